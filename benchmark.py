"""Time what the README says is fast against the plain way of doing it, in turn, in one run.

    python benchmark.py                          # drawn pictures, generated features; minutes
    python benchmark.py --quick --json           # under two minutes, one JSON object
    python benchmark.py --images data/flickr8k/Images --encoder mobilenet_v2 --chart docs/benchmark.png
    python benchmark.py --scale 1000 8000 31000 123000       # what training costs with so many images; 16 GB of disk

encode           images per second into a fresh feature cache      against float32, one image at a time, no cache
train_lstm       captions per second of a training step            against float32, 32 captions, no image shared, the
train_attention  the same; 7 x 7 x 1280 features, all widths 512   vocabulary and the features projected at every step
beam_search      images per second, beam 5                         against float32, one image at a time, the same way
metrics          captions per second, references counted once      against counting the references at every scoring

Ours and the plain way alternate (A B A B ...). `ratio` is the median over the rounds, `spread` its range; both ways run
the same model on the same batches, and the plain ways' results are tested to equal ours (tests/test_benchmark.py).

--scale starts the program's own training, a fresh process each, on generated datasets: five captions an image, a
feature cache that is filled. Start-up lasts from the process's start to the end of its first step; private memory is
the most that no file backs (RssAnon), mapped memory what the system keeps of the cache's file for it.
"""

import argparse
import contextlib
import itertools
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

import download_datasets
import image_loading

CHANNELS, CELLS, WIDTH, VOCABULARY = (
    1280,
    49,
    512,
    2539,
)  # MobileNetV2's grid; Flickr8k's vocabulary
SHARED, PLAIN = 128, 32  # captions per step: ours, the textbook's
SCALED = ("lstm", "attention")  # decoders of --scale: one reads means, the other grids
BEAM = {"beam_size": 5, "min_length": 9, "max_length": 25}  # as long as Flickr8k's captions are


# ------------------------------------------------------------------------------------------------------- the plain ways


def plain_encoding(encoder, paths):
    """One image at a time through torchvision's own layers, float32, decoded in the same process -> [(1, F, h, w)]."""
    import torch

    features = []
    with torch.inference_mode():
        for path in paths:
            image = (
                torch.from_numpy(image_loading.load_image(path, encoder.image_size))
                .permute(2, 0, 1)
                .unsqueeze(0)
            )
            features.append(
                encoder.trunk(((image / 255 - encoder.mean) / encoder.std).contiguous())
            )
    return features


def plain_logits(decoder, features, captions):
    """Teacher forcing word by word: features (B, P, F), captions (B, T) -> logits (B, T, V), alphas or None."""
    import torch

    logits, alphas, layers = [], [], None
    for tokens in captions.unbind(1):
        per_image, first = decoder.start(features)  # the features are projected anew for every word
        written, (_, layers), looked = decoder.step(
            tokens.unsqueeze(1), (per_image, layers or first)
        )
        logits.append(written.squeeze(1))
        alphas.append(looked)
    return torch.stack(logits, 1), None if alphas[0] is None else torch.cat(alphas, 1)


def plain_step(run, features, batch):
    """One update as textbooks write it: as `flickr_image_caption.train_step`, with `plain_logits`."""
    import torch

    import flickr_image_caption as program

    _, captions, lengths, image_index = batch
    logits, alphas = plain_logits(run.decoder, features[image_index], captions[:, :-1])
    loss, plain = program.cross_entropy(logits, captions, lengths, run.args.label_smoothing)
    if alphas is not None:
        loss = loss + run.args.alpha_c * program.doubly_stochastic_penalty(alphas, lengths)
    run.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.decoder.parameters(), run.args.grad_clip)
    run.optimizer.step()
    return plain.detach()


def plain_beam_search(decoder, features, vocabulary, beam_size, min_length, max_length):
    """One image (P, F), its features copied for every hypothesis -> (tokens, log_prob) of the best caption."""
    import torch

    beam = [(0.0, [vocabulary.sos], None)]  # log_prob, tokens, LSTM layers
    with torch.inference_mode():
        for step in range(1, max_length + 1):
            live = [
                hypothesis
                for hypothesis in beam
                if hypothesis[1][-1] != vocabulary.eos or len(hypothesis[1]) == 1
            ]
            if not live or (len(live) < len(beam) and max(beam, key=lambda h: h[0]) not in live):
                break
            per_image, first = decoder.start(features.expand(len(live), -1, -1))
            layers = first
            if live[0][2] is not None:
                layers = tuple(tuple(torch.cat(parts) for parts in zip(*layer, strict=True))
                               for layer in zip(*(hypothesis[2] for hypothesis in live), strict=True))  # fmt: skip
            tokens = torch.tensor([[hypothesis[1][-1]] for hypothesis in live])
            logits, (_, layers), _ = decoder.step(tokens, (per_image, layers))
            log_probs = logits.squeeze(1).log_softmax(-1)
            log_probs[:, [vocabulary.pad, vocabulary.sos, vocabulary.unk]] = -torch.inf
            if step <= min_length:
                log_probs[:, vocabulary.eos] = -torch.inf
            grown = [
                hypothesis for hypothesis in beam if not any(hypothesis is other for other in live)
            ]
            for row, (log_prob, words, _) in enumerate(live):
                own = tuple(tuple(part[row : row + 1] for part in layer) for layer in layers)
                values, best = log_probs[row].topk(beam_size)
                grown += [
                    (log_prob + float(v), [*words, int(w)], own)
                    for v, w in zip(values, best, strict=True)
                ]
            beam = sorted(grown, key=lambda hypothesis: hypothesis[0], reverse=True)[:beam_size]
    ended = [hypothesis for hypothesis in beam if hypothesis[1][-1] == vocabulary.eos]
    log_prob, tokens, _ = max(ended or beam, key=lambda hypothesis: hypothesis[0])
    return tokens[1 : len(tokens) - bool(ended)], log_prob


# ---------------------------------------------------------------------------------------------------------- in turn


def seconds(function):
    """Wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def compare(ours, plain, rounds, unit, amounts):
    """Time both in turn, after one call of each that counts for nothing. `amounts`: units of work per call."""
    ours(), plain()
    pairs = [(amounts[0] / seconds(ours), amounts[1] / seconds(plain)) for _ in range(rounds)]
    ratios = sorted(fast / slow for fast, slow in pairs)
    return {
        "ratio": statistics.median(ratios), "ours": statistics.median(fast for fast, _ in pairs),
        "plain": statistics.median(slow for _, slow in pairs), "unit": unit, "spread": [ratios[0], ratios[-1]],
    }  # fmt: skip


def encode(args):
    """Pictures into an empty cache, reading, decoding and writing counted."""
    import torch

    import feature_cache
    import flickr_image_caption as program
    import runtime

    with tempfile.TemporaryDirectory() as folder:
        images = args.images
        if images is None:
            images = Path(folder, "sample", "Images")
            download_datasets.draw_sample_dataset(images.parent, num_images=args.number)
        paths = image_loading.pictures_in(images)[: args.number]
        weights = program.load_encoder_weights(args.encoder, args.encoder_weights, 0)
        precision = runtime.resolve_precision("auto", torch.device("cpu"))
        encoder = program.Encoder(args.encoder, weights, args.encoder_weights, precision)
        textbook = program.Encoder(args.encoder, weights, args.encoder_weights)

        def cached():
            with tempfile.TemporaryDirectory() as cache:
                feature_cache.cached_features(
                    paths, encoder, cache_dir=cache, num_workers=args.num_workers, progress=False
                )

        few = paths[: max(1, len(paths) // 4)]
        amounts = len(paths), len(few)
        result = compare(
            cached, lambda: plain_encoding(textbook, few), args.rounds, "images per second", amounts
        )
        return result | {"precision": precision}


def generated(captions, seed=0):
    """features (N, P, F) and a batch: five captions of each image, as long as Flickr8k's (12 +- 3.5 tokens)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    image_index = torch.arange(captions) // 5
    features = torch.rand(int(image_index[-1]) + 1, CELLS, CHANNELS, generator=generator)
    lengths = (12 + 3.5 * torch.randn(captions, generator=generator)).round().clamp(5, 25).long()
    tokens = torch.randint(4, VOCABULARY, (captions, int(lengths.max()) + 1), generator=generator)
    return features, (torch.arange(len(features)), tokens, lengths, image_index)


def new_run(kind, precision):
    """What a training step needs, untrained: always the same weights."""
    import torch

    import flickr_image_caption as program

    typed = ["--decoder", kind, "--num_layers", "1", "--hidden_size", str(WIDTH)]
    args = program.parse_args(typed)  # embedding and attention are 512 by default
    args.device, args.precision = torch.device("cpu"), precision
    torch.manual_seed(0)
    decoder = program.build_decoder(args, CHANNELS, VOCABULARY)
    return SimpleNamespace(
        args=args, decoder=decoder, model=decoder, optimizer=program.build_optimizer(decoder, args),
        scaler=torch.amp.GradScaler("cpu", enabled=False), per_step=False,
    )  # fmt: skip


def train(kind, args):
    """One training step, dropout on."""
    import torch

    import flickr_image_caption as program
    import runtime

    precision = runtime.resolve_precision("auto", torch.device("cpu"))
    ours, plain = new_run(kind, precision), new_run(kind, "float32")
    shared, small = generated(SHARED), generated(PLAIN)
    for run in (ours, plain):
        run.decoder.train()
    result = compare(
        lambda: program.train_step(ours, *shared), lambda: plain_step(plain, *small), args.rounds * 3,
        "captions per second", (SHARED, PLAIN),
    )  # fmt: skip
    return result | {"precision": precision}


def searcher():
    """A decoder, untrained but decided enough for captions to differ and to end, its vocabulary, and features."""
    import torch

    run = new_run("attention", "float32")
    with torch.no_grad():
        for parameter in run.decoder.parameters():
            parameter.mul_(3)
        run.decoder.head.bias[2] += 4
    return run.decoder.eval(), SimpleNamespace(pad=0, sos=1, eos=2, unk=3), run.args


def beam_search(args):
    """Features to captions, beam 5."""
    import torch

    import caption_decoding
    import flickr_image_caption as program
    import runtime

    decoder, vocabulary, options = searcher()
    options.precision = runtime.resolve_precision("auto", options.device)
    features = torch.rand(args.search, CELLS, CHANNELS, generator=torch.Generator().manual_seed(0))
    few = features[: max(1, len(features) // 50)]

    def ours():
        hypotheses = []
        for chunk in features.split(program.CHUNK):
            with program.autocast(options):
                hypotheses += caption_decoding.generate(decoder, chunk, vocabulary, **BEAM)
        return [best.tokens for (best,) in hypotheses]

    def plain():
        return [plain_beam_search(decoder, image, vocabulary, **BEAM)[0] for image in few]

    result = compare(ours, plain, args.rounds, "images per second", (len(features), len(few)))
    differing = sum(one != other for one, other in zip(ours(), plain(), strict=False)) / len(few)
    return result | {"precision": options.precision, "differing": differing}


def metrics(args):
    """BLEU, ROUGE-L, CIDEr and the shares of 1,000 captions, one of each image's five references changed a little."""
    import metrics_utils

    draw = random.Random(0)
    words = [f"word{number}" for number in range(VOCABULARY)]
    likely = [1 / (rank + 1) for rank in range(VOCABULARY)]  # Zipf's law
    references = {
        str(image): [" ".join(draw.choices(words, likely, k=12)) for _ in range(5)]
        for image in range(args.search)
    }
    captions = {image: f"{texts[0]} word0" for image, texts in references.items()}
    scorer = metrics_utils.CaptionScorer(references)
    return compare(
        lambda: scorer.score(captions), lambda: metrics_utils.CaptionScorer(references).score(captions), args.rounds,
        "captions per second", (args.search, args.search),
    )  # fmt: skip


def ceilings():
    """What this machine can do at best: matrix products, memory and JPEG decoding, medians of nine."""
    import torch

    def per_second(work, function):
        function()
        return work / statistics.median(seconds(function) for _ in range(9))

    found, side = {}, 2048
    for precision in ("float32", "bfloat16"):
        left, right = (torch.rand(side, side).to(getattr(torch, precision)) for _ in range(2))
        found[f"{precision} matrix product, GFLOP/s"] = per_second(
            2 * side**3 / 1e9, lambda a=left, b=right: a @ b
        )
    source = torch.rand(64 * 2**20)
    target = torch.empty_like(source)
    found["memory copy, GB/s read and written"] = per_second(
        2 * source.nbytes / 1e9, lambda: target.copy_(source)
    )
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, "picture.jpg")
        noise = torch.randint(
            0, 256, (14, 14, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        Image.fromarray(noise.numpy()).resize((500, 375)).save(picture, quality=90)
        one = per_second(1, lambda: image_loading.load_image(picture, 224))
    found["JPEG 500 x 375 to 224 x 224, images/s and core"] = one
    return found


STAGES = {
    "encode": encode, "train_lstm": lambda args: train("lstm", args),
    "train_attention": lambda args: train("attention", args), "beam_search": beam_search, "metrics": metrics,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- scale


def scale_options(folder, kind):
    """The command line of a training run on the generated dataset in a folder."""
    return [
        "--dataset_type", "custom", "--image_dir", f"{folder}/Images", "--captions_file", f"{folder}/captions.csv",
        "--cache_dir", f"{folder}/{kind}", "--decoder", kind, "--encoder", "mobilenet_v2",
        "--encoder_weights", "random", "--device", "cpu", "--num_layers", "1", "--hidden_size",
        str(WIDTH), "--freq_threshold", "1",  # as many words for all sizes
    ]  # fmt: skip


def write_captions(folder, images):
    """Empty image files and five captions each: 12 +- 3.5 words, Zipf's law over VOCABULARY words of usual lengths."""
    draw = random.Random(0)
    words = [
        "".join(draw.choices("etaoinshrdlucmwfgyp", k=2 + draw.randrange(8)))
        for _ in range(VOCABULARY)
    ]
    sums = list(itertools.accumulate(1 / rank for rank in range(1, VOCABULARY + 1)))
    (folder / "Images").mkdir()
    with (folder / "captions.csv").open("w") as file:
        file.write("image,caption\n")
        for number in range(images):
            name = f"{number:07}_0123456789.jpg"
            (folder / "Images" / name).touch()
            for _ in range(5):
                length = min(25, max(5, round(draw.gauss(12, 3.5))))
                file.write(
                    f"{name},{' '.join(draw.choices(words, cum_weights=sums, k=length)).capitalize()} .\n"
                )


def fill_cache(folder, kind):
    """The feature cache of these images as a run with this decoder would leave it; bytes on disk."""
    import torch

    import feature_cache
    import flickr_image_caption as program

    args = program.parse_args(scale_options(folder, kind))
    args.device, args.precision = (
        torch.device("cpu"),
        program.resolve_precision(args.precision, torch.device("cpu")),
    )
    feature_cache.FeatureSource(
        program.open_encoder(args), [], pooled=program.DECODERS[kind].pooled,
        cache_dir=args.cache_dir, dtype=torch.float16, num_workers=0, device=args.device,
    )  # an empty one  # fmt: skip
    (file,) = Path(args.cache_dir).glob("*/features.*")
    cells, dtype = (1, torch.float32) if program.DECODERS[kind].pooled else (CELLS, torch.float16)
    block = torch.rand(512, cells, CHANNELS, generator=torch.Generator().manual_seed(0)).to(dtype)
    stamps = list(feature_cache._stamps(sorted((folder / "Images").iterdir()))[0].values())
    with feature_cache._Store(feature_cache.FeatureFile(file, block[0].shape, dtype)) as store:
        for start in range(0, len(stamps), 256):
            chunk = stamps[start : start + 256]
            offset = 7 * start // 256 % 256  # not always the same features
            store.append(chunk, block[offset : offset + len(chunk)].numpy())
    return file.stat().st_size


def start_and_step(typed, warm_up, steps, started):
    """In a fresh process: start the training that `typed` asks for, take some steps, print times in seconds as JSON.

    `started`: the clock when the process was started. The first `warm_up` steps do not count.
    """
    import feature_cache
    import flickr_image_caption as program

    ends, captions, opening, received = [], [], [], []
    imported, open_cache, step = time.time(), feature_cache.cached_features, program.train_step

    def timed_open(*args, **options):
        began = time.time()
        found = open_cache(*args, **options)
        opening.append(time.time() - began)
        return found

    def timed_step(run, features, batch, weights):
        loss = step(run, features, batch, weights)
        ends.append(time.time())
        captions.append(len(batch.lengths))
        if len(ends) == warm_up + steps:
            received.append(1)  # as a signal would
        return loss

    feature_cache.cached_features, program.train_step = timed_open, timed_step
    args = program.parse_args(typed)
    args.device = program.resolve_device(args.device)
    args.precision = program.resolve_precision(args.precision, args.device)
    program.runtime.keep_freed_memory()
    with contextlib.redirect_stdout(sys.stderr):
        run = program.set_up(args, None)
    ready = time.time()
    with contextlib.suppress(program.Stopped):
        while True:
            program.train_epoch(run, received)
            run.progress |= {**program.AT_EPOCH_START, "epoch": run.progress["epoch"] + 1}
    per_caption = (ends[-1] - ends[warm_up - 1]) / sum(captions[warm_up:])
    cache = sum(opening)
    print(json.dumps({
        "startup_seconds": ends[0] - started, "import_seconds": imported - started, "cache_seconds": cache,
        "data_and_model_seconds": ready - imported - cache, "first_step_seconds": ends[0] - ready,
        "ms_per_caption": 1000 * per_caption, "epoch_seconds": per_caption * len(run.batches.lengths),
        "training_captions": len(run.batches.lengths), "words": len(run.vocabulary), "precision": args.precision,
    }))  # fmt: skip


def measure(typed, warm_up, steps):
    """`start_and_step` in a process of its own, and its peak memory in MiB, looked at every 20 ms."""
    call = f"import benchmark; benchmark.start_and_step({typed}, {warm_up}, {steps}, {time.time()})"
    peaks = {"RssAnon": 0, "RssFile": 0}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-c", call], cwd=Path(__file__).parent, stdout=said, stderr=errors
        )
        status = Path(f"/proc/{child.pid}/status")
        while child.poll() is None:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            for name in peaks.keys() & fields.keys():  # one that has ended has no memory
                peaks[name] = max(peaks[name], int(fields[name].split()[0]) / 1024)
            time.sleep(0.02)
        said.seek(0)
        errors.seek(0)
        if child.returncode:
            raise RuntimeError(errors.read())
        found = json.loads(said.read())
    return found | {"peak_private_mib": peaks["RssAnon"], "peak_mapped_mib": peaks["RssFile"]}


def scale(args):
    """{images: {decoder: what its training costs}} of generated datasets. Raises: OSError if the disk is too small."""
    largest = max(args.scale)
    needed = largest * (
        (CELLS + 1) * CHANNELS * 2 + 1200
    )  # grids and means; captions, index lines, image files
    free = shutil.disk_usage(args.scale_dir or tempfile.gettempdir()).free
    line = f"{largest:,} images need {needed / 1e9:.2f} GB in {args.scale_dir or tempfile.gettempdir()}"
    if needed > free:
        raise OSError(
            f"--scale: {line}, {free / 1e9:.2f} GB are free: give --scale_dir or fewer images"
        )
    print(f"{line}; {free / 1e9:.2f} GB are free", file=sys.stderr)
    found = {}
    for images in args.scale:
        with tempfile.TemporaryDirectory(dir=args.scale_dir) as folder:
            write_captions(Path(folder), images)
            for kind in SCALED:
                size = fill_cache(Path(folder), kind)
                one = measure(scale_options(folder, kind), *args.scale_steps) | {
                    "cache_gb": size / 1e9
                }
                found.setdefault(str(images), {})[kind] = one
                if not args.json:
                    print(f"scale {images:7,} {kind:10} start-up {one['startup_seconds']:.1f} s (import "
                          f"{one['import_seconds']:.1f}, cache {one['cache_seconds']:.1f}, data and model "
                          f"{one['data_and_model_seconds']:.1f}, first step {one['first_step_seconds']:.1f}); "
                          f"{one['ms_per_caption']:.2f} ms per caption, epoch {one['epoch_seconds']:,.0f} s; private "
                          f"{one['peak_private_mib']:,.0f} MiB, mapped {one['peak_mapped_mib']:,.0f} MiB; cache "
                          f"{one['cache_gb']:.2f} GB", flush=True)  # fmt: skip
    return found


def draw_chart(report, path):
    """One bar per stage: how many times the plain way's speed ours is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in STAGES if name in report][::-1]
    figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    for row, name in enumerate(names):
        stage = report[name]
        low, high = (abs(stage["ratio"] - end) for end in stage["spread"])
        axes.barh(
            row, stage["ratio"], color="#3b6ea5", height=0.6, xerr=[[low], [high]], ecolor="#555555"
        )
        axes.annotate(f" {stage['ratio']:.1f}x   {stage['ours']:,.0f} {stage['unit']}", (stage["spread"][1], row),
                      va="center", fontsize=9)  # fmt: skip
    axes.axvline(1, color="#555555", linewidth=0.8)
    axes.set(yticks=range(len(names)), yticklabels=[name.replace("_", " ") for name in names],
             xlabel="times the speed of the plain way, both timed in turn",
             xlim=(0, 1.7 * max(report[name]["spread"][1] for name in names)))  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)


def main(argv=None):
    """Time the stages; print one line for each, or one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help="some of " + " ".join(STAGES) + " (all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer pictures and rounds: under two minutes"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--chart", type=Path, metavar="FILE", help="also draw the ratios, as PNG or PDF"
    )
    parser.add_argument("--images", type=Path, help="folder of pictures (drawn ones)")
    parser.add_argument("--encoder", default="resnet50", help="torchvision model (%(default)s)")
    parser.add_argument(
        "--encoder_weights", default="random", help="random, imagenet or a file (%(default)s)"
    )
    parser.add_argument("--number", type=int, help="pictures to encode (256; --quick 64)")
    parser.add_argument("--rounds", type=int, help="of each way, in turn (5; --quick 3)")
    parser.add_argument(
        "--num_workers", type=int, default=0, help="processes that decode pictures (%(default)s)"
    )
    parser.add_argument(
        "--scale",
        type=int,
        nargs="+",
        metavar="IMAGES",
        help="also, or only, datasets of these sizes",
    )
    parser.add_argument(
        "--scale_dir", metavar="FOLDER", help="where they are generated (the temporary folder)"
    )
    args = parser.parse_args(argv)
    unknown = [stage for stage in args.stages if stage not in STAGES]
    if unknown:
        parser.error(f"no stage {unknown[0]}: choose from {' '.join(STAGES)}")
    if args.scale and min(args.scale) < 10:
        parser.error(f"--scale {min(args.scale)}: expected at least 10 images")
    args.number = args.number or (64 if args.quick else 256)
    args.rounds = args.rounds or (3 if args.quick else 5)
    args.scale_steps = (1, 4) if args.quick else (5, 40)  # that warm up, that count
    args.search = 200 if args.quick else 1000  # images to search, captions to score

    import torch

    import experiment_utils
    import runtime

    runtime.keep_freed_memory()  # for both ways: the program does so on a CPU
    report = {}
    if args.scale:
        try:
            report["scale"] = scale(args)
        except OSError as error:
            parser.error(str(error))
    for stage in args.stages or ([] if args.scale else STAGES):
        report[stage] = STAGES[stage](args)
        if not args.json:
            figures, (low, high) = report[stage], report[stage]["spread"]
            print(f"{stage:16} {figures['ratio']:6.1f}x [{low:.1f}, {high:.1f}]  {figures['ours']:9,.1f} "
                  f"against {figures['plain']:,.1f} {figures['unit']}", flush=True)  # fmt: skip
            if "differing" in figures:
                share = f"{figures['differing']:6.0%} of captions in {figures['precision']}"
                print(f"{'':16} {share} differ from the plain way's", flush=True)
    if args.stages or not args.scale:
        report["ceilings"] = ceilings()
    report |= {
        "encoder": args.encoder, "threads": torch.get_num_threads(),
        "commit": experiment_utils.git_info()["commit"], "environment": experiment_utils.environment(),
    }  # fmt: skip
    for name, value in () if args.json else report.get("ceilings", {}).items():
        print(f"{name}: {value:,.0f}")
    if args.chart and report.keys() & STAGES.keys():
        draw_chart(report, args.chart)
    if args.json:
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    sys.exit(main())
