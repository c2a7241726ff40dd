"""What a GPU computes and what it waits for, in under two minutes: `python -m pytest -m gpu`.

Every body takes its device and runs on the CPU, too: a machine without a GPU tests the tests. Two GPUs as one run are
in test_process_group.py.
"""

import contextlib
import json
import random

import pytest
import torch
from small_runs import CPU, make_run
from test_end_to_end import DECODERS, load, program, run_dir, succeed, train
from test_without_a_gpu import source

import caption_batches
import caption_decoding
import feature_cache
import flickr_image_caption as fic
import image_loading
import runtime
from caption_options import parse_args
from download_datasets import load_encoder_weights
from runtime import Hardware

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    ],
)
# Relative errors that are allowed; float32 is TF32 on CUDA. A CPU's are a tenth of them.
PRECISIONS = {"float32": 0.005, "bfloat16": 0.05, "float16": 0.01}
WORDS, CHANNELS, CELLS = 300, 64, 49
ENCODER = "shufflenet_v2_x0_5"
on_each_device = pytest.mark.parametrize("device", ["cpu", CUDA])
of_each_kind = pytest.mark.parametrize("kind", DECODERS)
in_each_precision = pytest.mark.parametrize("precision", PRECISIONS)


@pytest.fixture(autouse=True)
def matrix_products(one_thread):
    """Those of `resolve_hardware` on CUDA, and afterwards the other tests'."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)
    if torch.cuda.is_initialized():
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def waits_for_nothing(device):
    """On CUDA, torch raises RuntimeError where an operation in the block synchronises."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def hardware(device, precision):
    """Also float16 on a CPU, which `resolve_precision` refuses to users."""
    return Hardware(torch.device(device), precision)


def new_run(kind, place, *typed):
    """A run of two layers before its first step: always the same weights."""
    sizes = [
        "--embed_size",
        "64",
        "--hidden_size",
        "64",
        "--num_layers",
        "2",
        "--learning_rate",
        "0.01",
    ]
    sizes += ["--attention_dim", "32"] if kind != "lstm" else []
    options = parse_args([*DECODERS[kind].split(), *sizes, *typed])
    torch.manual_seed(0)
    decoder = fic.build_decoder(options.as_dict(), CHANNELS, WORDS).to(place.device)
    return make_run(decoder, options, place)


def some_captions(images=8):
    """A batch of five captions an image, and features of all images (N, P, F)."""
    draw = random.Random(0)
    captions = [
        [draw.choices(range(4, WORDS), k=draw.randrange(3, 15)) for _ in range(5)]
        for _ in range(images)
    ]
    (batch,) = caption_batches.CaptionBatches(captions, 5 * images, 20, seed=0).epoch(0)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(images, 1, CHANNELS, generator=generator)
    return batch, centres + torch.randn(images, CELLS, CHANNELS, generator=generator)


def stepped(kind, place):
    """A run after one step without dropout -> it, the loss in nats, and how far its weights moved."""
    run = new_run(kind, place, "--drop_prob", "0", "--label_smoothing", "0.1")
    batch, features = some_captions()
    before = [weight.detach().clone() for weight in run.model.parameters()]
    nats = fic.train_step(run, features[batch.image_rows].to(place.device), batch)
    moved = [(new.detach() - old).cpu() for new, old in zip(run.model.parameters(), before)]  # noqa: B905
    return run, float(nats), moved


# ------------------------------------------------------------------------------------------ training


@on_each_device
@in_each_precision
@of_each_kind
def test_a_training_step_is_the_cpus_in_float32(kind, precision, device):
    """Loss, gradients (unscaled and clipped), and what the optimizer makes of gradients that are not near 0."""
    tolerance = PRECISIONS[precision]
    exact, exact_nats, exact_moved = stepped(kind, CPU)
    run, nats, moved = stepped(kind, hardware(device, precision))
    assert nats == pytest.approx(exact_nats, rel=tolerance)
    expected = dict(exact.model.named_parameters())
    norm = torch.cat([weight.grad.flatten() for weight in expected.values()]).norm()
    for number, (name, weight) in enumerate(run.model.named_parameters()):
        gradient = expected[name].grad
        error = (weight.grad.cpu() - gradient).norm()
        assert error <= 2 * tolerance * gradient.norm() + 1e-3 * tolerance * norm, name
        clear = gradient.abs() > 0.2 * gradient.abs().max()
        difference = moved[number][clear] - exact_moved[number][clear]
        assert difference.abs().max() <= 0.05 * 0.01, name  # of the learning rate
    assert run.state.scaler.get_scale() == (2**16 if precision == "float16" else 1)


@on_each_device
@of_each_kind
def test_small_gradients_survive_in_bfloat16(kind, device):
    """Nothing scales them there; what computes in float16 under that name loses them."""
    gradients = []
    for weight in (1.0, 2.0**-24):
        run = new_run(kind, hardware(device, "bfloat16"), "--grad_clip", "0", "--drop_prob", "0")
        batch, features = some_captions()
        features = features[batch.image_rows].to(run.captioner.hardware.device)
        fic.train_step(run, features, batch._replace(weight=weight))
        gradients.append([parameter.grad / weight for parameter in run.model.parameters()])
    for whole, small in zip(*gradients, strict=True):
        assert (small - whole).norm() <= 0.02 * whole.norm()


@on_each_device
@of_each_kind
def test_a_float16_step_that_overflows_changes_nothing_and_halves_the_scale(kind, device):
    run = new_run(kind, hardware(device, "float16"))
    run.state.scaler = torch.amp.GradScaler(device, init_scale=2.0**32)
    batch, features = some_captions()
    features = features[batch.image_rows].to(device)
    before = [weight.detach().clone() for weight in run.model.parameters()]
    fic.train_step(run, features, batch)
    assert run.state.scaler.get_scale() == 2.0**31
    assert all(map(torch.equal, run.model.parameters(), before))
    for _ in range(20):
        nats = fic.train_step(run, features, batch)
    assert 2.0**12 <= run.state.scaler.get_scale() < 2.0**31
    assert torch.isfinite(nats)
    assert all(torch.isfinite(weight).all() for weight in run.model.parameters())
    assert not any(map(torch.equal, run.model.parameters(), before))


@on_each_device
@in_each_precision
@of_each_kind
def test_training_steps_wait_for_nothing(kind, precision, device):
    """All that a step can do, its features gathered from the device's memory; the first step sets up."""
    typed = [
        "--use_scheduler",
        "--scheduler_type",
        "one_cycle",
        "--label_smoothing",
        "0.1",
        "--drop_prob",
        "0.1",
    ]
    typed += ["--patch_dropout", "0.5"] if kind != "lstm" else []
    run = new_run(kind, hardware(device, precision), *typed)
    batch, features = some_captions()
    features = source(features.half().to(device))
    mirror, losses = torch.tensor([True, False] * 4), []
    for step in range(6):
        with waits_for_nothing(device) if step else contextlib.nullcontext():
            (read,) = features.stream([batch.image_rows], mirror)
            losses.append(fic.train_step(run, read, batch))
    assert float(losses[-1]) < 0.99 * float(losses[0])


@on_each_device
def test_a_copy_to_the_device_starts_from_pinned_memory_and_is_not_waited_for(device, monkeypatch):
    pinned, pin = [], torch.Tensor.pin_memory

    def pin_memory(tensor):
        pinned.append(pin(tensor))
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    values = torch.arange(1000)
    with waits_for_nothing(device):
        there = runtime.to_device(values, torch.device(device))
        again = runtime.to_device(there, torch.device(device))
    assert there.device.type == device and there.cpu().equal(values) and again is there
    assert [tensor.is_pinned() for tensor in pinned] == ([True] if device == "cuda" else [])


# ------------------------------------------------------------------------------------------ searching


class Watched:
    """A decoder from whose `step` on nothing may synchronise, until the search asks which images are done."""

    def __init__(self, decoder, device):
        self.decoder, self.device, self.stack = decoder, device, contextlib.ExitStack()
        self.start = decoder.start

    def step(self, tokens, state):
        self.stack.close()
        self.stack.enter_context(waits_for_nothing(self.device))
        return self.decoder.step(tokens, state)


@on_each_device
@pytest.mark.parametrize("search", [{"beam_size": 4, "length_penalty": 0.8}, {"algorithm": "greedy"},
                                    {"beam_size": 3, "no_repeat_ngram_size": 2, "min_length": 2}], ids=str)  # fmt: skip
@of_each_kind
def test_a_search_finds_the_cpus_captions_and_synchronises_every_8_steps_only(
    kind, search, device, monkeypatch
):
    torch.set_float32_matmul_precision("highest")
    decoder = new_run(kind, CPU).model.eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" not in name:  # gains of queries and keys would amplify rounding a hundredfold
                parameter.mul_(4)
        decoder.head.bias[caption_batches.Vocabulary.eos] += 3
    vocabulary = caption_batches.Vocabulary(caption_batches.Vocabulary.SPECIALS)
    _, features = some_captions()
    expected = caption_decoding.generate(decoder, features, vocabulary, max_length=20, **search)
    watched, asked, is_done = Watched(decoder.to(device), device), [], caption_decoding.is_done

    def may_synchronise(beams, *rest):
        watched.stack.close()
        asked.append(beams.tokens.size(-1) - 1)
        return is_done(beams, *rest)

    monkeypatch.setattr(caption_decoding, "is_done", may_synchronise)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = caption_decoding.generate(
            watched, features.to(device), vocabulary, max_length=20, fixed_shapes=True, **search
        )
    assert asked == [8, 16, 20][: len(asked)]
    for (one,), (other,) in zip(expected, found, strict=True):
        assert one.tokens == other.tokens
        assert one.log_prob == pytest.approx(other.log_prob, rel=1e-4, abs=1e-3)
        assert (one.attention is None) == (kind == "lstm")
        if one.attention is not None:
            torch.testing.assert_close(one.attention, other.attention, atol=1e-3, rtol=0)
    assert len({tuple(hypothesis.tokens) for (hypothesis,) in expected}) > 3


# ------------------------------------------------------------------------------- encoder and features


@on_each_device
@in_each_precision
@torch.inference_mode()
def test_the_encoders_features_are_the_cpus_in_float32(precision, device):
    named = ENCODER, load_encoder_weights(ENCODER, "random", 0), "random"
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 224, 224), dtype=torch.uint8, generator=generator)
    expected = fic.Encoder(*named)(images)
    encoder = fic.Encoder(*named, precision).to(device)
    features = encoder(images)
    assert features.device.type == device and features.dtype == torch.float32
    assert (features.cpu() - expected).norm() <= PRECISIONS[precision] * expected.norm()


@on_each_device
def test_features_in_the_devices_memory_are_those_on_the_disk(device, shop, tmp_path, monkeypatch):
    """Read in any order, none, some and all of them mirrored; where memory lacks they stay on the disk."""
    weights = load_encoder_weights(ENCODER, "random", 0)
    encoder = fic.Encoder(ENCODER, weights, "random").to(device)
    paths = image_loading.pictures_in(shop / "data/sample/Images")[:9]

    def open_source():
        return feature_cache.FeatureSource(
            encoder,
            paths,
            pooled=False,
            mirrored=True,
            cache_dir=tmp_path / "cache",
            dtype=torch.float16,
            num_workers=0,
            device=torch.device(device),
        )

    resident = open_source()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (0, 0))
    on_disk = open_source()
    assert isinstance(resident.features, torch.Tensor) == (device == "cuda")
    assert isinstance(on_disk.features, feature_cache.Features)
    rows = torch.tensor([3, 0, 8])
    for turned in ([], [0], [0, 3, 8]):
        mirror = torch.zeros(9, dtype=torch.bool).index_fill(0, torch.tensor(turned).long(), True)
        expected = on_disk.features[rows].float()
        expected[mirror[rows]] = on_disk.mirrored[rows[mirror[rows]]].float()
        for opened in (resident, on_disk):
            (features,) = opened.stream([rows], mirror)
            assert features.device.type == device
            assert features.cpu().equal(expected)


# ------------------------------------------------------------------------------------- the program


def resumed(folder, epoch, device):
    """The run that goes on for one epoch more."""
    outcome = program(
        "--resume", folder / f"model_epoch_{epoch}.pt", f"--epochs 1 --device {device}"
    )
    assert outcome.status == 0, outcome.err
    return run_dir(outcome)


@on_each_device
@of_each_kind
def test_a_run_goes_on_from_the_cpu_on_the_device_and_back(kind, device, shop):
    flags = f"{DECODERS[kind]} --drop_prob 0"
    unbroken = load(train(flags, "--device cpu --epochs 3") / "model_epoch_3.pt")
    first = train(flags, "--device cpu")
    last = resumed(resumed(first, 1, device), 2, "cpu")
    checkpoint = load(last / "model_epoch_3.pt")
    assert checkpoint["step"] == unbroken["step"] and len(checkpoint["history"]) == 3
    assert all(tensor.device.type == "cpu" for tensor in checkpoint["model"].values())
    for row, expected in zip(checkpoint["history"], unbroken["history"], strict=True):
        for name in ("train_loss", "val_loss", "learning_rate"):
            assert row[name] == pytest.approx(expected[name], rel=0.01), name


@on_each_device
@of_each_kind
def test_a_checkpoint_is_tested_on_the_device_as_on_the_cpu(kind, device, shop, tmp_path):
    written = {}
    for place in ("cpu", device):
        folder = tmp_path / f"on_{place}"
        typed = f"--mode test --precision float32 --device {place} --model_path"
        succeed(typed, shop / kind / "best.pt", "--output_dir", folder)
        rows = json.loads((folder / "test_captions.json").read_text())
        written[place] = {row["file_name"]: row for row in rows}
    differing = 0
    for name, row in written["cpu"].items():
        other = written[device][name]
        differing += row["caption"] != other["caption"]
        assert row["log_prob"] == pytest.approx(other["log_prob"], abs=0.05)
    assert len(written["cpu"]) == 4 and differing <= 1
