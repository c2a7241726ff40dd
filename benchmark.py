"""Time what the README says is fast against the plain way of doing it, in turn, in one run.

    python benchmark.py                          # drawn pictures, generated features; minutes
    python benchmark.py --quick --json           # under two minutes, one JSON object
    python benchmark.py --device cuda train_lstm train_attention
    python benchmark.py --images data/flickr8k/Images --encoder mobilenet_v2 --chart benchmark.png
    python benchmark.py --scale 1000 8000 31000 123000   # what training costs; 16 GB of disk
    python benchmark.py --device cuda --epochs 15        # whole runs of Flickr8k's shape; 2 GB of disk

encode           images per second into a fresh feature cache
                 against float32, one image at a time, no cache; and the network's speed by batch
train_lstm       captions per second of a training step
                 against float32, 32 captions, no image shared, and the vocabulary and the features
                 projected at every step; and the share of the device's peak in matrix products
train_attention  the same, and against the structure that tutorials have; 7 x 7 x 2048 features, all
                 other widths 512; --attention additive
train_adaptive   the same with --attention adaptive
beam_search      images per second, beam 5
                 against float32, one image at a time, the same way
gpt2_search      the same with --decoder gpt2 of 6 layers of 384 units; against transformers'
                 generate, one image at a time, and all together; and the memory that each took
metrics          captions per second, references counted once
                 against counting the references at every scoring

The ways alternate (A B A B ...). `ratio` is the median over the rounds, `spread` its range. Ours and
the plain way run the same model on the same batches, and the plain ways' results are tested to
equal ours (tests/test_benchmark.py). The tutorials' way has a model of its own: what people train
who follow one.

--scale starts the program's own training, a fresh process each, on generated datasets: five
captions an image, a feature cache that is filled. Start-up lasts from the process's start to the
end of its first step; private memory is the most that no file backs (RssAnon), mapped memory what
the system keeps of the cache's file for it.

--epochs times the program's own command from a filled cache of generated features, a process for
each decoder: imports, training, validation with beam search, checkpoints and plots.
"""

import argparse
import contextlib
import csv
import ctypes
import functools
import io
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

CHANNELS, CELLS, WIDTH = 2048, 49, 512  # ResNet50's grid
VOCABULARY = 2539  # Flickr8k's
SHARED, PLAIN = 128, 32  # captions per step: ours, the textbook's
KINDS = ("lstm", "attention")  # decoders of --scale and --epochs: one reads means, one grids
SCALE_CHANNELS = 1280  # MobileNetV2's
ENCODING_BATCHES = (8, 16, 32, 64, 128)
GPT2 = {"gpt2_width": 384, "gpt2_layers": 6, "gpt2_heads": 6}
OTHER_WAYS = {  # beside the plain way
    "tutorial": "the structure that tutorials have",
    "in_batches": "generate with all images together",
}
BEAM = {"beam_size": 5, "min_length": 9, "max_length": 25}  # as long as Flickr8k's captions are


# ------------------------------------------------------------------------------------------ in turn


def seconds(function):
    """Wall time of one call, and of what it left to the GPU."""
    wait_for_gpu()
    started = time.perf_counter()
    function()
    wait_for_gpu()
    return time.perf_counter() - started


def wait_for_gpu():
    """Does nothing where none is in use."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def compare(rounds, unit, ours, plain, **others):
    """Time all ways in turn, after one call of each that does not count.

    A way is (function, units of work per call). `others` are reported below their names.
    """
    ways = {"ours": ours, "plain": plain, **others}
    for function, _ in ways.values():
        function()
    speeds = [
        {name: amount / seconds(function) for name, (function, amount) in ways.items()}
        for _ in range(rounds)
    ]
    result = {"ours": statistics.median(each["ours"] for each in speeds), "unit": unit}
    return result | against("plain", speeds) | {name: against(name, speeds) for name in others}


def against(name, speeds):
    """How many times as fast as this way ours is."""
    ratios = sorted(each["ours"] / each[name] for each in speeds)
    return {
        "ratio": statistics.median(ratios),
        name: statistics.median(each[name] for each in speeds),
        "spread": [ratios[0], ratios[-1]],
    }


def encode(args):
    """Pictures into an empty cache, reading, decoding and writing counted."""
    import baselines
    import image_loading

    with tempfile.TemporaryDirectory() as folder:
        images = args.images or draw_pictures(Path(folder, "sample"), args.number)
        paths = image_loading.pictures_in(images)[: args.number]
        encoder, textbook = open_encoders(args)
        few = paths[: max(1, len(paths) // 4)]
        result = compare(
            args.rounds,
            "images per second",
            (lambda: fill_fresh_cache(encoder, paths, args), len(paths)),
            (lambda: baselines.plain_encoding(textbook, few), len(few)),
        )
    batches = [batch for batch in ENCODING_BATCHES if batch <= args.number]
    rates = {batch: encoding_rate(encoder, batch, args.rounds) for batch in batches}
    return result | {"precision": args.hardware.precision, "by_batch": rates}


def encoding_rate(encoder, batch, rounds):
    """Images per second of the network and the copy to its device, so many images at a time."""
    import torch

    images = torch.randint(
        0, 256, (batch, 3, encoder.image_size, encoder.image_size), dtype=torch.uint8
    )
    with torch.inference_mode():
        return per_second(batch, lambda: encoder(images), rounds)


def draw_pictures(folder, number):
    """The folder of the sample dataset's first pictures."""
    import download_datasets

    return download_datasets.draw_sample_dataset(folder, num_images=number) / "Images"


def open_encoders(args):
    """The same encoder twice: in this machine's precision, and in float32."""
    import download_datasets
    import flickr_image_caption as program

    weights = download_datasets.load_encoder_weights(args.encoder, args.encoder_weights, 0)
    named = args.encoder, weights, args.encoder_weights
    encoders = program.Encoder(*named, args.hardware.precision), program.Encoder(*named)
    return [encoder.to(args.hardware.device) for encoder in encoders]


def fill_fresh_cache(encoder, paths, args):
    """Encode pictures as the program does before training."""
    import torch

    import feature_cache

    silent = contextlib.redirect_stderr(io.StringIO())  # no progress bar
    with tempfile.TemporaryDirectory() as cache, silent:
        feature_cache.FeatureSource(
            encoder,
            paths,
            pooled=False,
            cache_dir=cache,
            dtype=torch.float16,
            num_workers=args.num_workers,
            device=args.hardware.device,
        )


def generated(captions, seed=0):
    """features (N, P, F) and Padded captions: five of each image.

    They are as long as Flickr8k's, 12 +- 3.5 tokens.
    """
    import torch

    import baselines
    from caption_batches import Vocabulary

    generator = torch.Generator().manual_seed(seed)
    image_index = torch.arange(captions) // 5
    features = torch.rand(int(image_index[-1]) + 1, CELLS, CHANNELS, generator=generator)
    lengths = (12 + 3.5 * torch.randn(captions, generator=generator)).round().clamp(5, 25).long()
    tokens = torch.randint(4, VOCABULARY, (captions, int(lengths.max()) + 1), generator=generator)
    tokens[:, 0] = Vocabulary.sos
    tokens[torch.arange(captions), lengths] = Vocabulary.eos
    return features, baselines.Padded(tokens, lengths, image_index)


def packed(padded):
    """The same captions as a batch of the program's."""
    from caption_batches import CaptionBatches

    captions = zip(padded.captions, padded.lengths, strict=True)
    words = [caption[1:length].tolist() for caption, length in captions]
    images = [words[first : first + 5] for first in range(0, len(words), 5)]
    batches = CaptionBatches(images, len(words), int(padded.lengths.max()), seed=0)
    return next(batches.epoch(0, shuffle=False))


DECODERS = {  # what is typed for each that is timed
    "lstm": ("--decoder", "lstm"),
    "attention": ("--decoder", "attention"),
    "adaptive": ("--decoder", "attention", "--attention", "adaptive"),
}


def new_run(kind, hardware, *typed):
    """What a training step needs, untrained: always the same weights. `typed`: more options."""
    import torch

    import caption_options
    import flickr_image_caption as program

    # embedding and attention are 512 by default
    sizes = [*DECODERS[kind], "--num_layers", "1", "--hidden_size", str(WIDTH)]
    options = caption_options.parse_args([*sizes, *typed])
    torch.manual_seed(0)
    decoder = program.build_decoder(options.as_dict(), CHANNELS, VOCABULARY).to(hardware.device)
    encoder = SimpleNamespace(tail=torch.nn.Identity())
    captioner = program.Captioner(encoder, decoder, None, hardware)
    plan = program.make_plan(options, SimpleNamespace(num_batches=1))
    return SimpleNamespace(
        options=options,
        captioner=captioner,
        objective=program.CrossEntropyObjective(options.training),
        state=program.new_state(captioner, options, plan, order="any"),
        model=decoder,
        grids=encoder.tail,
        parameters=[*decoder.parameters()],
    )


def train(kind, args):
    """One training step, dropout on."""
    import torch

    import baselines
    import flickr_image_caption as program

    device, precision = args.hardware.device, args.hardware.precision
    ours = new_run(kind, args.hardware)
    plain = new_run(kind, args.hardware._replace(precision="float32"))
    for run in (ours, plain):
        run.captioner.decoder.train()
    (features, shared), (few_features, few) = generated(SHARED), generated(PLAIN)
    features, few_features = features.to(device), few_features.to(device)
    shared, few = packed(shared), baselines.Padded(*(tensor.to(device) for tensor in few))
    others = {}
    if kind != "lstm":
        tutorial = baselines.tutorial_decoder(CHANNELS, WIDTH, VOCABULARY).to(device)
        optimizer = torch.optim.Adam(tutorial.parameters(), lr=4e-4)
        step = functools.partial(baselines.tutorial_step, tutorial, optimizer, few_features, few)
        others["tutorial"] = step, PLAIN
    result = compare(
        args.rounds * 3,
        "captions per second",
        (lambda: program.train_step(ours, features, shared), SHARED),
        (lambda: baselines.plain_step(plain, few_features, few), PLAIN),
        **others,
    )
    gflop, peak = step_gflop(kind), matrix_rate(device, precision)
    return result | {
        "precision": precision,
        "gflop_per_step": gflop,
        "peak_gflop_per_second": peak,
        "share_of_peak": gflop * result["ours"] / SHARED / peak,
    }


def step_gflop(kind):
    """What a training step multiplies and adds, counted on the CPU: fused layers hide it on CUDA."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import flickr_image_caption as program
    from runtime import Hardware

    run = new_run(kind, Hardware(torch.device("cpu"), "float32"))
    run.captioner.decoder.train()
    features, captions = generated(SHARED)
    with FlopCounterMode(display=False) as counter:
        program.train_step(run, features, packed(captions))
    return counter.get_total_flops() / 1e9


def matrix_rate(device, precision):
    """GFLOP/s of one large matrix product. In float32 on CUDA that is TF32, as in training."""
    import torch

    side = 8192 if device.type == "cuda" else 2048
    dtype = getattr(torch, precision)
    left, right = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    return per_second(2 * side**3 / 1e9, lambda: left @ right)


def searcher(hardware):
    """A decoder and its vocabulary's ids.

    It is untrained, but decided enough for captions to differ and to end.
    """
    import torch

    from caption_batches import Vocabulary

    decoder = new_run("attention", hardware).captioner.decoder
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3)
        decoder.head.bias[Vocabulary.eos] += 4
    return decoder.eval(), Vocabulary(Vocabulary.SPECIALS)


def beam_search(args):
    """Features to captions, beam 5."""
    import torch

    import baselines
    import caption_decoding
    import flickr_image_caption as program

    decoder, vocabulary = searcher(args.hardware)
    features = torch.rand(args.search, CELLS, CHANNELS, generator=torch.Generator().manual_seed(0))
    features = features.to(args.hardware.device)
    few = features[: max(1, len(features) // 50)]

    def ours():
        hypotheses = []
        for chunk in features.split(program.DECODE_CHUNK):
            with args.hardware.autocast():
                hypotheses += caption_decoding.generate(decoder, chunk, vocabulary, **BEAM)
        return [best.tokens for (best,) in hypotheses]

    def plain():
        return [baselines.plain_beam_search(decoder, image, vocabulary, **BEAM)[0] for image in few]

    ways = (ours, len(features)), (plain, len(few))
    result = compare(args.rounds, "images per second", *ways)
    differing = sum(one != other for one, other in zip(ours(), plain(), strict=False)) / len(few)
    return result | {"precision": args.hardware.precision, "differing": differing}


def gpt2_search(args):
    """Features to captions, beam 5, by --decoder gpt2 and by transformers' generate."""
    import torch

    import baselines
    import caption_decoding
    import clip_gpt2
    from caption_batches import Vocabulary

    torch.manual_seed(0)
    decoder = clip_gpt2.GPT2Decoder(CHANNELS, VOCABULARY, **GPT2).to(args.hardware.device).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3)  # decided enough for captions to differ
    features = torch.rand(args.search // 10, CELLS, CHANNELS).to(args.hardware.device)
    model, few = baselines.plain_gpt2(decoder), features[: max(1, len(features) // 10)]

    def ours():
        return [
            image[0].tokens
            for image in caption_decoding.generate(decoder, features, Vocabulary, **BEAM)
        ]

    def plain(images=few, size=1):
        chunks = images.split(size)
        return [
            c for chunk in chunks for c in baselines.plain_generate(model, decoder, chunk, **BEAM)
        ]

    whole = functools.partial(plain, features, len(features))
    ways = {"ours": ours, "plain": plain, "in_batches": whole}
    amounts = {"ours": len(features), "plain": len(few), "in_batches": len(features)}
    pairs = {name: (way, amounts[name]) for name, way in ways.items()}
    result = compare(args.rounds, "images per second", **pairs)
    differing = sum(one != other for one, other in zip(ours(), whole(), strict=True))
    peaks = {name: peak_mib(way, args.hardware.device) for name, way in ways.items()}
    return result | {"precision": "float32", "differing": differing / len(features), "peaks": peaks}


def peak_mib(function, device):
    """MiB that a call takes at most, beyond what is held before it; None where the system does not tell."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    status, peak = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not peak.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would hide what the call takes
    peak.write_text("5")  # the highest so far is what is held now
    held = kib_of(status, "VmRSS")
    function()
    return (kib_of(status, "VmHWM") - held) / 2**10


def kib_of(status, name):
    """A number of /proc/PID/status."""
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def metrics(args):
    """BLEU, ROUGE-L, CIDEr and the shares of 1,000 captions.

    Each is one of its image's five references, changed a little.
    """
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
        args.rounds,
        "captions per second",
        (lambda: scorer.score(captions), args.search),
        (lambda: metrics_utils.CaptionScorer(references).score(captions), args.search),
    )


def ceilings(hardware):
    """What this machine can do at best, medians of nine.

    Matrix products and memory of the device, JPEG decoding of a core. A precision that the program
    would not take by itself is left out: bfloat16 is 50 times slower where it is emulated.
    """
    import torch

    device, report = hardware.device, {}
    for precision in dict.fromkeys(["float32", hardware.precision]):
        report[f"{precision} matrix product, GFLOP/s"] = matrix_rate(device, precision)
    source = torch.rand(64 * 2**20, device=device)
    target = torch.empty_like(source)
    report["memory copy, GB/s read and written"] = per_second(
        2 * source.nbytes / 1e9, lambda: target.copy_(source)
    )
    report["JPEG 500 x 375 to 224 x 224, images/s and core"] = jpeg_rate()
    return report


def per_second(work, function, rounds=9):
    """Units of work per second; `work` is what one call does."""
    function()
    return work / statistics.median(seconds(function) for _ in range(rounds))


def jpeg_rate():
    """Pictures of blurred noise that one process decodes per second."""
    import torch
    from PIL import Image

    import image_loading

    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (14, 14, 3), dtype=torch.uint8, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, "picture.jpg")
        Image.fromarray(noise.numpy()).resize((500, 375)).save(picture, quality=90)
        return per_second(1, lambda: image_loading.load_image(picture, 224))


STAGES = {
    "encode": encode,
    "train_lstm": lambda args: train("lstm", args),
    "train_attention": lambda args: train("attention", args),
    "train_adaptive": lambda args: train("adaptive", args),
    "beam_search": beam_search,
    "gpt2_search": gpt2_search,
    "metrics": metrics,
}


# ------------------------------------------------------------------------------- whole training runs


def run_options(folder, kind, encoder="mobilenet_v2", device="cpu"):
    """The command line of a training run on the generated dataset in a folder."""
    return [
        "--dataset_type", "custom",
        "--image_dir", f"{folder}/Images",
        "--captions_file", f"{folder}/captions.csv",
        "--cache_dir", f"{folder}/{kind}",
        "--encoder", encoder,
        "--encoder_weights", "random",
        "--decoder", kind,
        "--num_layers", "1",
        "--hidden_size", str(WIDTH),
        "--device", device,
        "--freq_threshold", "1",  # as many words for all sizes
    ]  # fmt: skip


def write_captions(folder, images):
    """Empty image files and five captions each: 12 +- 3.5 words.

    Words are drawn by Zipf's law from VOCABULARY words of usual lengths.
    """
    draw, letters = random.Random(0), "etaoinshrdlucmwfgyp"
    words = ["".join(draw.choices(letters, k=2 + draw.randrange(8))) for _ in range(VOCABULARY)]
    sums = list(itertools.accumulate(1 / rank for rank in range(1, VOCABULARY + 1)))
    (folder / "Images").mkdir()
    with (folder / "captions.csv").open("w") as file:
        file.write("image,caption\n")
        for number in range(images):
            name = f"{number:07}_0123456789.jpg"
            (folder / "Images" / name).touch()
            for _ in range(5):
                length = min(25, max(5, round(draw.gauss(12, 3.5))))
                caption = " ".join(draw.choices(words, cum_weights=sums, k=length)).capitalize()
                file.write(f"{name},{caption} .\n")


def fill_cache(folder, typed):
    """Leave the feature cache that a run with these options would leave; returns bytes on disk."""
    import torch

    import feature_cache

    reads_grid, channels, file = make_empty_cache(typed)
    cells, dtype = (CELLS, torch.float16) if reads_grid else (1, torch.float32)
    block = torch.rand(512, cells, channels, generator=torch.Generator().manual_seed(0))
    block = block.to(dtype)
    stamps, _ = feature_cache._stamps(sorted((folder / "Images").iterdir()))
    with feature_cache._Store(feature_cache.FeatureFile(file, block[0].shape, dtype)) as store:
        for start in range(0, len(stamps), 256):
            chunk = stamps[start : start + 256]
            offset = 7 * start // 256 % 256  # not always the same features
            store.append(chunk, block[offset : offset + len(chunk)].numpy())
    return file.stat().st_size


def make_empty_cache(typed):
    """Whether the decoder reads grids, its features' channels, and the file of its empty cache."""
    import torch

    import caption_options
    import feature_cache
    import flickr_image_caption as program
    import runtime

    options = caption_options.parse_args(typed)
    hardware = runtime.resolve_hardware(options.run.device, options.run.precision)
    reads_grid = program.decoder_class(options.as_dict()).reads_grid
    encoder = program.open_encoder(options, hardware)
    feature_cache.FeatureSource(
        encoder,
        [],
        pooled=not reads_grid,
        cache_dir=options.features.cache_dir,
        dtype=getattr(torch, options.features.cache_dtype),
        num_workers=0,
        device=hardware.device,
    )
    (file,) = Path(options.features.cache_dir).glob("*/features.*")
    return reads_grid, encoder.channels, file


def start_and_step(typed, warm_up, steps, started):
    """In a fresh process: start the training that `typed` asks for, take some steps, print times.

    They are seconds, as JSON. `started`: the clock when the process was started. The first
    `warm_up` steps do not count.
    """
    import caption_options
    import flickr_image_caption as program
    import runtime

    imported = time.time()
    opening = time_cache_openings()
    options = caption_options.parse_args(typed)
    hardware = runtime.resolve_hardware(options.run.device, options.run.precision)
    with contextlib.redirect_stdout(sys.stderr):
        run = program.set_up(options, hardware)
    ready = time.time()
    cache = sum(opening)
    ends, captions = take_steps(run, warm_up + steps)
    per_caption = (ends[-1] - ends[warm_up - 1]) / sum(captions[warm_up:])
    training_captions = len(run.training.batches.lengths)
    report = {
        "startup_seconds": ends[0] - started,
        "import_seconds": imported - started,
        "cache_seconds": cache,
        "data_and_model_seconds": ready - imported - cache,
        "first_step_seconds": ends[0] - ready,
        "ms_per_caption": 1000 * per_caption,
        "epoch_seconds": per_caption * training_captions,
        "training_captions": training_captions,
        "words": len(run.captioner.vocabulary),
        "precision": hardware.precision,
    }
    print(json.dumps(report))


def time_cache_openings():
    """From now on the seconds of each opening of a feature cache come into the list returned."""
    import feature_cache

    opening, open_cache = [], feature_cache.cached_features

    def timed_open(*args, **options):
        began = time.time()
        opened = open_cache(*args, **options)
        opening.append(time.time() - began)
        return opened

    feature_cache.cached_features = timed_open
    return opening


def take_steps(run, number):
    """Train for so many steps -> the clock when each ended, and its number of captions."""
    import flickr_image_caption as program

    ends, captions = [], []
    while True:
        for batch, features in program.begin_epoch(run):
            program.train_step(run, features, batch)
            ends.append(time.time())
            captions.append(batch.num_captions)
            if len(ends) == number:
                return ends, captions
        run.state.loop["epoch"] += 1


def measure(typed, warm_up, steps):
    """`start_and_step` in a process of its own, and its peak memory in MiB, read every 20 ms."""
    call = f"import benchmark; benchmark.start_and_step({typed}, {warm_up}, {steps}, {time.time()})"
    command, here = [sys.executable, "-c", call], Path(__file__).parent
    peaks = {"RssAnon": 0, "RssFile": 0}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, cwd=here, stdout=output, stderr=errors)
        status = Path(f"/proc/{child.pid}/status")
        while child.poll() is None:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            for name in peaks.keys() & fields.keys():  # one that has ended has no memory
                peaks[name] = max(peaks[name], int(fields[name].split()[0]) / 1024)
            time.sleep(0.02)
        output.seek(0)
        errors.seek(0)
        if child.returncode:
            raise RuntimeError(errors.read())
        costs = json.loads(output.read())
    return costs | {"peak_private_mib": peaks["RssAnon"], "peak_mapped_mib": peaks["RssFile"]}


def scale(args):
    """{images: {decoder: what its training costs}} of generated datasets.

    Raises: OSError if the disk is too small.
    """
    check_disk("--scale", max(args.scale), SCALE_CHANNELS, args.scale_dir)
    report = {}
    for images in args.scale:
        with tempfile.TemporaryDirectory(dir=args.scale_dir) as folder:
            write_captions(Path(folder), images)
            for kind in KINDS:
                typed = run_options(folder, kind)
                size = fill_cache(Path(folder), typed)
                costs = measure(typed, *args.scale_steps)
                costs["cache_gb"] = size / 1e9
                report.setdefault(str(images), {})[kind] = costs
                if not args.json:
                    print_costs(images, kind, costs)
    return report


def check_disk(flag, images, channels, folder):
    """Say what a dataset takes in a folder, or the temporary one. Raises: OSError if not free."""
    folder = folder or tempfile.gettempdir()
    features = (CELLS + 2) * channels * 2  # bytes of a grid, and of a mean in float32
    needed = images * (features + 1200)  # and captions, index lines, image files
    free = shutil.disk_usage(folder).free
    line = f"{images:,} images need {needed / 1e9:.2f} GB in {folder}"
    if needed > free:
        raise OSError(
            f"{flag}: {line}, {free / 1e9:.2f} GB are free: give --scale_dir or fewer images"
        )
    print(f"{line}; {free / 1e9:.2f} GB are free", file=sys.stderr)


def print_costs(images, kind, costs):
    """One line of --scale."""
    print(
        f"scale {images:7,} {kind:10} start-up {costs['startup_seconds']:.1f} s "
        f"(import {costs['import_seconds']:.1f}, cache {costs['cache_seconds']:.1f}, "
        f"data and model {costs['data_and_model_seconds']:.1f}, "
        f"first step {costs['first_step_seconds']:.1f}); "
        f"{costs['ms_per_caption']:.2f} ms per caption, epoch {costs['epoch_seconds']:,.0f} s; "
        f"private {costs['peak_private_mib']:,.0f} MiB, "
        f"mapped {costs['peak_mapped_mib']:,.0f} MiB; "
        f"cache {costs['cache_gb']:.2f} GB",
        flush=True,
    )


def epochs(args):
    """{decoder: what a run of --epochs takes} on a generated dataset of Flickr8k's shape.

    Three quarters of the images are for training, an eighth for validation.
    Raises: OSError if the disk is too small.
    """
    images, report = args.train_images * 4 // 3, {}
    check_disk("--epochs", images, CHANNELS, args.scale_dir)
    with tempfile.TemporaryDirectory(dir=args.scale_dir) as folder:
        write_captions(Path(folder), images)
        write_split_lists(Path(folder), args.train_images)
        for kind in KINDS:
            typed = run_options(folder, kind, "resnet50", args.device)
            fill_cache(Path(folder), typed)
            report[kind] = time_run(folder, kind, [*typed, "--epochs", str(args.epochs)])
            if not args.json:
                print_run(kind, report[kind])
    return report


def write_split_lists(folder, train_images):
    """Name the images of each split as Flickr8k's lists do."""
    names = sorted(path.name for path in (folder / "Images").iterdir())
    val = train_images + (len(names) - train_images) // 2
    splits = {"train": names[:train_images], "dev": names[train_images:val], "test": names[val:]}
    for split, chosen in splits.items():
        (folder / f"{split}Images.txt").write_text("\n".join(chosen))


def time_run(folder, kind, typed):
    """Run the program's training in a process of its own. Raises: RuntimeError with its messages."""
    program = Path(__file__).with_name("flickr_image_caption.py")
    models = Path(folder, "models", kind)
    files = ["--model_save_dir", str(models), "--keep_checkpoints", "1", "--num_workers", "0"]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(program), *typed, *files], capture_output=True, text=True, check=False
    )
    elapsed_seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(done.stderr)
    (table,) = models.glob("**/metrics.csv")
    with table.open() as file:
        each = [float(row["epoch_time_seconds"]) for row in csv.DictReader(file)]
    return {
        "seconds": elapsed_seconds,
        "epochs": len(each),
        "epoch_seconds": statistics.median(each),
        "outside_epochs_seconds": elapsed_seconds - sum(each),
    }


def print_run(kind, costs):
    """One line of --epochs."""
    print(
        f"{costs['epochs']} epochs {kind:10} {costs['seconds']:.1f} s: an epoch with its validation "
        f"{costs['epoch_seconds']:.2f} s, start-up and files "
        f"{costs['outside_epochs_seconds']:.1f} s in all",
        flush=True,
    )


# --------------------------------------------------------------------------------------- the report


PLAIN_COLOUR, TUTORIAL_COLOUR = "#3b6ea5", "#d58a3b"


def draw_chart(report, path):
    """A bar per stage and baseline: how many times its speed ours is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    bars = chart_bars(report)[::-1]
    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.4 * len(bars)), layout="constrained")
    for row, (_, figures, text, colour) in enumerate(bars):
        low, high = ([abs(figures["ratio"] - end)] for end in figures["spread"])
        bar = {"color": colour, "height": 0.6, "ecolor": "#555555"}
        axes.barh(row, figures["ratio"], xerr=[low, high], **bar)
        axes.annotate(text, (figures["spread"][1], row), va="center", fontsize=9)
    axes.axvline(1, color="#555555", linewidth=0.8)
    axes.set(
        yticks=range(len(bars)),
        yticklabels=[label for label, *_ in bars],
        xlabel="times the speed of the other way, timed in turn",
        xlim=(0, 1.7 * max(figures["spread"][1] for _, figures, *_ in bars)),
    )
    colours = {"plain way": PLAIN_COLOUR, "structure of tutorials": TUTORIAL_COLOUR}
    handles = [patches.Patch(color=colour, label=label) for label, colour in colours.items()]
    axes.legend(handles=handles, loc="lower right", frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)


def chart_bars(report):
    """(label, figures, text, colour) of each bar, the first stage first."""
    bars = []
    for name in [name for name in STAGES if name in report]:
        stage = report[name]
        text = f" {stage['ratio']:.1f}x   {stage['ours']:,.0f} {stage['unit']}"
        bars.append((name.replace("_", " "), stage, text, PLAIN_COLOUR))
        if "tutorial" in stage:
            tutorial = stage["tutorial"]
            bars.append(("", tutorial, f" {tutorial['ratio']:.1f}x", TUTORIAL_COLOUR))
    return bars


def print_stage(name, figures):
    """A stage's line, and one for whatever else it measured."""
    low, high = figures["spread"]
    print(
        f"{name:16} {figures['ratio']:6.1f}x [{low:.1f}, {high:.1f}]  {figures['ours']:9,.1f} "
        f"against {figures['plain']:,.1f} {figures['unit']}",
        *other_figures(figures),
        sep=f"\n{'':17}",
        flush=True,
    )


def other_figures(figures):
    """Lines for what only some stages measure."""
    lines, precision = [], figures.get("precision")
    for name, what in OTHER_WAYS.items():
        if name in figures:
            way = figures[name]
            low, high = way["spread"]
            ratio = f"{way['ratio']:6.1f}x [{low:.1f}, {high:.1f}]"
            lines.append(f"{ratio}  against {way[name]:,.1f} of {what}")
    if any(figures.get("peaks", {}).values()):  # else the system does not tell them
        each = (f"{name} {mib:,.0f}" for name, mib in figures["peaks"].items())
        lines.append(f"peak memory, MiB: {', '.join(each)}")
    if "share_of_peak" in figures:
        lines.append(
            f"{figures['share_of_peak']:6.0%} of the peak in {precision}, "
            f"{figures['peak_gflop_per_second']:,.0f} GFLOP/s; "
            f"{figures['gflop_per_step']:,.1f} GFLOP a step"
        )
    if figures.get("by_batch"):
        rates = figures["by_batch"]
        each = ", ".join(f"{batch}: {rate:,.0f}" for batch, rate in rates.items())
        lines.append(f"the network by images at a time: {each}; best {max(rates, key=rates.get)}")
    if "differing" in figures:
        share = f"{figures['differing']:6.0%} of captions in {precision}"
        lines.append(f"{share} differ from the plain way's")
    return lines


def build_parser():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("stages", nargs="*", metavar="STAGE", help=f"some of {' '.join(STAGES)} (all)")
    add("--quick", action="store_true", help="fewer pictures and rounds: under two minutes")
    add("--json", action="store_true", help="print one JSON object")
    add("--chart", type=Path, metavar="FILE", help="also draw the ratios, as PNG or PDF")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of both ways (%(default)s)")
    add("--images", type=Path, help="folder of pictures (drawn ones)")
    add("--encoder", default="resnet50", help="torchvision model (%(default)s)")
    add("--encoder_weights", default="random", help="random, imagenet or a file (%(default)s)")
    add("--number", type=int, help="pictures to encode (256; --quick 64)")
    add("--rounds", type=int, help="of each way, in turn (5; --quick 3)")
    add("--num_workers", type=int, default=0, help="processes that decode pictures (%(default)s)")
    sizes = "also, or only, datasets of these sizes"
    add("--scale", type=int, nargs="+", metavar="IMAGES", help=sizes)
    add("--scale_dir", metavar="FOLDER", help="where they are generated (the temporary folder)")
    add("--epochs", type=int, metavar="N", help="also, or only, whole runs of N epochs")
    images = "training images of --epochs, five captions each (%(default)s)"
    add("--train_images", type=int, default=6000, metavar="N", help=images)
    return parser


def parse_args(argv=None):
    """What to measure and where; misuse exits with status 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    unknown = [stage for stage in args.stages if stage not in STAGES]
    if unknown:
        parser.error(f"no stage {unknown[0]}: choose from {' '.join(STAGES)}")
    if args.scale and min(args.scale) < 10:
        parser.error(f"--scale {min(args.scale)}: expected at least 10 images")
    if args.scale and args.device != "cpu":
        parser.error(f"--scale measures training on the CPU: leave --device {args.device} out")
    if args.epochs is not None and (args.epochs < 1 or args.train_images < 10):
        parser.error("--epochs takes at least 1 epoch and 10 --train_images")
    args.number = args.number or (64 if args.quick else 256)
    args.rounds = args.rounds or (3 if args.quick else 5)
    args.scale_steps = (1, 4) if args.quick else (5, 40)  # that warm up, that count
    args.search = 200 if args.quick else 1000  # images to search, captions to score

    import runtime

    try:  # prepares the machine for both ways as the program does
        args.hardware = runtime.resolve_hardware(args.device, "auto")
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv=None):
    """Time the stages; print one line for each, or one JSON object."""
    args = parse_args(argv)

    import torch

    import experiment_utils

    report, whole_runs = {}, {"scale": scale, "epochs": epochs}
    for name in [name for name in whole_runs if getattr(args, name)]:
        try:
            report[name] = whole_runs[name](args)
        except OSError as error:
            build_parser().error(str(error))
    stages = args.stages or ([] if report else STAGES)
    for stage in stages:
        report[stage] = STAGES[stage](args)
        if not args.json:
            print_stage(stage, report[stage])
    if stages:
        report["ceilings"] = ceilings(args.hardware)
    report |= {
        "encoder": args.encoder,
        "threads": torch.get_num_threads(),
        "commit": experiment_utils.get_git_info()["commit"],
        "environment": experiment_utils.environment(),
    }
    for name, value in () if args.json else report.get("ceilings", {}).items():
        print(f"{name}: {value:,.0f}")
    if args.chart and report.keys() & STAGES.keys():
        draw_chart(report, args.chart)
    if args.json:
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    sys.exit(main())
