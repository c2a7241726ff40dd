#!/usr/bin/env bash
# ./setup.sh              make .venv and install requirements.txt
# ./setup.sh demo         that, then train, test and draw attention pictures on the built-in sample dataset, offline
# ./setup.sh test         that and requirements-test.txt, then lint and run the tests
# ./setup.sh serve        that and requirements-service.txt, then caption pictures over HTTP; further options are those of
#                         caption_service serve, such as --model_path best.pt; without one, the newest run in saved_models
# ./setup.sh flickr8k     make .venv, then download Flickr8k (or flickr30k, or coco); further options go to download_datasets.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

case "${1:-}" in
    "" | demo | test | serve | flickr8k | flickr30k | coco) ;;
    *) echo "setup.sh: error: unknown job '$1': give demo, test, serve, flickr8k, flickr30k, coco or nothing" >&2; exit 2 ;;
esac

new_enough() { command -v "$1" >/dev/null && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; }
too_old() {
    echo "setup.sh: error: Python 3.11 or newer is needed, $1: $2" >&2
    exit 1
}

if [ -x .venv/bin/python ]; then
    new_enough .venv/bin/python || too_old ".venv has $(.venv/bin/python -V 2>&1)" "remove .venv and start again"
elif command -v uv >/dev/null; then
    uv venv --quiet --python ">=3.11" .venv
else
    python=$(for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if new_enough "$name"; then echo "$name"; break; fi
    done)
    [ -n "$python" ] || too_old "python3 is $(python3 -V 2>/dev/null || echo missing)" \
        "install it, or uv (https://docs.astral.sh/uv), which brings one"
    "$python" -m venv .venv
fi
if ! command -v uv >/dev/null && [ ! -x .venv/bin/uv ]; then .venv/bin/python -m pip install --quiet uv; fi
uv=$(command -v uv || echo .venv/bin/uv)
requirements=(-r requirements.txt)
if [ "${1:-}" = test ]; then requirements+=(-r requirements-test.txt); fi
if [ "${1:-}" = serve ]; then requirements+=(-r requirements-service.txt); fi
echo "installing requirements.txt into .venv"
"$uv" pip install --quiet --python .venv "${requirements[@]}"
export PATH="$PWD/.venv/bin:$PATH"

case "${1:-}" in
    demo)
        python download_datasets.py --dataset sample
        echo "encoder: VGG-11 with random, untrained weights drawn from --seed 0, so nothing is downloaded."
        echo "         The drawn scenes are plain enough for them; photographs need --encoder_weights imagenet."
        python flickr_image_caption.py --dataset_type sample --decoder attention --attention adaptive --encoder vgg11 --encoder_weights random \
            --image_size 320 --embed_size 256 --hidden_size 256 --attention_dim 128 --num_layers 1 --drop_prob 0.5 --batch_size 64 \
            --learning_rate 0.003 --use_scheduler --scheduler_type one_cycle --warmup_epochs 2 --epochs 20 \
            --keep_checkpoints 1
        python flickr_image_caption.py --mode test --model_path saved_models/sample/vgg11_attention \
            --save_attention_viz --advanced_attention_viz
        run=$(ls -td saved_models/sample/vgg11_attention/*/ | head -1)
        echo "demo done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Everything is in $run:"
        echo "  best.pt                    the model: --mode caption --model_path ${run}best.pt --images PICTURE"
        echo "  attention_viz_sample_1.png where it looked, word by word (and advanced_...)"
        echo "  test_metrics.json          scores; test_captions.json has every caption"
        echo "  training_losses.png        curves; the pictures it saw are in data/sample/Images"
        ;;
    test)
        ruff check .
        ruff format --check .
        python -m pytest -q -rs "${@:2}"
        ;;
    serve) exec python -m caption_service "$@" ;;
    flickr8k | flickr30k | coco) python download_datasets.py --dataset "$@" ;;
    *) echo "ready: source .venv/bin/activate, then python flickr_image_caption.py --help" ;;
esac
