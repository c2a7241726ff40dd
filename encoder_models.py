"""What an encoder is before it is one of ours: torchvision's models, and those that plugins add.

    model = find_model("inception_v3")             # .build, .image_size, .mean, .std
    trunk, state = empty_trunk("resnet18", modules)   # to be loaded

torch is imported by the functions that need it, so that naming an encoder takes no time.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in 0..1
# torchvision's transforms normalise for it as for the others, which its transform_input undoes
NORMALISATIONS = {"inception_v3": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}
BUILT_WITH = {"inception_v3": {"init_weights": False}}  # else what is random grows to 1e11


class EncoderModel(NamedTuple):
    """How a model is built, and what its published weights were trained on."""

    build: Callable  # () -> torch.nn.Module, untrained
    image_size: int  # pixels a side that it was tested with
    mean: tuple[float, float, float]  # of RGB in 0..1, taken off
    std: tuple[float, float, float]  # by which the rest is divided
    weights: Callable | None = None  # () -> state dict, which --encoder_weights imagenet stands for
    code_sha256: str | None = None  # of a plugin's file
    interpolation: str = "bilinear"  # by which its pictures are scaled
    folds: bool = True  # torch.fx can trace it, to fold BatchNorm into convolutions
    translate: Callable | None = None  # a library's state dict -> under the names of the trunk
    configuration: dict | None = None  # plain values that build it again where its source is not
    beside_cells: tuple[
        str, ...
    ] = ()  # what stands behind the cells in one row of features, such as a class token

    def key(self):
        """What of it decides the features, weights apart."""
        code = {"code_sha256": self.code_sha256} if self.code_sha256 else {}
        own = {"configuration": self.configuration} if self.configuration else {}
        return {"mean": tuple(self.mean), "std": tuple(self.std), **code, **own}


ADDED = {}  # by plugins: {name: EncoderModel}


def find_model(name):
    """The EncoderModel of a name in caption_options.ENCODERS."""
    if name in ADDED:
        return ADDED[name]
    import torchvision

    published = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    arguments = BUILT_WITH.get(name, {})
    build = functools.partial(torchvision.models.get_model, name, weights=None, **arguments)
    normalisation = NORMALISATIONS.get(name, (IMAGENET_MEAN, IMAGENET_STD))
    return EncoderModel(build, published.transforms().crop_size[0], *normalisation)


def empty_trunk(name, modules, model=None):
    """(an nn.Sequential of the model's `modules`, the whole model's state dict), to be loaded.

    Args:
        modules: names; None where what the model builds is the trunk already.
        model: the EncoderModel of the name, where `find_model` does not know it.
    Raises: ValueError where the model lacks one of the modules.
    """
    import torch

    device = "cpu" if name in ADDED else "meta"  # where a plugin's code may not run
    with torch.random.fork_rng(devices=[]), torch.device(device):
        model = (model or find_model(name)).build()
    if modules is None:
        return model, model.state_dict()
    parts = dict(model.named_children())
    if missing := [module for module in modules if module not in parts]:
        raise ValueError(
            f"--encoder {name}: its model has no module {missing[0]}: it has {' '.join(parts)}"
        )
    trunk = torch.nn.Sequential()
    for module in modules:
        trunk.add_module(module, parts[module])
    return trunk, model.state_dict()


def fill_buffers(trunk, build):
    """Give a loaded trunk what is no weight, such as the numbers of its positions, as building it does."""
    import torch

    lacking = [name for name, buffer in trunk.named_buffers() if buffer.is_meta]
    if not lacking:
        return
    with torch.random.fork_rng(devices=[]):
        built = build()
    for name in lacking:
        owner, _, short = name.rpartition(".")
        value = built.get_buffer(name)
        trunk.get_submodule(owner).register_buffer(short, value, persistent=False)


def grid_shape(trunk, size, name):
    """[F, h, w] that a trunk makes of pictures of `size` pixels a side. Raises: ValueError if it cannot."""
    import torch

    try:
        with torch.inference_mode():
            _, *shape = trunk(torch.zeros(1, 3, size, size)).shape
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--encoder {name} makes no grid of pictures of {size} pixels a side ({reason}): "
            "give a larger --image_size or --coarse_size"
        ) from error
    if len(shape) != 3:
        raise ValueError(f"--encoder {name}: gives {len(shape) + 1} axes, not (N, F, h, w)")
    return shape
