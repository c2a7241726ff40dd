"""The command line: what each flag changes, what is refused and how, full disks and streams.

A refusal is one line on stderr that names the flag or file and says what was expected, status 2,
and leaves nothing behind.
"""

import collections
import contextlib
import csv
import functools
import io
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from small_runs import one_caption_each
from specified_commands import DEFAULTS, RESUME_AND_TEST_COMMANDS, TRAINING_COMMANDS
from test_end_to_end import (
    ATTENTION,
    BEST_FILES,
    DECODERS,
    EPOCH_BLOCK,
    ON_SAMPLE,
    STEPS,
    TABLE,
    TINY,
    TINY_GPT2,
    listed,
    load,
    own_copy,
    program,
    read_json,
    replace_cider,
    replace_losses,
    run_dir,
    snapshot,
    succeed,
    train,
    warnings_in,
)  # fmt: skip

import attention_visualization
import caption_batches
import caption_options
import checkpoints
import download_datasets
import feature_cache
import flickr_image_caption as fic
import image_loading
import run_comparison
import run_output
import runtime
import self_critical
import tracking_backends
from self_critical import Reward
from split_data import open_dataset
from trained_models import open_checkpoint

PROGRAM = Path(fic.__file__)
CPU = runtime.Hardware(torch.device("cpu"), "float32")
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("shop")]


def refused(*flags, naming=()):
    """Assert that the program refuses: status 2, one line that names these texts, no file more or less."""
    before = snapshot()
    outcome = program(*flags)
    assert outcome.status == 2, outcome
    assert (
        outcome.err.startswith("flickr_image_caption.py: error: ") and outcome.err.count("\n") == 1
    ), outcome.err
    for text in naming:
        assert str(text) in outcome.err
    assert snapshot() == before


def failed(*flags, naming=()):
    """Assert that the program fails at work: status 1, one line that names these texts. Returns the outcome."""
    outcome = program(*flags)
    assert outcome.status == 1, outcome
    (line,) = [
        line
        for line in outcome.err.splitlines()
        if "every validation image got the same" not in line
    ]
    assert line.startswith("flickr_image_caption.py: error: ")
    for text in naming:
        assert text in line
    return outcome


# ------------------------------------------------------------------------------------------ what every flag changes


def chosen(*flags, tiny=TINY):
    """Options of a tiny training run."""
    return fic.parse_args([*tiny.split(), *" ".join(flags).split()])


def ready(*flags, tiny=TINY):
    """A training run before its first step."""
    options = chosen(*flags, tiny=tiny)
    with contextlib.redirect_stdout(io.StringIO()):
        return fic.set_up(options, runtime.resolve_hardware("cpu", options.run.precision))


def stepped(*flags, tiny=TINY):
    """(plain loss in nats per token, run) after one step on the first batch."""
    run = ready(*flags, tiny=tiny)
    batch, features = next(run.training.epoch(0))
    run.captioner.decoder.train()
    torch.manual_seed(7)
    nats = fic.train_step(run, features, batch)
    return float(nats) / batch.num_tokens, run


def weights(run):
    decoder = run.captioner.decoder
    return torch.cat([parameter.detach().flatten() for parameter in decoder.parameters()])


def rates(*flags, losses=(3.0, 2.0, 2.0, 2.0, 2.0)):
    """The learning rate of each epoch whose validation losses are given, from 0.01 on."""
    options = chosen("--use_scheduler", *flags)
    optimizer = torch.optim.AdamW(
        [torch.zeros(1, requires_grad=True)], lr=options.training.learning_rate
    )
    scheduler = fic.build_scheduler(
        optimizer, options, fic.make_plan(options, one_caption_each(STEPS))
    )
    plateau = options.schedule.scheduler_type == "reduce_lr_on_plateau"
    seen = []
    for loss in losses:
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*([loss] if plateau else []))
    return [round(rate, 7) for rate in seen]


def written(*flags, decoder="attention"):
    """Captions of the four test images, each image's a list of {caption, log_prob}, by caption mode."""
    shop = Path("data").resolve().parent
    images = [f"data/sample/Images/{name}" for name in listed("test")]
    out = succeed(
        "--mode caption --json --model_path",
        shop / decoder / "best.pt",
        *flags,
        "--images",
        *images,
    )
    return [json.loads(line)["captions"] for line in out.splitlines()]


def texts(*flags):
    """The best caption of each of the four test images."""
    return [captions[0]["caption"] for captions in written(*flags)]


def lengths(*flags):
    return [len(text.split()) for text in texts(*flags)]


def drawn(*flags, keyword="advanced"):
    """What test mode hands to the picture drawer as `keyword`, one per picture."""
    seen = []
    shop = Path("data").resolve().parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_visualization, "save_attention_viz",
                      lambda *_, **given: seen.append(given[keyword]))  # fmt: skip
        succeed(
            "--mode test --algorithm greedy --output_dir out --model_path",
            shop / "attention/best.pt",
            *flags,
        )
    return seen


def mode_chooses_what_runs():
    path, ran = Path("data").resolve().parent / "lstm/best.pt", []
    with pytest.MonkeyPatch.context() as patch:
        for mode in fic.MODES:
            patch.setitem(fic.MODES, mode, lambda *_, mode=mode: ran.append(mode) or 0)
        succeed("--mode test --model_path", path)
        succeed("--mode caption --images data/sample/Images --model_path", path)
        succeed("--mode train --epochs 1 --model_path", path)
    assert ran == ["test", "caption", "train"]


def preset_gives_what_is_not_typed():
    config = read_json(train("--preset laptop --decoder lstm") / "run_config.json")
    assert config["preset"] == "laptop" and config["label_smoothing"] == 0.1
    assert (config["batch_size"], config["decoder_type"], config["patch_dropout"]) == (
        40,
        "lstm",
        0,
    )


def model_path_chooses_the_model():
    assert written() != written(decoder="lstm")


def resume_goes_on():
    path = Path("data").resolve().parent / "lstm/model_epoch_4.pt"
    assert EPOCH_BLOCK.search(succeed("--epochs 1 --resume", path))[1] == "5"


def model_save_dir_holds_the_runs():
    assert train("--model_save_dir elsewhere").parts[:2] == ("elsewhere", "sample")


def device_is_taken_at_its_word():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        assert runtime.resolve_device("auto").type == "cuda"
        assert runtime.resolve_device("cpu").type == "cpu"
    assert read_json(train("--device cpu") / "run_config.json")["device"] == "cpu"


def seed_fixes_everything():
    runs = [stepped(f"--encoder_weights weights.pth --seed {seed}") for seed in (1, 1, 2)]
    same, again, other = (weights(run) for _, run in runs)
    assert torch.equal(same, again) and not torch.equal(same, other)
    orders = [next(run.training.epoch(0))[0].image_rows.tolist() for _, run in runs]
    assert orders[0] == orders[1] != orders[2]
    drawn_encoders = [
        download_datasets.load_encoder_weights("shufflenet_v2_x0_5", "random", seed)["fc.bias"]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(*drawn_encoders[:2]) and not torch.equal(*drawn_encoders[1:])


def threads_compute():
    threads = torch.get_num_threads()
    config = read_json(train("--threads 2") / "run_config.json")
    assert torch.get_num_threads() == config["threads"] == config["environment"]["threads"] == 2
    torch.set_num_threads(threads)
    refused(TINY, "--threads none", naming=["--threads", "invalid auto or whole number value"])
    refused(TINY, "--threads 0", naming=["--threads", "at least 1"])


def num_workers_decode():
    asked, original = [], feature_cache.cached_features

    def cached_features(*args, **kwargs):
        asked.append(kwargs["num_workers"])
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_cache, "cached_features", cached_features)
        ready("--num_workers 3")
    assert asked == [3, 3]  # training and validation images


def dataset_type_names_the_folder():
    assert open_dataset(chosen()).image_dir == Path("data/sample/Images")
    refused(
        "--dataset_type flickr8k",
        naming=["flickr8k", "python download_datasets.py --dataset flickr8k"],
    )


def image_dir_and_captions_file_replace_the_default():
    dataset = open_dataset(chosen(own_copy()))
    assert dataset.image_dir == Path("data_copy/Images") and dataset.captions_file == Path(
        "data_copy/captions.txt"
    )


def data_dir_replaces_the_default_folder():
    own_copy()
    for name in ("sample", "custom"):
        dataset = open_dataset(chosen(f"--dataset_type {name} --data_dir data_copy"))
        assert dataset.image_dir == Path("data_copy/Images")
        assert dataset.captions_file == Path("data_copy/captions.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_DIR", "data_copy")
        assert open_dataset(chosen()).image_dir == Path("data_copy/Images")
    typed = open_dataset(chosen("--data_dir data_copy --image_dir data/sample/Images"))
    assert typed.image_dir == Path("data/sample/Images")
    assert typed.captions_file == Path("data_copy/captions.txt")
    refused(TINY, "--data_dir nowhere", naming=["nowhere: no image folder (looked for Images"])


def split_seed_draws_the_split():
    flags = own_copy()
    for path in Path("data_copy").glob("sample.*.txt"):
        path.unlink()
    one, same, other = (
        open_dataset(chosen(flags, f"--split_seed {n}")).split_names() for n in (1, 1, 2)
    )
    assert one == same != other


def split_ratios_share_the_images_out():
    flags = own_copy()
    for path in Path("data_copy").glob("sample.*.txt"):
        path.unlink()
    names = open_dataset(chosen(flags, "--split_ratios 0.5 0.25 0.25")).split_names()
    assert [len(names[split]) for split in ("train", "val", "test")] == [20, 10, 10]


def config_gives_what_is_not_typed():
    Path("exp.yaml").write_text("grad_clip: 3\nhidden_dim: 24\n")
    options = fic.parse_args(["--config", "exp.yaml", "--hidden_size", "8"])
    assert (options.training.grad_clip, options.model.hidden_size) == (3, 8)


def freq_threshold_leaves_rare_words_out():
    kept = set(ready("--freq_threshold 20").captioner.vocabulary.words[4:])
    counts, training = collections.Counter(), set(listed("train"))
    with Path("data/sample/captions.txt").open() as file:
        for row in csv.DictReader(file):
            if row["image"] in training:
                counts.update(caption_batches.tokenize(row["caption"]))
    assert kept == {word for word, count in counts.items() if count >= 20} != set(counts)


def max_bad_fraction_bounds_what_is_skipped():
    flags = own_copy()
    Path("data_copy/Images", listed("train")[0]).unlink()
    assert len(open_dataset(chosen(flags, "--max_bad_fraction 0.025")).table) == 39
    with pytest.raises(ValueError, match=r"--max_bad_fraction 0\.024"):
        open_dataset(chosen(flags, "--max_bad_fraction 0.024"))


def max_train_images_leaves_the_rest_out():
    counts = open_dataset(chosen("--max_train_images 7")).table.split.value_counts()
    assert counts.to_dict() == {"train": 7, "val": 4, "test": 4}


def max_val_images_leaves_the_rest_out():
    counts = open_dataset(chosen("--max_val_images 3")).table.split.value_counts()
    assert counts.to_dict() == {"train": 32, "val": 3, "test": 4}
    run = ready("--max_val_images 3")
    assert len(run.validation.table) == len(run.splits["val"]) == 3


def encoder_is_built_by_name():
    assert fic.open_encoder(chosen(), CPU).channels == 1024
    assert fic.open_encoder(chosen("--encoder squeezenet1_1"), CPU).channels == 512


def encoder_weights_come_from_the_file(flag="--encoder_weights"):
    state = download_datasets.load_encoder_weights("shufflenet_v2_x0_5", "random", 5)
    torch.save(state, "own.pth")
    own, other = (
        fic.open_encoder(chosen(flags), CPU).trunk.conv1[0].weight
        for flags in (f"{flag} own.pth", "")
    )
    assert torch.equal(own, state["conv1.0.weight"])
    assert not torch.equal(other, state["conv1.0.weight"])


def clip_model_is_the_folder_of_the_encoder():
    hub = pytest.importorskip("test_hub_encoders")  # skips without requirements-hub.txt
    Path("dino").mkdir()
    hub.save_folder("dino", "dinov2")
    encoder = ready("--encoder clip --encoder_weights imagenet --clip_model dino").captioner.encoder
    assert encoder.key()["configuration"]["vision"]["model_type"] == "dinov2"


def clip_score_judges_the_captions():
    clip = pytest.importorskip("test_clip_score")  # skips without requirements-hub.txt
    Path("judge").mkdir()
    clip.save_clip("judge")
    lstm = Path("data").resolve().parent / "lstm/best.pt"
    table = succeed("--mode test --clip_score judge --output_dir out --model_path", lstm)
    scores, rows = read_json("out/test_metrics.json"), read_json("out/test_captions.json")
    for name in ("CLIPScore", "RefCLIPScore"):
        assert f"  {name:17}{scores[name]:.4g}\n" in table
        mean = sum(row[name] for row in rows) / len(rows)
        assert scores[name] == pytest.approx(mean, abs=1e-6) and mean > 0


def image_size_is_what_the_encoder_sees():
    run = ready(ATTENTION, "--image_size 96")
    assert run.captioner.encoder.image_size == 96 and run.captioner.encoder.grid == [3, 3]
    assert next(run.training.features.stream([[0]])).shape == (1, 9, 1024)
    pictures = "--save_attention_viz --attention_viz_samples 1"
    best = train(ATTENTION, "--image_size 96", pictures) / "best.pt"
    assert load(best)["encoder"]["image_size"] == 96 and load(best)["encoder"]["grid"] == [3, 3]
    picture = f"data/sample/Images/{listed('test')[0]}"
    for mode in (
        f"--mode test {pictures}",
        f"--mode caption --images {picture} --save_attention_viz",
    ):
        succeed(mode, "--output_dir out --model_path", best)
        with np.load(next(Path("out").glob("attention_maps_*.npz"))) as drawn:
            assert drawn["maps"].shape[1:] == (3, 3)
        shutil.rmtree("out")
    refused(
        "--mode test --image_size 64 --model_path", best, naming=["--image_size 64 (stored: 96)"]
    )
    own = Path("data").resolve().parent / "lstm/best.pt"  # trained with the encoder's own size
    succeed("--mode test --image_size 224 --output_dir out --model_path", own)


def coarse_size_lays_a_second_look_under_the_first():
    run = ready(ATTENTION, "--image_size 96 --coarse_size 64")
    encoder = run.captioner.encoder
    pixels = image_loading.load_image(run.training.features.paths[0], 96)
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    fine, coarse = encoder(image).unflatten(2, (2, 1024)).unbind(2)
    assert encoder.grid == [3, 3] and fine.shape == (1, 9, 1024)
    torch.testing.assert_close(fine, ready("--image_size 96").captioner.encoder(image))
    smaller = F.interpolate(image.float(), size=(64, 64), mode="bilinear", antialias=True)
    grid = ready("--image_size 64").captioner.encoder(smaller)
    grid = grid.transpose(1, 2).unflatten(2, (2, 2))
    expected = F.interpolate(grid, size=(3, 3), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(coarse, expected, rtol=2e-2, atol=2e-2 * float(expected.std()))
    best = train("--image_size 96 --coarse_size 64") / "best.pt"
    assert load(best)["encoder"]["channels"] == 2048
    succeed("--mode test --output_dir out --model_path", best)
    for flags, size in (("--image_size 96 --coarse_size 96", 96), ("--coarse_size 256", 224)):
        refused(TINY, flags, naming=[f"must be below the image size, {size} (--image_size)"])
    refused(
        "--mode test --coarse_size 32 --model_path", best, naming=["--coarse_size 32 (stored: 64)"]
    )


def cache_dir_holds_the_features():
    ready("--cache_dir elsewhere --max_train_images 2")
    (file,) = Path("elsewhere").glob("*/features.*")
    assert file.stat().st_size == 6 * 1024 * 4  # 2 + 4 images, float32: the LSTM's means
    ready(ATTENTION, "--cache_dir elsewhere --max_train_images 2")
    sizes = sorted(file.stat().st_size for file in Path("elsewhere").glob("*/features.*"))
    assert sizes[1] == 6 * 49 * 1024 * 2


def cache_dtype_is_what_the_disk_holds():
    for name, file, bytes_each in (("float16", "features.f16", 2), ("float32", "features.f32", 4)):
        run = ready(ATTENTION, f"--cache_dir elsewhere --cache_dtype {name}")
        (file,) = Path("elsewhere").glob(f"*/{file}")
        assert file.stat().st_size == 36 * 49 * 1024 * bytes_each  # training and validation images
        features = run.training.features
        assert features.features[[0]].dtype == getattr(torch, name)
        assert next(features.stream([[0]])).dtype == torch.float32
    best = train(ATTENTION, "--cache_dir elsewhere --cache_dtype float32") / "best.pt"
    assert load(best)["config"]["cache_dtype"] == "float32"
    test = "--mode test --precision float32 --output_dir out --cache_dir elsewhere --model_path"
    succeed(test, best)
    (file,) = Path("elsewhere").glob("*/features.f32")
    assert file.stat().st_size == 40 * 49 * 1024 * 4
    succeed("--mode caption --images data/sample/Images --model_path", best)


def encode_batch_size_bounds_what_is_computed_together():
    """When the decoder is calibrated, in training, validation, test and caption mode, with and without a cache."""

    def largest_batch(*flags):
        """Of the images that reach the encoder's convolutions."""
        sizes = []

        def note(module, inputs):
            if isinstance(module, torch.nn.Conv2d):
                sizes.append(len(inputs[0]))

        hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
        try:
            succeed(*flags)
        finally:
            hook.remove()
        return max(sizes)

    shop, ours = Path("data").resolve().parent, "--encode_batch_size 3"
    assert largest_batch(TINY, "--no_feature_cache") == 8  # of 32 to calibrate with
    assert largest_batch(TINY, "--no_feature_cache", ours) == 3
    assert largest_batch(TINY, "--cache_dir elsewhere", ours) == 3
    uncached = "--mode test --no_feature_cache --split train --algorithm greedy --output_dir out"
    assert largest_batch(uncached, ours, "--model_path", shop / "lstm/best.pt") == 3
    pictures = "--mode caption --images data/sample/Images --algorithm greedy"
    assert largest_batch(pictures, ours, "--model_path", shop / "lstm/best.pt") == 3


def no_feature_cache_stores_nothing():
    Path("feature_cache").unlink()  # the link to the workshop's
    run = ready("--no_feature_cache --max_train_images 2")
    assert run.training.features.features is None
    Path("feature_cache").write_text("a file: no folder could be made here")
    best = train("--no_feature_cache --max_train_images 2") / "best.pt"
    succeed("--mode test --no_feature_cache --model_path", best)
    assert Path("feature_cache").is_file()


def horizontal_flip_mirrors_half_of_the_training_images_anew_each_epoch():
    run = ready(ATTENTION, "--horizontal_flip")
    source, batches = run.training.features, run.training.batches
    mirror, rows = batches.mirrored(0), torch.arange(len(source.paths))
    assert 0 < mirror.sum() < len(rows) and torch.equal(mirror, batches.mirrored(0))
    assert not torch.equal(mirror, batches.mirrored(1))
    plain, seen = (next(source.stream([rows], coins)) for coins in (None, mirror))
    assert torch.equal((plain != seen).flatten(1).any(1), mirror)
    pixels = image_loading.load_image(source.paths[int(mirror.int().argmax())], 224)
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    flipped = run.captioner.encoder(image.flip(-1))[0]
    torch.testing.assert_close(seen[mirror][0], flipped, rtol=2e-2, atol=1e-3)
    uncached = ready(ATTENTION, "--horizontal_flip --no_feature_cache").training.features
    torch.testing.assert_close(next(uncached.stream([rows], mirror)), seen, rtol=2e-2, atol=1e-3)
    one, other = (
        load(train(flags) / "best.pt")["history"][0] for flags in ("", "--horizontal_flip")
    )
    assert one["train_loss"] != other["train_loss"]


def random_crop_shows_another_part_of_each_image_in_each_epoch():
    """Past the cache, of training images alone, and once the encoder learns."""
    run = ready(ATTENTION, "--fine_tune_encoder 2 --fine_tune_after 1 --random_crop --epochs 3")
    source, batches, encoder = run.training.features, run.training.batches, run.captioner.encoder
    rows, boxes = torch.arange(3), batches.crops(1)
    seen = next(source.stream([rows], None, boxes))
    assert torch.equal(boxes, batches.crops(1)) and not torch.equal(boxes, batches.crops(2))
    for row, cropped in zip(rows.tolist(), seen, strict=True):
        left, top, width, height = boxes[row].tolist()
        with Image.open(source.paths[row]) as image:
            across, down = image.size
            part = (left * across, top * down, (left + width) * across, (top + height) * down)
            pixels = image.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR, box=part)
        image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
        torch.testing.assert_close(cropped, encoder.stem(image)[0], rtol=1e-3, atol=1e-3)
    assert not torch.equal(seen, next(source.stream([rows])))
    asked = []
    stream = source.stream
    source.stream = lambda rows, mirror=None, crops=None: (
        asked.append(crops) or stream(rows, mirror, crops)
    )
    with contextlib.redirect_stdout(io.StringIO()):
        for epoch in (0, 1):
            run.state.loop["epoch"] = epoch
            fic.begin_epoch(run)
    assert asked[0] is None and torch.equal(asked[1], batches.crops(1))


def decoder_is_built_by_name():
    assert isinstance(ready("--decoder lstm").captioner.decoder, fic.LSTMDecoder)
    assert isinstance(ready("--decoder attention").captioner.decoder, fic.AttentionDecoder)
    assert isinstance(ready(tiny=TINY_GPT2).captioner.decoder, fic.GPT2Decoder)


def sizes_reach_the_decoders():
    for flags in ("--decoder lstm", "--decoder attention --attention_dim 7"):
        decoder = ready(flags, "--embed_size 5 --hidden_size 6").captioner.decoder
        assert decoder.embed.embedding_dim == 5 and decoder.head.in_features == 6
    assert decoder.attention.project_keys.out_features == 7


def attention_is_of_the_kind_that_is_named():
    kinds = {
        "additive": fic.AttentionDecoder, "multi_head": fic.MultiHeadDecoder,
        "adaptive": fic.AdaptiveDecoder,
    }  # fmt: skip
    for name, kind in kinds.items():
        assert type(ready(ATTENTION, f"--attention {name}").captioner.decoder) is kind


def attention_heads_look_each_at_a_part_of_the_features():
    for kind, heads in itertools.product(("multi_head", "adaptive"), (1, 2, 8)):
        decoder = ready(DECODERS[kind], f"--attention_heads {heads}").captioner.decoder
        (keys, _), _ = decoder.start(torch.zeros(3, 4, 1024))
        assert keys.shape == (3, heads, 4, 8 // heads)


def tiny_gpt2(folder="gpt2"):
    """The folder of a GPT-2 as small as can be, with a tokenizer of its own."""
    import tokenizers
    import transformers

    Path(folder).mkdir(exist_ok=True)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["a red circle"], special_tokens=["<|endoftext|>"])
    tokenizer.save_model(folder)
    size = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": tokenizer.get_vocab_size()}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)).save_pretrained(folder)
    return folder


def gpt2_begins_as_named_and_reads_its_tokens():
    words, sizes = ready(tiny=TINY_GPT2).captioner, "--gpt2_layers 2 --gpt2_width 12 --gpt2_heads 3"
    other = ready(sizes, tiny=TINY_GPT2).captioner.decoder
    for decoder, expected in ((words.decoder, (1, 16, 1)), (other, (2, 12, 3))):
        config = decoder.gpt2.config
        assert (config.n_layer, config.n_embd, config.n_head) == expected
    assert isinstance(words.vocabulary, caption_batches.Vocabulary)
    folder = tiny_gpt2()
    with pytest.MonkeyPatch.context() as patch:
        returned = []
        patch.setattr(fic, "MANY_WORDS", len(words.vocabulary))
        patch.setattr(fic, "return_freed_memory", lambda: returned.append(True))
        tokens = ready(f"--gpt2_tokenizer {folder}", tiny=TINY_GPT2).captioner
    assert len(tokens.vocabulary) > len(words.vocabulary) and returned == [True]
    assert isinstance(tokens.vocabulary, caption_batches.SubwordVocabulary)
    assert tokens.decoder.gpt2.config.n_embd == 16
    named = ready(f"--decoder gpt2 --gpt2_model {folder}", tiny=ON_SAMPLE).captioner
    published = named.decoder.gpt2.from_pretrained(folder).transformer.wte.weight
    assert torch.equal(named.decoder.gpt2.transformer.wte.weight, published)
    best = train(f"--decoder gpt2 --gpt2_model {folder}", tiny=ON_SAMPLE) / "best.pt"
    shutil.rmtree(folder)  # a checkpoint needs it no more
    pictures = ["--images", f"data/sample/Images/{listed('test')[0]}"]
    assert succeed("--mode caption --model_path", best, *pictures).count("\n") == 1


def prefix_length_is_how_many_words_the_picture_becomes():
    for length in (2, 5):
        decoder = ready(f"--prefix_length {length}", tiny=TINY_GPT2).captioner.decoder
        _, ((keys, _),) = decoder.start(torch.zeros(3, 1, 1024))
        assert keys.shape[3] == length


def attention_layer_chooses_whose_maps_are_shown():
    folder = train("--gpt2_layers 2", tiny=TINY_GPT2)
    drawn = f"--save_attention_viz --advanced_attention_viz --attention_viz_samples 1 --model_path {folder / 'best.pt'}"
    found = []
    for layer in (0, 1, 2):
        succeed(f"--mode test --attention_layer {layer} --output_dir out{layer}", drawn)
        with np.load(f"out{layer}/attention_maps_sample_1.npz") as arrays:
            found.append(arrays["maps"])
    mean = (found[1].astype(float) + found[2]) / 2
    assert np.allclose(found[0], mean, atol=1e-3) and not np.allclose(found[1], found[2])


def trainable_leaves_the_rest_of_gpt2_as_it_was():
    folder = tiny_gpt2()
    for name, moves in (("cross", set()), ("decoder", {"attn"}), ("all", {"attn", "wte"})):
        flags = f"--decoder gpt2 --gpt2_model {folder} --trainable {name}"
        _, run = stepped(flags, tiny=ON_SAMPLE)
        model = run.captioner.decoder.gpt2
        before = model.from_pretrained(folder).transformer
        after = {"attn": model.transformer.h[0].attn.c_attn, "wte": model.transformer.wte}
        first = {"attn": before.h[0].attn.c_attn, "wte": before.wte}
        moved = {key for key in after if not torch.equal(after[key].weight, first[key].weight)}
        assert moved == moves


def gradient_accumulation_and_checkpointing_make_the_same_step():
    kinds = [f"{TINY} {decoder}" for decoder in DECODERS.values()]
    for tiny in (*kinds, TINY_GPT2):
        (nats, plain), (in_parts, other) = (
            stepped("--drop_prob 0 --grad_clip 0", more, tiny=tiny)
            for more in ("", "--gradient_accumulation_steps 3")
        )
        assert in_parts == pytest.approx(nats, rel=1e-5)
        for name, tensor in gradients_of(plain).items():
            torch.testing.assert_close(
                gradients_of(other)[name], tensor, rtol=1e-3, atol=1e-5 * float(tensor.abs().max())
            )
    (nats, _), (again, run) = (
        stepped("--drop_prob 0", more, tiny=TINY_GPT2) for more in ("", "--gradient_checkpointing")
    )
    assert again == nats and run.captioner.decoder.gpt2.transformer.gradient_checkpointing


def gradients_of(run):
    """{name: gradient} of the step that was made last."""
    return {name: p.grad for name, p in run.captioner.decoder.named_parameters()}


def num_layers_are_built_by_every_decoder():
    for name, flags in DECODERS.items():
        one, two = (ready(flags, f"--num_layers {n}") for n in (1, 2))
        extra = 4 * 16 * (16 + 16) + 4 * 16  # the second LSTM's weights and bias
        extra += (
            2 * (1024 + 1) * 16 if name != "lstm" else 0
        )  # its first state, from the mean feature
        extra += 4 * 16 if name in ("lstm", "adaptive") else 0  # torch's second bias
        assert len(weights(two)) - len(weights(one)) == extra


def drop_prob_drops_in_every_decoder():
    for flags in DECODERS.values():
        losses = [stepped(flags, f"--drop_prob {p}")[0] for p in (0, 0, 0.6)]
        assert losses[0] == losses[1] != losses[2]


def recurrent_dropout_drops_in_every_decoder():
    for flags in DECODERS.values():
        losses = [stepped(flags, f"--drop_prob 0 --recurrent_dropout {p}")[0] for p in (0, 0, 0.6)]
        assert losses[0] == losses[1] != losses[2]


def patch_dropout_leaves_cells_out_in_training_only():
    losses = [
        stepped(ATTENTION, f"--drop_prob 0 --patch_dropout {share}")[0] for share in (0, 0.5, 0.99)
    ]
    assert len(set(losses)) == 3
    decoder = ready(ATTENTION, "--drop_prob 0 --patch_dropout 0.5").captioner.decoder
    grids = torch.randn(2, 49, 1024)
    two_images = caption_batches.CaptionBatches([[[4, 5]] * 2] * 2, 4, 9, seed=0)
    (batch,) = two_images.epoch(0, shuffle=False)
    first, again = (decoder.train()(grids, batch)[1] for _ in range(2))
    assert first.shape == (12, 24) and not torch.equal(first, again)
    torch.testing.assert_close(first.sum(-1), torch.ones(12))
    of_caption = [first[batch.caption_index == number] for number in range(4)]
    assert batch.image_index.tolist() == [0, 0, 1, 1]  # whose captions see the same cells
    torch.testing.assert_close(of_caption[0], of_caption[1])
    torch.testing.assert_close(of_caption[2], of_caption[3])
    assert not torch.allclose(of_caption[0], of_caption[2])
    for kept, image in zip(fic.drop_patches(grids, 0.5), grids, strict=True):
        assert len(kept.unique(dim=0)) == 24
        assert all((cell == image).all(-1).any() for cell in kept)
    assert decoder.eval()(grids, batch)[1].shape == (12, 49)


def alpha_c_weighs_the_attention_penalty():
    (plain, without), (same, with_penalty) = (stepped(ATTENTION, f"--alpha_c {a}") for a in (0, 9))
    assert plain == same and not torch.equal(weights(without), weights(with_penalty))


def epochs_are_trained():
    assert len(EPOCH_BLOCK.findall(succeed(TINY, "--epochs 3"))) == 3


def batch_size_counts_captions():
    counts = [ready(f"--batch_size {n}").training.batches.num_batches for n in (40, 160, 7)]
    assert counts == [STEPS, 1, 23]


def learning_rate_is_adams():
    """Its first update of a parameter is the rate, whatever the gradient."""
    before = weights(ready())
    for rate in (0.01, 0.0001):
        update = weights(stepped(f"--learning_rate {rate}")[1]) - before
        assert update.abs().max() == pytest.approx(rate, rel=0.01)


def weight_decay_shrinks_matrices_but_not_embeddings_or_biases():
    for flags in DECODERS.values():
        first = ready(flags).captioner.decoder
        plain, decayed = (
            stepped(flags, f"--weight_decay {decay}")[1].captioner.decoder for decay in (0, 10)
        )
        for name, parameter in decayed.named_parameters():
            textbook = plain.get_parameter(name)
            if parameter.ndim < 2 or name == "embed.weight":
                assert torch.equal(parameter, textbook)
            else:
                shrunk = 0.01 * 10 * first.get_parameter(name)
                torch.testing.assert_close(textbook - parameter, shrunk, rtol=1e-3, atol=1e-6)


def scst_options_reach_the_reward():
    """The rate is that of the last epochs alone; each image gets so many samples; BLEU is mixed in."""
    flags = "--epochs 0 --scst_epochs 2"
    row = load(train(flags, "--scst_learning_rate 0.0003") / "model_epoch_2.pt")["history"][1]
    assert row["learning_rate"] == 0.0003 and 0 <= row["train_reward"] <= 10
    run = ready("--scst_epochs 2 --scst_samples 3 --scst_bleu_weight 0.25")
    assert (run.state.plan["epochs"], run.state.plan["reward_epochs"]) == (3, 2)
    objective, (batch, features) = run.objectives["reward"], next(run.training.epoch(0))
    drawn = objective.draw(run.captioner.decoder.eval(), features)
    captions = [[hypothesis.tokens for hypothesis in image] for image in drawn]
    assert len(captions) == len(batch.image_rows) and {len(image) for image in captions} == {3}
    reward, references = objective.reward, self_critical.training_references(run.training.batches)
    plain, bleu = (Reward(*references, reward.orders[0].base, w) for w in (0.0, 1.0))
    mixed = 0.75 * plain(batch.image_rows, captions) + 0.25 * bleu(batch.image_rows, captions)
    torch.testing.assert_close(reward(batch.image_rows, captions), mixed)
    assert stepped(flags)[1].state.stage == "reward" and "reward" not in ready().objectives
    for name in ("scst_learning_rate 0.1", "scst_samples 3", "scst_bleu_weight 0.1"):
        refused(TINY, f"--{name}", naming=[f"--{name.split()[0]} needs --scst_epochs"])
    refused(TINY, "--epochs 0", naming=["--epochs 0", "--scst_epochs"])
    refused(TINY, flags, "--use_scheduler", naming=["--use_scheduler", "--epochs 0"])
    assert chosen("--preset laptop", flags).schedule.use_scheduler is False


def label_smoothing_changes_the_update_but_not_the_plain_loss():
    (plain, sharp), (same, smooth) = (stepped(f"--label_smoothing {share}") for share in (0, 0.3))
    assert plain == same and not torch.equal(weights(sharp), weights(smooth))


def grad_clip_bounds_the_gradient():
    def norm(run):
        moments = [state["exp_avg"].flatten() for state in run.state.optimizer.state.values()]
        return float(torch.cat(moments).norm())

    free, clipped, loose = (norm(stepped(f"--grad_clip {limit}")[1]) for limit in (0, 0.01, 1000))
    assert clipped == pytest.approx(0.1 * 0.01, rel=1e-3)  # Adam keeps a tenth
    assert free == loose > 2 * clipped


def precision_is_computed_in():
    refused(TINY, "--precision float16", naming=["--precision float16 is for GPUs"])
    assert runtime.resolve_precision("float16", torch.device("cuda")) == "float16"
    for name in ("float32", "bfloat16"):
        with runtime.resolve_hardware("cpu", name).autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == getattr(torch, name)
        loss, run = stepped(f"--precision {name}")
        assert loss == pytest.approx(4, abs=0.3) and not run.state.scaler.is_enabled()
    half = runtime.Hardware(torch.device("cpu"), "float16")  # as a GPU would take it
    assert fic.set_up(chosen(ATTENTION), half).state.scaler.is_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert runtime.resolve_precision("auto", torch.device("cuda")) == "float16"
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert runtime.resolve_precision("auto", torch.device("cuda")) == "bfloat16"
    taken = runtime.resolve_precision("auto", torch.device("cpu"))
    assert read_json(train("--precision auto") / "run_config.json")["precision"] == taken != "auto"


def early_stopping_patience_ends_the_run():
    with pytest.MonkeyPatch.context() as patch:
        replace_cider(patch, itertools.repeat(0.5))
        out = succeed(TINY, "--epochs 6 --early_stopping_patience 2")
    assert len(EPOCH_BLOCK.findall(out)) == 3


def debug_candidates_are_the_words_of_each_step():
    """Captions are caption mode's; a picture that is none is named, and the rest goes on."""
    path, picture = (
        Path("data").resolve().parent / "attention/best.pt",
        f"data/sample/Images/{listed('test')[0]}",
    )
    Path("broken.jpg").write_bytes(b"no picture")
    for count in (1, 4):
        outcome = program(f"--mode debug --images broken.jpg {picture} --output_dir out --debug_candidates {count}",
            "--temperature 0.5 --viz_format svg --model_path", path)  # fmt: skip
        assert outcome.status == 1 and outcome.err.count("\n") == 1 and "broken.jpg" in outcome.err
        first = next(line for line in outcome.out.splitlines() if line.split()[:1] == ["1"])
        candidates = first[outcome.out.splitlines()[2].index("candidates") :].split("  ")
        assert len(candidates) == count
    assert [file.name for file in Path("out").iterdir()] == [
        f"{Path(picture).stem}_search_tree.svg"
    ]
    for algorithm in ("greedy", "beam", "full_beam", "sample"):
        narrow = "--temperature 0.5" if algorithm == "sample" else ""
        out = succeed(
            f"--mode caption --algorithm {algorithm} {narrow} --images {picture} --model_path", path
        )
        assert f": {out.strip().split(chr(9))[1]} (log probability" in outcome.out
    for flags, said in (
        ("--algorithm greedy", "--algorithm belongs to --mode"),
        ("", "needs --images"),
    ):
        images = f"--images {picture}" if flags else ""
        refused("--mode debug --model_path", path, images, flags, naming=[said])


def select_by_chooses_the_best_epoch():
    for flags, epoch in (("", 1), ("--select_by loss", 2)):
        with pytest.MonkeyPatch.context() as patch:
            replace_cider(patch, iter([0.9, 0.1]))
            replace_losses(patch, [3.0, 2.0])
            assert load(train("--epochs 2", flags) / "best.pt")["epoch"] == epoch


def val_beam_size_reaches_the_search():
    asked, original = [], fic.generate

    def generate(*args, **kwargs):
        asked.append(kwargs["beam_size"])
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fic, "generate", generate)
        train("--val_beam_size 3")
        train()
    assert asked[::2] == [3, 1]  # the others are the report's, which searches as test mode will


def keep_checkpoints_deletes_older_ones():
    kept = {path.name for path in train("--epochs 3 --keep_checkpoints 2").glob("*.pt")}
    assert kept == {"model_epoch_2.pt", "model_epoch_3.pt", *BEST_FILES}


def use_scheduler_schedules():
    assert ready().state.scheduler is None
    scheduler = ready("--use_scheduler").state.scheduler
    assert isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)


def scheduler_type_chooses():
    names = {"step": "StepLR", "cosine": "CosineAnnealingLR", "exponential": "ExponentialLR",
             "one_cycle": "OneCycleLR", "reduce_lr_on_plateau": "ReduceLROnPlateau"}  # fmt: skip
    assert names.keys() == caption_options.SCHEDULES.keys()
    for kind, name in names.items():
        run = ready(f"--use_scheduler --scheduler_type {kind}")
        assert type(run.state.scheduler).__name__ == name
        assert run_output.describe_scheduler(run.options, run.state.plan).startswith(name)


def plateau_options_count():
    plateau = "--scheduler_type reduce_lr_on_plateau"
    for patience, factor, expected in (
        (0, 0.5, [0.01, 0.01, 0.01, 0.005, 0.0025]),
        (0, 0.1, [0.01, 0.01, 0.01, 0.001, 0.0001]),
        (1, 0.5, [0.01, 0.01, 0.01, 0.01, 0.005]),
    ):
        flags = f"--scheduler_patience {patience} --scheduler_factor {factor}"
        assert rates(plateau, flags) == expected


def step_options_count():
    step = "--scheduler_type step --scheduler_step_size"
    assert rates(step, "2") == [0.01, 0.01, 0.001, 0.001, 0.0001]
    assert rates(step, "3") == [0.01, 0.01, 0.01, 0.001, 0.001]
    assert rates(step, "3 --scheduler_gamma 0.5")[-1] == 0.005
    halved = [0.01, 0.005, 0.0025, 0.00125, 0.000625]
    assert rates("--scheduler_type exponential --scheduler_gamma 0.5") == halved


def t_max_is_where_the_cosine_is_lowest():
    assert rates("--scheduler_type cosine --scheduler_t_max 4")[-1] == 1e-7
    assert rates("--scheduler_type cosine --scheduler_t_max 2")[2] == 1e-7


def min_lr_is_the_lowest_rate():
    assert rates("--scheduler_type cosine --scheduler_t_max 4 --min_lr 0.002")[-1] == 0.002
    plateau = "--scheduler_type reduce_lr_on_plateau --scheduler_patience 0 --scheduler_factor 0.1"
    assert rates(plateau, "--min_lr 0.002")[-1] == 0.002


def warmup_epochs_of_rising_rate():
    for warm in (1, 2):
        folder = train(
            f"--epochs 4 --use_scheduler --scheduler_type one_cycle --warmup_epochs {warm}"
        )
        found = read_json(folder / "loss_curve.json")["learning_rates"]
        assert found.index(max(found)) == warm


def ensemble_writes_with_all_its_members():
    shop = Path("data").resolve().parent
    members = [shop / "lstm/best.pt", shop / "lstm/model_epoch_4.pt"]
    alone, together = written(), written("--ensemble", *members)
    assert [image[0]["log_prob"] for image in together] != [image[0]["log_prob"] for image in alone]
    test = f"--mode test --output_dir out --model_path {shop / 'attention/best.pt'}"
    succeed(test, "--save_attention_viz --attention_viz_samples 1 --ensemble", *members)
    assert read_json("out/test_metrics.json")["ensemble"] == [str(path) for path in members]
    first = read_json("out/test_captions.json")[0]
    assert first["caption"] == together[0][0]["caption"]  # of float16 features, from the cache
    assert first["log_prob"] == pytest.approx(together[0][0]["log_prob"], abs=0.05)
    refused(
        "--ensemble", members[0], naming=["--ensemble belongs to --mode test, caption and debug"]
    )
    succeed(
        test, "--ensemble", shop / "lstm"
    )  # a folder of runs: the file that it means now is what counts
    assert read_json("out/test_metrics.json")["ensemble"] == [str(members[0])]
    for part in (
        {"encoder__image_size": torch.tensor([1, 2])},
        {"encoder": {}},
        {"config__hidden_size": 17},
    ):
        changed(members[0], **part)
        refused(test, "--ensemble bad.pt", naming=["bad.pt"])
    for flags, part in (("--freq_threshold 9", "vocabulary"), ("--image_size 64", "image size"),
                        ("--seed 1", "encoder"), ("--max_train_images 20", "split")):  # fmt: skip
        odd = train(flags) / "best.pt"
        refused(test, "--ensemble", odd, naming=[f"--ensemble {odd}: has another {part} than"])


def algorithm_chooses_the_search():
    assert written("--algorithm greedy") == written("--algorithm beam --beam_size 1")
    full = written("--algorithm full_beam --beam_size 2 --length_penalty 5")
    assert full != written("--algorithm beam --beam_size 2 --length_penalty 5")
    samples = [texts(f"--algorithm sample --seed {seed}") for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]


def beam_size_widens_the_search():
    narrow, wide = (
        [captions[0]["log_prob"] for captions in written(f"--beam_size {n} --min_length 9")]
        for n in (1, 8)
    )
    assert sum(wide) > sum(narrow)


def max_length_cuts():
    assert max(lengths("--max_length 2")) <= 2 < max(lengths("--min_length 3"))


def min_length_holds_eos_back():
    drawn = "--algorithm sample --temperature 2"
    assert min(lengths(f"{drawn} --min_length 9")) >= 9 > min(lengths(drawn))


def length_penalty_favours_long_captions():
    shop = Path("data").resolve().parent
    images = [f"data/sample/Images/{name}" for name in listed("train")]

    def words(penalty):
        flags = f"--mode caption --json --beam_size 10 --max_length 40 --length_penalty {penalty} --model_path"
        out = succeed(flags, shop / "lstm/best.pt", "--images", *images)
        return sum(
            len(json.loads(line)["captions"][0]["caption"].split()) for line in out.splitlines()
        )

    assert words(10) > words(-10)


def no_repeat_ngram_size_forbids_repeats():
    repeats = [len(text.split()) - len(set(text.split())) for text in texts("--min_length 10")]
    unique = [
        len(text.split()) - len(set(text.split()))
        for text in texts("--min_length 10 --no_repeat_ngram_size 1")
    ]
    assert max(unique) == 0 < max(repeats)


def sampling_narrows_down_to_greedy():
    greedy = texts("--algorithm greedy --max_length 2")
    for flags in ("--temperature 0.001", "--top_k 1", "--top_p 0.000001"):
        assert texts("--algorithm sample --max_length 2", flags) == greedy
    assert texts("--algorithm sample --temperature 5 --max_length 2") != greedy
    assert texts("--algorithm sample --temperature 5 --top_k 2") != texts(
        "--algorithm sample --temperature 5"
    )
    assert texts("--algorithm sample --temperature 5 --top_p 0.3") != texts(
        "--algorithm sample --temperature 5"
    )


def num_captions_are_printed():
    assert [
        len({caption["caption"] for caption in captions})
        for captions in written("--num_captions 3")
    ] == [3] * 4


def seeds_are_each_tested_as_if_alone():
    """And the mean and the standard deviation of two values, (x + y) / 2 and |x - y| / sqrt 2, are theirs."""
    shop = Path("data").resolve().parent
    shutil.copytree(shop / "lstm", "first")
    recipe = f"{TINY} --epochs 4 --learning_rate 0.02 --encoder_weights weights.pth"
    second = run_dir(succeed(recipe, "--seed 1"))
    paths = [Path("first/best.pt"), second / "best.pt"]
    for number, path in enumerate(paths, start=1):
        succeed(f"--mode test --output_dir alone/{number} --model_path", path)
    test = ("--mode test --model_path first --seeds", second)
    outcome = program(*test, paths[0], "--output_dir out")  # named twice, it counts once
    assert outcome.status == 0 and warnings_in(outcome) == []
    for number in (1, 2):
        for name in ("test_captions.json", "test_metrics.json"):
            alone, found = (read_json(f"{folder}/{number}/{name}") for folder in ("alone", "out"))
            for each in (alone, found):
                each.pop("wall_time_seconds") if isinstance(each, dict) else None
            assert found == alone
    tests = [read_json(f"alone/{number}/test_metrics.json") for number in (1, 2)]
    summary, (x, y) = read_json("out/test_seeds.json"), [each["CIDEr"] for each in tests]
    rows = summary["checkpoints"]
    assert [(row["checkpoint"], row["seed"]) for row in rows] == [*zip(map(str, paths), (0, 1))]  # noqa: B905
    assert [row["CIDEr"] for row in rows] == [x, y] and x != y
    mean, sd = (x + y) / 2, abs(x - y) / 2**0.5
    found = {"mean": mean, "sd": sd, "lowest": min(x, y), "highest": max(x, y)}
    assert summary["spread"]["CIDEr"] == pytest.approx(found)
    assert re.search(rf"^  CIDEr +{mean:.4f} +{sd:.4f} ", outcome.out, re.MULTILINE)
    succeed(*test)
    files = {"test_metrics.json", "test_captions.json", "test_examples.json"}
    assert {path.name for path in second.glob("test_*")} == files
    assert {path.name for path in Path("first").glob("test_*")} == files | {"test_seeds.json"}


def split_chooses_the_images():
    path = Path("data").resolve().parent / "lstm/best.pt"
    succeed("--mode test --split val --algorithm greedy --output_dir out --model_path", path)
    assert [row["file_name"] for row in read_json("out/val_captions.json")] == listed("dev")


def images_are_captioned_and_json_is_json():
    path = Path("data").resolve().parent / "lstm/best.pt"
    out = succeed("--mode caption --model_path", path, "--images data/sample/Images")
    assert [line.split("\t")[0] for line in out.splitlines()] == sorted(
        map(str, Path("data/sample/Images").iterdir())
    )
    assert len(written()) == 4  # parsed from JSON lines


def backends_hear_of_the_run():
    """What they write is tested with tracking_backends."""
    heard = {"tensorboard": [], "wandb": []}

    def backend(name):
        def hear(event):
            return lambda *values: heard[name].append((event, values))

        events = ("config_logged", "metrics_logged", "samples_logged", "run_ended")
        return lambda *_: SimpleNamespace(name=name, **{event: hear(event) for event in events})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking_backends, "BACKENDS", {name: backend(name) for name in heard})
        patch.setattr(caption_options.importlib.util, "find_spec", lambda name: sys.__spec__)
        succeed(TINY, DECODERS["attention"], "--tensorboard")
        assert heard["wandb"] == []
        succeed(TINY, "--wandb")
    for events in heard.values():
        names = [name for name, _ in events]
        assert names == ["config_logged", "samples_logged", "metrics_logged", "run_ended"]
    (sample, *_) = heard["tensorboard"][1][1][1]
    assert sample.maps.shape[0] == len(sample.words) and Path(sample.path).is_file()
    (sample, *_) = heard["wandb"][1][1][1]
    assert sample.maps is None and sample.references


def the_best_model_is_pushed():
    """What arrives is tested with hub_models."""
    pushed = []

    def push(source, name, *, private):
        pushed.append((name, private))
        assert source.name == "best.pt" and source.is_file()
        return f"https://hub/{name}", None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fic.hub_models, "push", push)
        patch.setattr(fic.hub_models, "hub_token", lambda: "token")
        patch.setattr(caption_options.importlib.util, "find_spec", lambda name: sys.__spec__)
        assert "pushed: https://hub/ann/one" in succeed(TINY, "--push_to_hub ann/one")
        succeed(TINY, "--push_to_hub ann/two --hub_private")
        assert "pushed" not in succeed(TINY)
    assert pushed == [("ann/one", False), ("ann/two", True)]


def runs_are_compared():
    """Where --output_dir says; what is compared is tested with run_comparison."""
    for name in ("one", "other"):
        Path(name).mkdir()
        checkpoints.write_json(Path(name, "run_config.json"), {"learning_rate": 0.1})
        Path(name, "metrics.csv").write_text("epoch,CIDEr\n1,0.5\n")
    words = ["--mode", "compare", "--runs", "one", "other", "--output_dir", "seen"]
    options = fic.parse_args(words)
    assert run_comparison.main(options.output) == 0
    assert Path("seen/run_comparison.png").is_file()


def output_dir_holds_what_is_written():
    shop = Path("data").resolve().parent
    succeed(
        "--mode test --algorithm greedy --output_dir new/folder --model_path", shop / "lstm/best.pt"
    )
    written = {path.name for path in Path("new/folder").iterdir()}
    files = {"test_metrics.json", "test_captions.json", "test_examples.json", "report.html"}
    assert written == files
    name = listed("test")[0]
    succeed("--mode caption --save_attention_viz --output_dir other --model_path",
            shop / "attention/best.pt", f"--images data/sample/Images/{name}")  # fmt: skip
    assert Path(f"other/attention_viz_{Path(name).stem}.png").is_file()


def pictures_are_drawn_as_asked():
    assert drawn() == [] and drawn("--save_attention_viz") == [False] * 3
    assert drawn("--save_attention_viz --attention_viz_samples 2") == [False] * 2
    assert drawn("--advanced_attention_viz --attention_viz_samples 1") == [True]


def viz_scale_says_whose_largest_weight_is_bright():
    flags = "--save_attention_viz --attention_viz_samples 1"
    assert drawn(flags, keyword="scale") == ["caption"]
    assert drawn(f"{flags} --viz_scale word", keyword="scale") == ["word"]


def viz_format_is_that_of_the_pictures():
    path = Path("data").resolve().parent / "attention/best.pt"
    out = succeed("--mode test --save_attention_viz --attention_viz_samples 1 --algorithm greedy",
                  "--viz_format svg --output_dir out --model_path", path)  # fmt: skip
    assert "attention pictures: out/*attention_viz_*.svg\n" in out
    assert [file.name for file in Path("out").glob("*viz*")] == ["attention_viz_sample_1.svg"]


def viz_method_chooses_the_maps():
    """The same captions with others, in test mode's numbers and caption mode's pictures."""
    path, found = Path("data").resolve().parent / "attention/best.pt", []
    picture = f"--images data/sample/Images/{listed('test')[0]}"
    for method in ("attention", "gradient"):
        flags = (
            f"--viz_method {method} --algorithm greedy --output_dir {method} --model_path {path}"
        )
        out = succeed("--mode test --save_attention_viz --attention_viz_samples 1", flags)
        assert f"{method} pictures: {method}/*attention_viz_*.png\n" in out
        found.append(read_json(f"{method}/test_metrics.json"))
        assert found[-1]["attention"]["method"] == method
        succeed("--mode caption --save_attention_viz", picture, flags)
    scores = [row["CIDEr"] for row in found], [row["attention"]["entropy_share"] for row in found]
    assert scores[0][0] == scores[0][1] and scores[1][0] != scores[1][1]
    name = f"attention_maps_{Path(listed('test')[0]).stem}.npz"
    raw = [np.load(f"{method}/{name}") for method in ("attention", "gradient")]
    assert raw[0]["words"].tolist() == raw[1]["words"].tolist()
    assert np.abs(raw[0]["maps"] - raw[1]["maps"]).max() > 0.01


def init_from_begins_with_a_trained_decoder():
    """Here with all that it has learnt, because nothing is new to it."""
    path = Path("data").resolve().parent / "lstm/best.pt"
    trained = load(path)["model"]
    begun = ready_from(path).captioner.decoder.state_dict()
    assert all(torch.equal(begun[name], trained[name]) for name in trained)
    fresh = ready().captioner.decoder.state_dict()
    assert not torch.equal(fresh["lstm.weight_hh_l0"], trained["lstm.weight_hh_l0"])


def ready_from(path, *flags):
    """As `ready`, with --init_from and without what TINY says of sizes."""
    words = f"--dataset_type sample --freq_threshold 1 --num_workers 0 --init_from {path}"
    options = fic.parse_args([*words.split(), *" ".join(flags).split()])
    with contextlib.redirect_stdout(io.StringIO()):
        options, _ = open_checkpoint(options)
        return fic.set_up(options, runtime.resolve_hardware("cpu", "float32"))


def fine_tuning_moves_the_last_blocks_from_its_epoch_on_at_its_rate():
    """Its weights alone: neither BatchNorm's statistics nor the blocks before."""

    def moved(flags, epoch):
        run = ready(f"--epochs 3 --fine_tune_encoder 2 {flags}")
        before = {name: t.clone() for name, t in run.captioner.encoder.trunk.state_dict().items()}
        run.state.loop["epoch"] = epoch
        batch, features = next(run.training.epoch(epoch))
        fic.train_step(run, features, batch)
        after = run.captioner.encoder.trunk.state_dict()
        steps = {name: float((after[name] - before[name]).abs().max()) for name in before}
        return {name: step for name, step in steps.items() if step}

    steps = moved("--encoder_learning_rate 0.002 --grad_clip 0", 0)
    # conv5 has one block with weights, stage4 ends with another
    assert {name.split(".")[0] for name in steps} == {"conv5", "stage4"}
    assert {name.split(".")[1] for name in steps if name.startswith("stage4")} == {"3"}
    assert not any("running" in name or "num_batches" in name for name in steps)
    assert max(steps.values()) == pytest.approx(0.002, rel=1e-2)  # Adam's first step is its rate
    assert moved("--fine_tune_after 2", 1) == {} != moved("--fine_tune_after 2", 2)
    assert moved("--scst_epochs 1", 3) == {}  # on the reward the decoder alone learns


def glove_path_gives_words_their_vectors_and_freeze_embeddings_keeps_them():
    """Of a file with the length of --embed_size; with the second the rows that it has do not learn."""
    words = ready().captioner.vocabulary.words[4:20]
    row = torch.linspace(0, 1, 16)
    numbers = " ".join(map("{:.6f}".format, row))
    Path("words.txt").write_text("".join(f"{word} {numbers}\n" for word in words))
    given = "--embed_size 16 --learning_rate 0.01 --glove_path words.txt"
    known = ready(given).captioner.decoder.embed.weight
    torch.testing.assert_close(known[4:20], row.expand(16, 16), rtol=0, atol=1e-6)
    fresh = ready("--embed_size 16").captioner.decoder.embed.weight
    assert torch.equal(known[:4], fresh[:4]) and torch.equal(known[20:], fresh[20:])
    learnt = [stepped(given, flag)[1] for flag in ("", "--freeze_embeddings")]
    moved = [(run.captioner.decoder.embed.weight != known).any(1) for run in learnt]
    assert moved[0][4:20].any() and not moved[1][4:20].any()
    assert torch.equal(moved[0][20:], moved[1][20:]) and moved[1][[1, *range(20, 30)]].any()
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as said:
        fic.check_files(chosen("--embed_size 8 --glove_path words.txt"))
    message = "--embed_size 8 must be the length of the vectors in words.txt, 16"
    assert said.getvalue() == f"flickr_image_caption.py: error: {message}\n"


def distill_from_teaches_by_its_weight():
    teacher = Path("data").resolve().parent / "lstm/best.pt"
    flags = f"--decoder lstm --distill_from {teacher} --distill_weight"
    (plain, captions), (same, taught) = (stepped(f"{flags} {weight}") for weight in (0, 1))
    assert plain == same and not torch.equal(weights(captions), weights(taught))
    assert captions.objective.weight == 0 and taught.objective.weight == 1


def rerank_chooses_by_what_neighbours_are_called():
    shutil.copytree(Path("data").resolve().parent / "attention", "run")

    def captions(flags=""):
        succeed("--mode test --beam_size 8 --output_dir out --model_path run/best.pt", flags)
        return [row["caption"] for row in read_json("out/test_captions.json")]

    plain, reranked = captions(), captions("--rerank consensus --neighbours 1 --rerank_weight 99")
    assert plain != reranked
    assert captions("--rerank consensus --neighbours 32 --rerank_weight 99") != reranked
    assert captions("--rerank consensus --neighbours 1 --rerank_weight 0") == plain
    assert captions("--rerank none") == plain


def plugin_adds_an_algorithm():
    """One that chooses as greedy does, but is called otherwise."""
    Path("own.py").write_text(
        "from caption_decoding import ALGORITHMS, register_algorithm\n"
        "register_algorithm('own')(ALGORITHMS['greedy'])\n"
    )
    path = Path("data").resolve().parent / "lstm/best.pt"
    words = ["--mode", "caption", "--model_path", str(path), "--images", "data/sample/Images"]
    printed = [
        subprocess.run(
            [sys.executable, str(PROGRAM), *words, *flags.split()], capture_output=True, text=True
        )
        for flags in ("--algorithm greedy", "--plugin own.py --algorithm own", "--algorithm own")
    ]
    assert printed[0].stdout == printed[1].stdout != ""
    assert printed[2].returncode == 2 and "own" in printed[2].stderr


FLAG_EFFECTS = {
    "--plugin": plugin_adds_an_algorithm,
    "--mode": mode_chooses_what_runs,
    "--config": config_gives_what_is_not_typed,
    "--preset": preset_gives_what_is_not_typed,
    "--model_path": model_path_chooses_the_model,
    "--resume": resume_goes_on,
    "--model_save_dir": model_save_dir_holds_the_runs,
    "--device": device_is_taken_at_its_word,
    "--seed": seed_fixes_everything,
    "--threads": threads_compute,
    "--num_workers": num_workers_decode,
    "--dataset_type": dataset_type_names_the_folder,
    "--data_dir": data_dir_replaces_the_default_folder,
    "--image_dir": image_dir_and_captions_file_replace_the_default,
    "--captions_file": image_dir_and_captions_file_replace_the_default,
    "--split_seed": split_seed_draws_the_split,
    "--split_ratios": split_ratios_share_the_images_out,
    "--freq_threshold": freq_threshold_leaves_rare_words_out,
    "--max_bad_fraction": max_bad_fraction_bounds_what_is_skipped,
    "--max_train_images": max_train_images_leaves_the_rest_out,
    "--max_val_images": max_val_images_leaves_the_rest_out,
    "--encoder": encoder_is_built_by_name,
    "--clip_model": clip_model_is_the_folder_of_the_encoder,
    "--encoder_weights": encoder_weights_come_from_the_file,
    "--resnet_weights": functools.partial(encoder_weights_come_from_the_file, "--resnet_weights"),
    "--cache_dir": cache_dir_holds_the_features,
    "--image_size": image_size_is_what_the_encoder_sees,
    "--coarse_size": coarse_size_lays_a_second_look_under_the_first,
    "--cache_dtype": cache_dtype_is_what_the_disk_holds,
    "--encode_batch_size": encode_batch_size_bounds_what_is_computed_together,
    "--no_feature_cache": no_feature_cache_stores_nothing,
    "--random_crop": random_crop_shows_another_part_of_each_image_in_each_epoch,
    "--horizontal_flip": horizontal_flip_mirrors_half_of_the_training_images_anew_each_epoch,
    "--decoder": decoder_is_built_by_name,
    "--embed_size": sizes_reach_the_decoders,
    "--hidden_size": sizes_reach_the_decoders,
    "--attention_dim": sizes_reach_the_decoders,
    "--gpt2_model": gpt2_begins_as_named_and_reads_its_tokens,
    "--gpt2_tokenizer": gpt2_begins_as_named_and_reads_its_tokens,
    "--gpt2_layers": gpt2_begins_as_named_and_reads_its_tokens,
    "--gpt2_width": gpt2_begins_as_named_and_reads_its_tokens,
    "--gpt2_heads": gpt2_begins_as_named_and_reads_its_tokens,
    "--prefix_length": prefix_length_is_how_many_words_the_picture_becomes,
    "--attention_layer": attention_layer_chooses_whose_maps_are_shown,
    "--trainable": trainable_leaves_the_rest_of_gpt2_as_it_was,
    "--gradient_accumulation_steps": gradient_accumulation_and_checkpointing_make_the_same_step,
    "--gradient_checkpointing": gradient_accumulation_and_checkpointing_make_the_same_step,
    "--num_layers": num_layers_are_built_by_every_decoder,
    "--drop_prob": drop_prob_drops_in_every_decoder,
    "--recurrent_dropout": recurrent_dropout_drops_in_every_decoder,
    "--attention": attention_is_of_the_kind_that_is_named,
    "--attention_heads": attention_heads_look_each_at_a_part_of_the_features,
    "--patch_dropout": patch_dropout_leaves_cells_out_in_training_only,
    "--alpha_c": alpha_c_weighs_the_attention_penalty,
    "--init_from": init_from_begins_with_a_trained_decoder,
    "--glove_path": glove_path_gives_words_their_vectors_and_freeze_embeddings_keeps_them,
    "--freeze_embeddings": glove_path_gives_words_their_vectors_and_freeze_embeddings_keeps_them,
    "--fine_tune_encoder": fine_tuning_moves_the_last_blocks_from_its_epoch_on_at_its_rate,
    "--fine_tune_after": fine_tuning_moves_the_last_blocks_from_its_epoch_on_at_its_rate,
    "--encoder_learning_rate": fine_tuning_moves_the_last_blocks_from_its_epoch_on_at_its_rate,
    "--distill_from": distill_from_teaches_by_its_weight,
    "--distill_weight": distill_from_teaches_by_its_weight,
    "--rerank": rerank_chooses_by_what_neighbours_are_called,
    "--neighbours": rerank_chooses_by_what_neighbours_are_called,
    "--rerank_weight": rerank_chooses_by_what_neighbours_are_called,
    "--epochs": epochs_are_trained,
    "--batch_size": batch_size_counts_captions,
    "--learning_rate": learning_rate_is_adams,
    "--weight_decay": weight_decay_shrinks_matrices_but_not_embeddings_or_biases,
    "--scst_epochs": scst_options_reach_the_reward,
    "--scst_learning_rate": scst_options_reach_the_reward,
    "--scst_samples": scst_options_reach_the_reward,
    "--scst_bleu_weight": scst_options_reach_the_reward,
    "--label_smoothing": label_smoothing_changes_the_update_but_not_the_plain_loss,
    "--grad_clip": grad_clip_bounds_the_gradient,
    "--precision": precision_is_computed_in,
    "--early_stopping_patience": early_stopping_patience_ends_the_run,
    "--select_by": select_by_chooses_the_best_epoch,
    "--val_beam_size": val_beam_size_reaches_the_search,
    "--keep_checkpoints": keep_checkpoints_deletes_older_ones,
    "--use_scheduler": use_scheduler_schedules,
    "--scheduler_type": scheduler_type_chooses,
    "--scheduler_patience": plateau_options_count,
    "--scheduler_factor": plateau_options_count,
    "--scheduler_step_size": step_options_count,
    "--scheduler_gamma": step_options_count,
    "--scheduler_t_max": t_max_is_where_the_cosine_is_lowest,
    "--min_lr": min_lr_is_the_lowest_rate,
    "--warmup_epochs": warmup_epochs_of_rising_rate,
    "--ensemble": ensemble_writes_with_all_its_members,
    "--seeds": seeds_are_each_tested_as_if_alone,
    "--algorithm": algorithm_chooses_the_search,
    "--beam_size": beam_size_widens_the_search,
    "--max_length": max_length_cuts,
    "--min_length": min_length_holds_eos_back,
    "--length_penalty": length_penalty_favours_long_captions,
    "--no_repeat_ngram_size": no_repeat_ngram_size_forbids_repeats,
    "--temperature": sampling_narrows_down_to_greedy,
    "--top_k": sampling_narrows_down_to_greedy,
    "--top_p": sampling_narrows_down_to_greedy,
    "--num_captions": num_captions_are_printed,
    "--split": split_chooses_the_images,
    "--images": images_are_captioned_and_json_is_json,
    "--clip_score": clip_score_judges_the_captions,
    "--debug_candidates": debug_candidates_are_the_words_of_each_step,
    "--runs": runs_are_compared,
    "--tensorboard": backends_hear_of_the_run,
    "--wandb": backends_hear_of_the_run,
    "--push_to_hub": the_best_model_is_pushed,
    "--hub_private": the_best_model_is_pushed,
    "--json": images_are_captioned_and_json_is_json,
    "--output_dir": output_dir_holds_what_is_written,
    "--save_attention_viz": pictures_are_drawn_as_asked,
    "--viz_method": viz_method_chooses_the_maps,
    "--attention_viz_samples": pictures_are_drawn_as_asked,
    "--advanced_attention_viz": pictures_are_drawn_as_asked,
    "--viz_scale": viz_scale_says_whose_largest_weight_is_bright,
    "--viz_format": viz_format_is_that_of_the_pictures,
}


def flag_names():
    """Every option string of the parser, aliases included."""
    actions = caption_options.build_parser()._actions
    return {name for action in actions for name in action.option_strings} - {"-h", "--help"}


def test_every_flag_has_an_effect_test():
    aliases = {f"--{option.alias}" for option in TABLE.values() if option.alias}
    assert flag_names() == FLAG_EFFECTS.keys() == {f"--{name}" for name in TABLE} | aliases


SLOW_EFFECTS = {
    ensemble_writes_with_all_its_members,
    plugin_adds_an_algorithm,
    seeds_are_each_tested_as_if_alone,
    image_size_is_what_the_encoder_sees,
}


@pytest.mark.parametrize(
    "effect",
    [
        pytest.param(effect, marks=[pytest.mark.slow] if effect in SLOW_EFFECTS else [])
        for effect in dict.fromkeys(FLAG_EFFECTS.values())
    ],
    ids=lambda effect: getattr(effect, "__name__", "resnet_weights"),
)
def test_flag_effect(effect):
    state = download_datasets.load_encoder_weights("shufflenet_v2_x0_5", "random", 0)
    torch.save(state, "weights.pth")
    effect()


# --------------------------------------------------------------------------- parser and documentation


@pytest.mark.parametrize("command", TRAINING_COMMANDS)
def test_the_specified_training_commands_are_accepted(command):
    """And every value that a command names is settled as typed."""
    words = command.split()
    settled = fic.parse_args(words).as_dict()
    for name, value in itertools.pairwise(words):
        if name.startswith("--") and not value.startswith("--"):
            assert str(settled[name[2:]]) == str(type(settled[name[2:]])(value))


@pytest.mark.parametrize("command", RESUME_AND_TEST_COMMANDS)
def test_the_specified_resume_and_test_commands_are_accepted(command, shop):
    """With what a checkpoint of the attention decoder stores."""
    options = fic.parse_args(command.split())
    path = shop / "attention/model_epoch_4.pt"
    typed = options.typed - {"model_path"}
    stored = load(path)["config"] | {"dataset_type": "flickr30k"}
    settled = caption_options.inherit(options, path, stored).as_dict()
    assert settled["decoder"] == "attention" and settled["model_path"] == str(path)
    assert {name: settled[name] for name in typed} == {
        name: options.as_dict()[name] for name in typed
    }


def test_the_specified_defaults_are_ours():
    settled = fic.parse_args([]).as_dict()
    assert len(DEFAULTS) >= 20
    assert {name: settled[name] for name in DEFAULTS} == DEFAULTS


def test_the_documented_options_are_those_of_the_table():
    documented = PROGRAM.with_name("docs").joinpath("OPTIONS.md").read_text()
    assert documented == caption_options.as_markdown()
    for name in flag_names():
        assert f"`{name}`" in documented


def answer(*flags):
    """(status, stdout, stderr lines that are no import times, CPU seconds, imported modules) of a real process."""
    command = [sys.executable, "-X", "importtime", str(PROGRAM), *flags]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = subprocess.run(command, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = child.stderr.splitlines()
    modules = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    return (
        child.returncode,
        child.stdout,
        [x for x in lines if not x.startswith("import time:")],
        seconds,
        modules,
    )


def test_help_answers_in_under_a_second_without_torch():
    status, out, errors, seconds, modules = answer("--help")
    assert status == 0 and errors == [] and seconds < 1 and "argparse" in modules
    assert not modules & {"torch", "torchvision", "numpy", "pandas"}
    assert flag_names() <= set(out.replace(",", " ").split())


@pytest.mark.parametrize("flags, named", [("--epoch 3", "--epoch"), ("--drop_prob 1.5", "--drop_prob"),
                                          ("--save_attention_viz --decoder lstm", "--save_attention_viz")])  # fmt: skip
def test_a_mistake_answers_in_under_a_second_without_torch(flags, named):
    status, out, errors, seconds, modules = answer(*flags.split())
    assert status == 2 and out == "" and len(errors) == 1 and named in errors[0] and seconds < 1
    assert "torch" not in modules


@pytest.mark.parametrize("flags, said", [
    ("--epoch 3", "unrecognized arguments: --epoch 3 (did you mean --epochs?)"),
    ("--batch-size=3", "unrecognized arguments: --batch-size=3 (did you mean --batch_size?)"),
    ("--quantum", "unrecognized arguments: --quantum"),
    ("--device gpu", "--device gpu: give auto, cpu, cuda, cuda:N or mps"),
    ("--device cuda:-1", "--device cuda:-1: give auto, cpu, cuda, cuda:N or mps"),
])  # fmt: skip
def test_a_mistyped_flag_is_guessed_and_a_device_s_spelling_known(flags, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        fic.parse_args(flags.split())
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"flickr_image_caption.py: error: {said}\n"


LOST = {  # command line -> what it names
    "--model_path nowhere/best.pt": "nowhere/best.pt: no such checkpoint: the newest one nearby is ",
    "--resume nowhere.pt": "nowhere.pt: no such checkpoint: the newest one nearby is ",
    "--resume latest --model_save_dir data": "data: no such checkpoint: there is none in ",
    "--mode test --model_path RUN --ensemble nowhere.pt": "nowhere.pt: no such checkpoint: ",
    "--dataset_type sample --init_from nowhere.pt": "nowhere.pt: no such checkpoint: the newest one nearby is ",
    "--dataset_type sample --glove_path words.txt": "--glove_path words.txt: no such file",
    "--dataset_type custom --init_from RUN": "--dataset_type custom needs both --image_dir and ",
    "--mode test --model_path RUN --seeds nowhere.pt": "nowhere.pt: no such checkpoint: ",
    "--mode test --model_path RUN --captions_file a.csv": "--captions_file a.csv: no such file",
    "--mode caption --model_path RUN --images a.jpg": "--images a.jpg: no such file or folder",
    "--image_dir nowhere --captions_file data": "--image_dir nowhere: no such file or folder",
    "--dataset_type sample --encoder_weights a.pth": "--encoder_weights a.pth: no such file",
    "--dataset_type flickr8k": "--dataset_type flickr8k: no folder data/flickr8k; get the dataset "
        "with: python download_datasets.py --dataset flickr8k",
    "--dataset_type custom": "--dataset_type custom needs both --image_dir and --captions_file",
}  # fmt: skip


@pytest.mark.parametrize("command", LOST)
def test_a_path_that_leads_nowhere_is_one_line_as_short_as_it_can_be(command, shop, capsys):
    Path("run").symlink_to(shop / "lstm")
    options = fic.parse_args(command.replace("RUN", "run/best.pt").split())
    with pytest.raises(SystemExit) as stopped:
        fic.check_files(options)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1 and len(line) < 300
    assert line.startswith(f"flickr_image_caption.py: error: {LOST[command]}")


@pytest.mark.parametrize("command", [
    "--dataset_type sample", "--mode test --model_path RUN", "--resume RUN", "--model_path RUN/best.pt",
    "--dataset_type sample --init_from RUN", "--dataset_type sample --init_from RUN/best.pt",
    "--image_dir http://example.org/{000..009}.tar --captions_file data/sample/captions.txt",
    "--dataset_type sample --image_dir pipe:cat", "--dataset_type sample --image_dir lost-{0..3}.tar",
    "--mode caption --model_path RUN --images data/sample/Images",
    "--mode test --model_path RUN --captions_file data/sample/captions.txt --ensemble RUN RUN",
])  # fmt: skip
def test_paths_that_are_there_or_that_only_their_readers_know_pass(command, shop):
    Path("run").symlink_to(shop / "lstm")
    options = fic.parse_args(command.replace("RUN", "run").split())
    assert fic.check_files(options) is options


def test_a_lost_path_answers_in_under_a_second_without_torch():
    status, out, errors, seconds, modules = answer("--mode", "test", "--model_path", "nowhere.pt")
    assert status == 2 and out == "" and len(errors) == 1 and seconds < 1
    assert "nowhere.pt: no such checkpoint" in errors[0]
    assert not modules & {"torch", "torchvision", "numpy", "pandas", "matplotlib"}


def test_a_run_that_draws_nothing_does_not_wait_for_matplotlib():
    code = "import sys, flickr_image_caption; print('matplotlib' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=PROGRAM.parent) == b"False\n"


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags", [
    "--epoch 3", "--nonsense", "stray", "--mode fly", "--decoder gru", "--encoder alexnet9", "--scheduler_type linear",
    "--dataset_type coco9", "--algorithm best", "--split all", "--precision int8", "--epochs", "--images",
    "--epochs 0", "--epochs -1", "--epochs 1.5", "--epochs nan", "--epochs x", "--batch_size 0", "--batch_size -3",
    "--learning_rate 0", "--learning_rate -1", "--learning_rate nan", "--learning_rate inf", "--learning_rate 1e999",
    "--drop_prob 1.5", "--drop_prob 1", "--drop_prob -0.1", "--drop_prob nan", "--alpha_c -1", "--alpha_c inf",
    "--label_smoothing 1", "--label_smoothing nan", "--grad_clip -1", "--grad_clip nan", "--embed_size 0",
    "--hidden_size 0", "--num_layers 0", "--attention_dim 0", "--num_workers -1", "--seed -1", "--seed 4294967296",
    "--split_seed -1", "--freq_threshold 0", "--max_bad_fraction 1.1", "--max_bad_fraction -0.1",
    "--max_bad_fraction nan", "--max_train_images 0", "--max_val_images 0", "--keep_checkpoints 0",
    "--early_stopping_patience -1",
    "--val_beam_size 0", "--scheduler_patience -1", "--scheduler_factor 0", "--scheduler_factor 1",
    "--scheduler_factor nan", "--scheduler_step_size 0", "--scheduler_gamma 0", "--scheduler_gamma 1.5",
    "--scheduler_t_max 0", "--min_lr -1", "--min_lr nan", "--warmup_epochs -1", "--beam_size 0", "--max_length 0",
    "--min_length -1", "--length_penalty nan", "--length_penalty inf", "--no_repeat_ngram_size -1",
    "--temperature 0", "--temperature nan", "--top_k -1", "--top_p 0", "--top_p 1.1", "--num_captions 0",
    "--attention_viz_samples 0", "--image_size 31", "--image_size 1025", "--coarse_size 31",
    "--beam_size 1025", "--val_beam_size 1025", "--num_captions 1025", "--max_length 1025", "--hidden_size 16385",
    "--embed_size 16385", "--attention_dim 16385", "--num_layers 65", "--batch_size 65537",
    "--scst_epochs -1", "--scst_samples 1", "--scst_learning_rate 0", "--scst_bleu_weight 1.1",
    "--patch_dropout 1", "--weight_decay -1", "--cache_dtype float8", "--compile", "--attention soft",
    "--attention_heads 0", "--attention_heads 65",
])  # fmt: skip
def test_an_unknown_flag_or_a_value_out_of_range(flags):
    refused(flags, naming=[flags.split()[0]])


@pytest.mark.parametrize("flags, named", [
    ("--resume a.pt --model_path b.pt", ["--resume", "--model_path"]),
    ("--mode test", ["--model_path"]), ("--mode caption --images x.jpg", ["--model_path"]),
    ("--mode caption --model_path a.pt", ["--images"]),
    ("--mode test --resume a.pt", ["--resume", "--model_path"]),
    ("--min_length 40 --max_length 40", ["--min_length", "--max_length"]),
    ("--use_scheduler --scheduler_type one_cycle --warmup_epochs 10", ["--warmup_epochs", "--epochs"]),
    ("--use_scheduler --scheduler_type cosine --min_lr 0.1", ["--min_lr", "--learning_rate"]),
    ("--resume=", ["--resume"]), ("--model_path=", ["--model_path"]),
])  # fmt: skip
def test_flags_that_contradict_each_other(flags, named):
    """An empty --resume or --model_path, such as of an unset variable, must not start a new run."""
    refused(flags, naming=named)


IDLE = {  # flags of which the last does nothing -> what the refusal says
    "--hub_private": "--hub_private needs --push_to_hub",
    "--patch_dropout 0.5": "--patch_dropout belongs to --decoder attention, not lstm",
    "--attention_dim 8": "--attention_dim belongs to --decoder attention, not lstm",
    "--attention adaptive": "--attention belongs to --decoder attention, not lstm",
    "--decoder attention --attention_heads 2":
        "--attention_heads belongs to --attention multi_head or adaptive, not additive",
    "--gpt2_model scratch": "--gpt2_model belongs to --decoder gpt2, not lstm",
    "--gpt2_tokenizer words": "--gpt2_tokenizer belongs to --decoder gpt2, not lstm",
    "--decoder gpt2 --gpt2_layers 2": "--gpt2_layers belongs to --gpt2_model scratch, not gpt2",
    "--decoder gpt2 --gpt2_width 8": "--gpt2_width belongs to --gpt2_model scratch, not gpt2",
    "--decoder gpt2 --gpt2_heads 2": "--gpt2_heads belongs to --gpt2_model scratch, not gpt2",
    "--prefix_length 2": "--prefix_length belongs to --decoder gpt2, not lstm",
    "--decoder gpt2 --prefix_length 2 --attention_layer 1": "--attention_layer does nothing with --prefix_length",
    "--gradient_checkpointing": "--gradient_checkpointing belongs to --decoder gpt2, not lstm",
    "--trainable cross": "--trainable belongs to --decoder gpt2, not lstm",
    "--alpha_c 1": "--alpha_c belongs to --decoder attention, not lstm",
    "--save_attention_viz": "--save_attention_viz belongs to --decoder attention, not lstm: "
        "--viz_method gradient maps any decoder",
    "--advanced_attention_viz": "--advanced_attention_viz belongs to --decoder attention, not lstm: "
        "--viz_method gradient maps any decoder",
    "--viz_method gradient": "--viz_method needs --save_attention_viz in --mode train",
    "--decoder attention --attention_viz_samples 2":
        "--attention_viz_samples needs --save_attention_viz",
    "--decoder attention --viz_scale word": "--viz_scale needs --save_attention_viz",
    "--decoder attention --viz_format pdf": "--viz_format needs --save_attention_viz",
    "--clip_model folder": "--clip_model belongs to --encoder clip, not resnet50",
    "--no_feature_cache --cache_dir x": "--cache_dir does nothing with --no_feature_cache",
    "--no_feature_cache --cache_dtype float32":
        "--cache_dtype does nothing with --no_feature_cache",
    "--scheduler_type step": "--scheduler_type needs --use_scheduler",
    "--min_lr 1e-6": "--min_lr needs --use_scheduler",
    "--use_scheduler --scheduler_type step --scheduler_patience 2":
        "--scheduler_patience belongs to --scheduler_type reduce_lr_on_plateau, not step",
    "--use_scheduler --scheduler_type cosine --scheduler_factor 0.5":
        "--scheduler_factor belongs to --scheduler_type reduce_lr_on_plateau, not cosine",
    "--use_scheduler --scheduler_step_size 2":
        "--scheduler_step_size belongs to --scheduler_type step, not reduce_lr_on_plateau",
    "--use_scheduler --scheduler_gamma 0.5":
        "--scheduler_gamma belongs to --scheduler_type step or exponential, not reduce_lr_on_plateau",
    "--use_scheduler --scheduler_type one_cycle --scheduler_t_max 9":
        "--scheduler_t_max belongs to --scheduler_type cosine, not one_cycle",
    "--use_scheduler --scheduler_type exponential --min_lr 1e-6":
        "--min_lr belongs to --scheduler_type reduce_lr_on_plateau or cosine, not exponential",
    "--use_scheduler --scheduler_type cosine --warmup_epochs 2":
        "--warmup_epochs belongs to --scheduler_type one_cycle, not cosine",
    "--algorithm greedy --beam_size 3": "--beam_size belongs to --algorithm beam or full_beam, not greedy",
    "--algorithm sample --length_penalty 1":
        "--length_penalty belongs to --algorithm beam or full_beam, not sample",
    "--algorithm sample --rerank consensus": "--rerank belongs to --algorithm beam or full_beam, not sample",
    "--neighbours 9": "--neighbours belongs to --rerank consensus, not none",
    "--rerank none --rerank_weight 2": "--rerank_weight belongs to --rerank consensus, not none",
    "--distill_weight 0.5": "--distill_weight needs --distill_from",
    "--freeze_embeddings": "--freeze_embeddings needs --glove_path",
    "--random_crop": "--random_crop needs --fine_tune_encoder",
    "--encoder_learning_rate 1e-5": "--encoder_learning_rate needs --fine_tune_encoder",
    "--fine_tune_encoder 0 --fine_tune_after 1": "--fine_tune_after needs --fine_tune_encoder",
    "--scst_learning_rate 1e-5": "--scst_learning_rate needs --scst_epochs",
    "--scst_epochs 0 --scst_samples 3": "--scst_samples needs --scst_epochs",
    "--scst_bleu_weight 0.5": "--scst_bleu_weight needs --scst_epochs",
    "--temperature 0.5": "--temperature belongs to --algorithm sample, not beam",
    "--top_k 3": "--top_k belongs to --algorithm sample, not beam",
    "--algorithm greedy --top_p 0.5": "--top_p belongs to --algorithm sample, not greedy",
}  # fmt: skip
EVERY_DECODER = {
    "embed_size", "hidden_size", "num_layers", "drop_prob", "recurrent_dropout", "glove_path",
}  # fmt: skip
BY_A_RULE = {"save_attention_viz", "advanced_attention_viz", "viz_method"}  # of check_maps


def test_every_option_that_depends_on_another_is_tried_without_it():
    tried = {flags[flags.rindex("--") + 2 :].split()[0] for flags in IDLE}
    depending = {name for name, option in TABLE.items() if option.needs}
    assert tried == depending - EVERY_DECODER | BY_A_RULE


@pytest.mark.parametrize("flags", IDLE)
def test_a_flag_that_does_nothing_beside_the_others_is_refused(flags):
    refused(flags, naming=[IDLE[flags]])


@pytest.mark.parametrize("flags, said", [
    ("--batch_size 3", "--batch_size belongs to --mode train, not test"),
    ("--epochs 3", "--epochs belongs to --mode train, not test"),
    ("--use_scheduler", "--use_scheduler belongs to --mode train, not test"),
    ("--drop_prob 0", "--drop_prob belongs to --mode train, not test"),
    ("--num_captions 2", "--num_captions belongs to --mode caption, not test"),
    ("--json", "--json belongs to --mode caption and compare, not test"),
    ("--images x.jpg", "--images belongs to --mode caption and debug, not test"),
    ("--runs x", "--runs belongs to --mode compare, not test"),
    ("--mode caption --split val", "--split belongs to --mode test and compare, not caption"),
    ("--mode caption --cache_dir x", "--cache_dir belongs to --mode train, test and tune, not caption"),
    ("--mode train --output_dir x", "--output_dir belongs to --mode test, caption, debug, tune and compare, not train"),
    ("--mode train --num_captions 2", "--num_captions belongs to --mode caption, not train"),
])  # fmt: skip
def test_a_flag_of_another_mode_is_refused(flags, said, shop):
    refused("--mode test --model_path", shop / "attention/best.pt", flags, naming=[said])


@pytest.mark.parametrize("name", [name for name in TABLE if len(TABLE[name].modes) < 3])
def test_a_flag_is_refused_in_every_mode_but_its_own(name, capsys):
    kind, default = TABLE[name].kind, TABLE[name].default
    value = kind[0] if isinstance(kind, tuple) else "1" if default in (None, ()) else default
    value = "ann/captions" if name == "push_to_hub" else value
    words = [f"--{name}"] if kind is bool else [f"--{name}", str(value)]
    for mode in set(caption_options.MODES) - set(TABLE[name].modes):
        with pytest.raises(SystemExit) as stopped:
            fic.parse_args(["--mode", mode, "--model_path", "x", *words])
        assert stopped.value.code == 2
        own = " and ".join(TABLE[name].modes)
        assert f"error: --{name} belongs to --mode {own}, not {mode}" in capsys.readouterr().err


@pytest.mark.parametrize("flags, said", [
    ("--mode caption --images data/sample/Images --num_captions 9 --beam_size 3",
     "--num_captions 9 is more than --algorithm beam finds (3)"),
    ("--mode caption --images data/sample/Images --algorithm greedy --num_captions 2",
     "--num_captions 2 is more than --algorithm greedy finds (1)"),
    ("--mode test --attention_viz_samples 2", "--attention_viz_samples needs --save_attention_viz"),
    ("--mode test --no_feature_cache --cache_dir x",
     "--cache_dir does nothing with --no_feature_cache"),
    ("--mode test --max_length 5 --min_length 5", "--min_length 5 must be below --max_length 5"),
    ("--mode test --temperature 2", "--temperature belongs to --algorithm sample, not beam"),
    ("--epochs 1 --scheduler_type step", "--scheduler_type needs --use_scheduler"),
    ("--epochs 1 --patch_dropout 0.5", "--patch_dropout belongs to --decoder attention, not lstm"),
])  # fmt: skip
def test_a_flag_that_does_nothing_with_a_checkpoint_s_options_is_refused(flags, said, shop):
    refused(flags, "--model_path", shop / "lstm/best.pt", naming=[said])


def test_a_flag_that_acts_with_a_checkpoint_s_options_is_accepted():
    path = train("--algorithm sample --use_scheduler --scheduler_type step") / "model_epoch_1.pt"
    succeed("--mode test --temperature 0.5 --output_dir out --model_path", path)
    decoding = read_json("out/test_metrics.json")["decoding"]
    assert decoding["algorithm"] == "sample" and decoding["temperature"] == 0.5
    resumed = run_dir(succeed("--epochs 1 --scheduler_gamma 0.5 --model_path", path))
    config = read_json(resumed / "run_config.json")
    assert config["scheduler_type"] == "step" and config["scheduler_gamma"] == 0.5


def test_attention_pictures_of_a_checkpoint_without_attention(shop):
    path, picture = shop / "lstm/best.pt", f"data/sample/Images/{listed('test')[0]}"
    for mode in ("--mode test", f"--mode caption --images {picture}", "--epochs 1"):
        refused(
            mode, "--save_attention_viz --model_path", path, naming=["--save_attention_viz", "lstm"]
        )


def test_a_dataset_that_is_not_there_says_which_command_gets_it():
    refused(
        "--dataset_type flickr30k",
        naming=["flickr30k", "python download_datasets.py --dataset flickr30k"],
    )
    refused("", naming=["python download_datasets.py --dataset flickr30k"])
    refused(
        "--dataset_type sample --captions_file nowhere.txt", naming=["--captions_file nowhere.txt"]
    )
    refused("--dataset_type sample --image_dir nowhere", naming=["--image_dir nowhere"])
    refused("--dataset_type custom", naming=["--image_dir", "--captions_file"])


@pytest.mark.parametrize("content", [b"", b"  \n\n", b"image,caption\n", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"{", b"[]",
                                     b"hello world\nthis is prose\n", b"image,caption\n\xff\xfe\n"])  # fmt: skip
def test_a_captions_file_without_captions(content):
    Path("bad.txt").write_bytes(content)
    refused(TINY, "--captions_file bad.txt", naming=["bad.txt"])


def test_a_split_without_images(shop):
    flags = own_copy()
    Path("data_copy/sample.devImages.txt").write_text("")
    refused(TINY, flags, naming=["data_copy", "val"])
    Path("bad.csv").write_text(
        "image,caption,split\n" + "".join(f"{n},a dog,train\n" for n in listed("train"))
    )
    refused(TINY, "--captions_file bad.csv", naming=["bad.csv", "val"])
    refused(
        "--mode test --captions_file bad.csv --model_path",
        shop / "lstm/best.pt",
        naming=["bad.csv"],
    )


def test_weights_that_do_not_fit_or_are_none(monkeypatch):
    monkeypatch.setattr(fic.Encoder, "forward", None)  # nothing is encoded before
    refused(TINY, "--encoder_weights nowhere.pth", naming=["--encoder_weights nowhere.pth"])
    torch.save(
        download_datasets.load_encoder_weights("squeezenet1_1", "random", 0), "squeezenet.pth"
    )
    refused(
        TINY, "--encoder_weights squeezenet.pth", naming=["squeezenet.pth", "shufflenet_v2_x0_5"]
    )
    torch.save(
        download_datasets.load_encoder_weights("shufflenet_v2_x1_0", "random", 0), "wider.pth"
    )
    refused(TINY, "--resnet_weights wider.pth", naming=["wider.pth", "shufflenet_v2_x0_5"])
    whole = Path("squeezenet.pth").read_bytes()
    for content in (
        b"",
        b"no weights",
        whole[: len(whole) // 2],
        pickle.dumps({"a": 1}),
        pickle.dumps(Hostile()),
    ):
        Path("bad.pth").write_bytes(content)
        refused(TINY, "--encoder_weights bad.pth", naming=["--encoder_weights bad.pth"])
    torch.save([1, 2], "list.pth")
    refused(TINY, "--encoder_weights list.pth", naming=["--encoder_weights list.pth"])
    refused(TINY, "--encoder_weights data", naming=["--encoder_weights data"])
    assert not Path("owned").exists()


def test_imagenet_weights_that_cannot_be_had_are_an_error(monkeypatch, tmp_path):
    """Without the file the encoder was once silently random. File, address and place are named."""

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path.parent / "torch_home"))
    monkeypatch.setattr(download_datasets, "WEIGHTS_DIR", Path("place"))
    for encoder, file in (("resnet50", "resnet50"), ("mobilenet_v2", "mobilenet_v2-b0353104.pth")):
        refused(
            f"--dataset_type sample --encoder {encoder}",
            naming=[file, "https://download.pytorch.org/", "place"],
        )
    Path("place").mkdir()
    Path("place/mobilenet_v2-b0353104.pth").write_bytes(b"a page that says 404")
    refused(
        "--dataset_type sample --encoder mobilenet_v2",
        naming=["place/mobilenet_v2-b0353104.pth", "SHA-256"],
    )


class Hostile:
    """Unpickling it writes a file."""

    def __reduce__(self):
        return (os.system, ("touch owned",))


def test_a_checkpoint_that_is_missing_damaged_or_hostile(shop):
    whole = (shop / "lstm/best.pt").read_bytes()
    picture = f"data/sample/Images/{listed('test')[0]}"
    modes = "--mode test", f"--mode caption --images {picture}", "--epochs 1"
    for mode in modes:
        refused(mode, "--model_path nowhere/best.pt", naming=["nowhere/best.pt"])
    refused("--resume latest", naming=["saved_models"])
    refused("--mode test --model_path data", naming=["data"])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    torch.save({**load(shop / "lstm/best.pt"), "vocabulary": Hostile()}, "archive.pt")
    contents = [b"", b"no checkpoint", whole[:1000], whole[:-1000], bytes(flipped), pickle.dumps(Hostile()),
                Path("archive.pt").read_bytes()]  # fmt: skip
    for content, mode in itertools.zip_longest(contents, modes, fillvalue=modes[0]):
        Path("bad.pt").write_bytes(content)
        refused(mode, "--model_path bad.pt", naming=["bad.pt"])
        refused("--dataset_type sample --init_from bad.pt", naming=["bad.pt"])
    assert not Path("owned").exists()


def test_a_checkpoint_of_another_format_version(shop):
    torch.save(load(shop / "lstm/best.pt") | {"format_version": 99}, "future.pt")
    expected = "99, expected 4 or 5"
    refused("--mode test --model_path future.pt", naming=["future.pt", expected])


def changed(path, **parts):
    """Write bad.pt: a checkpoint with parts replaced; `a__b` is part b of part a."""
    state = load(path)
    for name, value in parts.items():
        part, _, key = name.partition("__")
        state[part] = {**state[part], key: value} if key else value
    torch.save(state, "bad.pt")


@pytest.mark.parametrize(
    "name", [name for name in TABLE if TABLE[name].stored != caption_options.OWN]
)
def test_a_wrong_configuration_inside_a_checkpoint_is_named(name, shop):
    config = load(shop / "lstm/best.pt")["config"]
    for wrong in ([1], {"a": 1}, torch.tensor([1, 2])):
        with pytest.raises(ValueError, match=rf"bad\.pt: .*--{name}:"):
            caption_options.check_config("bad.pt", config | {name: wrong})
    older = {key: config[key] for key in config if key != name}  # from before the option was there
    assert caption_options.check_config("older.pt", older)[name] == TABLE[name].default


WRONG_PARTS = {
    "--mode caption --images data/sample/Images": [
        {"config__hidden_size": 17}, {"config__decoder": "attention"}, {"config__drop_prob": 7.0},
        {"config__encoder": "resnet18"}, {"model": {}}, {"vocabulary": {}}, {"vocabulary": {"words": ["a"]}},
        {"encoder": {}}, {"encoder__weights": {}}, {"encoder__weights": [1]}, {"encoder__weights_sha256": "0"},
        {"encoder__channels": 3}, {"encoder__channels": "x"}, {"encoder__image_size": 96},
        {"config__image_size": 96}, {"config__coarse_size": 64}, {"encoder__coarse_size": 64},
        {"config__use_scheduler": torch.tensor([1, 2])}, {"encoder__channels": 2**40},
        {"config__hidden_size": 2**20}, {"config__beam_size": 2**20}, {"config__max_length": 2**20},
        {"model__head.bias": torch.zeros(1).expand(2**50)},
        {"model__head.bias": torch.zeros(3, dtype=torch.int8)}, {"splits": {"test": ["a.jpg"]}},
    ],
    "--mode test": [{"splits": {}}, {"splits": {"test": 3}}],
    "--epochs 1": [
        {"plan": None}, {"plan": {}}, {"optimizer": {}}, {"optimizer": None}, {"config__use_scheduler": True},
        {"plan__schedule": "step"},
        {"data_position__captions": "x"}, {"data_position__captions": -3}, {"history": [1]}, {"early_stopping": None},
        {"history": [{"epoch": "one", "learning_rate": 1.0}]}, {"epoch": -1},
        {"random_state": {}}, {"random_state__cpu": 5}, {"selection": "high"},
        {"selection__best_eval.pt": {"by": "cider", "best": {"epoch": 1}}},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "mode, parts", [(mode, parts) for mode in WRONG_PARTS for parts in WRONG_PARTS[mode]], ids=str
)
def test_a_checkpoint_with_a_wrong_part(mode, parts, shop):
    changed(shop / "lstm/best.pt", **parts)
    shutil.copy(shop / "lstm/best.pt", "best.pt")  # beside it, as in a run's directory
    refused(mode, "--model_path bad.pt", naming=["bad.pt"])


@pytest.mark.parametrize("parts", [
    {"config__hidden_size": 17}, {"config__decoder": "attention"}, {"config__hidden_size": 2**20},
    {"config__embed_size": [1]}, {"model": {}}, {"vocabulary": {"words": ["a"]}}, {"encoder": {}},
    {"encoder__weights": {}}, {"encoder__weights_sha256": "0"}, {"encoder__channels": 3},
    {"model__head.bias": torch.zeros(1).expand(2**50)}, {"model__head.bias": torch.zeros(3)},
    {"splits": {}},
], ids=str)  # fmt: skip
def test_a_model_to_begin_with_that_has_a_wrong_part(parts, shop):
    changed(shop / "lstm/best.pt", **parts)
    refused("--dataset_type sample --init_from bad.pt", naming=["bad.pt"])


def test_a_checkpoint_does_not_decide_where_anything_is_written(shop):
    changed(shop / "lstm/best.pt", config__cache_dir="stolen", config__model_save_dir="stolen")
    shutil.copy(shop / "lstm/best.pt", "best.pt")
    for mode in ("--mode test --output_dir out", "--epochs 1"):
        out = succeed(mode, "--model_path bad.pt")
        assert (
            "features go to ./feature_cache; the checkpoint's run used --cache_dir stolen: " in out
        )
    assert run_dir(out).parts[:2] == ("saved_models", "sample")
    assert not Path("stolen").exists()


def test_a_resumed_run_lies_beside_the_old_one(shop):
    old = train("--model_save_dir elsewhere")
    assert run_dir(succeed("--epochs 1 --resume", old / "model_epoch_1.pt")).parent == old.parent
    assert (
        run_dir(succeed("--epochs 1 --resume latest --model_save_dir elsewhere")).parent
        == old.parent
    )
    shutil.copytree(old, "moved")
    moved = run_dir(succeed("--epochs 1 --model_path moved"))
    assert moved.parent == Path("saved_models").joinpath(*old.parts[1:-1])
    typed = run_dir(succeed("--epochs 1 --model_save_dir typed --resume", old / "model_epoch_1.pt"))
    assert typed.parts[0] == "typed"


@pytest.mark.parametrize("mode", ["--mode test --output_dir out", "--epochs 1"])
def test_what_a_checkpoint_has_read_is_shown_and_not_quoted(mode, shop):
    Path("secret").write_text("password: 1234\n")
    changed(shop / "lstm/best.pt", config__captions_file="secret")
    outcome = program(mode, "--model_path bad.pt")
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert "captions file (from the checkpoint): secret\n" in outcome.out
    assert "--captions_file secret, from the checkpoint, cannot be used: type it" in outcome.err
    assert "1234" not in outcome.out + outcome.err
    refused(mode, "--model_path bad.pt --captions_file secret", naming=["secret", "1234"])


def test_nothing_from_a_checkpoint_or_a_dataset_drives_the_terminal(shop):
    code = "\x1b]0;owned\x07"
    changed(shop / "lstm/best.pt", config__captions_file=f"{code}.csv", config__cache_dir=code)
    outcome = program("--mode test --model_path bad.pt")
    assert outcome.status == 2 and r"\x1b]0;owned\x07.csv" in outcome.out
    assert r"\x1b]0;owned\x07.csv: no such file" in outcome.err
    assert "\x1b" not in outcome.out + outcome.err
    Path("holiday").mkdir()
    Path("holiday", f"a{code}.jpg").write_bytes(b"no picture")
    outcome = program("--mode caption --images holiday --model_path", shop / "lstm/best.pt")
    assert outcome.status == 1 and r"a\x1b]0;owned\x07.jpg: " in outcome.err
    assert "\x1b" not in outcome.err


class Terminal(io.StringIO):
    """A stdout that somebody looks at."""

    def isatty(self):
        return True


@pytest.mark.parametrize("as_json", [False, True])
def test_file_names_are_escaped_on_a_terminal_and_left_alone_in_a_pipe(as_json, shop):
    captioner, options = fic.load_captioner(shop / "lstm/best.pt", "cpu", "float32")
    picture = Path("data/sample/Images", listed("test")[0])
    (hypotheses,) = captioner.caption([picture], options.decoding)
    shown = {}
    for kind in (io.StringIO, Terminal):
        with contextlib.redirect_stdout(kind()) as stream:
            fic.print_captions(captioner, Path("a\x9b2J.jpg"), hypotheses[:1], as_json)
        shown[kind] = stream.getvalue()
    assert "a\x9b2J.jpg" in shown[io.StringIO] and r"a\x9b2J.jpg" in shown[Terminal]
    assert "\x9b" not in shown[Terminal]
    assert as_json or shown[Terminal].count("\t") == 1


@pytest.mark.parametrize(
    "flag", ["--model_path", "--resume", "--ensemble", "--images", "--output_dir", "--init_from"]
)
def test_a_path_that_an_unset_variable_left_empty(flag, capsys):
    others = [
        "--mode",
        "train" if flag in ("--resume", "--init_from") else "caption",
        "--model_path",
        "x",
        "--images",
        "x",
    ]
    others = others[:2] if flag in ("--model_path", "--resume", "--init_from") else others
    with pytest.raises(SystemExit) as stopped:
        fic.parse_args([*others, flag, ""])
    assert stopped.value.code == 2 and f"{flag} is empty: give a path" in capsys.readouterr().err


def test_an_output_path_that_is_a_file(shop):
    Path("file").write_text("in the way")
    refused(TINY, "--model_save_dir file", naming=["--model_save_dir file"])
    refused(TINY, "--cache_dir file", naming=["--cache_dir file"])
    refused(TINY, "--model_save_dir file/below", naming=["--model_save_dir file/below"])
    refused(
        "--mode test --output_dir file --model_path",
        shop / "lstm/best.pt",
        naming=["--output_dir file"],
    )
    refused("--mode test --cache_dir file --output_dir new --model_path", shop / "lstm/best.pt",
            naming=["--cache_dir file"])  # fmt: skip
    refused("--mode caption --save_attention_viz --images data/sample/Images --output_dir file --model_path",
            shop / "attention/best.pt", naming=["--output_dir file"])  # fmt: skip


def test_test_and_caption_mode_make_no_folder_for_a_run_that_is_refused(shop):
    refused("--mode test --captions_file nowhere --output_dir new --model_path", shop / "lstm/best.pt",
            naming=["nowhere"])  # fmt: skip
    refused("--mode caption --save_attention_viz --output_dir new --encoder_weights nowhere.pth --images "
            "data/sample/Images --model_path", shop / "attention/best.pt", naming=["nowhere.pth"])  # fmt: skip


def test_images_that_are_not_there(shop):
    Path("empty").mkdir()
    refused(
        "--mode caption --images nowhere.jpg --model_path",
        shop / "lstm/best.pt",
        naming=["nowhere.jpg"],
    )
    refused("--mode caption --images empty --model_path", shop / "lstm/best.pt", naming=["empty"])


@pytest.mark.parametrize(
    "device", ["nonsense", "cuda:99", "cpu:x", "meta", "xla", "mtia", "cuda:-1"]
)
def test_a_device_that_is_not_there(device):
    refused(TINY, f"--device {device}", naming=[f"--device {device}"])


@contextlib.contextmanager
def memory_limit(more):
    """This process gets only so many more bytes of address space."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_model_larger_than_memory_is_one_line():
    largest = "--hidden_size 16384"  # of one layer: 4 * 16384 ** 2 weights, 4.3 GB
    with memory_limit(2 * 10**9):
        failed(TINY, largest, naming=["out of memory (4.3 GB asked for): lower --batch_size"])
    assert not Path("saved_models").exists()


def test_a_killed_worker_is_one_line_that_names_the_usual_cause(monkeypatch):
    def killed(*_, **__):
        assert torch.utils.data.get_worker_info()
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(image_loading, "_pixels_or_reason", killed)
    said = ["was killed, which usually means that memory ran out: lower --num_workers"]
    failed(TINY, "--cache_dir own --num_workers 1", naming=said)
    assert not Path("saved_models").exists()


@pytest.mark.parametrize("part", ["Encoder", "build_decoder"])
def test_a_bug_of_ours_is_not_called_a_bad_checkpoint(part, monkeypatch, shop):
    def bug(*_, **__):
        raise TypeError("our bug")

    monkeypatch.setattr(fic, part, bug)
    with pytest.raises(TypeError, match="our bug"):
        program(
            "--mode caption --images data/sample/Images --model_path", shop / "attention/best.pt"
        )


# ------------------------------------------------------------------------------------- warnings, failures, full disks


def test_cuda_is_preferred_to_mps_and_mps_to_the_cpu(monkeypatch):
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert runtime.resolve_device("auto").type == expected
    monkeypatch.undo()


def test_schedules_that_surprise_are_warned_of():
    def warnings(flags):
        outcome = program(TINY, "--use_scheduler", flags)
        assert outcome.status == 0
        return [line for line in outcome.err.splitlines() if "every validation image" not in line]

    (line,) = warnings("--scheduler_type exponential")
    assert line.startswith("warning: --scheduler_gamma 0.1") and "0.001" in line
    (line,) = warnings("--scheduler_type cosine --scheduler_t_max 1 --epochs 2")
    assert line.startswith("warning: --epochs 2 is more than --scheduler_t_max 1")
    assert warnings("--scheduler_type exponential --scheduler_gamma 0.9") == []


def breaking(train_step, at_step, after=False):
    """`train_step` with weights that become NaN before, or after, step `at_step`."""
    steps = itertools.count(1)

    def broken(run, features, batch):
        now, bias = next(steps) == at_step, run.captioner.decoder.head.bias.data
        if now and not after:
            bias.fill_(torch.nan)
        nats = train_step(run, features, batch)
        if now and after:
            bias.fill_(torch.nan)
        return nats

    return broken


def all_finite(path):
    return all(tensor.isfinite().all() for tensor in load(path)["model"].values())


@pytest.mark.parametrize("read_every", [1, 50])
def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(read_every, monkeypatch):
    """Steps are counted over the whole run, and the loss is read every so many steps."""
    monkeypatch.setattr(fic, "READ_LOSS_EVERY", read_every)
    monkeypatch.setattr(fic, "train_step", breaking(fic.train_step, STEPS + 2))
    folder = run_dir(
        failed(TINY, "--epochs 3", naming=[f"step {STEPS + 2} ", "nan", "--learning_rate"])
    )
    assert {path.name for path in folder.glob("*.pt")} == {"model_epoch_1.pt", *BEST_FILES}
    assert all_finite(folder / "best.pt") and all_finite(folder / "model_epoch_1.pt")


def test_weights_broken_by_an_epoch_s_last_step_are_not_saved(monkeypatch):
    monkeypatch.setattr(fic, "train_step", breaking(fic.train_step, 2 * STEPS, after=True))
    folder = run_dir(failed(TINY, "--epochs 3", naming=["epoch 2"]))
    assert {path.name for path in folder.glob("*.pt")} == {"model_epoch_1.pt", *BEST_FILES}
    assert all_finite(folder / "best.pt")


def test_a_learning_rate_that_explodes_is_one_line():
    folder = run_dir(failed(TINY, "--learning_rate 1e38 --grad_clip 0", naming=["--learning_rate"]))
    assert not list(folder.glob("*.pt"))


@contextlib.contextmanager
def file_size_limit(size):
    """No file of this process may grow past `size` bytes: what a full disk looks like to it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up_in_training_leaves_the_previous_checkpoint_whole(monkeypatch):
    saves, original = itertools.count(1), run_output.save

    def save(run, name, is_best):
        if next(saves) == 2:
            with file_size_limit(100_000):
                original(run, name, is_best)
        original(run, name, is_best)

    replace_cider(monkeypatch, itertools.count(1.0))
    monkeypatch.setattr(run_output, "save", save)
    folder = run_dir(failed(TINY, "--epochs 3", naming=["File too large"]))
    assert {path.name for path in folder.glob("*.pt*")} == {"model_epoch_1.pt", *BEST_FILES}
    for path in folder.glob("*.pt"):
        assert checkpoints.load_checkpoint(path)["epoch"] == 1


def test_auto_says_what_it_chose_but_not_among_captions(monkeypatch, shop):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(runtime, "available_cpus", lambda: 2)
    monkeypatch.setattr(runtime, "probe", {1: 0.01, 2: 0.02}.get)
    model = f"--model_path {shop / 'lstm/best.pt'} --algorithm greedy"
    outcome = program("--mode caption --images data/sample/Images --json", model)
    assert len([json.loads(line) for line in outcome.out.splitlines()]) == 40 and not outcome.err
    assert torch.get_num_threads() == 1
    out = succeed("--mode test --output_dir out", model)
    assert "threads: 1 (a probe took 10 ms with 1, 20 ms with 2: the machine is busy)" in out


def test_a_resumed_run_takes_the_checkpoints_number_of_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(runtime, "probe", None)  # would fail
    first = train("--threads 2")
    for typed, expected in (("", 2), ("--threads 1", 1)):
        out = succeed("--model_path", first / "model_epoch_1.pt", "--epochs 1", typed)
        assert read_json(run_dir(out) / "run_config.json")["threads"] == expected


def test_a_disk_that_fills_up_while_encoding_is_one_line_and_the_next_run_goes_on():
    with file_size_limit(15 * 1024 * 4):  # room for fifteen images' features
        failed(TINY, "--cache_dir own", naming=["features.f32"])
    assert not Path("saved_models").exists()
    assert EPOCH_BLOCK.search(succeed(TINY, "--cache_dir own"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_stdout_that_is_full_is_one_line_and_status_1(shop):
    command = [sys.executable, PROGRAM, "--mode", "caption", "--model_path", shop / "lstm/best.pt"]
    with Path("/dev/full").open("w") as full:
        child = subprocess.run([*command, "--images", "data/sample/Images"], stdout=full, stderr=subprocess.PIPE,
                               text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert child.returncode == 1
    assert child.stderr.count("\n") == 1 and "No space left on device" in child.stderr
