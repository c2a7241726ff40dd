"""Trunks whose weights were trained elsewhere: loaded, folded for inference, hashed, split into blocks.

    trunk, model_state = encoder_models.empty_trunk("resnet18", modules)
    load_trunk(trunk, state, model_state, "--encoder_weights resnet18.pth", "resnet18")
    frozen, trained = split_blocks(trunk, 2, "resnet18")      # the last two blocks go on learning

A trunk is an nn.Module from pictures to a grid of features; nothing here computes one.
"""

import copy
import hashlib

import torch
import torch.fx.experimental.optimization
from torch import nn

from runtime import ENCODING, SEARCHING


def load_trunk(trunk, state, model_state, source, name):
    """Load a state dict that may hold a classifier, or lack BatchNorm's counters, into the trunk."""
    expected = trunk.state_dict()
    counters = [key for key in expected if key.endswith("num_batches_tracked")]
    state = {key: torch.zeros_like(expected[key]) for key in counters} | state
    missing = sorted(expected.keys() - state.keys()) or sorted(state.keys() - model_state.keys())
    reshaped = sorted(
        key
        for key in expected.keys() & state.keys()
        if expected[key].shape != getattr(state[key], "shape", None)
    )
    if missing or reshaped:
        fault = f"they differ in {missing[0]}" if missing else f"another shape of {reshaped[0]}"
        raise ValueError(f"{source}: not weights of --encoder {name} ({fault}): give both alike")
    state = {key: state[key].to(value.dtype) for key, value in expected.items()}
    trunk.load_state_dict(state, assign=True)


def split_weights(weights, name):
    """A checkpoint's encoder weights -> the state dict of each encoder that `name` joins."""
    count = name.count("+") + 1
    if count == 1:
        return [weights]
    parts = [{} for _ in range(count)]
    for key, tensor in weights.items():
        number, _, rest = key.partition(".")
        if number.isdecimal() and int(number) < count:
            parts[int(number)][rest] = tensor
    return parts


def fold(modules, precision, folds=True):
    """A copy for inference; BatchNorm is folded into the convolutions if it `folds`. modules: nn.Sequential."""
    if folds:
        with ENCODING, SEARCHING:  # torch.fx traces
            folded = torch.fx.experimental.optimization.fuse(modules)
    else:
        folded = copy.deepcopy(modules)
    return folded.to(getattr(torch, precision), memory_format=torch.channels_last)


def sha256_of(module):
    """Over names and tensors of its state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def split_blocks(trunk, trained, name):
    """The trunk's modules in their order: the frozen ones, and those to be trained.

    trained: how many blocks, such as a ResNet's bottlenecks; what has no matrix of weights, such as a
    normalisation between two of them, belongs to the one before. Raises: ValueError unless one is left.
    """
    modules = modules_of(trunk)
    blocks = [place for place, module in enumerate(modules) if has_matrix(module)]
    if len(blocks) == 1:
        raise ValueError(
            f"--fine_tune_encoder {trained}: {name} cannot be taken apart into blocks that follow one "
            "upon the other: leave the option out, or give another --encoder"
        )
    if trained >= len(blocks):
        raise ValueError(
            f"--fine_tune_encoder {trained}: {name} has {len(blocks)} blocks, "
            "of which the first stays frozen: give fewer"
        )
    first = blocks[-trained]
    return modules[:first], modules[first:]


def modules_of(module):
    """A module's parts in their order; a plain nn.Sequential is as many as it holds."""
    if type(module) is not nn.Sequential:
        return [module]
    return [part for child in module for part in modules_of(child)]


def has_matrix(module):
    """Whether it has weights of more than one axis."""
    return any(parameter.ndim > 1 for parameter in module.parameters())
