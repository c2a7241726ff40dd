"""Caption photographs: frozen torchvision encoder -> LSTM, with or without attention -> beam search.

    python flickr_image_caption.py --dataset_type flickr8k --decoder attention --epochs 15 --learning_rate 0.001
    python flickr_image_caption.py --mode test --model_path saved_models/flickr8k/resnet_attention/best.pt
    python flickr_image_caption.py --mode caption --model_path best.pt --images dog.jpg holiday_folder

Pictures are encoded once into a feature cache; training then reads features only. Every run writes its own folder below
--model_save_dir. Shapes: N images, B captions, K hypotheses per image, P grid cells (7 * 7), F feature channels (2048),
E embedding, H hidden and A attention units, L layers, T steps, V words.
[1] Vinyals et al. 2015, Show and Tell.   [2] Xu et al. 2015, Show, Attend and Tell.   [3] Bahdanau et al. 2015.
"""

import argparse
import math
import sys

# torchvision family: the modules from the picture to the last grid before pooling, and its members
ENCODER_FAMILIES = {
    "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4": """resnet18 resnet34 resnet50 resnet101 resnet152
        resnext50_32x4d resnext101_32x8d resnext101_64x4d wide_resnet50_2 wide_resnet101_2""",
    "features": """mobilenet_v2 mobilenet_v3_small mobilenet_v3_large efficientnet_b0 efficientnet_b1 efficientnet_b2
        efficientnet_b3 efficientnet_b4 efficientnet_v2_s efficientnet_v2_m vgg11 vgg11_bn
        vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn convnext_tiny convnext_small convnext_base squeezenet1_0
        squeezenet1_1""",
    "conv1 maxpool stage2 stage3 stage4 conv5": "shufflenet_v2_x0_5 shufflenet_v2_x1_0",
    "layers": "mnasnet0_5 mnasnet1_0",
    "features norm permute": "swin_t swin_s swin_b swin_v2_t swin_v2_s swin_v2_b",
}
ENCODERS = {
    name: modules.split() for modules, names in ENCODER_FAMILIES.items() for name in names.split()
}
SCHEDULERS = ("reduce_lr_on_plateau", "step", "cosine", "exponential", "one_cycle")
ARCHITECTURE = (
    "decoder", "encoder", "image_size", "coarse_size", "freq_threshold", "embed_size", "hidden_size", "num_layers",
    "attention_dim",
)  # fmt: skip
IDLE_ELSEWHERE = {
    "model_path": ("train", "test", "caption"), "resume": ("train",), "split": ("test",), "images": ("caption",),
    "json": ("caption",), "output_dir": ("test", "caption"), "ensemble": ("test", "caption"),
}  # fmt: skip
THIS_RUN_ONLY = (
    "mode", "model_path", "resume", "ensemble", "images", "json", "output_dir", "split", "device", "epochs", "compile",
    "typed",
)  # fmt: skip


def number(kind, low, high=math.inf, *, above=False):
    """An argparse type: a `kind` in low..high, low itself excluded if `above`. nan and inf are refused."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or (above and value == low) or math.isinf(value):
            bounds = f"{'above' if above else 'at least'} {low}" + (
                "" if high == math.inf else f" and at most {high}"
            )
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


COUNT, SIZE, RATE, SHARE = (
    number(int, 0),
    number(int, 1, 2**20),
    number(float, 0, above=True),
    number(float, 0, 1),
)


def build_parser():
    """Every option with its type, range and default; a default is written here and nowhere else."""
    parser = Parser(
        prog="flickr_image_caption.py",
        usage="flickr_image_caption.py [--mode train|test|caption] [options]  (--help lists them)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for add_options in (
        add_data_options,
        add_model_options,
        add_training_options,
        add_decoding_options,
    ):
        add_options(parser)
    return parser


def add_data_options(parser):
    """What to run, and on which data."""
    add = parser.add_argument_group("what to do").add_argument
    add("--mode", choices=("train", "test", "caption"), default="train", help="default: train")
    add(
        "--model_path",
        metavar="PATH",
        help="checkpoint, or a folder of runs: to resume (train), test or caption with",
    )
    add(
        "--resume",
        metavar="latest|PATH",
        help="train: go on from the newest run's newest checkpoint, or from PATH",
    )
    add("--model_save_dir", default="./saved_models", help="run folders go below it (%(default)s)")
    add(
        "--device",
        default="auto",
        help="auto (cuda, then mps, then cpu) or a torch device such as cpu, cuda:1",
    )
    add(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        default=0,
        help="fixes weights, batches and dropout (%(default)s)",
    )
    add(
        "--num_workers",
        type=COUNT,
        default=16,
        help="processes decoding images, at most one per core (%(default)s)",
    )

    add = parser.add_argument_group("data").add_argument
    add("--dataset_type", choices=("flickr8k", "flickr30k", "sample", "custom"), default="flickr30k",
        help="default folder ./data/<dataset_type>, and the run folder's name (%(default)s)")  # fmt: skip
    add(
        "--image_dir",
        help="folder of images, or WebDataset shards (*.tar), instead of the default folder",
    )
    add(
        "--captions_file",
        help="captions in any of the formats the README lists, instead of the default one",
    )
    add(
        "--split_seed",
        type=COUNT,
        default=42,
        help="draws the 0.8/0.1/0.1 split if the data has none (%(default)s)",
    )
    add(
        "--freq_threshold",
        type=SIZE,
        default=5,
        help="fewest times a word stands in training captions (%(default)s)",
    )
    add(
        "--max_bad_fraction",
        type=SHARE,
        default=0.01,
        help="most missing or malformed items tolerated (%(default)s)",
    )
    add("--max_train_images", type=SIZE, help="use only so many training images, for smoke runs")


def add_model_options(parser):
    """Encoder and decoder."""
    add = parser.add_argument_group("encoder").add_argument
    add("--encoder", choices=tuple(ENCODERS), default="resnet50", metavar="NAME",
        help="torchvision model, frozen (%(default)s); one of " + " ".join(ENCODERS))  # fmt: skip
    add("--encoder_weights", "--resnet_weights", default="imagenet", metavar="imagenet|random|FILE",
        help="torchvision's IMAGENET1K_V1, untrained ones from --seed, or a state dict (%(default)s)")  # fmt: skip
    add("--image_size", type=number(int, 32, 1024), metavar="PIXELS",
        help="side of the square that pictures are squashed to; more: a finer grid (the encoder's own)")  # fmt: skip
    add("--coarse_size", type=number(int, 32, 1024), metavar="PIXELS",
        help="look at the picture at this smaller size, too: twice the channels (off)")  # fmt: skip
    add(
        "--cache_dir",
        default="./feature_cache",
        help="encoded images, shared by all runs (%(default)s)",
    )
    add("--cache_dtype", choices=("float32", "float16"), default="float16",
        help="what encoded images are rounded to on disk (%(default)s)")  # fmt: skip
    add(
        "--no_feature_cache",
        action="store_true",
        help="encode images whenever they are needed and store nothing",
    )

    add = parser.add_argument_group("decoder").add_argument
    add("--decoder", choices=("lstm", "attention"), default="lstm", help="default: lstm")
    add("--embed_size", type=SIZE, default=512, help="word and projected image size (%(default)s)")
    add("--hidden_size", type=SIZE, default=1024, help="LSTM units per layer (%(default)s)")
    add("--num_layers", type=SIZE, default=3, help="LSTM layers (%(default)s)")
    add(
        "--attention_dim",
        type=SIZE,
        default=512,
        help="attention decoder: units that compare cells (%(default)s)",
    )
    add(
        "--drop_prob",
        type=number(float, 0, 0.99),
        default=0.3,
        help="dropout probability (%(default)s)",
    )
    add("--patch_dropout", type=number(float, 0, 0.99), default=0.0,
        help="attention: share of an image's cells left out, drawn anew each step (%(default)s)")  # fmt: skip
    add(
        "--alpha_c",
        type=number(float, 0),
        default=1.0,
        help="attention: doubly stochastic penalty (%(default)s)",
    )


def add_training_options(parser):
    """Training, and its learning rate schedule."""
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=SIZE, default=10, help="on resume: additional epochs (%(default)s)")
    add("--batch_size", type=SIZE, default=128, help="captions per step (%(default)s)")
    add("--learning_rate", type=RATE, default=0.0001, help="AdamW's initial rate (%(default)s)")
    add(
        "--weight_decay",
        type=number(float, 0),
        default=0.0,
        help="AdamW's, of the weight matrices (%(default)s)",
    )
    add(
        "--horizontal_flip",
        action="store_true",
        help="mirror every other training image, drawn anew each epoch",
    )
    add(
        "--label_smoothing",
        type=number(float, 0, 0.99),
        default=0.0,
        help="spread over all words (%(default)s)",
    )
    add(
        "--grad_clip",
        type=number(float, 0),
        default=5.0,
        help="largest L2 norm of gradients, 0 = off (%(default)s)",
    )
    add("--precision", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="auto: bfloat16 where the hardware has it, float16 on older GPUs, else float32")  # fmt: skip
    add("--compile", action="store_true",
        help="torch.compile encoder and attention decoder (on CUDA its steps as graphs); slow to start")  # fmt: skip
    add(
        "--early_stopping_patience",
        type=COUNT,
        default=0,
        help="epochs without a better CIDEr, 0 = off (%(default)s)",
    )
    add(
        "--val_beam_size",
        type=SIZE,
        default=1,
        help="beam for each epoch's validation captions (%(default)s)",
    )
    add(
        "--keep_checkpoints",
        type=SIZE,
        help="keep only so many of the newest model_epoch_N.pt (all)",
    )

    add = parser.add_argument_group("learning rate schedule").add_argument
    add("--use_scheduler", action="store_true", help="without it the rate is constant")
    add(
        "--scheduler_type",
        choices=SCHEDULERS,
        default="reduce_lr_on_plateau",
        help="default: %(default)s",
    )
    add(
        "--scheduler_patience",
        type=COUNT,
        default=3,
        help="plateau: epochs without a better loss (%(default)s)",
    )
    add(
        "--scheduler_factor",
        type=number(float, 0, 0.999, above=True),
        default=0.5,
        help="plateau: (%(default)s)",
    )
    add(
        "--scheduler_step_size",
        type=SIZE,
        default=7,
        help="step: epochs between decays (%(default)s)",
    )
    add(
        "--scheduler_gamma",
        type=number(float, 0, 1, above=True),
        default=0.1,
        help="step, exponential: (%(default)s)",
    )
    add(
        "--scheduler_t_max",
        type=SIZE,
        default=10,
        help="cosine: epochs to the minimum (%(default)s)",
    )
    add(
        "--min_lr",
        type=number(float, 0),
        default=1e-7,
        help="plateau, cosine: smallest rate (%(default)s)",
    )
    add(
        "--warmup_epochs",
        type=COUNT,
        default=0,
        help="one_cycle: epochs of rising rate (%(default)s)",
    )


def add_decoding_options(parser):
    """How captions are written, and what test and caption mode leave behind."""
    add = parser.add_argument_group("decoding, in test and caption mode").add_argument
    add("--algorithm", choices=("greedy", "beam", "sample"), default="beam", help="default: beam")
    add("--beam_size", type=SIZE, default=5, help="beam: hypotheses kept per image (%(default)s)")
    add(
        "--max_length",
        type=SIZE,
        default=40,
        help="most tokens in a caption, <EOS> counted (%(default)s)",
    )
    add("--min_length", type=COUNT, default=0, help="fewest words in a caption (%(default)s)")
    add("--length_penalty", type=number(float, -10, 10), default=0.0,
        help="beam: score is log_prob / length ** penalty; above 0 favours long captions (%(default)s)")  # fmt: skip
    add(
        "--no_repeat_ngram_size",
        type=COUNT,
        default=0,
        help="no n-gram of this size twice, 0 = off (%(default)s)",
    )
    add(
        "--temperature",
        type=number(float, 1e-3),
        default=1.0,
        help="sample: below 1 sharpens (%(default)s)",
    )
    add(
        "--top_k",
        type=COUNT,
        default=0,
        help="sample: from the k likeliest words, 0 = all (%(default)s)",
    )
    add(
        "--top_p",
        type=number(float, 0, 1, above=True),
        default=1.0,
        help="sample: nucleus probability (%(default)s)",
    )
    add(
        "--num_captions",
        type=SIZE,
        default=1,
        help="caption mode: captions per image (%(default)s)",
    )

    add = parser.add_argument_group("test and caption mode").add_argument
    add(
        "--split",
        choices=("train", "val", "test"),
        default="test",
        help="test: which images (%(default)s)",
    )
    add("--ensemble", nargs="+", default=[], metavar="PATH",
        help="more checkpoints, or folders of runs; word probabilities are averaged")  # fmt: skip
    add(
        "--images",
        nargs="+",
        metavar="FILE_OR_FOLDER",
        help="caption: pictures, and folders of pictures",
    )
    add("--json", action="store_true", help="caption: one JSON object per line")
    add("--output_dir", help="where test and caption mode write files (beside the checkpoint)")

    add = parser.add_argument_group("attention pictures, attention decoder only").add_argument
    add(
        "--save_attention_viz",
        action="store_true",
        help="draw where the decoder looked, word by word",
    )
    add(
        "--attention_viz_samples",
        type=SIZE,
        default=3,
        help="train and test: how many images (%(default)s)",
    )
    add("--advanced_attention_viz", action="store_true", help="also raw maps, entropy and peaks")


def parse_args(argv=None):
    """Options of one run with `typed`, the names given on the command line. Misuse exits with status 2 and one line."""
    parser = build_parser()
    defaults = vars(parser.parse_args([]))
    unset = object()
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    typed = {name: value for name, value in typed.items() if value is not unset}
    args = argparse.Namespace(**{**defaults, **typed}, typed=frozenset(typed))
    for name, modes in IDLE_ELSEWHERE.items():
        if name in typed and args.mode not in modes:
            hint = ": give --model_path" if name == "resume" else ""
            parser.error(f"--{name} belongs to --mode {' and '.join(modes)}, not {args.mode}{hint}")
        if typed.get(name) == "" or (isinstance(typed.get(name), list) and "" in typed[name]):
            parser.error(f"--{name} is empty: give a path")
    if args.resume and args.model_path:
        parser.error("--resume and --model_path name the same thing: give one of them")
    args.model_path = args.model_path or args.resume
    if args.mode != "train" and not args.model_path:
        parser.error(f"--mode {args.mode} needs --model_path, the checkpoint to use")
    if args.mode == "caption" and not args.images:
        parser.error("--mode caption needs --images, pictures or folders of them")
    if (
        args.model_path is None
    ):  # with a checkpoint, the options it holds are checked together with the typed ones
        try:
            check_options(args)
        except ValueError as error:
            parser.error(str(error))
    return args


def check_options(args):
    """Refuse options that contradict each other. Raises: ValueError naming the flags."""
    args.save_attention_viz |= args.advanced_attention_viz
    if args.save_attention_viz and args.decoder != "attention":
        raise ValueError(
            f"--save_attention_viz needs --decoder attention: the {args.decoder} decoder has no attention maps"
        )
    if args.min_length >= args.max_length:
        raise ValueError(
            f"--min_length {args.min_length} must be below --max_length {args.max_length}"
        )
    most = {"greedy": 1, "beam": args.beam_size, "sample": math.inf}[args.algorithm]
    if args.num_captions > most:
        raise ValueError(
            f"--num_captions {args.num_captions} is more than --algorithm {args.algorithm} finds ({most})"
        )
    idle = dict.fromkeys(("temperature", "top_k", "top_p"), "sample") | {
        "beam_size": "beam",
        "length_penalty": "beam",
    }
    for name, algorithm in idle.items():
        if name in args.typed and args.algorithm != algorithm:
            raise ValueError(f"--{name} belongs to --algorithm {algorithm}, not {args.algorithm}")
    if (
        args.use_scheduler
        and args.scheduler_type in ("reduce_lr_on_plateau", "cosine")
        and args.min_lr > args.learning_rate
    ):
        raise ValueError(
            f"--min_lr {args.min_lr:g} is above --learning_rate {args.learning_rate:g}"
        )
    new_plan = args.model_path is None  # a resumed one keeps the warm-up of its first plan
    if (
        new_plan
        and args.use_scheduler
        and args.scheduler_type == "one_cycle"
        and args.warmup_epochs >= args.epochs
    ):
        raise ValueError(
            f"--warmup_epochs {args.warmup_epochs} must be below --epochs {args.epochs}"
        )


if __name__ == "__main__":
    ARGS = (
        parse_args()
    )  # before torch, whose import takes seconds: --help and mistakes answer at once

import functools
import hashlib
import itertools
import json
import pickle
import shutil
import signal
import time
import urllib.error
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.fx.experimental.optimization
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from tqdm import tqdm

import attention_visualization
import caption_batches
import caption_data
import checkpoints
import download_datasets
import experiment_utils
import feature_cache
import image_loading
import metrics_utils
import process_group
import runtime
from caption_decoding import Ensemble, generate, map_tensors, select
from repeated_linear import RepeatedLinear, summed_once
from runtime import (
    Stopped,
    listen_for_stop,
    resolve_device,
    resolve_precision,
    to_device,
    until_stopped,
)

WEIGHTS_DIR = download_datasets.WEIGHTS_DIR  # document A's place for downloaded weights
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in 0..1
DECODING_OPTIONS = (
    "beam_size", "max_length", "min_length", "length_penalty", "no_repeat_ngram_size", "temperature", "top_k", "top_p",
    "num_captions",
)  # fmt: skip
SCHEDULER_STATE = {
    "last_epoch",
    "_step_count",
    "_last_lr",
    "base_lrs",
    "best",
    "num_bad_epochs",
    "cooldown_counter",
}
SCHEDULER_STATE |= {
    "_schedule_phases"
}  # OneCycle's plan; everything else a schedule holds follows from the options
AT_EPOCH_START = {
    "batch": 0,
    "loss_sum": 0.0,
    "tokens": 0,
    "seconds": 0.0,
    "rate": 0.0,
}  # counters of one epoch
SAMPLE = 512  # training images that the features' mean and standard deviation are taken from
LOOK_EVERY = 50  # steps between looks at the loss: each look waits for the device
CHUNK = 100  # images decoded together
TOGETHER = 16  # captions of about one length that end their training step together
BUCKET = (
    8  # a compiled step's captions and images are padded to multiples of it: few shapes to compile
)

# --------------------------------------------------------------------------------------------------------- the encoder


class Encoder(nn.Module):
    """A frozen torchvision trunk: pictures to the grid of features before pooling. BatchNorm never leaves eval mode.

    `trunk` holds the weights as they came; what computes is a copy with BatchNorm folded into the convolutions.
    """

    def __init__(
        self, name, state, weights, precision="float32", image_size=None, coarse_size=None
    ):
        """`name`: one of ENCODERS. `state`: torchvision's state dict, classifier ignored. `weights`: its origin.

        `image_size`: pixels a side; None: what the published weights were tested with. `coarse_size`: of a second look.
        Raises: ValueError when `state` is of another architecture, or the second look is no smaller.
        """
        super().__init__()
        with torch.device("meta"):
            model = torchvision.models.get_model(name, weights=None)
        self.trunk = nn.Sequential()
        for module in ENCODERS[name]:
            self.trunk.add_module(module, getattr(model, module))
        wanted = self.trunk.state_dict()
        state = {
            key: torch.zeros_like(v)
            for key, v in wanted.items()
            if key.endswith("num_batches_tracked")
        } | state
        missing = sorted(wanted.keys() - state.keys()) or sorted(
            state.keys() - model.state_dict().keys()
        )
        wrong = [
            key
            for key in wanted.keys() & state.keys()
            if wanted[key].shape != getattr(state[key], "shape", None)
        ]
        if missing or wrong:
            fault = f"they differ in {missing[0]}" if missing else f"another shape of {min(wrong)}"
            raise ValueError(
                f"--encoder_weights {weights}: not weights of --encoder {name} ({fault}): give both alike"
            )
        self.trunk.load_state_dict(
            {key: state[key].to(value.dtype) for key, value in wanted.items()}, assign=True
        )
        self.name = name
        own_size = (
            torchvision.models.get_model_weights(name).IMAGENET1K_V1.transforms().crop_size[0]
        )
        self.image_size, self.coarse_size = image_size or own_size, coarse_size
        if coarse_size and coarse_size >= self.image_size:
            raise ValueError(
                f"--coarse_size {coarse_size} must be below the image size, {self.image_size} (--image_size)"
            )
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()
        self.precision, self.folded = precision, torch.fx.experimental.optimization.fuse(self.trunk)
        self.folded.to(getattr(torch, precision), memory_format=torch.channels_last)
        with torch.inference_mode():
            blank = torch.zeros(1, 3, self.image_size, self.image_size)
            self.channels, *self.grid = self.trunk(blank).shape[1:]  # F, [h, w]
        self.channels *= 2 if coarse_size else 1

    def train(self, mode=True):
        """Stays in eval mode whatever `mode`: frozen BatchNorm must not drift."""
        return super().train(False)

    def forward(self, images):
        """images (N, 3, S, S) uint8 RGB -> features (N, P, F) float32, cells in reading order."""
        images = to_device(images, self.mean.device).contiguous(memory_format=torch.channels_last)
        images, dtype = (images / 255 - self.mean) / self.std, getattr(torch, self.precision)
        features = self.folded(images.to(dtype)).float()  # (N, F, h, w)
        if self.coarse_size:
            smaller = F.interpolate(
                images, size=(self.coarse_size,) * 2, mode="bilinear", antialias=True
            )
            coarse = self.folded(smaller.to(dtype)).float()
            features = torch.cat(
                [features, F.interpolate(coarse, size=features.shape[2:], mode="bilinear")], dim=1
            )
        return features.flatten(2).transpose(1, 2)

    @functools.cached_property
    def weights_sha256(self):
        """Over names and tensors of the trunk, which is frozen: taken once."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.trunk.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def key(self):
        """What decides the features: the cache's key, and what a checkpoint says of its encoder."""
        return {
            "name": self.name, "weights_sha256": self.weights_sha256, "image_size": self.image_size,
            "grid": list(self.grid), "channels": self.channels, "mean": IMAGENET_MEAN, "std": IMAGENET_STD,
            "precision": self.precision, **({"coarse_size": self.coarse_size} if self.coarse_size else {}),
        }  # fmt: skip


def load_encoder_weights(name, source, seed):
    """State dict of torchvision's `name` from `source`: imagenet, random (drawn from `seed`) or a file.

    Raises: FileNotFoundError or ValueError that say how to get the weights: an encoder is never silently random.
    """
    if source == "random":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return torchvision.models.get_model(name, weights=None).state_dict()
    if source != "imagenet":
        return read_weights(Path(source))
    url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
    published = download_datasets.RESNET50  # document A's file, in a format older than weights_only
    names = [published.name, Path(url).name] if name == "resnet50" else [Path(url).name]
    for file in (WEIGHTS_DIR / name for name in names):
        if file.is_file():
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            if not digest.startswith(file.stem.rpartition("-")[2]):
                raise ValueError(
                    f"{file}: its SHA-256 {digest[:8]}... is not the one in its name: fetch it again"
                )
            return read_weights(file, trusted=f"sha256:{digest}" == published.checksum)
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except (
        urllib.error.URLError,
        OSError,
        pickle.UnpicklingError,
        *checkpoints.UNREADABLE,
    ) as error:
        reason = str(error).splitlines()[0] or type(error).__name__
        raise FileNotFoundError(
            f"--encoder_weights imagenet: cannot download {url} ({reason}): put the file into {WEIGHTS_DIR}/, "
            "or give --encoder_weights FILE or random"
        ) from error


def read_weights(file, trusted=False):
    """State dict in a file; unless `trusted`, no code in it runs. Raises: FileNotFoundError, ValueError naming it."""
    if not file.is_file():
        raise FileNotFoundError(
            f"--encoder_weights {file}: no such file: give imagenet, random or a torchvision state dict"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on pickles that it then refuses
            state = torch.load(file, map_location="cpu", weights_only=not trusted)
    except (pickle.UnpicklingError, *checkpoints.UNREADABLE) as error:
        raise ValueError(
            f"--encoder_weights {file}: not a readable state dict: give a torchvision .pth file"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(
            f"--encoder_weights {file}: holds a {type(state).__name__}, expected a torchvision state dict"
        )
    return state


def open_encoder(args, checkpoint=None):
    """The encoder of this run, on its device: from the checkpoint's own weights where it has them.

    Raises: ValueError when the weights differ from those the checkpoint was trained with.
    """
    stored, look = (
        checkpoint["encoder"] if checkpoint else {},
        (args.precision, args.image_size, args.coarse_size),
    )
    if stored.get("weights") is not None and "encoder_weights" not in args.typed:
        with checkpoints.checkpoint_errors(args.model_path):
            encoder = Encoder(args.encoder, stored["weights"], args.model_path, *look)
    else:
        weights = load_encoder_weights(args.encoder, args.encoder_weights, args.seed)
        encoder = Encoder(args.encoder, weights, args.encoder_weights, *look)
    args.image_size, key = encoder.image_size, encoder.key()
    for name in ("channels", "image_size", "coarse_size") if checkpoint else ():
        if stored.get(name) != key.get(name):
            raise ValueError(
                f"{args.model_path}: its encoder has other {name} than it says: give another checkpoint"
            )
    if checkpoint and key["weights_sha256"] != stored.get("weights_sha256"):
        raise ValueError(
            f"--encoder_weights {args.encoder_weights}: other weights than {args.model_path} was trained with: "
            "give the same ones, or leave the option out and use best.pt, which holds them"
        )
    encoder.to(args.device)
    if args.compile:
        encoder.folded = torch.compile(encoder.folded, dynamic=False, options={"freezing": True})
    return encoder


# -------------------------------------------------------------------------------------------------------- the decoders


class Decoder(nn.Module):
    """What both decoders share. Features are standardised per channel, so that any encoder's scale suits them."""

    compiled = None  # `teach` as --compile made it

    def __init__(self, feature_dim, vocab_size, embed_size, hidden_size, drop_prob):
        super().__init__()
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_std", torch.ones(feature_dim))
        self.embed = nn.Embedding(vocab_size, embed_size)
        self.dropout = nn.Dropout(drop_prob)
        self.head = nn.Linear(hidden_size, vocab_size)

    def fit_features(self, features):
        """Take mean and standard deviation of each channel from a sample (N, P, F) of the training images."""
        std, mean = torch.std_mean(features, dim=(0, 1), correction=0)
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(
            std.clamp_min(1e-3 * std.max() + 1e-12)
        )  # a channel that never moves stays quiet

    def standardise(self, features):
        """(N, P, F) -> (N, P, F)."""
        return (features - self.feature_mean) / self.feature_std

    def drop(self, x, owner=None, captions=None):
        """Dropout that leaves the same units out in every cell of an image, or at every step of a caption.

        x (N, P, D), or x (tokens, D) and the number (tokens,) of the caption that owns each token, below `captions`.
        Source: Gal and Ghahramani 2016, section 4.
        """
        if not self.training:
            return x
        if owner is None:
            return x * self.dropout(x.new_ones(x.size(0), 1, x.size(-1)))
        return x * self.dropout(torch.ones_like(x[:captions])).index_select(0, owner)

    def forward(self, features, captions, lengths, image_index, packed=False):
        """Teacher forcing: step t is given token t and predicts token t + 1.

        Captions run longest first, and leave when they are written, TOGETHER at a time: matrix products of few
        different sizes keep oneDNN's cache of compiled kernels warm.

        Args: features (N, P, F), captions (B, T), lengths (B,), image_index (B,).
        Returns: logits (B, T, V), 0 beyond a caption's length, and alphas (B, T, P) or None, of fewer cells where
            --patch_dropout leaves some out; if `packed`, logits as a PackedSequence, which spares the loss the way over
            (B, T, V).
        """
        exact = pack(captions, lengths)
        order, steps = exact.sorted_indices, captions.size(1)
        longest = (
            lengths.cpu()
            .sort(descending=True)
            .values[::TOGETHER]
            .repeat_interleave(TOGETHER)[: len(order)]
        )
        teach = (self.training and self.compiled) or self.teach
        if teach is self.compiled:  # nobody leaves early
            longest = longest.new_full(longest.shape, steps + -steps % BUCKET)
            captions = F.pad(captions, (0, -steps % BUCKET))
            features = F.pad(features, (0, 0, 0, 0, 0, -len(features) % BUCKET))
        written = pack_padded_sequence(captions[order], longest, batch_first=True)
        sizes = written.batch_sizes.tolist()
        rows = list(itertools.zip_longest(sizes, exact.batch_sizes.tolist(), fillvalue=0))
        owner = to_device(torch.cat([torch.arange(count) for count in sizes]), features.device)
        within = (
            torch.cat([torch.arange(count) < writing for count, writing in rows])
            .nonzero()
            .squeeze(1)
        )
        within = to_device(within, features.device)
        found = teach(features, written.data, sizes, image_index[order], owner)
        words, alphas = (
            part if part is None else exact._replace(data=part.index_select(0, within))
            for part in found
        )
        return words if packed else unpack(words, steps), None if alphas is None else unpack(
            alphas, steps
        )


class LSTMDecoder(Decoder):
    """LSTM that is shown the image once, then the words. Source: [1] section 3.1, equations 10 to 12.

    Departure: the image also reaches the output of every step directly, so that it is not forgotten on the way.
    """

    options = ("embed_size", "hidden_size", "num_layers", "drop_prob")
    pooled = True  # reads the mean over the grid only

    def __init__(self, vocab_size, feature_dim, embed_size, hidden_size, num_layers, drop_prob):
        super().__init__(feature_dim, vocab_size, embed_size, hidden_size, drop_prob)
        self.project_image = nn.Linear(feature_dim, embed_size)
        self.remind = nn.Linear(embed_size, hidden_size, bias=False)
        self.lstm = nn.LSTM(
            embed_size,
            hidden_size,
            num_layers,
            batch_first=True,
            dropout=drop_prob * (num_layers > 1),
        )

    def teach(self, features, tokens, sizes, image_index, owner):
        """Teacher forcing on packed captions, longest first.

        Args: features (N, P, F), tokens (tokens,) step by step, sizes: how many captions each step writes, image_index
            (B,), owner (tokens,): the caption that each token belongs to.   Returns: logits (tokens, V), None.
        """
        image = self.show(features)[image_index]  # (B, E), the first input of each caption
        inputs = torch.cat([image, self.embed(tokens)])
        inputs = self.drop(inputs, torch.cat([owner[: len(image)], owner]), len(image))
        hidden = self.lstm(PackedSequence(inputs, torch.tensor([sizes[0], *sizes])))[0].data
        hidden = hidden[len(image) :]  # what follows the image itself is no word
        hidden = hidden + self.remind(self.dropout(image)).index_select(0, owner)
        return self.head(self.drop(hidden, owner, len(image))), None

    def show(self, features):
        """features (N, P, F) -> the image as the LSTM's first input (N, E)."""
        return self.project_image(self.dropout(self.standardise(features).mean(1)))

    def start(self, features):
        """features (N, P, F) -> state once the image was shown, one hypothesis per image."""
        image = self.show(features).unsqueeze(1)
        layers = tuple(
            part.transpose(0, 1).unsqueeze(1) for part in self.lstm(image)[1]
        )  # (N, 1, L, H) each
        return self.remind(image), layers

    def step(self, tokens, state):
        """tokens (N, K), state -> logits (N, K, V), state, None."""
        hidden, cell = (
            part.flatten(0, 1).transpose(0, 1).contiguous() for part in state[1]
        )  # (L, N K, H)
        output, new = self.lstm(self.embed(tokens).flatten(0, 1).unsqueeze(1), (hidden, cell))
        new = tuple(part.transpose(0, 1).unflatten(0, tokens.shape) for part in new)  # (N, K, L, H)
        return self.head(output.view(*tokens.shape, -1) + state[0]), (state[0], new), None


class AttentionDecoder(Decoder):
    """LSTM that looks at the grid before each word. Source: [2] sections 3.1.2 and 4.2, scores as in [3] section 3.1.

    Departures: the context is a mean of projected cells, gated unit by unit; the deep output layer (equation 7) adds
    the LSTM's output as it is. tanh x is computed as 2 sigmoid 2x - 1, quicker on a CPU; softmax ignores the 1.
    """

    options = (
        "embed_size",
        "hidden_size",
        "num_layers",
        "drop_prob",
        "attention_dim",
        "patch_dropout",
    )
    pooled = False

    def __init__(
        self,
        vocab_size,
        feature_dim,
        embed_size,
        hidden_size,
        num_layers,
        drop_prob,
        attention_dim,
        patch_dropout=0.0,
    ):
        super().__init__(feature_dim, vocab_size, embed_size, hidden_size, drop_prob)
        self.patch_dropout = patch_dropout
        self.project_features = nn.Linear(feature_dim, embed_size)
        self.project_keys = nn.Linear(feature_dim, attention_dim)
        self.project_query = RepeatedLinear(
            hidden_size, attention_dim, bias=False
        )  # the keys have the bias
        self.score = nn.Linear(attention_dim, 1, bias=False)  # softmax ignores a shared constant
        self.gate = RepeatedLinear(hidden_size, embed_size)
        self.start_hidden = nn.Linear(feature_dim, num_layers * hidden_size)
        self.start_cell = nn.Linear(feature_dim, num_layers * hidden_size)
        self.word_gates = nn.Linear(
            embed_size, 4 * hidden_size
        )  # the first layer's input weights for words
        below = [embed_size] + [hidden_size] * (num_layers - 1)
        self.layers = nn.ModuleList(
            RepeatedLinear(size + hidden_size, 4 * hidden_size) for size in below
        )
        self.deepen = nn.Linear(2 * embed_size, hidden_size)  # word and context, into the output

    def some_cells(self, features):
        """In training, of each image as many cells as --patch_dropout leaves, drawn at random: (N, P, F) -> (N, P', F).

        Source: Liu et al. 2023, PatchDropout, section 3.
        """
        if not (self.training and self.patch_dropout):
            return features
        kept = max(1, round(features.size(1) * (1 - self.patch_dropout)))
        cells = torch.rand(features.shape[:2], device=features.device).topk(kept).indices
        images = torch.arange(len(features), device=features.device).unsqueeze(1)
        return features[images, cells]

    def start(self, features):
        """features (N, P, F) -> state: what is computed once per image, and LSTM layers made of the mean feature."""
        features = self.standardise(features)
        keys, values = (
            2 * self.project_keys(features),
            self.drop(self.project_features(features)),
        )  # (N, P, A or E)
        mean = self.dropout(features.mean(1, keepdim=True))
        hidden, cell = (
            layer(mean).tanh().chunk(len(self.layers), -1)
            for layer in (self.start_hidden, self.start_cell)
        )
        return (keys, values), tuple(zip(hidden, cell, strict=True))  # each (N, 1, H)

    def look(self, query, keys, values):
        """query (N, K, H), keys (N, P, A), values (N, P, E) -> context (N, K, E), alphas (N, K, P); rows sum to 1."""
        energy = (
            keys.unsqueeze(1) + 2 * self.project_query(query).unsqueeze(2)
        ).sigmoid()  # (N, K, P, A)
        alphas = (2 * self.score(energy).squeeze(-1).float()).softmax(dim=-1)
        return alphas.type_as(values) @ values * self.gate(query).sigmoid(), alphas

    def advance(self, word_gates, state):
        """One step: word gates (N, K, 4H), state -> output (N, K, H), context (N, K, E), state, alphas (N, K, P)."""
        per_image, layers = state
        context, alphas = self.look(
            layers[-1][0], *per_image
        )  # the query: the top layer's output, one step ago
        below, new = context, []
        for layer, (hidden, cell) in zip(self.layers, layers, strict=True):
            gates = layer(torch.cat([self.dropout(below) if new else below, hidden], dim=-1))
            i, f, g, o = (gates if new else gates + word_gates).float().chunk(4, dim=-1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            below = o.sigmoid() * cell.tanh()
            new.append((below, cell))
        return below, context, (per_image, tuple(new)), alphas

    def step(self, tokens, state):
        """tokens (N, K), state -> logits (N, K, V), state, alphas (N, K, P)."""
        words = self.embed(tokens)
        output, context, state, alphas = self.advance(self.word_gates(words), state)
        return self.head(output + self.deepen(torch.cat([words, context], dim=-1))), state, alphas

    def teach(self, features, tokens, sizes, image_index, owner):
        """As `LSTMDecoder.teach`, and alphas (tokens, P or P'). An image's captions share its projections."""
        state = self.start(self.some_cells(features))
        state = map_tensors(lambda part: part.index_select(0, image_index), state)  # (B, 1, ...)
        words = self.embed(tokens)  # (tokens, E)
        word_gates = self.word_gates(self.drop(words, owner, len(image_index))).unsqueeze(
            1
        )  # (tokens, 1, 4H)
        outputs, contexts, looked = [], [], []
        with summed_once(self.project_query, self.gate, *self.layers):
            for gates in word_gates.split(sizes):
                if outputs and len(gates) < len(outputs[-1]):
                    state = select(state, slice(len(gates)))  # captions leave when they are written
                output, context, state, alphas = self.advance(gates, state)
                outputs.append(output)
                contexts.append(context)
                looked.append(alphas)
        output, context, alphas = (
            torch.cat(steps).squeeze(1) for steps in (outputs, contexts, looked)
        )
        output = output + self.deepen(torch.cat([words, context], dim=-1))
        return self.head(self.drop(output, owner, len(image_index))), alphas


DECODERS = {"lstm": LSTMDecoder, "attention": AttentionDecoder}


def token_mask(lengths, steps):
    """lengths (B,) -> (B, T) bool, False beyond each caption's length."""
    return torch.arange(steps, device=lengths.device) < lengths.unsqueeze(1)


def pack(sequences, lengths):
    """sequences (B, T, ...), lengths (B,) -> PackedSequence: what lies within the lengths, step by step.

    The order depends on the lengths alone. Lengths that are on the CPU spare a GPU the wait for them.
    """
    lengths, order = lengths.cpu().sort(descending=True, stable=True)
    there, back = (to_device(indices, sequences.device) for indices in (order, order.argsort()))
    packed = pack_padded_sequence(sequences.index_select(0, there), lengths, batch_first=True)
    return PackedSequence(packed.data, packed.batch_sizes, there, back)


def unpack(packed, steps):
    """The way back: (B, steps, ...), 0 beyond each length. torch's own reordering would make a GPU wait."""
    ordered = PackedSequence(packed.data, packed.batch_sizes)
    padded, _ = pad_packed_sequence(ordered, batch_first=True, total_length=steps)
    return padded.index_select(0, packed.unsorted_indices)


def build_decoder(args, feature_dim, vocab_size, device=None):
    """An untrained decoder with the sizes that `args` gives, on its device or the given one."""
    decoder = DECODERS[args.decoder]
    sizes = {name: getattr(args, name) for name in decoder.options}
    return decoder(vocab_size, feature_dim, **sizes).to(device or args.device)


# ------------------------------------------------------------------------------------------------- losses and schedules


def doubly_stochastic_penalty(alphas, lengths):
    """Penalise grid cells that receive more or less than one unit of attention over a whole caption.

    Args: alphas (B, T, P), each row sums to 1; lengths (B,) tokens per caption, <EOS> counted.
    Returns: () float, dimensionless: (1 - attention received) ** 2, averaged over cells and captions.
    Source: [2] section 4.2.1, which sums over cells; the mean keeps alpha_c independent of the grid's size.
    """
    within = token_mask(to_device(lengths, alphas.device), alphas.size(1))
    received = (alphas * within.unsqueeze(-1)).sum(dim=1)  # (B, P)
    return (1 - received).square().mean()


def cross_entropy(logits, captions, lengths, label_smoothing=0.0):
    """logits (B, T, V) or packed, captions (B, T + 1), lengths (B,) -> smoothed and plain loss, () in nats per token.

    Label smoothing spreads that share of the target evenly over the vocabulary (Szegedy et al. 2016, section 7). What
    lies beyond a caption's length is left out by length: a padding id may also be a word.
    """
    logits = pack(logits, lengths) if isinstance(logits, torch.Tensor) else logits
    log_probs = logits.data.float().log_softmax(dim=-1)  # (tokens, V)
    plain = F.nll_loss(log_probs, pack(captions[:, 1:], lengths).data)
    if not label_smoothing:
        return plain, plain
    return (1 - label_smoothing) * plain - label_smoothing * log_probs.mean(), plain


def build_optimizer(decoder, args):
    """AdamW (Loshchilov and Hutter 2019). Biases do not decay, nor do embeddings: those of rare words would fade."""
    decays = {p: p.ndim > 1 and p is not decoder.embed.weight for p in decoder.parameters()}
    groups = [
        {"params": [p for p in decays if decays[p]], "weight_decay": args.weight_decay},
        {"params": [p for p in decays if not decays[p]], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)


def build_scheduler(optimizer, args, plan):
    """The torch scheduler that `args` asks for, or None. `plan` holds `epochs` and `steps`, OneCycle's length."""
    schedule = torch.optim.lr_scheduler
    if not args.use_scheduler:
        return None
    if args.scheduler_type == "reduce_lr_on_plateau":
        return schedule.ReduceLROnPlateau(
            optimizer,
            factor=args.scheduler_factor,
            patience=args.scheduler_patience,
            min_lr=args.min_lr,
        )
    if args.scheduler_type == "step":
        return schedule.StepLR(optimizer, args.scheduler_step_size, args.scheduler_gamma)
    if args.scheduler_type == "cosine":
        return schedule.CosineAnnealingLR(optimizer, args.scheduler_t_max, args.min_lr)
    if args.scheduler_type == "exponential":
        return schedule.ExponentialLR(optimizer, args.scheduler_gamma)
    warmup = min(
        1.0, args.warmup_epochs / args.epochs + 1e-9
    )  # torch divides 0 by 0 for a warm-up of one step
    return schedule.OneCycleLR(
        optimizer, args.learning_rate, total_steps=plan["steps"], pct_start=warmup
    )


def describe_scheduler(args, plan):
    """What the console says of the schedule, such as `CosineAnnealingLR (T_max=20)`."""
    return {
        "reduce_lr_on_plateau": f"ReduceLROnPlateau (factor={args.scheduler_factor}, "
                                f"patience={args.scheduler_patience})",
        "step": f"StepLR (step_size={args.scheduler_step_size}, gamma={args.scheduler_gamma})",
        "cosine": f"CosineAnnealingLR (T_max={args.scheduler_t_max})",
        "exponential": f"ExponentialLR (gamma={args.scheduler_gamma})",
        "one_cycle": f"OneCycleLR (max_lr={args.learning_rate:g}, warmup_epochs={args.warmup_epochs}, "
                     f"steps={plan['steps']})",
    }[args.scheduler_type] if args.use_scheduler else "none"  # fmt: skip


def warn_about_schedule(args, epochs):
    """Say on stderr what a schedule will do that its user may not expect."""
    if args.use_scheduler and args.scheduler_type == "cosine" and epochs > args.scheduler_t_max:
        print(f"warning: --epochs {epochs} is more than --scheduler_t_max {args.scheduler_t_max}: "
              "the cosine's rate climbs again after its minimum", file=sys.stderr)  # fmt: skip
    if args.use_scheduler and args.scheduler_type == "exponential" and args.scheduler_gamma <= 0.5:
        print(f"warning: --scheduler_gamma {args.scheduler_gamma} multiplies the rate every epoch: after 3 epochs "
              f"{args.scheduler_gamma**3:.2g} of it is left", file=sys.stderr)  # fmt: skip


# ------------------------------------------------------------------------------------------ data, as the models want it


def open_dataset(args, checkpoint=None):
    """The dataset, split as the checkpoint's was; another one, without any image in common, has its own split."""
    stored, remote = checkpoint["splits"] if checkpoint else None, "image_dir" in args.typed
    if stored and {"dataset_type", "captions_file"} & args.typed:
        _, captions_file = caption_data.find_dataset(
            args.dataset_type, args.image_dir, args.captions_file, remote
        )
        here = {row[0] for row in caption_data.read_captions(captions_file)[0]}
        stored = stored if any(here.intersection(names) for names in stored.values()) else None
    return caption_data.load_dataset(
        args.dataset_type, args.image_dir, args.captions_file, split_seed=args.split_seed, splits=stored,
        max_bad_fraction=args.max_bad_fraction, max_train_images=args.max_train_images,
        remote_shards=remote,
    )  # fmt: skip


def open_features(args, encoder, dataset, split, pooled):
    """(table of the images in `split`, their features); unreadable images leave the dataset first."""

    def source():
        table = dataset.table[dataset.table.split == split].reset_index(drop=True)
        paths = [dataset.image_dir / name for name in table.image]
        mirrored = args.horizontal_flip and args.mode == split == "train"
        return table, feature_cache.FeatureSource(
            encoder, paths, pooled=pooled, mirrored=mirrored,
            cache_dir=None if args.no_feature_cache else args.cache_dir,
            dtype=getattr(torch, args.cache_dtype), num_workers=args.num_workers, device=args.device,
        )  # fmt: skip

    table, features = source()
    if features.unreadable:
        names = zip(table.image, features.paths, strict=True)
        reasons = {
            name: features.unreadable[path] for name, path in names if path in features.unreadable
        }
        print(dataset.drop_unreadable(reasons))
        table, features = source()
    return table, features


def caption_images(decoder, grids, vocabulary, args, **search):
    """Yield each image's hypotheses, best first, decoded without reference tokens.

    `grids`: features (n, P, F), chunk by chunk. `search` overrides the decoding options of `args`.
    """
    search = {name: getattr(args, name) for name in ("algorithm", *DECODING_OPTIONS)} | search
    generator = torch.Generator(args.device).manual_seed(args.seed)
    decoder.eval()
    for grid in grids:
        with autocast(args):
            hypotheses = generate(decoder, grid, vocabulary, generator=generator, **search)
        yield from hypotheses


def autocast(args):
    """The context in which decoders compute, at --precision."""
    return torch.autocast(
        args.device.type, getattr(torch, args.precision), enabled=args.precision != "float32"
    )


# ------------------------------------------------------------------------------------------------------------ training


def train_step(run, features, batch, weights=(1.0, 1.0)):
    """One update from one batch. Returns the plain loss before it: () float on the device, nats per token.

    `weights`: of this batch in the mean over tokens and over captions, when it is a process's share of a larger one.
    """
    args, device = run.args, run.args.device
    _, captions, lengths, image_index = batch
    captions, image_index = (
        to_device(captions, device),
        to_device(image_index, device),
    )  # lengths stay on the CPU
    with autocast(args):
        logits, alphas = run.model(features, captions[:, :-1], lengths, image_index, packed=True)
    loss, plain = cross_entropy(logits, captions, lengths, args.label_smoothing)
    loss = weights[0] * loss
    if alphas is not None:
        loss = loss + weights[1] * args.alpha_c * doubly_stochastic_penalty(alphas.float(), lengths)
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    if args.grad_clip:
        nn.utils.clip_grad_norm_(run.decoder.parameters(), args.grad_clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if (
        run.per_step and run.scheduler.last_epoch + 1 < run.scheduler.total_steps
    ):  # past its end the rate stays
        run.scheduler.step()
    return plain.detach()


def train_epoch(run, received):
    """Take the epoch's steps from where `run.progress` stands. Raises: Stopped, FloatingPointError."""
    progress, unread = run.progress, []
    todo, ahead = itertools.tee(
        map(share_of, run.batches.epoch(progress["epoch"], start=progress["batch"]))
    )
    run.decoder.train()
    silent = True if process_group.rank() else None  # None: where stderr is no terminal
    bar = tqdm(todo, f"epoch {progress['epoch'] + 1}", run.batches.num_batches - progress["batch"], unit="batch",
               disable=silent, leave=False)  # fmt: skip
    mirror = run.batches.mirrored(progress["epoch"]) if run.args.horizontal_flip else None
    steps = zip(
        bar, run.features.stream((batch.image_rows for batch, _ in ahead), mirror), strict=True
    )
    try:
        for (batch, weights), features in until_stopped(received, steps):
            with process_group.lost_peers():
                loss = train_step(run, features, batch, weights)
            unread.append((loss, int(batch.lengths.sum()) if weights[0] else 0))
            progress["batch"] += 1
            progress["step"] += 1
            if len(unread) == LOOK_EVERY:
                bar.set_postfix(loss=f"{read_losses(progress, unread):.3f}")
    except (
        Stopped
    ):  # of all processes together; what one of them raises alone must not wait for the others here
        read_losses(progress, unread)
        raise
    read_losses(progress, unread)


def share_of(batch):
    """This process's part of a batch, and its weights in the means over the whole batch's tokens and captions.

    DistributedDataParallel takes the mean of the processes' gradients, so the weights are times their number. A process
    for which no caption is left computes one with weight 0, because all must take part.
    """
    rows, processes = process_group.shard(len(batch.lengths)), process_group.world_size()
    if processes == 1:
        return batch, (1.0, 1.0)
    none = rows.start == rows.stop
    rows = slice(0, 1) if none else rows
    lengths = batch.lengths[rows]
    image_rows, image_index = batch.image_rows[batch.image_index[rows]].unique(return_inverse=True)
    own = batch._replace(
        image_rows=image_rows, image_index=image_index, lengths=lengths,
        captions=batch.captions[rows, : int(lengths.max()) + 1],
    )  # fmt: skip
    weights = int(lengths.sum()) / int(batch.lengths.sum()), len(lengths) / len(batch.lengths)
    return own, tuple(0.0 if none else processes * weight for weight in weights)


def read_losses(progress, unread):
    """Move losses from the device into the epoch's sum; returns the last. Raises: FloatingPointError with the step."""
    losses = torch.stack([loss for loss, _ in unread]).tolist() if unread else []
    tokens = [tokens for _, tokens in unread]
    unread.clear()
    if process_group.world_size() > 1 and losses:
        sums = process_group.all_reduce_sum(
            [loss * count for loss, count in zip(losses, tokens, strict=True)] + tokens
        )
        tokens = [int(count) for count in sums[len(losses) :]]
        losses = [loss / count for loss, count in zip(sums, tokens, strict=False)]
    for number, (loss, count) in enumerate(zip(losses, tokens, strict=True)):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss} at step {progress['step'] - len(losses) + number + 1} (epoch "
                f"{progress['epoch'] + 1}): lower --learning_rate or --grad_clip; the last good checkpoint is kept"
            )
        progress["loss_sum"] += loss * count
        progress["tokens"] += count
    return losses[-1] if losses else math.nan


def validate(run, received):
    """Plain validation loss in nats per token, then scores of captions decoded without reference tokens, one row."""
    losses, tokens = 0.0, 0
    batches = list(run.val_batches.epoch(0, shuffle=False))
    batches = batches[process_group.shard(len(batches))]
    run.decoder.eval()
    stream = zip(
        batches, run.val_features.stream([batch.image_rows for batch in batches]), strict=True
    )
    for batch, features in until_stopped(received, stream, apart=True):
        captions, image_index = (
            to_device(batch.captions, run.args.device),
            to_device(batch.image_index, run.args.device),
        )
        with torch.inference_mode(), autocast(run.args):
            logits, _ = run.decoder(
                features, captions[:, :-1], batch.lengths, image_index, packed=True
            )
            losses += float(cross_entropy(logits, captions, batch.lengths)[1]) * int(
                batch.lengths.sum()
            )
        tokens += int(batch.lengths.sum())
    losses, tokens = process_group.all_reduce_sum([losses, tokens])
    if not math.isfinite(losses):
        raise FloatingPointError(
            f"the validation loss of epoch {run.progress['epoch'] + 1} is {losses}: lower --learning_rate"
        )
    own = torch.arange(len(run.val_table))[process_group.shard(len(run.val_table))]
    grids = run.val_features.stream(own.split(CHUNK) if len(own) else [])
    greedy = {"algorithm": "beam", "beam_size": run.args.val_beam_size, "num_captions": 1}
    found = caption_images(run.decoder, grids, run.vocabulary, run.args, **greedy)
    best = [hypotheses[0] for hypotheses in until_stopped(received, found, apart=True)]
    shares = process_group.all_gather([hypothesis._replace(attention=None) for hypothesis in best])
    best = [hypothesis for share in shares for hypothesis in share]
    captions = dict(
        zip(run.val_table.image, (run.vocabulary.decode(h.tokens) for h in best), strict=True)
    )
    scores = process_group.broadcast(
        run.scorer.score(captions)[0] if process_group.rank() == 0 else None
    )
    del scores["METEOR"]
    return {
        "val_loss": losses / tokens,
        **scores,
        "share_cut": sum(not h.finished for h in best) / len(best),
    }


def finish_epoch(run, row):
    """Book one epoch: schedule, best score; and, in rank 0, history, checkpoints, files and the console block."""
    args, progress = run.args, run.progress
    if isinstance(run.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        run.scheduler.step(row["val_loss"])
    elif run.scheduler and not run.per_step:
        run.scheduler.step()
    progress.update({**AT_EPOCH_START, "epoch": progress["epoch"] + 1})
    is_best = progress["best_score"] is None or row["CIDEr"] > progress["best_score"]
    progress["stale_epochs"] = 0 if is_best else progress["stale_epochs"] + 1
    progress["best_score"] = row["CIDEr"] if is_best else progress["best_score"]
    if process_group.rank():
        return
    run.tracker.log_epoch(row)
    if is_best:
        save(run, "best.pt")
    save(run, f"model_epoch_{progress['epoch']}.pt")
    if args.keep_checkpoints:
        checkpoints.prune_checkpoints(run.run_dir, args.keep_checkpoints)
    print(
        f"Epoch {row['epoch']} completed ({row['epoch']}/{run.plan['epochs']}):\n"
        f"  Training Loss: {row['train_loss']:.5f}\n"
        f"  Validation Loss: {row['val_loss']:.5f}\n"
        f"  Learning Rate: {row['learning_rate']:.6f}\n"
        f"  Scheduler: {describe_scheduler(args, run.plan)}\n"
        f"  Validation captions: BLEU-4 {row['BLEU-4']:.4f}, CIDEr {row['CIDEr']:.4f}, "
        f"{row['share_unique']:.0%} unique, {row['share_cut']:.0%} cut at --max_length\n"
        f"  Model checkpoint saved (best: {is_best})",
        flush=True,
    )
    if row["share_unique"] * len(run.val_table) < 1.5 and len(run.val_table) > 1:
        print("warning: every validation image got the same caption: the decoder does not see the images (yet); "
              "lower --learning_rate if it stays so", file=sys.stderr)  # fmt: skip


def save(run, name):
    """Write the whole state of the run to a file of its directory; only best.pt holds the encoder's weights."""
    progress = run.progress
    weights = run.encoder.trunk.state_dict() if name == "best.pt" else None
    checkpoints.save_checkpoint(run.run_dir / name, {
        "config": plain_config(run.args), "vocabulary": run.vocabulary.to_plain(), "model": run.decoder.state_dict(),
        "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(), "plan": run.plan,
        "scheduler": run.scheduler and run.scheduler.state_dict(), "epoch": progress["epoch"], "step": progress["step"],
        "data_position": {name: progress[name] for name in AT_EPOCH_START},
        "history": run.tracker.history, "best_score": progress["best_score"],
        "early_stopping": {"stale_epochs": progress["stale_epochs"]}, "random_state": experiment_utils.random_state(),
        "encoder": {**run.encoder.key(), "weights": weights}, "splits": run.dataset.split_names(),
    })  # fmt: skip


def plain_config(args):
    """Every option's value as plain types: what run_config.json and checkpoints store."""
    return {
        name: str(value) if name == "device" else value
        for name, value in vars(args).items()
        if name != "typed"
    }


def set_up(args, checkpoint):
    """Everything a training run needs, new or as the checkpoint left it. Reads and encodes data; writes no run file."""
    dataset = open_dataset(args, checkpoint)
    print(*dataset.notes, sep="\n")
    encoder = open_encoder(args, checkpoint)
    pooled = DECODERS[args.decoder].pooled
    table, features = open_features(args, encoder, dataset, "train", pooled)
    val_table, val_features = open_features(args, encoder, dataset, "val", pooled)
    texts = [caption for captions in table.captions for caption in captions]
    experiment_utils.set_seed(args.seed)
    if checkpoint:
        decoder, vocabulary = restore_decoder(args, checkpoint)
    else:
        vocabulary = caption_batches.Vocabulary.build(texts, args.freq_threshold)
        decoder = build_decoder(args, encoder.channels, len(vocabulary))
        sample = torch.linspace(0, len(table) - 1, min(len(table), SAMPLE)).long()
        decoder.fit_features(next(features.stream([sample])))
    print(
        f"vocabulary: {len(vocabulary)} words, each in {len(texts)} captions {args.freq_threshold} times or more"
    )
    run = SimpleNamespace(
        args=args, encoder=encoder, decoder=decoder, model=decoder, vocabulary=vocabulary, dataset=dataset,
        features=features, batches=token_batches(table.captions, vocabulary, args),
        val_table=val_table, val_features=val_features, val_batches=token_batches(val_table.captions, vocabulary, args),
        scorer=metrics_utils.CaptionScorer(dict(zip(val_table.image, val_table.captions, strict=True)), texts),
        optimizer=build_optimizer(decoder, args),
        scaler=torch.amp.GradScaler(args.device.type, enabled=args.precision == "float16"),
        progress={"epoch": 0, "step": 0, "best_score": None, "stale_epochs": 0, **AT_EPOCH_START}, history=[],
    )  # fmt: skip
    if args.compile and args.decoder == "attention":  # torch's LSTM is one call already
        backend = "cudagraphs" if args.device.type == "cuda" else "inductor"
        decoder.compiled = torch.compile(decoder.teach, dynamic=False, backend=backend)
    if checkpoint:
        with checkpoints.checkpoint_errors(args.model_path):
            restore_progress(run, checkpoint)
    else:
        run.plan = {"epochs": args.epochs, "steps": args.epochs * run.batches.num_batches}
        run.scheduler = build_scheduler(run.optimizer, args, run.plan)
    if process_group.world_size() > 1:
        run.model = nn.parallel.DistributedDataParallel(
            decoder, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
    if process_group.rank():  # dropout of its own
        torch.manual_seed(args.seed + 1_000_003 * process_group.rank() + run.progress["step"])
    run.per_step = isinstance(run.scheduler, torch.optim.lr_scheduler.OneCycleLR)
    return run


def token_batches(captions, vocabulary, args):
    """Captions (per image a list of texts) as batches of word ids."""
    ids = ([vocabulary.encode(text) for text in image] for image in captions)
    return caption_batches.CaptionBatches(ids, args.batch_size, args.max_length, args.seed)


def restore_decoder(args, checkpoint):
    """The checkpoint's decoder, on its device, and vocabulary. Raises: ValueError when they do not fit each other."""
    with (
        checkpoints.checkpoint_errors(args.model_path),
        torch.device("meta"),
    ):  # shapes first, before memory is taken
        vocabulary = caption_batches.Vocabulary.from_plain(checkpoint["vocabulary"])
        sizes = checkpoint["encoder"]["channels"], len(vocabulary)
        expected = build_decoder(args, *sizes, device="meta").state_dict()
    shapes = {name: getattr(tensor, "shape", None) for name, tensor in checkpoint["model"].items()}
    if shapes != {name: tensor.shape for name, tensor in expected.items()}:
        raise ValueError(
            f"{args.model_path}: its decoder's weights do not fit its configuration: give another checkpoint"
        )
    decoder = build_decoder(args, *sizes)
    decoder.load_state_dict(checkpoint["model"])
    return decoder, vocabulary


def family(checkpoint):
    """What the members of an ensemble must have in common."""
    encoder, splits = checkpoint["encoder"], checkpoint["splits"]
    return {"encoder": [encoder["weights_sha256"], encoder["channels"]],
            "image size": [encoder["image_size"], encoder.get("coarse_size")],
            "split": {name: sorted(splits[name]) for name in splits},
            "vocabulary": checkpoint["vocabulary"]}  # fmt: skip


def open_decoder(args, checkpoint):
    """What test and caption mode write with, and its vocabulary: the checkpoint's decoder, or its --ensemble.

    Raises: ValueError when a member has other words, pictures or splits (whose test images the first may know).
    """
    decoder, vocabulary = restore_decoder(args, checkpoint)
    members = [decoder]
    args.ensemble = [str(found_checkpoint(args, path)) for path in args.ensemble]
    with checkpoints.checkpoint_errors(args.model_path):
        own = family(checkpoint)
    for path in args.ensemble:
        other = checkpoints.load_checkpoint(path)
        stored = SimpleNamespace(
            **check_stored(path, other["config"]) | {"device": args.device, "model_path": path}
        )
        with checkpoints.checkpoint_errors(path):
            others = family(other)
            differing = [name for name in own if own[name] != others[name]]
        if differing:
            raise ValueError(
                f"--ensemble {path}: has another {differing[0]} than {args.model_path}: members must be trained alike"
            )
        members.append(restore_decoder(stored, other)[0])
    return (Ensemble(members) if args.ensemble else decoder), vocabulary


def restore_progress(run, checkpoint):
    """Put optimizer, schedule, counters and random state back to where the checkpoint was taken."""
    args, saved = run.args, checkpoint["config"]
    best, where = checkpoint["best_score"], checkpoint["data_position"]
    run.progress |= {name: type(start)(where[name]) for name, start in AT_EPOCH_START.items()}
    run.progress |= {"epoch": checkpoint["epoch"], "step": checkpoint["step"]}
    run.progress |= {
        "best_score": best if best is None else float(best),
        **checkpoint["early_stopping"],
    }
    run.history, run.plan = [dict(row) for row in checkpoint["history"]], dict(checkpoint["plan"])
    if not 0 <= run.progress["batch"] <= run.batches.num_batches:
        raise ValueError(f"batch {run.progress['batch']} of {run.batches.num_batches}")
    if "epochs" in args.typed:
        run.plan["epochs"] = checkpoint["epoch"] + args.epochs
    args.epochs = run.plan["epochs"] - checkpoint["epoch"]
    if args.epochs < 1:
        raise ValueError(
            f"{args.model_path}: its plan of {run.plan['epochs']} epochs is done: give --epochs for more"
        )
    fresh = args.use_scheduler and (
        not saved["use_scheduler"] or args.scheduler_type != saved["scheduler_type"]
    )
    if fresh:
        print(f"--scheduler_type {args.scheduler_type} is new to this run: its schedule starts now")
        run.plan["steps"] = args.epochs * run.batches.num_batches - run.progress["batch"]
    run.scheduler = build_scheduler(
        run.optimizer, args, run.plan
    )  # before the states: building one sets the rate
    planned = [group | {} for group in run.optimizer.param_groups]
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.scaler.load_state_dict(checkpoint["scaler"])
    for group, plan in zip(run.optimizer.param_groups, planned, strict=True):
        group.update(
            {
                name: plan[name]
                for name in (plan if fresh else ("weight_decay",))
                if name != "params"
            }
        )
    if run.scheduler and not fresh:
        state = {
            name: value
            for name, value in checkpoint["scheduler"].items()
            if name in SCHEDULER_STATE
        }
        run.scheduler.load_state_dict(state)
    if args.learning_rate != saved["learning_rate"] and not fresh:
        scale_rate(run, args.learning_rate / saved["learning_rate"])
    over = run.progress["step"] + args.epochs * run.batches.num_batches - run.plan["steps"]
    if (
        args.use_scheduler
        and args.scheduler_type == "one_cycle"
        and not fresh
        and over > run.progress["batch"]
    ):
        print(f"warning: one_cycle was planned for {run.plan['steps']} steps: past them the rate stays as it is",
              file=sys.stderr)  # fmt: skip
    experiment_utils.set_random_state(checkpoint["random_state"])


def scale_rate(run, factor):
    """Go on at a typed --learning_rate: everything the schedule computes with, times `factor`."""
    for group in run.optimizer.param_groups:
        for name in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():
            group[name] *= factor
    if hasattr(run.scheduler, "base_lrs"):
        run.scheduler.base_lrs = [rate * factor for rate in run.scheduler.base_lrs]


def open_run_dir(run):
    """Make the run's directory and its first files; a resumed run brings the best checkpoint so far along."""
    args, progress = run.args, run.progress
    config = plain_config(args)
    run.run_dir = experiment_utils.create_run_dir(args.model_save_dir, config)
    schedule_options = {
        "reduce_lr_on_plateau": ("scheduler_patience", "scheduler_factor", "min_lr"),
        "step": ("scheduler_step_size", "scheduler_gamma"),
        "cosine": ("scheduler_t_max", "min_lr"),
        "exponential": ("scheduler_gamma",),
        "one_cycle": ("warmup_epochs",),
    }
    run.tracker = experiment_utils.RunTracker(
        run.run_dir,
        config,
        [Path(sys.executable).name, *sys.argv],
        run.history,
        schedule_options[args.scheduler_type] if args.use_scheduler else (),
    )
    print(f"run directory: {run.run_dir}")
    size = (
        sum(parameter.nbytes for parameter in run.decoder.parameters()) * 3
    )  # weights and Adam's two moments
    kept = min(args.epochs, args.keep_checkpoints or args.epochs)
    weights = sum(tensor.nbytes for tensor in run.encoder.trunk.state_dict().values())
    print(f"checkpoints will take {(size * (kept + 1) + weights) / 2**20:,.0f} MiB: {size / 2**20:,.0f} MiB for each "
          f"of {kept} epochs, and best.pt with the encoder")  # fmt: skip
    if progress["best_score"] is not None:
        best = Path(args.model_path).with_name("best.pt")
        if best.is_file() and checkpoints.load_checkpoint(best)["epoch"] <= progress["epoch"]:
            with (
                checkpoints.replace_file(run.run_dir / "best.pt") as copy,
                best.open("rb") as original,
            ):
                shutil.copyfileobj(original, copy)
        else:
            print(
                f"no best.pt as old as {args.model_path} beside it: the next epoch's will be the first"
            )
            progress["best_score"] = None


def train(args, checkpoint):
    """Train until the plan's last epoch, early stopping or a signal. Returns the exit status."""
    for flag in ("model_save_dir", "cache_dir"):
        checkpoints.check_writable_dir(getattr(args, flag), f"--{flag}")
    run = set_up(args, checkpoint)
    progress = run.progress
    if process_group.rank() == 0:
        open_run_dir(run)
    progress["best_score"] = process_group.broadcast(progress["best_score"])
    warn_about_schedule(args, run.plan["epochs"])
    if checkpoint:
        where = (
            f", batch {progress['batch'] + 1} of {run.batches.num_batches}"
            if progress["batch"]
            else ""
        )
        print(
            f"resumed from {args.model_path}: epoch {progress['epoch'] + 1}{where}; {args.epochs} epochs to go"
        )
    with listen_for_stop() as received:
        while progress["epoch"] < run.plan["epochs"]:
            started = time.perf_counter() - progress["seconds"]
            try:
                if not progress["batch"]:
                    progress["rate"] = run.optimizer.param_groups[0]["lr"]
                train_epoch(run, received)
                row = {
                    "epoch": progress["epoch"] + 1,
                    "train_loss": progress["loss_sum"] / progress["tokens"],
                }
                row |= {"learning_rate": progress["rate"], **validate(run, received)}
            except Stopped as stop:
                progress["seconds"] = time.perf_counter() - started
                if process_group.rank():
                    return 128 + stop.args[0]
                save(run, "last.pt")
                print(f"stopped by {signal.Signals(stop.args[0]).name} in epoch {progress['epoch'] + 1}: "
                      f"--resume {run.run_dir / 'last.pt'} goes on from here")  # fmt: skip
                return 128 + stop.args[0]
            finish_epoch(run, row | {"epoch_time_seconds": time.perf_counter() - started})
            if 0 < args.early_stopping_patience <= progress["stale_epochs"]:
                print(f"stopped early: no better CIDEr for {progress['stale_epochs']} epochs")
                break
    if process_group.rank():
        return 0
    best = run.run_dir / "best.pt"
    if args.save_attention_viz:
        run.decoder.load_state_dict(checkpoints.load_checkpoint(best)["model"])
        positions = torch.arange(min(args.attention_viz_samples, len(run.val_table)))
        found = caption_images(
            run.decoder, run.val_features.stream([positions]), run.vocabulary, args
        )
        paths = run.val_features.paths[: len(positions)]
        draw_attention(run.run_dir, args, run.encoder.grid, run.vocabulary, paths, found)
    print(f"best CIDEr {progress['best_score']:.4f}: {best}\ntest it: python {Path(sys.argv[0]).name} --mode test "
          f"--model_path {best}")  # fmt: skip
    return 0


# ----------------------------------------------------------------------------------------- test and caption new images


def draw_attention(folder, args, grid, vocabulary, paths, found, first=1):
    """One picture per path, numbered from `first`: where the decoder looked for each word of its best hypothesis."""
    pictures = image_loading.open_images(paths)
    for number, (picture, hypotheses) in enumerate(zip(pictures, found, strict=False), start=first):
        best = hypotheses[0]
        attention_visualization.save_attention_viz(
            folder, number, picture, [vocabulary.words[token] for token in best.tokens],
            best.attention.unflatten(1, grid).numpy(), advanced=args.advanced_attention_viz, log_prob=best.log_prob,
        )  # fmt: skip


def output_folder(args):
    """Where test and caption mode write: --output_dir, not yet made, or the checkpoint's folder. Raises: ValueError."""
    folder = Path(args.output_dir or Path(args.model_path).parent)
    checkpoints.check_writable_dir(folder, "--output_dir")
    return folder


def test(args, checkpoint):
    """Caption a whole split without reference tokens, score it, write what was found. Returns the exit status."""
    folder, started = output_folder(args), time.perf_counter()
    checkpoints.check_writable_dir(args.cache_dir, "--cache_dir")
    dataset = open_dataset(args, checkpoint)
    encoder, (decoder, vocabulary) = open_encoder(args, checkpoint), open_decoder(args, checkpoint)
    print(*dataset.notes, sep="\n")
    table, features = open_features(args, encoder, dataset, args.split, decoder.pooled)
    grids = features.stream(torch.arange(len(table)).split(CHUNK))
    found = caption_images(decoder, grids, vocabulary, args, num_captions=1)
    found = list(tqdm(found, "decoding", len(table), unit="image", disable=None))
    best = [hypotheses[0] for hypotheses in found]
    captions = {
        name: vocabulary.decode(h.tokens) for name, h in zip(table.image, best, strict=True)
    }
    training = [
        c for captions in dataset.table.captions[dataset.table.split == "train"] for c in captions
    ]
    scorer = metrics_utils.CaptionScorer(
        dict(zip(table.image, table.captions, strict=True)), training
    )
    scores, per_image = scorer.score(captions, meteor=True, bootstrap=1000)
    scores["share_cut"] = sum(not h.finished for h in best) / len(best)
    boxes = dataset.captions_file.with_name("boxes.json")
    if best[0].attention is not None and boxes.is_file():
        boxes = json.loads(boxes.read_text())
        words = [[vocabulary.words[token] for token in h.tokens] for h in best]
        maps = [h.attention.unflatten(1, encoder.grid).numpy() for h in best]
        known = [boxes.get(name, []) for name in table.image]
        scores["attention"] = metrics_utils.peak_in_box(zip(words, maps, known, strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    decoding = {name: getattr(args, name) for name in ("algorithm", *DECODING_OPTIONS)} | {
        "num_captions": 1
    }
    rows = [
        {
            "image_id": number,
            "file_name": name,
            "caption": captions[name],
            "log_prob": h.log_prob,
            **per_image[name],
        }
        for number, (name, h) in enumerate(zip(table.image, best, strict=True))
    ]
    if args.save_attention_viz:
        draw_attention(
            folder,
            args,
            encoder.grid,
            vocabulary,
            features.paths[: args.attention_viz_samples],
            found,
        )
    scores |= {"dataset_type": args.dataset_type, "split": args.split, "images": len(table), "decoding": decoding,
               "checkpoint": str(args.model_path), "ensemble": args.ensemble,
               "wall_time_seconds": time.perf_counter() - started}  # fmt: skip
    checkpoints.write_json(folder / f"{args.split}_captions.json", rows)
    checkpoints.write_json(folder / f"{args.split}_metrics.json", scores)
    how = f"beam {args.beam_size}" if args.algorithm == "beam" else args.algorithm
    print(f"{args.dataset_type} {args.split}: {len(table)} images, {how}")
    print(metrics_utils.scores_table(scores))
    print(f"written: {folder / f'{args.split}_metrics.json'} and {args.split}_captions.json")
    return 0


def caption(args, checkpoint):
    """Print a caption per picture; goes on past files that are no pictures. Returns the status, 1 if there were any."""
    paths = [path for given in args.images for path in image_loading.pictures_in(Path(given))]
    folder = output_folder(args) if args.save_attention_viz else None
    encoder, (decoder, vocabulary) = open_encoder(args, checkpoint), open_decoder(args, checkpoint)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names may be any bytes
    status, drawn = 0, 0
    for start in range(0, len(paths), CHUNK):
        images, readable = [], []
        for path in paths[start : start + CHUNK]:
            try:
                images.append(torch.from_numpy(image_loading.load_image(path, encoder.image_size)))
                readable.append(path)
            except ValueError as error:
                print(f"flickr_image_caption.py: {error}", file=sys.stderr)
                status = 1
        if not images:
            continue
        with torch.inference_mode():
            grid = encoder(torch.stack(images).permute(0, 3, 1, 2))
        found = list(caption_images(decoder, [grid], vocabulary, args))
        for path, hypotheses in zip(readable, found, strict=True):
            texts = [
                {"caption": vocabulary.decode(h.tokens), "log_prob": h.log_prob} for h in hypotheses
            ]
            if args.json:
                print(
                    json.dumps({"image": str(path), "captions": texts}, ensure_ascii=False),
                    flush=True,
                )
            else:
                print(*(f"{path}\t{text['caption']}" for text in texts), sep="\n", flush=True)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            draw_attention(folder, args, encoder.grid, vocabulary, readable, found, first=drawn + 1)
            drawn += len(readable)
    return status


# --------------------------------------------------------------------------------------------------------- the program

MODES = {"train": train, "test": test, "caption": caption}


def found_checkpoint(args, path):
    """The file that `path`, a file or a folder of runs, means; said where it is another. Raises: FileNotFoundError."""
    found = checkpoints.resolve_checkpoint(path, "newest" if args.mode == "train" else "best")
    if str(found) != str(path):
        print(f"checkpoint: {found}", file=sys.stderr if args.mode == "caption" else sys.stdout)
    return found


def open_checkpoint(args):
    """The checkpoint that --model_path or --resume means, or None; options that were not typed become its own.

    Raises: FileNotFoundError, ValueError; ValueError too when a typed option contradicts the stored model.
    """
    if args.model_path is None:
        return None
    if args.resume == "latest":
        args.model_path = args.model_save_dir
    path = args.model_path = str(found_checkpoint(args, args.model_path))
    checkpoint = checkpoints.load_checkpoint(path)
    keep = THIS_RUN_ONLY + (
        ()
        if args.mode == "train"
        else ("precision", "save_attention_viz", "advanced_attention_viz")
    )
    stored = check_stored(path, checkpoint["config"])
    with checkpoints.checkpoint_errors(path):
        checkpoint["splits"] = {
            split: list(checkpoint["splits"][split]) for split in caption_data.SPLITS
        }
    differing = [
        name for name in ARCHITECTURE if name in args.typed and getattr(args, name) != stored[name]
    ]
    if differing:
        said = ", ".join(
            f"--{name} {getattr(args, name)} (stored: {stored[name]})" for name in differing
        )
        raise ValueError(
            f"{path}: trained with other options than {said}: leave them out, they come from the checkpoint"
        )
    vars(args).update(
        {
            name: value
            for name, value in stored.items()
            if name not in args.typed and name not in keep
        }
    )
    check_options(args)
    return checkpoint


def check_stored(path, config):
    """A checkpoint's options, checked as if they were typed: the file may come from anyone. Raises: ValueError.

    Options that the file lacks have their defaults, which do what the program did before there was the option.
    """
    checked = {}
    for action in build_parser()._actions:
        if action.dest in ("help", *THIS_RUN_ONLY):
            continue
        try:
            value = config.get(action.dest, action.default)
            as_typed = action.type or (bool if action.nargs == 0 else str)
            if value is not None or action.default is not None:
                same = as_typed(value if as_typed is bool else str(value)) == value
                if not same or (action.choices and value not in action.choices):
                    raise ValueError(value)
        except (TypeError, ValueError, RuntimeError, argparse.ArgumentTypeError) as error:
            raise ValueError(
                f"{path}: its configuration has no usable --{action.dest}: give another checkpoint"
            ) from error
        checked[action.dest] = value
    return checked


def main(args):
    """Run the mode. Returns the exit status: 0 done, 1 stopped by a failure, 2 misuse, 128 + signal."""
    try:
        checkpoint = open_checkpoint(args)
        args.device = resolve_device(args.device)
        args.precision = resolve_precision(args.precision, args.device)
        if args.compile:
            runtime.check_compiler(args.device)
        if args.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32
        if args.device.type == "cpu":
            runtime.keep_freed_memory()
        if process_group.world_size() > 1 and args.mode != "train":
            raise ValueError(f"--mode {args.mode} runs in one process: start it without torchrun")
        with process_group.joined(args.device):
            return MODES[args.mode](args, checkpoint)
    except KeyboardInterrupt:
        return 130
    except (ValueError, FileNotFoundError) as error:
        fault, status = error, 2
    except (OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        fault, status = error, 1
    print(f"flickr_image_caption.py: error: {' '.join(str(fault).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(ARGS))
