"""What a GPU's code paths can show without one: on a pretended device, a step mixes no devices and waits for nothing.

Tensors of class Away claim to be on torch's `meta` device, but hold their values on the CPU. An operation that mixes
them with the CPU's tensors fails, as it does on a GPU; copies to and fro are noted, because each makes a GPU wait.
"""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from small_runs import make_run
from test_end_to_end import DECODERS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import caption_batches
import caption_decoding
import feature_cache
import flickr_image_caption as program
import runtime
from caption_options import parse_args

pytestmark = pytest.mark.usefixtures("one_thread")

AWAY = torch.device("meta")
VOCABULARY = SimpleNamespace(pad=0, sos=1, eos=2, unk=3)
WORDS, CHANNELS, CELLS = 15, 6, 9
# They read values, or make a result whose size depends on values: on CUDA the program waits for either.
FETCHES = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2",
    "unique_consecutive", "unique_dim", "bincount", "multinomial",
}  # fmt: skip


class Away(torch.Tensor):
    """A tensor on the pretended device; `held`: its values."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=AWAY,
        )

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return Device.current(operation, args, kwargs or {})


class Device(TorchDispatchMode):
    """While it lasts, tensors can be made on and sent to the pretended device. `fetched`, `sent`: names, of copies."""

    current = None

    def __init__(self):
        super().__init__()
        self.fetched, self.sent, Device.current = [], [], self

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return self(operation, args, kwargs or {})

    def __call__(self, operation, args, kwargs):
        name, tensors = (
            operation.name(),
            [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)],
        )
        away = [tensor for tensor in tensors if isinstance(tensor, Away)]
        target = kwargs.get("device") and torch.device(kwargs["device"]).type
        if not away and target != AWAY.type:
            return operation(*args, **kwargs)
        packs = "_sequence" in name  # torch's packing takes lengths and batch sizes on the CPU
        here = [tensor for tensor in tensors if not isinstance(tensor, Away) and tensor.dim()]
        if away and here and not packs:
            raise RuntimeError(f"{name} mixes devices")
        if tensors and not away:
            self.sent.append(name)
        if target == "cpu" or fetches(name, args, kwargs):
            self.fetched.append(name)
        held = tree_map_only(
            Away, lambda tensor: tensor.held, (args, kwargs | ({"device": "cpu"} if target else {}))
        )
        result = operation(*held[0], **held[1])
        if target == "cpu":
            return result
        if operation._schema.is_mutable:
            return args[0]
        if packs and isinstance(result, tuple):
            return Away(result[0]), *result[1:]
        return tree_map_only(
            torch.Tensor,
            lambda tensor: tensor if isinstance(tensor, Away) else Away(tensor),
            result,
        )


def fetches(name, args, kwargs):
    """Whether this operation on a GPU's tensors makes the program wait for them."""
    operation = name.removeprefix("aten::").partition(".")[0]
    if operation in ("index", "index_put", "index_put_", "_index_put_impl_"):
        indices = [index for index in args[1] if index is not None]
        return any(index.dtype in (torch.bool, torch.uint8) for index in indices)  # a mask
    if operation == "repeat_interleave":
        return kwargs.get("output_size") is None
    return operation in FETCHES


def moved(module):
    """The module with its weights on the pretended device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(Away(parameter.data))
        for name, buffer in part._buffers.items():
            part._buffers[name] = Away(buffer)
    return module


class Pretended(runtime.Hardware):
    """Hardware without autocast, which torch lacks for this device."""

    def autocast(self):
        return contextlib.nullcontext()


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _kind: False)
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda groups, lr, fused: torch.optim.SGD(groups, lr, foreach=False)
    )  # this device has no fused one
    return Device()


def options(kind, *more):
    sizes = (
        "--embed_size 8 --hidden_size 8 --num_layers 2 --label_smoothing 0.1 --learning_rate 0.1"
    )
    attention = "" if kind == "lstm" else "--attention_dim 4 --patch_dropout 0.5"
    return parse_args([*DECODERS[kind].split(), *sizes.split(), *attention.split(), *more])


def source(features):
    """A FeatureSource whose cache lies in the device's memory."""
    made = object.__new__(feature_cache.FeatureSource)
    made.features, made.mirrored = features, features.flip(1)
    return made


def new_decoder(settled):
    """The same one each time."""
    torch.manual_seed(0)
    return program.build_decoder(settled.as_dict(), CHANNELS, WORDS)


def run_at(place, features, decoder, settled):
    """Features and decoder where they are asked for, and a run with that decoder."""
    if place == AWAY:
        features, decoder = Away(features), moved(decoder)
    return features, decoder, make_run(decoder, settled, Pretended(place, "float32"), num_batches=5)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_training_step_is_the_cpus_and_waits_for_nothing(kind, device, monkeypatch):
    """The features lie in the device's memory: positions to read and the batch's numbers go there."""
    captions = [[[5, 6, 7], [4]], [[8, 9]], [[5, 4]], [[6]]]
    (batch,) = caption_batches.CaptionBatches(captions, 5, 9, seed=0).epoch(0)
    settled = options(kind, "--use_scheduler", "--scheduler_type", "one_cycle")
    mirror = torch.tensor([True, False, True, False])
    features = torch.randn(4, 1 if kind == "lstm" else CELLS, CHANNELS).half()
    losses, decoders = [], []
    for place in (torch.device("cpu"), AWAY):
        decoder = new_decoder(settled)
        with device if place == AWAY else contextlib.nullcontext():
            cache, decoder, run = run_at(place, features, decoder, settled)
            with monkeypatch.context() as patch:
                sends = noted_sends(patch)
                (grids,) = source(cache).stream([batch.image_rows], mirror)
                for_features = len(sends)
                torch.manual_seed(1)
                losses.append(program.train_step(run, grids, batch))
        decoders.append(decoder)
        assert run.state.scheduler.last_epoch == 1
    assert isinstance(losses[1], Away) and float(losses[0]) == pytest.approx(float(losses[1].held))
    for one, other in zip(*(decoder.parameters() for decoder in decoders), strict=True):
        torch.testing.assert_close(one.data, other.data.held)
    assert device.fetched == []
    # all that goes there goes through `to_device`, which does not wait: in a step, the batch alone
    assert len(device.sent) == len(sends)
    in_batch = [batch.image_index, batch.caption_index, batch.inputs, batch.targets]
    in_batch += [batch.image_tokens, batch.token_place]
    assert [id(tensor) for tensor in sends[for_features:]] == [id(tensor) for tensor in in_batch]


@pytest.mark.parametrize("kind", DECODERS)
def test_a_step_in_parts_is_the_cpus_and_waits_for_nothing(kind, device):
    captions = [[[5, 6, 7], [4]], [[8, 9]], [[5, 4]], [[6]]]
    (batch,) = caption_batches.CaptionBatches(captions, 5, 9, seed=0).epoch(0)
    features = torch.randn(4, 1 if kind == "lstm" else CELLS, CHANNELS)
    losses = []
    for place, flags in ((torch.device("cpu"), ()), (AWAY, ("--gradient_accumulation_steps", "2"))):
        nothing_dropped = () if kind == "lstm" else ("--patch_dropout", "0")
        settled = options(kind, "--drop_prob", "0", *nothing_dropped, *flags)
        decoder = new_decoder(settled)
        with device if place == AWAY else contextlib.nullcontext():
            grids, _, run = run_at(place, features, decoder, settled)
            losses.append(program.train_step(run, grids, batch))
    assert float(losses[1].held) == pytest.approx(float(losses[0]), rel=1e-5)
    assert device.fetched == []


def noted_sends(patch):
    """The tensors of the CPU that `to_device` sends from here on."""
    sends = []

    def to_device(tensor, device):
        sends.extend([tensor] * (not isinstance(tensor, Away)))
        return runtime.to_device(tensor, device)

    for module in (caption_batches, feature_cache):
        patch.setattr(module, "to_device", to_device)
    return sends


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("search", [{"beam_size": 4, "length_penalty": 0.8}, {"algorithm": "greedy"},
                                    {"beam_size": 3, "no_repeat_ngram_size": 2, "min_length": 2}], ids=str)  # fmt: skip
def test_a_search_finds_the_cpus_captions_and_synchronises_every_8_steps_only(kind, search, device):
    torch.manual_seed(0)
    decoder = program.build_decoder(options(kind).as_dict(), CHANNELS, WORDS).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(4)
    features, search = (
        torch.randn(7, 1 if kind == "lstm" else CELLS, CHANNELS),
        {"max_length": 20, **search},
    )
    expected = caption_decoding.generate(decoder, features, VOCABULARY, **search)
    with device:
        away = moved(copy.deepcopy(decoder))
        found = caption_decoding.generate(
            away, Away(features), VOCABULARY, fixed_shapes=True, **search
        )
    for (one,), (other,) in zip(expected, found, strict=True):
        assert one.tokens == other.tokens and one.log_prob == pytest.approx(
            other.log_prob, abs=1e-4
        )
    assert len({tuple(hypothesis.tokens) for (hypothesis,) in expected}) > 1
    assert device.sent == []
    assert (
        len(device.fetched) < 20
    )  # what is done, and the captions at the end; not 20 steps' worth


def test_devices_that_mix_are_noticed(device):
    with device:
        there = Away(torch.ones(3))
        with pytest.raises(RuntimeError, match="mixes devices"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="mixes devices"):
            there[torch.tensor([0])]
        there.to(AWAY)
        torch.ones(3).to(AWAY)
        assert device.sent and not device.fetched
        there.cpu(), bool(there.any())
    assert len(device.fetched) == 2


def write_at(values, index, new):
    values[index] = new


@pytest.mark.parametrize(
    ("waits", "operation"),
    [
        (1, lambda values, mask, _: values[mask]),
        (1, lambda values, mask, _: write_at(values, mask, values[:2].clone())),
        (1, lambda values, mask, _: values.masked_select(mask)),
        (1, lambda values, *_: values.unique()),
        (1, lambda values, *_: values.unique_consecutive()),
        (1, lambda values, *_: values.unique(dim=0)),
        (1, lambda values, _, counts: values.repeat_interleave(counts)),
        (1, lambda _values, mask, _: mask.nonzero()),
        (1, lambda _values, mask, _: torch.where(mask)),
        (1, lambda _values, _, counts: counts.bincount()),
        (1, lambda values, *_: values.multinomial(1)),
        (1, lambda values, *_: torch.equal(values, values)),
        (1, lambda values, *_: float(values[0])),
        (0, lambda values, _, counts: values[counts]),
        (0, lambda values, _, counts: write_at(values, counts, values + 1)),
        (0, lambda values, mask, _: write_at(values, mask, 0.0)),
        (0, lambda values, _, counts: values.repeat_interleave(counts, output_size=3)),
        (0, lambda values, *_: values.repeat_interleave(2)),
        (0, lambda values, mask, _: torch.where(mask, values, 0.0)),
    ],
)
def test_what_a_gpu_waits_for_is_noticed(waits, operation, device):
    """By a mask, masked_select, unique, repeat_interleave: sizes that only the values tell."""
    with device:
        operation(
            Away(torch.tensor([1.0, 2.0, 2.0])),
            Away(torch.tensor([True, False, True])),
            Away(torch.tensor([0, 2, 1])),
        )
    assert len(device.fetched) == waits
