"""Encoders of timm and of transformers, as rows that the rest of the program takes like torchvision's.

    model = find_model("timm/convnext_tiny.in12k_ft_in1k")
    model = find_model("clip", "openai/clip-vit-base-patch32")   # a name on the hub, or a folder

Sizes, normalisation and interpolation come from each model's own configuration. The trunk is a
Sequential that ends in a grid (N, F, h, w), so that its last blocks can be trained. No file runs code:
weights are safetensors, or pickles read with weights_only, and no code of a repository is executed.
timm and transformers are imported by what needs them.

Shapes: N images, S pixels a side, L tokens, F channels, a grid of h x w cells.
[1] Radford et al. 2021, CLIP.   [2] Zhai et al. 2023, SigLIP.   [3] Oquab et al. 2023, DINOv2.
[4] Wightman 2019, PyTorch Image Models (timm).
"""

import copy
import difflib
import functools
import importlib.util
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import encoder_models
from checkpoints import UNREADABLE, read_json_object
from encoder_models import EncoderModel

DEFAULT_CLIP = "openai/clip-vit-base-patch32"
NEEDED = "config.json, preprocessor_config.json and model.safetensors"
MAX_JSON_BYTES = 2**20
# safetensors where there are any, else a pickle, which is read with weights_only
WEIGHT_FILES = (["*.json", "*.txt", "*.safetensors"], ["*.json", "pytorch_model*.bin"])
HUB_SECONDS = 5  # that the hub may take to say what it has
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def find_model(name, clip_model=DEFAULT_CLIP, *, pooled=False, class_token=False, stored=None):
    """The EncoderModel of any name that --encoder takes.

    Args:
        clip_model: of clip: the hub's name of a vision model, or the folder of one.
        pooled: of clip: one cell, the token that the model pools its picture into.
        class_token: of clip: it is handed on behind the cells, where the model has one.
        stored: a checkpoint's configuration of it, which replaces the hub's or the library's.
    Raises: ValueError or FileNotFoundError of one line that says what is wrong with the model.
    """
    family, _, variant = name.partition("/")
    if family == "clip":
        check_package("transformers", name)
        return clip_row(clip_model, pooled, class_token, stored)
    if family == "timm":
        check_package("timm", name)
        return timm_row(variant, stored)
    return encoder_models.find_model(name)


def check_package(package, name):
    """Raises: ValueError that says what brings a package, where it is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"--encoder {name} needs the package {package}: pip install -r requirements-hub.txt"
        )


# --------------------------------------------------------------------------------------------- trunks


class Grid(nn.Module):
    """The end of a trunk: a last normalisation, then cells as (N, F, h, w)."""

    def __init__(self, norm=None, prefix=0, channels_last=False):
        """prefix: tokens before the cells', such as a class token. channels_last: of 4 axes, F is the last."""
        super().__init__()
        self.norm, self.prefix, self.channels_last = norm or nn.Identity(), prefix, channels_last

    def forward(self, x):
        """x (N, prefix + h * w, F), (N, h, w, F) or (N, F, h, w) -> (N, F, h, w); pictures are square."""
        x = self.norm(x)
        if x.ndim == 4:
            return x.permute(0, 3, 1, 2) if self.channels_last else x
        cells = x[:, self.prefix :].transpose(1, 2)
        return cells.unflatten(2, (math.isqrt(cells.size(2)), -1))


class CellsAndClass(nn.Module):
    """The end of a trunk whose class token stands behind its cells, in one row."""

    def __init__(self, norm=None):
        super().__init__()
        self.norm = norm or nn.Identity()

    def forward(self, tokens):
        """tokens (N, 1 + P, F), the class token first -> (N, F, 1, P + 1), the class token last."""
        return self.norm(tokens).roll(-1, 1).transpose(1, 2).unsqueeze(2)


class PooledToken(nn.Module):
    """The end of a trunk that gives one cell (N, F, 1, 1): the token that stands for the picture."""

    def __init__(self, norm, head=None):
        """head: tokens (N, L, F) -> (N, F); None: the class token, which is the first."""
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, tokens):
        """tokens (N, L, F) -> (N, F, 1, 1)."""
        pooled = self.head(self.norm(tokens)) if self.head else self.norm(tokens[:, 0])
        return pooled[:, :, None, None]


class Tokens(nn.Module):
    """The beginning of a transformer of transformers: pictures -> tokens, of any size of picture."""

    def __init__(self, embeddings, norm=None, **how):
        """how: what `embeddings` is told so that its positions are interpolated to the picture's size."""
        super().__init__()
        self.embeddings, self.norm, self.how = embeddings, norm or nn.Identity(), how

    def forward(self, images):
        """images (N, 3, S, S) -> (N, L, F)."""
        return self.norm(self.embeddings(images, **self.how))


class Layer(nn.Module):
    """One block of transformers, every token of which sees all others."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, tokens):
        """tokens (N, L, F) -> (N, L, F)."""
        return self.layer(tokens, attention_mask=None)


class Before(nn.Module):
    """What a timm model does before some of its modules: a copy without them, of the same parameters."""

    def __init__(self, model, without=()):
        super().__init__()
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared | {id(module): Passing() for module in without})

    def forward(self, images):
        """images (N, 3, S, S) -> what the first of them is given; without any, the model's features."""
        return self.model.forward_features(images)


class Passing(nn.Module):
    """Stands where a module was."""

    def forward(self, x, **_):
        """Anything -> the same."""
        return x


# ------------------------------------------------------------------------------------ configurations


class Picture(NamedTuple):
    """What a model's pictures are: made of its library's configuration, kept in checkpoints."""

    size: int  # pixels a side
    mean: tuple[float, float, float]  # of RGB in 0..1
    std: tuple[float, float, float]
    interpolation: str  # by which they are scaled

    def checked(self, where):
        """Itself, if it can be: a file may come from anyone. Raises: ValueError that begins with `where`."""
        if type(self.size) is not int or not 16 <= self.size <= 4096:
            raise ValueError(
                f"{where}: pictures of {self.size!r} pixels a side, expected 16 to 4096"
            )
        for name, three in (("mean", self.mean), ("std", self.std)):
            if not _three_numbers(three) or (name == "std" and min(three) <= 0):
                expected = "three numbers" + " above 0" * (name == "std")
                raise ValueError(f"{where}: {name} {three!r}, expected {expected}")
        if self.interpolation not in INTERPOLATIONS.values():
            known = ", ".join(INTERPOLATIONS.values())
            raise ValueError(f"{where}: interpolation {self.interpolation!r}, expected {known}")
        return self._replace(mean=tuple(self.mean), std=tuple(self.std))

    def plain(self):
        """As a checkpoint holds it."""
        return {**self._asdict(), "mean": list(self.mean), "std": list(self.std)}


def _three_numbers(value):
    numbers = isinstance(value, list | tuple) and len(value) == 3
    return numbers and all(type(x) in (int, float) and math.isfinite(x) for x in value)


def stored_picture(where, stored):
    """The Picture of a checkpoint's configuration. Raises: ValueError."""
    picture = stored.get("picture") if isinstance(stored, dict) else None
    if not isinstance(picture, dict) or picture.keys() != set(Picture._fields):
        raise ValueError(f"{where}: no usable configuration of its encoder in the checkpoint")
    return Picture(**picture).checked(where)


def read_json(path):
    """A model's configuration. Raises: ValueError that names the file."""
    return read_json_object(path, MAX_JSON_BYTES)


# --------------------------------------------------------------------------------------- transformers


class Kind(NamedTuple):
    """A vision model of transformers: its classes, and the fields of its configuration that decide features."""

    model: str
    config: str
    fields: tuple[str, ...]
    any_size: bool = False  # was trained on pictures of a size other than its positions'


FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
          "num_channels", "hidden_act", "layer_norm_eps")  # fmt: skip
KINDS = {
    "clip_vision_model": Kind("CLIPVisionModel", "CLIPVisionConfig", (*FIELDS, "intermediate_size")),
    "siglip_vision_model": Kind(
        "SiglipVisionModel", "SiglipVisionConfig", (*FIELDS, "intermediate_size", "vision_use_head")
    ),
    "dinov2": Kind(
        "Dinov2Model", "Dinov2Config",
        (*FIELDS, "mlp_ratio", "qkv_bias", "use_swiglu_ffn", "use_mask_token"), any_size=True,
    ),
}  # fmt: skip
VISION_OF = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # of models with text
AT_MOST = {"hidden_size": 2**14, "num_hidden_layers": 256, "num_attention_heads": 256,
           "image_size": 4096, "patch_size": 256, "num_channels": 3, "intermediate_size": 2**16,
           "mlp_ratio": 64}  # fmt: skip


def clip_row(source, pooled=False, class_token=False, stored=None):
    """The EncoderModel of a vision model of transformers: patch tokens as a grid, or its pooled token.

    As `find_model`; source: of the weights, asked for only when they are needed.
    """
    where = f"--clip_model {source}"
    if stored is None:
        folder = open_folder(source)
        vision = read_vision(folder)
        picture = read_picture(folder, vision)
    else:
        vision, picture = stored.get("vision"), stored_picture(where, stored)
        check_vision(where, vision)
        class_token = stored.get("class_token") is True  # as it was trained
    class_token = class_token and has_class_token(vision) and not pooled
    how = {"pooled": pooled, "class_token": class_token}

    def build():
        return trunk_of_transformer(new_transformer(vision), vision, **how)

    def weights():
        model = load_transformer(open_folder(source), vision)
        return in_memory(trunk_of_transformer(model, vision, **how).state_dict())

    def translate(state):
        with torch.device("meta"):
            model = new_transformer(vision)
        known = model.state_dict(keep_vars=True)
        trunk = trunk_of_transformer(model, vision, **how)
        return to_trunk_names(state, known, trunk, ("", "vision_model.", "dinov2."))

    configuration = {"vision": vision, "picture": picture.plain(), **how}
    row = as_row(build, picture, weights, translate, configuration)
    return row._replace(beside_cells=("class",) if class_token else ())


def has_class_token(vision):
    """Whether the first token of a vision model's configuration stands for the whole picture."""
    return vision["model_type"] != "siglip_vision_model"


def as_row(build, picture, weights, translate, configuration):
    """An EncoderModel of this room."""
    return EncoderModel(
        build,
        picture.size,
        picture.mean,
        picture.std,
        weights,
        interpolation=picture.interpolation,
        folds=False,
        translate=translate,
        configuration=configuration,
    )


def read_vision(folder):
    """The fields of a folder's config.json that decide features: plain values, checked."""
    path = folder / "config.json"
    whole = read_json(path)
    kind = whole.get("model_type")
    own = whole.get("vision_config", {}) if kind in VISION_OF else whole
    kind = VISION_OF.get(kind, kind)
    if kind not in KINDS or not isinstance(own, dict):
        raise ValueError(
            f"{path}: model_type {whole.get('model_type')!r}, expected the vision model of one of "
            "clip, siglip, dinov2"
        )
    import transformers

    given = {name: own[name] for name in KINDS[kind].fields if name in own}
    check_vision(path, {"model_type": kind, **given}, whole=False)
    config = getattr(transformers, KINDS[kind].config)(**given)
    vision = {"model_type": kind, **{name: getattr(config, name) for name in KINDS[kind].fields}}
    check_vision(path, vision)
    return vision


def check_vision(where, vision, whole=True):
    """Raises: ValueError naming what cannot be: the file or the checkpoint may come from anyone."""
    kind = KINDS.get(vision.get("model_type")) if isinstance(vision, dict) else None
    if not kind or (whole and vision.keys() != {"model_type", *kind.fields}):
        raise ValueError(f"{where}: no usable configuration of a vision model")
    for name, value in vision.items():
        if name in AT_MOST:
            fits = type(value) in (int, float) if name == "mlp_ratio" else type(value) is int
            fits = fits and 0 < value <= AT_MOST[name]
        elif name in ("hidden_act", "model_type"):
            fits = isinstance(value, str)
        elif name == "layer_norm_eps":
            fits = type(value) in (int, float) and 0 <= value < 1
        else:
            fits = isinstance(value, bool)
        if not fits:
            raise ValueError(f"{where}: {name} {value!r} of the vision model cannot be")
    if whole:
        _check_sizes(where, vision)


def _check_sizes(where, vision):
    from transformers.activations import ACT2FN

    if vision["hidden_act"] not in ACT2FN:
        raise ValueError(f"{where}: hidden_act {vision['hidden_act']!r} is not known")
    if vision["num_channels"] != 3 or vision["patch_size"] > vision["image_size"]:
        raise ValueError(f"{where}: no vision model of RGB pictures of a patch or more")
    if vision["hidden_size"] % vision["num_attention_heads"]:
        raise ValueError(f"{where}: hidden_size is no multiple of num_attention_heads")


def read_picture(folder, vision):
    """The Picture that a folder's image processor makes. Raises: ValueError where the model wants another."""
    path = folder / "preprocessor_config.json"
    if path.is_file():
        processor = read_json(path)
    else:
        path = folder / "processor_config.json"  # in which newer versions keep it
        processor = read_json(path).get("image_processor") if path.is_file() else None
    if not isinstance(processor, dict):
        raise ValueError(
            f"{folder}: no preprocessor_config.json, which says how pictures are normalised: the "
            f"folder needs {NEEDED}"
        )
    centre = processor.get("do_center_crop", "crop_size" in processor)
    size = _side(processor.get("crop_size" if centre else "size"))
    factor = processor.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise ValueError(f"{path}: rescale_factor {factor!r}, expected 1/255, to pixels in 0..1")
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if processor.get("do_normalize", True) is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    interpolation = INTERPOLATIONS.get(processor.get("resample", 3))
    picture = Picture(size, mean, std, interpolation).checked(path)
    if picture.size != vision["image_size"] and not KINDS[vision["model_type"]].any_size:
        raise ValueError(
            f"{path}: makes pictures of {picture.size} pixels a side, but the vision model of "
            f"config.json is of {vision['image_size']}: one of the two belongs to another model"
        )
    return picture


def _side(size):
    """Pixels a side of what a processor calls a size, or what it says instead."""
    if isinstance(size, dict):
        sides = {size[k] for k in ("shortest_edge", "height", "width") if type(size.get(k)) is int}
        return sides.pop() if len(sides) == 1 else size
    return size


def new_transformer(vision):
    """The untrained model of a configuration."""
    import transformers

    kind = KINDS[vision["model_type"]]
    fields = {name: vision[name] for name in kind.fields}
    return getattr(transformers, kind.model)(getattr(transformers, kind.config)(**fields))


def load_transformer(folder, vision):
    """The trained vision model of a folder. Raises: ValueError where its weights are not all there."""
    import transformers

    kind = KINDS[vision["model_type"]]
    config = getattr(transformers, kind.config)(**{name: vision[name] for name in kind.fields})
    return read_pretrained(getattr(transformers, kind.model), folder, "--clip_model", config=config)


def read_pretrained(model_class, folder, flag, needed=NEEDED, **how):
    """A class of transformers with the weights of a folder, in evaluation mode; nothing in it is run.

    Raises: ValueError that begins with flag and folder where its weights are not all there.
    """
    import pickle

    import transformers
    from safetensors import SafetensorError

    if not has_weights(folder):
        raise ValueError(f"{flag} {folder}: no weights: the folder needs {needed}")
    try:
        with Quietly(transformers):
            model, report = model_class.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                weights_only=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=False,
                **how,
            )
    except (OSError, pickle.UnpicklingError, SafetensorError, *UNREADABLE) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{flag} {folder}: its weights cannot be read as those of its config.json ({reason})"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{flag} {folder}: its weights lack {missing[0]}")
    return model


class Quietly:
    """transformers logs and draws bars of what is said here in one line, or is of no interest."""

    def __init__(self, transformers):
        self.logging = transformers.utils.logging

    def __enter__(self):
        self.level = self.logging.get_verbosity()
        self.logging.set_verbosity_error()
        self.logging.disable_progress_bar()

    def __exit__(self, *_error):
        self.logging.set_verbosity(self.level)
        self.logging.enable_progress_bar()


def trunk_of_transformer(model, vision, pooled, class_token):
    """Its modules as a Sequential that ends in patch tokens as a grid, or in the pooled token.

    class_token: with the class token behind the patches', which are one row then.
    """
    if vision["model_type"] == "dinov2":
        tokens, norm, last = Tokens(model.embeddings), model.layernorm, model.layernorm
    elif vision["model_type"] == "siglip_vision_model":
        tokens = Tokens(model.embeddings, interpolate_pos_encoding=True)
        norm, last = model.post_layernorm, model.post_layernorm
    else:
        tokens = Tokens(model.embeddings, model.pre_layrnorm, interpolate_pos_encoding=True)
        norm, last = model.post_layernorm, None  # of the class token alone [1]
    class_tokens = int(has_class_token(vision))
    head = getattr(model, "head", None)
    end = CellsAndClass(last) if class_token else Grid(last, class_tokens)
    if pooled and (class_tokens or head):
        end = PooledToken(norm, head)
    trunk = nn.Sequential()
    trunk.add_module("tokens", tokens)
    layers = getattr(model.encoder, "layers", None) or model.encoder.layer
    trunk.add_module("layers", nn.Sequential(*map(Layer, layers)))
    trunk.add_module("end", end)
    return trunk


# ----------------------------------------------------------------------------------------------- timm


def timm_row(name, stored=None):
    """The EncoderModel of a model of timm. As `find_model`."""
    import timm

    where = f"--encoder timm/{name}"
    if not timm.is_model(name):
        base = name.partition(".")[0]
        meant = difflib.get_close_matches(base, timm.list_models(), n=1)
        guess = f" (did you mean timm/{meant[0]}?)" if meant else ""
        raise ValueError(f"{where}: timm {timm.__version__} has no such model{guess}")
    try:
        published = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = " ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*")[:6])
        raise ValueError(f"{where}: no such weights: give one of {tags}") from error
    config = timm.data.resolve_data_config(pretrained_cfg=published.to_dict() if published else {})
    if stored is None:
        interpolation = config["interpolation"]
        interpolation = "bilinear" if interpolation == "random" else interpolation
        size = max(config["input_size"][1:])
        picture = Picture(size, config["mean"], config["std"], interpolation).checked(where)
    else:
        picture = stored_picture(where, stored)

    def build():
        return trunk_of_timm(new_timm(name), name)

    def weights():
        file = timm_file(name, published)
        return in_memory(trunk_of_timm(new_timm(name, file), name).state_dict())

    def translate(state):
        with torch.device("meta"):
            model = new_timm(name)
        known = model.state_dict(keep_vars=True)
        return to_trunk_names(state, known, trunk_of_timm(model, name))

    return as_row(build, picture, weights, translate, {"picture": picture.plain()})


@functools.cache
def sizes_of(architecture):
    """What a timm model is told so that it takes pictures of any size: {} where it does, or cannot."""
    import inspect

    import timm

    with torch.device("meta"):
        kind = type(timm.create_model(architecture))
    takes = inspect.signature(kind.__init__).parameters
    return {"dynamic_img_size": True} if "dynamic_img_size" in takes else {}


def new_timm(name, file=None):
    """A model of timm: untrained, or with the published weights of a file."""
    import timm

    how = sizes_of(name.partition(".")[0])
    if file is None:
        return timm.create_model(name, **how)
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **how
    )


class Layout(NamedTuple):
    """How a timm model is taken apart; names of its modules."""

    blocks: list[str]  # which hand on one tensor from each to the next, up to the features
    head: list[str]  # what comes after the features
    is_chain: bool  # the first of the blocks is given the picture itself


@functools.cache
def layout_of(architecture):
    """The Layout of a timm model, from what its modules give each other on its way to its features.

    A module counts as several blocks if timm's own layer groups, for learning rates that differ from
    layer to layer, divide it, and if it hands on one tensor, too, from each of its parts to the next.
    Raises: ValueError where its features are no tensor.
    """
    import timm

    with torch.device("meta"), torch.no_grad():  # which computes shapes alone
        whole = Before(new_timm(architecture).eval())
        model = whole.model
        calls = record_calls(whole, torch.zeros(1, *model.default_cfg["input_size"]))
    if not calls[whole].gave:
        raise ValueError(
            f"--encoder timm/{architecture}: gives several features, not one grid: choose another"
        )
    groups = {name: name for name, _ in model.named_parameters()}
    if hasattr(model, "group_matcher"):
        matcher = model.group_matcher(coarse=False)
        groups = timm.models.group_parameters(model, matcher, reverse=True)

    def opened(name, module):
        of_module = {group for key, group in groups.items() if key.startswith(f"{name}.")}
        parts, given = chain_of(module, calls)
        if len(of_module) < 2 or not parts or given != calls[module].given:
            return [name]
        return [each for part in parts for each in opened(f"{name}.{part}", parts[part])]

    parts, given = chain_of(whole, calls)
    names = [(name.removeprefix("model."), module) for name, module in parts.items()]
    blocks = [each for name, module in names for each in opened(name, module)]
    children = dict(model.named_children())
    used = [name for name, child in children.items() if calls.keys() & {*child.modules()}]
    head = [*children][[*children].index(used[-1]) + 1 :]
    if not keeps_order(blocks):  # one block, computed as the model does
        return Layout([], head, False)
    return Layout(blocks, head, given == calls[whole].given)


class Call(NamedTuple):
    """One of a module: marks of the tensor that it was given and of the one that it gave, or None."""

    given: tuple | None
    gave: tuple | None = None


def record_calls(model, pixels):
    """{module: its Call} in their order. What is not called once with a tensor alone was given None."""
    calls, alive = {}, []  # alive: so that no two tensors have the same id

    def mark(value):
        alive.append(value)
        # the version, which tells whether it was changed in place
        return (id(value), value._version) if isinstance(value, torch.Tensor) else None

    def enter(module, given, named):
        alone = len(given) == 1 and all(value is None for value in named.values())
        calls[module] = Call(mark(given[0]) if alone and module not in calls else None)

    def leave(module, given, gave):
        calls[module] = calls[module]._replace(gave=mark(gave))

    for module in model.modules():
        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)
    model(pixels)
    return calls


def chain_of(module, calls):
    """Its last parts that hand on one tensor, up to what it gives, {name: part}; what the first is given."""
    order = [*calls]
    called = sorted(called_parts(module, calls), key=lambda pair: order.index(pair[1]))
    parts, tensor = [], calls[module].gave
    for name, part in reversed(called):
        if calls[part].given is None or calls[part].gave != tensor:
            break
        parts, tensor = [(name, part), *parts], calls[part].given
    return dict(parts), tensor


def called_parts(module, calls):
    """(name, part) of what is called in a module, also where it stands in a list that is not."""
    for name, part in module.named_children():
        if part in calls:
            yield name, part
        else:
            yield from ((f"{name}.{deeper}", each) for deeper, each in called_parts(part, calls))


def trunk_of_timm(model, name):
    """Its modules under its own names for them, as a Sequential that ends in the last grid."""
    layout, trunk = layout_of(name.partition(".")[0]), nn.Sequential()
    blocks, head = ([*map(model.get_submodule, names)] for names in layout[:2])
    if not layout.is_chain:
        trunk.add_module("before", Before(model, [*blocks, *head]))
    for place, block in zip(layout.blocks, blocks, strict=True):
        put(trunk, place, block)
    prefix = getattr(model, "num_prefix_tokens", 0)
    last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    trunk.add_module("end", Grid(prefix=prefix, channels_last=last))
    return trunk


def keeps_order(places):
    """Whether a Sequential of Sequentials with modules at these places computes them in this order."""
    trunk = nn.Sequential()
    for place in places:
        put(trunk, place, nn.Identity())
    return [
        name for name, module in trunk.named_modules() if not len([*module.children()])
    ] == places


def put(trunk, place, module):
    """Append a module to a Sequential of Sequentials, such as at layers.0.blocks.1."""
    *outer, name = place.split(".")
    for each in outer:
        if each not in trunk._modules:
            trunk.add_module(each, nn.Sequential())
        trunk = trunk.get_submodule(each)
    trunk.add_module(name, module)


# ------------------------------------------------------------------------------- names and downloads


def to_trunk_names(state, model_state, trunk, prefixes=("",)):
    """A library's state dict under the trunk's names.

    What the library's model has and the trunk does not, such as a classifier, is left out. What the
    model does not know keeps its name: it is the trunk's own, or for the caller to refuse.
    Args:
        model_state: of the library's model, with the very tensors that the trunk holds.
        prefixes: that may stand before the library's names, where a larger model was saved.
    """
    own = trunk.state_dict(keep_vars=True)
    trunk_name = {id(tensor): name for name, tensor in own.items()}
    prefix = max(prefixes, key=lambda p: sum(p + name in state for name in model_state))
    others = {name for name in state if prefix and not name.startswith(prefix)}
    names = {prefix + name: trunk_name.get(id(x)) for name, x in model_state.items()}
    kept = ((names.get(name, name), x) for name, x in state.items() if name not in others)
    return {name: tensor for name, tensor in kept if name is not None}


def in_memory(state):
    """Copies of tensors that may be mapped from a file: a run outlives a file that is written anew."""
    return {name: tensor.clone() for name, tensor in state.items()}


def has_weights(folder):
    """Whether a folder has weights that transformers reads: safetensors, or a pickle."""
    return any([*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")])


def open_folder(
    source, flag="--clip_model", needed=NEEDED, files=WEIGHT_FILES, is_whole=has_weights
):
    """The folder of a model: `source` itself, or what the hub has under this name.

    The copy that an earlier download left is taken without asking the hub.

    Args:
        needed: what a folder needs, in words.
        files: lists of patterns, of which the first that gives a whole folder is downloaded.
        is_whole: whether a folder has what is needed.
    Raises: FileNotFoundError or ValueError that name both, and how to give a folder.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not HUB_NAME.fullmatch(source):
        raise FileNotFoundError(
            f"{flag} {source}: no such folder: give one with {needed}, or a name on the hub"
        )
    import huggingface_hub

    found = None
    for patterns in files:
        wanted = (source, patterns, f"give a folder with {needed}")
        download = huggingface_hub.snapshot_download
        found = from_hub(download, f"{flag} {source}", *wanted, is_whole=is_whole)
        if is_whole(found):
            break
    return found


def from_hub(download, what, *arguments, is_whole=has_weights):
    """The Path of what a download of huggingface_hub gives: its cache's, else the hub's.

    arguments: the repository, the file's name or patterns, and what else the user can give.
    is_whole: whether a folder of the cache has what is needed; a download may have stopped halfway.
    Raises: FileNotFoundError of one line, after seconds, where neither has it.
    """
    import huggingface_hub
    from huggingface_hub.utils import httpx

    repository, wanted, remedy = arguments
    how = {"allow_patterns": wanted} if isinstance(wanted, list) else {"filename": wanted}
    fetch = functools.partial(download, repository, etag_timeout=HUB_SECONDS, **how)
    try:
        cached = Path(fetch(local_files_only=True))
        if cached.is_file() or is_whole(cached):
            return cached
    except OSError:  # it is not there
        pass
    try:
        # a hub that does not answer is waited for here, and nowhere else
        info = huggingface_hub.HfApi().model_info(repository, timeout=HUB_SECONDS)
        return Path(fetch(revision=info.sha))
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        cache = huggingface_hub.constants.HF_HUB_CACHE
        raise FileNotFoundError(
            f"{what}: neither given as files, nor in {cache}, nor got from the hub ({reason}): {remedy}, "
            f"or where there is a network: hf download {repository}"
        ) from error


def timm_file(name, published):
    """The file of a timm model's published weights, by timm's own name for them. Raises: as `from_hub`."""
    import huggingface_hub

    what = f"--encoder timm/{name}"
    if not (published and published.hf_hub_id):
        raise ValueError(
            f"{what}: timm publishes no weights of it: give --encoder_weights FILE or random"
        )
    wanted = published.hf_hub_filename or "model.safetensors"
    remedy = "give --encoder_weights FILE or random"
    return from_hub(huggingface_hub.hf_hub_download, what, published.hf_hub_id, wanted, remedy)
