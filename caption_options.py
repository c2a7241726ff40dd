"""What can be asked of the program: one table of options, settled once into frozen groups.

    options = parse_args(["--decoder", "attention"])     # misuse ends with status 2 and one line
    options = check_files(options)                       # so does a path that leads nowhere
    options.training.batch_size, options.decoding        # groups are named tuples: nothing below changes them
    options = inherit(options, "best.pt", stored)        # what was not typed comes from the checkpoint
    options = adopt(options, "best.pt", stored)          # of --init_from: what builds the decoder does
    python caption_options.py > docs/OPTIONS.md          # the table, for the documentation

A value comes from the flag, else from the environment, else from --config's file, else from --preset
or the checkpoint, else from the table; `options.origins` says which. Everything
about an option stands in its row: group, type and range, default, where it acts, and what a
checkpoint's value means for it. torch is not imported, so that --help and a mistake answer at once.
"""

import argparse
import contextlib
import difflib
import importlib.util
import math
import os
import re
import sys
from collections import ChainMap, namedtuple
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import config_file
import encoder_models
import model_selection
import plugins
import word_vectors
from checkpoints import runs_folder
from config_file import ENVIRONMENT, FILE, FLAG, Config, Origin, Setting
from model_versions import resolve_model_path

PROGRAM = "flickr_image_caption.py"
TRAIN, TEST, CAPTION, DEBUG, TUNE = MODES = (
    "train",
    "test",
    "caption",
    "debug",
    "tune",
)  # with a model
COMPARE = "compare"  # of runs' files alone
EVERY_MODE = (*MODES, COMPARE)
WITH_DATA = (TRAIN, TEST, TUNE)
DECODERS = ("lstm", "attention", "gpt2")
WITHOUT_STEPS = (TRAIN, TEST, CAPTION, TUNE)  # which do not show how a caption comes about
ATTENTIONS = ("additive", "multi_head", "adaptive")
BEAMS = ("beam", "full_beam")
ALGORITHMS = ("greedy", *BEAMS, "sample")
RERANKINGS = ("none", "consensus")
VIZ_METHODS = ("attention", "gradient")

# torchvision family: the modules from the picture to the last grid before pooling, and its members
ENCODER_FAMILIES = {
    "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4": """
        resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d
        resnext101_64x4d wide_resnet50_2 wide_resnet101_2""",
    "features": """
        mobilenet_v2 mobilenet_v3_small mobilenet_v3_large efficientnet_b0 efficientnet_b1
        efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_v2_s efficientnet_v2_m vgg11
        vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn convnext_tiny convnext_small
        convnext_base squeezenet1_0 squeezenet1_1""",
    "conv1 maxpool stage2 stage3 stage4 conv5": "shufflenet_v2_x0_5 shufflenet_v2_x1_0",
    "layers": "mnasnet0_5 mnasnet1_0",
    """Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 maxpool1 Conv2d_3b_1x1 Conv2d_4a_3x3 maxpool2
    Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e Mixed_7a Mixed_7b
    Mixed_7c""": "inception_v3",
    "features norm permute": "swin_t swin_s swin_b swin_v2_t swin_v2_s swin_v2_b",
}
ENCODERS = {
    name: modules.split() for modules, names in ENCODER_FAMILIES.items() for name in names.split()
}

# Encoders that other packages bring: how they are typed, and the package of requirements-hub.txt.
HUB_ENCODERS = {"clip": "transformers", "timm/NAME": "timm"}


def register_encoder(
    name, build, modules, *, weights=None, image_size=224,
    mean=encoder_models.IMAGENET_MEAN, std=encoder_models.IMAGENET_STD,
):  # fmt: skip
    """Let --encoder `name` mean a user's model: call it in a file that --plugin names.

    Args:
        build: () -> torch.nn.Module, untrained.
        modules: the names of its parts from the picture (N, 3, S, S) to the last grid
            (N, F, h, w), in their order, with spaces between. torch.fx must be able to trace them.
        weights: () -> state dict of the model, which --encoder_weights imagenet stands for.
        image_size: S, pixels a side.
        mean, std: three numbers each, of RGB in 0..1; the model sees (picture - mean) / std.
    Raises: ValueError when the name is taken or cannot be typed.
    """
    if name in ENCODERS or name in HUB_ENCODERS:
        raise ValueError(f"there is an encoder {name!r} already: choose another name")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"encoder {name!r}: give it a name of letters, digits and _ . -")
    ENCODERS[name] = modules.split()
    encoder_models.ADDED[name] = encoder_models.EncoderModel(build, image_size, mean, std, weights)


class Schedule(NamedTuple):
    """A learning rate schedule: torch's class, and which option each of its arguments comes from."""

    torch_name: str
    arguments: dict[str, str]  # torch's argument: our option
    shown: tuple[str, ...]  # torch's arguments that the console names


SCHEDULES = {
    "reduce_lr_on_plateau": Schedule(
        "ReduceLROnPlateau",
        {"patience": "scheduler_patience", "factor": "scheduler_factor", "min_lr": "min_lr"},
        ("factor", "patience"),
    ),
    "step": Schedule(
        "StepLR",
        {"step_size": "scheduler_step_size", "gamma": "scheduler_gamma"},
        ("step_size", "gamma"),
    ),
    "cosine": Schedule(
        "CosineAnnealingLR", {"T_max": "scheduler_t_max", "eta_min": "min_lr"}, ("T_max",)
    ),
    "exponential": Schedule("ExponentialLR", {"gamma": "scheduler_gamma"}, ("gamma",)),
    "one_cycle": Schedule(
        "OneCycleLR",
        {"max_lr": "learning_rate", "warmup_epochs": "warmup_epochs"},
        ("max_lr", "warmup_epochs"),
    ),
}

LAPTOP = {  # what the README shows: 38 minutes on two CPU cores without bfloat16
    "encoder": "mobilenet_v2", "encoder_weights": "imagenet", "image_size": 320, "coarse_size": 224,
    "decoder": "attention", "attention": "adaptive", "embed_size": 256, "hidden_size": 512,
    "num_layers": 1, "attention_dim": 256, "drop_prob": 0.4, "patch_dropout": 0.5, "batch_size": 256,
    "learning_rate": 0.003, "weight_decay": 0.5, "label_smoothing": 0.1, "horizontal_flip": True,
    "use_scheduler": True, "scheduler_type": "one_cycle", "warmup_epochs": 1, "epochs": 15,
    "val_beam_size": 5, "length_penalty": 0.8, "keep_checkpoints": 1, "num_workers": 0,
}  # fmt: skip
PRESETS = {  # what --preset gives options that are not typed
    "laptop": LAPTOP,
    "document-a": {  # the specification's first command, with its defaults
        "encoder": "resnet50", "decoder": "lstm", "embed_size": 512, "hidden_size": 1024,
        "num_layers": 3, "drop_prob": 0.3, "batch_size": 64, "learning_rate": 0.001,
        "use_scheduler": True, "scheduler_type": "cosine", "scheduler_t_max": 15, "min_lr": 1e-6,
        "epochs": 15,
    },
    "best": LAPTOP | {
        "encoder": "resnet50+mobilenet_v2", "no_repeat_ngram_size": 3, "rerank": "consensus",
        "rerank_weight": 4.0,
    },
}  # fmt: skip

# ------------------------------------------------------------------------------------- types of values


def number(kind, low, high=math.inf, *, above=False):
    """An argparse type: a `kind` in low..high, without low if `above`. Refuses nan and infinity."""
    bounds = f"{'above' if above else 'at least'} {low}"
    if high != math.inf:
        bounds += f" and at most {high}"

    def parse(text):
        value = kind(text)
        if not low <= value <= high or (above and value == low) or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


def auto_or(kind):
    """An argparse type: the word auto, or what `kind` takes."""

    def parse(text):
        return text if text == "auto" else kind(text)

    parse.__name__ = f"auto or {kind.__name__}"
    return parse


def encoder_name(text):
    """An argparse type: one of ENCODERS or HUB_ENCODERS, or several joined by +."""
    names = text.split("+")
    unknown = [name for name in names if not (name in ENCODERS or hub_package(name))]
    if unknown:
        meant = difflib.get_close_matches(unknown[0], [*ENCODERS, *HUB_ENCODERS], n=1)
        guess = f" (did you mean {meant[0]}?)" if meant else ""
        known = " ".join([*HUB_ENCODERS, *ENCODERS])
        raise argparse.ArgumentTypeError(
            f"no encoder {unknown[0]!r}{guess}: give one of {known}, several joined by +, or --plugin "
            "FILE.py that registers it"
        )
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text} names an encoder twice")
    return text


def hub_name(text):
    """A repository of the hub that can be pushed to."""
    if len(text) > 96 or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"{text[:120]!r}: give USER/NAME, letters, digits and - _ ."
        )
    return text


def hub_package(name):
    """The package that brings an encoder; None where it needs none, or there is no such encoder."""
    typed = re.sub(r"^timm/\w[\w.-]*$", "timm/NAME", name)
    return HUB_ENCODERS.get(typed)


COUNT = number(int, 0)
EPOCHS = number(int, 0, 2**20)
SIZE = number(int, 1, 2**20)  # of what takes no memory by itself
# What does has room for research, and none for a typo or a checkpoint that asks for terabytes.
UNITS = number(int, 1, 2**14)
LAYERS = number(int, 1, 64)
BATCH = number(int, 1, 2**16)
HYPOTHESES = number(int, 1, 1024)
TOKENS = number(int, 1, 1024)
PIXELS = number(int, 32, 1024)
ENCODE_BATCH = number(int, 1, 4096)
SEED = number(int, 0, 2**32 - 1)
THREADS = number(int, 1, 1024)
SHARE = number(float, 0, 1)
DROPOUT = number(float, 0, 0.99)
POSITIVE = number(float, 0, above=True)
NOT_NEGATIVE = number(float, 0)
PROBABILITY = number(float, 0, 1, above=True)

# ------------------------------------------------------------------------------------------- the table

INHERITED, FIXED, OWN = "inherited", "fixed", "own"  # what a checkpoint's value means, see Option


class Option(NamedTuple):
    """One row. An option that is typed where it would do nothing is refused."""

    kind: object  # a type of text, a tuple of choices, or bool for a switch
    default: object
    help: str
    metavar: str | None = None
    modes: tuple[str, ...] = MODES  # the modes in which it acts
    needs: Mapping = MappingProxyType({})  # acts only while other options have one of these values
    # INHERITED: a checkpoint's value stands for one that is not typed. FIXED: moreover a typed one
    # must equal it. OWN: each run has its own. A tuple of modes: inherited in these, else OWN.
    stored: str | tuple[str, ...] = INHERITED
    several: bool = False  # takes a list
    alias: str | None = None
    package: str | None = None  # one of requirements-tracking.txt, which it needs


def scheduled(option):
    """What a schedule's option needs: --use_scheduler, and one of the schedules that take it."""
    kinds = [name for name, row in SCHEDULES.items() if option in row.arguments.values()]
    return {"use_scheduler": (True,), "scheduler_type": tuple(kinds)}


class Given:
    """What an option needs of another one: any value but none, or 0."""

    def __contains__(self, value):
        return bool(value)

    def __iter__(self):
        return iter(())


class Joined(tuple):
    """What an option needs of --encoder: that it names one of these, alone or among others."""

    def __contains__(self, value):
        return not set(self).isdisjoint(value.split("+"))


GIVEN = Given()
CLIP = {"encoder": Joined(["clip"])}
ATTENTION = {"decoder": ("attention",)}
BEFORE_EACH_WORD = ATTENTION | {"attention": ("additive", "multi_head")}
WITH_HEADS = ATTENTION | {"attention": ("multi_head", "adaptive")}
CACHED = {"no_feature_cache": (False,)}
DRAWN = {"save_attention_viz": (True,)}
RNN = {"decoder": ("lstm", "attention")}
GPT2 = {"decoder": ("gpt2",)}
FROM_SCRATCH = GPT2 | {"gpt2_model": ("scratch",)}
LOOKS_BY_CROSS_ATTENTION = GPT2 | {"prefix_length": (0,)}
FINE_TUNED = {"fine_tune_encoder": GIVEN}
CONSENSUS = {"rerank": ("consensus",)}
REWARDED = {"scst_epochs": GIVEN}

RUN = {
    "mode": Option(EVERY_MODE, TRAIN,
        "train a model, test one, caption pictures, debug: show step by step how pictures' captions are searched "
        "for, tune: choose by validation captions how the checkpoint searches for them from now on, or compare runs",
        modes=EVERY_MODE, stored=OWN),
    "config": Option(str, None,
        "values of options that are not typed, in YAML or as an old run's run_config.json has them; see "
        "docs/EXPERIMENTS.md", "FILE", EVERY_MODE, stored=OWN),
    "plugin": Option(str, (),
        "Python files of yours that register encoders or decoding algorithms, see docs/EXPERIMENTS.md; they are "
        "run, so they must be typed", "FILE.py", stored=OWN, several=True),
    "preset": Option(tuple(PRESETS), None,
        "a good recipe in one word, at the end of docs/OPTIONS.md: values of options that are not typed",
        modes=(TRAIN,), stored=OWN),
    "model_path": Option(str, None,
        "checkpoint, a folder of runs, or registry:VERSION: to resume (train), test or caption with",
        "PATH", stored=OWN),
    "resume": Option(str, None,
        "go on from the newest run's newest checkpoint, or from PATH",
        "latest|PATH", (TRAIN,), stored=OWN),
    "model_save_dir": Option(str, "./saved_models",
        "run folders go below it; a resumed run's beside the old one, if that lies in such folders",
        "FOLDER", (TRAIN,), stored=OWN),
    "device": Option(str, "auto",
        "auto (cuda, then mps, then cpu) or a torch device such as cpu, cuda:1", stored=OWN),
    "precision": Option(("auto", "float32", "bfloat16", "float16"), "auto",
        "auto: bfloat16 where the hardware computes it, float16 on older GPUs, else float32",
        stored=(TRAIN,)),
    "threads": Option(auto_or(THREADS), "auto",
        "threads that compute on the CPU; auto: OMP_NUM_THREADS where it is set, else one per core, "
        "or a single one where a short probe finds it clearly faster; on resume the checkpoint's", "auto|N",
        stored=(TRAIN,)),
    "seed": Option(SEED, 0, "fixes weights, batches, dropout and samples"),
    "num_workers": Option(COUNT, 16,
        "processes that decode images, at most one per available core, in caption mode for more than 100; "
        "0: threads of the program itself; where the encoder computes on few cores itself, 0 is quickest",
        modes=WITHOUT_STEPS),
    "tensorboard": Option(bool, False,
        "scalars, histograms of weights, captions and attention of validation images, in the run's logs/",
        modes=(TRAIN,), stored=OWN, package="tensorboard"),
    "wandb": Option(bool, False,
        "losses, scores, captions and the best checkpoint go to Weights & Biases; offline without an API key",
        modes=(TRAIN,), stored=OWN, package="wandb"),
    "push_to_hub": Option(hub_name, None,
        "the best model goes there on the Hugging Face hub when training has ended, with a model card; the "
        "token is HF_TOKEN, HUGGINGFACE_TOKEN or that of hf auth login", "USER/NAME", (TRAIN,), stored=OWN),
    "hub_private": Option(bool, False,
        "what --push_to_hub makes on the hub is private", modes=(TRAIN,),
        needs={"push_to_hub": GIVEN}, stored=OWN),
}  # fmt: skip
DATA = {
    "dataset_type": Option(("flickr8k", "flickr30k", "coco", "sample", "custom"), "flickr30k",
        "default folder ./data/<dataset_type>, and the run folder's name", modes=WITH_DATA),
    "data_dir": Option(str, None,
        "the dataset's own folder, with images and captions in it, instead of ./data/<dataset_type>; what "
        "download_datasets.py calls --data_dir lies above it", "FOLDER", WITH_DATA),
    "image_dir": Option(str, None,
        "folder of images, or WebDataset shards (*.tar), instead of the default folder",
        "FOLDER", WITH_DATA),
    "captions_file": Option(str, None,
        "captions in any of the formats of docs/DATA.md, instead of the default one",
        "FILE", WITH_DATA),
    "split_seed": Option(COUNT, 42,
        "draws the split if the data has none", modes=WITH_DATA),
    "split_ratios": Option(PROBABILITY, (0.8, 0.1, 0.1),
        "shares of train, val and test in a split that is drawn; they sum to 1",
        "SHARE", WITH_DATA, several=True),
    "freq_threshold": Option(SIZE, 5,
        "fewest times a word stands in training captions", stored=FIXED),
    "max_bad_fraction": Option(SHARE, 0.01,
        "most missing or malformed items tolerated", modes=WITH_DATA),
    "max_train_images": Option(SIZE, None,
        "use only so many training images, for smoke runs", modes=(TRAIN,)),
    "max_val_images": Option(SIZE, None,
        "decode only so many validation images after each epoch, drawn once by --split_seed; the "
        "others are not used", modes=(TRAIN,)),
}  # fmt: skip
FEATURES = {
    "encoder": Option(encoder_name, "resnet50",
        "image model, frozen: torchvision's by its name, clip, or timm/NAME, see docs/HUB.md; several joined by "
        "+, such as resnet50+mobilenet_v2, give each cell the channels of all", "NAME[+NAME]", stored=FIXED),
    "encoder_weights": Option(str, "imagenet",
        "imagenet: those published, torchvision's IMAGENET1K_V1, or what timm or --clip_model names; random: "
        "untrained, from --seed; or a state dict's file; for several encoders one word for all, or one of these "
        "for each, joined by +",
        "imagenet|random|FILE", alias="resnet_weights"),
    "clip_model": Option(str, "openai/clip-vit-base-patch32",
        "CLIP, SigLIP or DINOv2 vision model of the Hugging Face hub, or the folder of one; lstm reads its pooled "
        "token, other decoders its patches", "NAME|FOLDER", needs=CLIP),
    "image_size": Option(PIXELS, None,
        "side of the square that pictures are squashed to, instead of the encoder's own (mostly "
        "224); more gives a finer grid, for more work", "PIXELS", stored=FIXED),
    "coarse_size": Option(PIXELS, None,
        "side of a second, coarser look at the same picture, whose grid is laid under the first: "
        "twice the channels, cache and encoding; below --image_size", "PIXELS", stored=FIXED),
    "encode_batch_size": Option(ENCODE_BATCH, None,
        "most images that the encoder computes together, instead of 8 on a CPU and 32 on a GPU: "
        "fewer take less memory", stored=OWN),
    "cache_dir": Option(str, "./feature_cache",
        "encoded images, shared by all runs", "FOLDER", WITH_DATA, CACHED, stored=OWN),
    "cache_dtype": Option(("float32", "float16"), "float16",
        "what encoded images are rounded to on disk", modes=WITH_DATA, needs=CACHED),
    "no_feature_cache": Option(bool, False,
        "encode images whenever they are needed and store nothing", modes=WITH_DATA),
}  # fmt: skip
MODEL = {
    "decoder": Option(DECODERS, "lstm", "what writes the captions", stored=FIXED),
    "embed_size": Option(UNITS, 512, "word and projected image size", needs=RNN, stored=FIXED),
    "hidden_size": Option(UNITS, 1024, "LSTM units per layer", needs=RNN, stored=FIXED),
    "num_layers": Option(LAYERS, 3, "stacked LSTM layers", needs=RNN, stored=FIXED),
    "attention": Option(ATTENTIONS, "additive",
        "additive: the LSTM looks before each word, by a small network; multi_head: as additive, but by scaled dot "
        "products; adaptive: each word looks once it is read, by dot products, or at nothing, and training has no "
        "loop over steps",
        needs=ATTENTION, stored=FIXED),
    "attention_heads": Option(number(int, 1, 64), 4,
        "looks of one word, each at places of its own; divides --attention_dim and --embed_size",
        needs=WITH_HEADS, stored=FIXED),
    "attention_dim": Option(UNITS, 512, "units that compare cells", needs=ATTENTION, stored=FIXED),
    "freeze_embeddings": Option(bool, False,
        "words that --glove_path knows keep its vectors; the others learn",
        modes=(TRAIN,), needs={"glove_path": GIVEN}),
    "drop_prob": Option(DROPOUT, 0.3, "dropout probability in training", modes=(TRAIN,)),
    "recurrent_dropout": Option(DROPOUT, 0.0,
        "share of each LSTM's units that a step does not hear of the one before, the same at every step of a caption",
        modes=(TRAIN,), needs=RNN),
    "patch_dropout": Option(DROPOUT, 0.0,
        "share of an image's cells left out of a training step, drawn anew each time: fewer to "
        "compute, and less overfitting", modes=(TRAIN,), needs=ATTENTION),
    "gpt2_model": Option(str, "gpt2",
        "GPT-2 that the decoder begins as: a name on the Hugging Face hub, a local folder, or scratch, which begins "
        "at random", "NAME|FOLDER|scratch", needs=GPT2, stored=FIXED),
    "gpt2_tokenizer": Option(str, None,
        "how captions are cut into tokens: a name on the hub, a local folder, or words, those of the training "
        "captions; without it the model's own, of scratch words", "NAME|FOLDER|words", (TRAIN,), GPT2),
    "gpt2_layers": Option(LAYERS, 4, "layers of GPT-2", needs=FROM_SCRATCH, stored=FIXED),
    "gpt2_width": Option(UNITS, 256, "units of each layer", needs=FROM_SCRATCH, stored=FIXED),
    "gpt2_heads": Option(number(int, 1, 64), 4, "heads of each layer, divides --gpt2_width",
        needs=FROM_SCRATCH, stored=FIXED),
    "prefix_length": Option(number(int, 0, 256), 0,
        "words that the picture becomes, which GPT-2 reads before the caption (ClipCap); 0: every layer looks at the "
        "cells by cross-attention", needs=GPT2, stored=FIXED),
    "attention_layer": Option(COUNT, 0,
        "layer whose attention maps are shown, from 1; 0: the mean over all", needs=LOOKS_BY_CROSS_ATTENTION),
}  # fmt: skip
TRAINING = {
    "init_from": Option(str, None,
        "checkpoint, or a folder of runs, whose trained decoder a new run begins with: words that it knows "
        "keep their rows, others start anew, as with another encoder does what reads features; sizes and "
        "encoder come from it", "CKPT", (TRAIN,), stored=OWN),
    "glove_path": Option(str, None,
        "word vectors in GloVe's text format, also gzipped or in a .zip, that the decoder's words begin with, as "
        "many numbers long as --embed_size; words that it lacks begin at random",
        "FILE", (TRAIN,), RNN, stored=OWN),
    "epochs": Option(EPOCHS, 10,
        "passes over the training captions; on resume: additional ones; 0 with --scst_epochs only",
        modes=(TRAIN,), stored=OWN),
    "batch_size": Option(BATCH, 128, "captions per step", modes=(TRAIN,)),
    "gradient_accumulation_steps": Option(SIZE, 1,
        "parts that a step's captions are computed in, one after the other: less memory, the same step",
        modes=(TRAIN,)),
    "gradient_checkpointing": Option(bool, False,
        "GPT-2's layers are computed again for their gradients instead of kept: less memory, more time",
        modes=(TRAIN,), needs=GPT2),
    "trainable": Option(("cross", "decoder", "all"), "all",
        "what of GPT-2 learns. cross: what reads the picture; decoder: the layers, too; all: its embeddings, too. The "
        "encoder learns with --fine_tune_encoder", needs=GPT2, stored=FIXED),
    "learning_rate": Option(POSITIVE, 0.0001, "AdamW's initial rate", modes=(TRAIN,)),
    "fine_tune_encoder": Option(COUNT, 0,
        "how many of the encoder's last blocks, such as a ResNet's bottlenecks, go on learning, BatchNorm's "
        "statistics apart; the output of those before them is cached, and every checkpoint holds the encoder",
        "BLOCKS", stored=FIXED),
    "encoder_learning_rate": Option(POSITIVE, 0.0001,
        "the initial rate of what --fine_tune_encoder trains; the schedule moves it as the other",
        modes=(TRAIN,), needs=FINE_TUNED),
    "fine_tune_after": Option(COUNT, 0,
        "epochs before --fine_tune_encoder begins, while the decoder alone learns",
        "EPOCHS", (TRAIN,), FINE_TUNED),
    "random_crop": Option(bool, False,
        "while --fine_tune_encoder learns, see another part of each training image in every epoch, half of its "
        "area or more; training images are encoded anew for it, past the cache",
        modes=(TRAIN,), needs=FINE_TUNED),
    "weight_decay": Option(NOT_NEGATIVE, 0.0,
        "AdamW's decoupled decay of the weight matrices; embeddings and biases do not decay",
        modes=(TRAIN,)),
    "alpha_c": Option(NOT_NEGATIVE, 1.0,
        "weight of the doubly stochastic penalty", modes=(TRAIN,), needs=BEFORE_EACH_WORD),
    "distill_from": Option(str, (),
        "checkpoints, or folders of runs, with the same words, encoder and split: the step also learns the words "
        "that the mean of their probabilities expects, computed once and kept in --cache_dir",
        "PATH", (TRAIN,), several=True),
    "distill_weight": Option(SHARE, 0.5,
        "of what is learnt from --distill_from; the rest is learnt from the captions",
        modes=(TRAIN,), needs={"distill_from": GIVEN}),
    "scst_epochs": Option(EPOCHS, 0,
        "epochs after those of --epochs that are trained on the reward of captions which the decoder draws: "
        "CIDEr-D against the image's own, minus the other samples' mean; on resume: additional ones",
        modes=(TRAIN,)),
    "scst_learning_rate": Option(POSITIVE, 5e-5, "their rate, constant", modes=(TRAIN,), needs=REWARDED),
    "scst_samples": Option(number(int, 2, 1024), 5, "captions drawn of each image", modes=(TRAIN,), needs=REWARDED),
    "scst_bleu_weight": Option(SHARE, 0.0,
        "of sentence BLEU-4 in the reward; the rest is CIDEr-D, 0 to 10", modes=(TRAIN,), needs=REWARDED),
    "label_smoothing": Option(DROPOUT, 0.0,
        "share of the target spread over all words", modes=(TRAIN,)),
    "horizontal_flip": Option(bool, False,
        "mirror every other training image, drawn anew each epoch", modes=(TRAIN,)),
    "grad_clip": Option(NOT_NEGATIVE, 5.0, "largest L2 norm of gradients, 0 = off", modes=(TRAIN,)),
    "select_by": Option((*model_selection.RULES, *model_selection.OTHER_NAMES), "cider",
        "what makes an epoch's validation captions the best: a score or the loss (best_loss.pt has its lowest, "
        "whatever this is), or one of the rules over several scores of docs/TRAINING.md",
        modes=(TRAIN,)),
    "early_stopping_patience": Option(COUNT, 0,
        "epochs without a better one by --select_by, 0 = off", modes=(TRAIN,)),
    "val_beam_size": Option(HYPOTHESES, 1,
        "beam for each epoch's validation captions", modes=(TRAIN,)),
    "keep_checkpoints": Option(SIZE, None,
        "keep only so many of the newest model_epoch_N.pt", modes=(TRAIN,)),
}  # fmt: skip
SCHEDULE = {
    "use_scheduler": Option(bool, False,
        "change the rate as --scheduler_type says; without it the rate is constant", modes=(TRAIN,)),
    "scheduler_type": Option(tuple(SCHEDULES), "reduce_lr_on_plateau",
        "how the rate changes from epoch to epoch", modes=(TRAIN,), needs={"use_scheduler": (True,)}),
    "scheduler_patience": Option(COUNT, 3,
        "epochs without a better validation loss before the rate falls",
        modes=(TRAIN,), needs=scheduled("scheduler_patience")),
    "scheduler_factor": Option(number(float, 0, 0.999, above=True), 0.5,
        "what the rate is multiplied by when it falls",
        modes=(TRAIN,), needs=scheduled("scheduler_factor")),
    "scheduler_step_size": Option(SIZE, 7,
        "epochs from one fall of the rate to the next",
        modes=(TRAIN,), needs=scheduled("scheduler_step_size")),
    "scheduler_gamma": Option(PROBABILITY, 0.1,
        "what the rate is multiplied by at each fall",
        modes=(TRAIN,), needs=scheduled("scheduler_gamma")),
    "scheduler_t_max": Option(SIZE, 10,
        "epochs until the rate is at its minimum", modes=(TRAIN,), needs=scheduled("scheduler_t_max")),
    "min_lr": Option(NOT_NEGATIVE, 1e-7,
        "smallest rate that the schedule reaches", modes=(TRAIN,), needs=scheduled("min_lr")),
    "warmup_epochs": Option(COUNT, 0,
        "epochs of rising rate at the start", modes=(TRAIN,), needs=scheduled("warmup_epochs")),
}  # fmt: skip
DECODING = {
    "algorithm": Option(ALGORITHMS, "beam",
        "how words are chosen; full_beam: as transformers' generate, which keeps beam_size hypotheses besides "
        "those that have ended; debug mode shows all of them",
        modes=WITHOUT_STEPS),
    "beam_size": Option(HYPOTHESES, 5, "hypotheses kept per image", needs={"algorithm": BEAMS}),
    "max_length": Option(TOKENS, 40, "most tokens in a caption, <EOS> counted"),
    "min_length": Option(COUNT, 0, "fewest words in a caption"),
    "length_penalty": Option(number(float, -10, 10), 0.0,
        "score is log_prob / length ** penalty; above 0 favours long captions",
        needs={"algorithm": BEAMS}),
    "no_repeat_ngram_size": Option(COUNT, 0, "no n-gram of this size twice, 0 = off"),
    "temperature": Option(number(float, 1e-3), 1.0,
        "divides the logits: below 1 likely words become likelier", needs={"algorithm": ("sample",)}),
    "top_k": Option(COUNT, 0,
        "draw from the k likeliest words, 0 = all", needs={"algorithm": ("sample",)}),
    "top_p": Option(PROBABILITY, 1.0,
        "draw from the fewest words that reach this probability", needs={"algorithm": ("sample",)}),
    "num_captions": Option(HYPOTHESES, 1, "how many captions per image", modes=(CAPTION,), stored=OWN),
}  # fmt: skip
RERANK = {
    "rerank": Option(RERANKINGS, "none",
        "consensus: of the beam's captions take the one whose score and agreement with the captions of similar "
        "training images are best together", modes=WITHOUT_STEPS, needs={"algorithm": BEAMS}),
    "neighbours": Option(SIZE, 60, "training images that are similar", modes=WITHOUT_STEPS, needs=CONSENSUS),
    "rerank_weight": Option(NOT_NEGATIVE, 2.0,
        "what the agreement, a mean CIDEr of 0 to 10, is multiplied by before it is added to the score",
        modes=WITHOUT_STEPS, needs=CONSENSUS),
}  # fmt: skip
OUTPUT = {
    "split": Option(("train", "val", "test"), "test", "which images to caption and score, or to compare scores of",
        modes=(TEST, COMPARE), stored=OWN),
    "ensemble": Option(str, (),
        "more checkpoints, or folders of runs, with the same words, encoder and split; the mean "
        "of all probabilities writes the caption; for attention pictures --model_path names an "
        "attention model",
        "PATH", (TEST, CAPTION, DEBUG), stored=OWN, several=True),
    "seeds": Option(str, (),
        "more checkpoints, or folders of runs, of the same recipe: each is tested as if alone, with --output_dir "
        "into numbered folders below it; then come mean, standard deviation, lowest and highest of every score",
        "PATH", (TEST,), stored=OWN, several=True),
    "images": Option(str, (),
        "pictures, and folders of pictures",
        "FILE_OR_FOLDER", (CAPTION, DEBUG), stored=OWN, several=True),
    "clip_score": Option(str, None,
        "CLIP of the Hugging Face hub, or the folder of one, that judges captions: CLIPScore and RefCLIPScore "
        "beside the other scores", "NAME|FOLDER", (TEST,), stored=OWN),
    "debug_candidates": Option(HYPOTHESES, 5, "how many of the leading words each step shows", modes=(DEBUG,),
        stored=OWN),
    "runs": Option(str, (),
        "folders of runs to compare, or folders that runs lie below", "RUN", (COMPARE,), stored=OWN, several=True),
    "json": Option(bool, False, "one JSON object per line", modes=(CAPTION, COMPARE), stored=OWN),
    "output_dir": Option(str, None,
        "where files are written, instead of beside the checkpoint, or the first run",
        "FOLDER", (TEST, CAPTION, DEBUG, TUNE, COMPARE), stored=OWN),
}  # fmt: skip
PICTURES = {
    "save_attention_viz": Option(bool, False,
        "draw where each word comes from, by --viz_method; of lstm by gradient only", modes=WITHOUT_STEPS,
        stored=(TRAIN,)),
    "viz_method": Option(VIZ_METHODS, "attention",
        "maps that are drawn, and measured in test mode. attention: where the decoder looked; gradient: "
        "cells that make a word likelier, of any decoder; lstm, too, is given grids then",
        modes=WITHOUT_STEPS, stored=(TRAIN,)),
    "attention_viz_samples": Option(SIZE, 3, "how many images to draw", modes=(TRAIN, TEST), needs=DRAWN),
    "advanced_attention_viz": Option(bool, False,
        "also raw maps, entropy and peaks", modes=WITHOUT_STEPS, stored=(TRAIN,)),
    "viz_scale": Option(("caption", "word"), "caption",
        "whose largest weight gets full brightness: the caption's, so that its words can be compared, or each "
        "word's own", modes=WITHOUT_STEPS, needs=DRAWN),
    "viz_format": Option(("png", "pdf", "svg"), "png",
        "of the pictures; in pdf and svg text stays text; debug mode always draws", needs=DRAWN),
}  # fmt: skip


class Group(NamedTuple):
    """A heading of --help and docs/OPTIONS.md, and its rows."""

    title: str
    rows: dict[str, Option]


GROUPS = {
    "run": Group("What to do", RUN),
    "data": Group("Data", DATA),
    "features": Group("Encoder and feature cache", FEATURES),
    "model": Group("Decoder", MODEL),
    "training": Group("Training", TRAINING),
    "schedule": Group("Learning rate schedule", SCHEDULE),
    "decoding": Group("Decoding", DECODING),
    "rerank": Group("Reranking", RERANK),
    "output": Group("Test and caption mode", OUTPUT),
    "pictures": Group("Attention pictures", PICTURES),
}
TABLE = {name: option for group in GROUPS.values() for name, option in group.rows.items()}
DEFAULTS = {name: option.default for name, option in TABLE.items()}
GROUP_TYPES = {name: namedtuple(name.capitalize(), group.rows) for name, group in GROUPS.items()}


class Options(namedtuple("Options", (*GROUPS, "typed", "origins"))):
    """Settled options: a named tuple of values per group.

    `typed`: the names of those that were typed, or that environment or file give as if they were.
    `origins`: the config_file.Origin of every option.
    """

    def as_dict(self):
        """Every option's value under its flag's name."""
        values = (getattr(self, group)._asdict() for group in GROUPS)
        return {name: value for group in values for name, value in group.items()}

    @property
    def given(self):
        """The values of what was typed, by name."""
        return {name: value for name, value in self.as_dict().items() if name in self.typed}

    @property
    def variables(self):
        """The environment variables that decided a value."""
        return [o.where for o in self.origins.values() if o.source == ENVIRONMENT]

    @property
    def by_hand(self):
        """The names of what was typed or stands in the environment: files may come from anyone."""
        return {name for name in self.typed if self.origins[name].source != FILE}

    @property
    def checkpoint(self):
        """The path that --model_path or --resume names, or None."""
        run = self.run
        return run.model_save_dir if run.resume == "latest" else run.model_path or run.resume


# -------------------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, and which guesses what a mistyped flag meant."""

    def parse_args(self, args=None, namespace=None):
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            meant = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            guess = f" (did you mean {meant[0]}?)" if meant else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{guess}")
        return values

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser(description=None):
    """The parser of TABLE; what was not typed is absent from its result."""
    parser = Parser(
        prog=PROGRAM,
        usage="flickr_image_caption.py [--mode train|test|caption|debug|tune|compare] [options]  (--help lists them)",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for group in GROUPS.values():
        section = parser.add_argument_group(group.title)
        for name, option in group.rows.items():
            add_option(section, name, option)
    return parser


def add_option(section, name, option):
    """One row as an argument of argparse."""
    flags = [f"--{name}"] + ([f"--{option.alias}"] if option.alias else [])
    text = describe(option).replace("%", "%%")
    if option.kind is bool:
        section.add_argument(*flags, action="store_true", help=text)
        return
    how = {"metavar": option.metavar, "nargs": "+" if option.several else None}
    how |= {"choices": option.kind} if isinstance(option.kind, tuple) else {"type": option.kind}
    section.add_argument(*flags, help=text, **how)


def describe(option):
    """A row's help: what it does, for whom, and its default."""
    values = [str(v) for wanted in option.needs.values() for v in wanted if not isinstance(v, bool)]
    modes = option.modes if len(option.modes) < len(MODES) and option.modes != (TRAIN,) else ()
    scope = ", ".join([*modes, *values] if option.needs != RNN else modes)
    known = " ".join([*HUB_ENCODERS, *ENCODERS])
    names = f"; of {known}" if option.kind == encoder_name else ""
    return f"{scope + ': ' if scope else ''}{option.help}{names} ({default_text(option)})"


def default_text(option):
    """A row's default as documentation names it."""
    if option.kind is bool:
        return "off"
    if option.several and option.default:
        return " ".join(map(str, option.default))
    return "none" if option.default in (None, ()) else str(option.default)


def load_plugins(argv):
    """Run the files of --plugin before the rest is parsed, which may name what they register."""
    parser = Parser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("--plugin", nargs="+", default=())
    try:
        for path in parser.parse_known_args(argv)[0].plugin:
            load_plugin(path)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def load_plugin(path):
    """Run a user's Python file and accept the encoders and algorithms that it registers.

    Raises: FileNotFoundError or ValueError that name the file and the line in it.
    """
    code_sha256 = plugins.run_file(path)
    from caption_decoding import ALGORITHMS, settings_of  # and torch, which the plugin needs, too

    for name, model in encoder_models.ADDED.items():
        encoder_models.ADDED[name] = model._replace(code_sha256=model.code_sha256 or code_sha256)
    for name, function in ALGORITHMS.items():
        if name not in DECODING["algorithm"].kind:
            accept_algorithm(name, settings_of(function))


def accept_algorithm(name, settings):
    """Let --algorithm be `name`, and let the options that it takes act beside it."""
    row = DECODING["algorithm"]
    DECODING["algorithm"] = row._replace(kind=(*row.kind, name))
    for option in DECODING.keys() & set(settings):
        row = DECODING[option]
        if "algorithm" in row.needs:
            DECODING[option] = row._replace(needs={"algorithm": (*row.needs["algorithm"], name)})
    TABLE.update(DECODING)


def parse_args(argv=None, description=None):
    """The options of one run; misuse exits with status 2 and one line.

    With a checkpoint they are provisional until `inherit` or `adopt` has seen what it stores.
    """
    load_plugins(argv)
    parser = build_parser(description)
    typed = vars(parser.parse_args(argv))
    typed |= {name: tuple(value) for name, value in typed.items() if isinstance(value, list)}
    try:
        settings, config = collect(typed)
        given = {name: setting.value for name, setting in settings.items()}
        origins = {name: setting.origin for name, setting in settings.items()}
        with naming_sources(origins):
            check_paths(given)
            options = group_options(ChainMap(given, DEFAULTS), given, default_origins(origins))
            if not (options.checkpoint or options.training.init_from):
                options = settle(given, {}, origins)
        check_feature_dim(config, options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    notes = [*config.notes, *map(plain_variable_note, plain_origins(options))]
    for note in notes if os.environ.get("RANK", "0") == "0" else ():
        print(f"{parser.prog}: {note}", file=sys.stderr)
    return options


def plain_origins(options):
    """The names of options whose value comes from a variable of a common name, such as DEVICE."""
    variables = {name: variable for variable, name in config_file.PLAIN_VARIABLES.items()}
    return [name for name in variables if options.origins[name].where == variables[name]]


def plain_variable_note(name):
    """What to say of it: a shell may have set the variable for something else."""
    (variable,) = (v for v, option in config_file.PLAIN_VARIABLES.items() if option == name)
    return f"--{name} comes from the environment variable {variable}"


# What a value of a file or of the environment gives way to, if that comes from a stronger source. A
# plan is the checkpoint's: only a typed --epochs, or one that stands beside --resume, adds to it.
CONTINUED = ("resume", "model_path")
YIELDS_TO = {
    "resume": ("model_path", "preset", "init_from"),
    "model_path": ("resume", "preset", "init_from"),
    **dict.fromkeys(("preset", "init_from", "epochs", "scst_epochs", "warmup_epochs"), CONTINUED),
    **dict.fromkeys(("glove_path", "freeze_embeddings"), (*CONTINUED, "init_from")),
    "seeds": ("ensemble",),
    "ensemble": ("seeds",),
}


def collect(typed):
    """({option: Setting} of all that is given, the Config of --config): typed, environment, file.

    What a file or the environment says of other modes is left out; they may serve all of them.
    """
    given = config_file.read_environment(os.environ, TABLE)
    given |= {name: Setting(value, Origin(FLAG)) for name, value in typed.items()}
    config = Config()
    if "config" in given:
        config = config_file.read_config(given["config"].value, GROUPS)
        given = {**config.settings, **given}
    mode = given["mode"].value if "mode" in given else TRAIN
    return {name: s for name, s in given.items() if is_meant(name, given, mode)}, config


def is_meant(name, given, mode):
    """Whether a Setting acts in this mode, beside those of stronger sources. What is typed always does."""
    origin = given[name].origin
    if origin.source == FLAG:
        return True
    if mode not in TABLE[name].modes or (mode == TUNE and (name in DECODING or name in RERANK)):
        return False  # tune chooses how captions are searched for
    others = [given[other].origin for other in YIELDS_TO.get(name, ()) if other in given]
    return not any(other.is_stronger(origin) for other in others)


def check_feature_dim(config, options):
    """Raises: ValueError where --config's feature_dim is not its encoder's, or else this run's."""
    encoder = options.features.encoder
    if "encoder" in config.settings:
        encoder = config.settings["encoder"].value
    elif options.checkpoint or options.training.init_from:
        return  # which alone know
    if config.feature_dim:
        config_file.check_feature_dim(config.feature_dim, encoder)


@contextlib.contextmanager
def naming_sources(origins):
    """Let an error that names options say where those come from that were not typed."""
    try:
        yield
    except (OSError, ValueError) as error:
        named = {name: origins.get(name) for name in re.findall(r"--(\w+)", str(error))}
        places = [
            f"{origin.key or '--' + name}: {origin.where}"
            for name, origin in named.items()
            if origin and origin.source in config_file.SOURCES[1:]
        ]
        if not places:
            raise
        raise type(error)(f"{error} ({', '.join(places)})") from error


def default_origins(origins):
    """Every option's Origin, where only some are given."""
    return dict.fromkeys(TABLE, Origin("default")) | origins


def check_paths(typed):
    """Refuse what the mode alone makes wrong or incomplete. Raises: ValueError naming the flags."""
    mode = typed.get("mode", TRAIN)
    for name, value in typed.items():
        if mode not in TABLE[name].modes:
            hint = ": give --model_path" if name == "resume" else ""
            *others, last = TABLE[name].modes
            belongs = f"{', '.join(others)} and {last}" if others else last
            raise ValueError(f"--{name} belongs to --mode {belongs}, not {mode}{hint}")
        if value == "" or (isinstance(value, tuple) and "" in value):
            raise ValueError(f"--{name} is empty: give a path")
    if "resume" in typed and "model_path" in typed:
        raise ValueError("--resume and --model_path name the same thing: give one of them")
    if "preset" in typed and typed.keys() & {"resume", "model_path"}:
        raise ValueError("--preset is for a new run: a resumed one has its checkpoint's options")
    if "init_from" in typed and typed.keys() & {"resume", "model_path"}:
        raise ValueError("--init_from is for a new run: a resumed one has its checkpoint's weights")
    if "glove_path" in typed and typed.keys() & {"resume", "model_path", "init_from"}:
        raise ValueError(
            "--glove_path is for a new decoder: leave it out, a checkpoint's words have vectors of their own"
        )
    if "seeds" in typed and "ensemble" in typed:
        raise ValueError(
            "--seeds and --ensemble exclude each other: only single checkpoints have a mean"
        )
    for package in filter(None, (TABLE[name].package for name, value in typed.items() if value)):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # a folder of that name is no package
            raise ValueError(
                f"--{package} needs the package {package}: pip install -r requirements-tracking.txt"
            )
    wanted = {
        f"--encoder {name}": hub_package(name) for name in typed.get("encoder", "").split("+")
    }
    wanted |= {"--clip_score": "transformers"} if "clip_score" in typed else {}
    wanted |= {"--push_to_hub": "huggingface_hub"} if typed.get("push_to_hub") else {}
    for asked, package in wanted.items():
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{asked} needs the package {package}: pip install -r requirements-hub.txt"
            )
    device = typed.get("device", "auto")
    if device != "auto" and not re.fullmatch(r"(cpu|cuda|mps)(:\d+)?", device):
        raise ValueError(f"--device {device}: give auto, cpu, cuda, cuda:N or mps")
    if mode == COMPARE and "runs" not in typed:
        raise ValueError("--mode compare needs --runs, the folders of two runs or more")
    if mode not in (TRAIN, COMPARE) and "model_path" not in typed:
        raise ValueError(f"--mode {mode} needs --model_path, the checkpoint to use")
    if mode == TUNE and typed.get("algorithm", "beam") != "beam":
        raise ValueError("--mode tune is for --algorithm beam alone")
    if mode in (CAPTION, DEBUG) and "images" not in typed:
        raise ValueError(f"--mode {mode} needs --images, pictures or folders of them")


def check_files(options):
    """The options, if the files that were typed are there; else exits as `parse_args` does.

    The rooms that read them would say the same, after the seconds that it takes to import torch.
    """
    try:
        with naming_sources(options.origins):
            find_files(options)
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        build_parser().error(str(error))
    return options


def find_files(options):
    """Raises: FileNotFoundError or ValueError naming a file, folder or checkpoint that is not there."""
    if options.checkpoint:
        resolve_model_path(options.checkpoint, checkpoint_choice(options.run.mode))
    training, output = options.training, options.output
    others = [*output.ensemble, *output.seeds, *training.distill_from, training.init_from]
    for path in filter(None, others):
        resolve_model_path(path)
    for flag, path in named_paths(options):
        if not path.exists():
            raise FileNotFoundError(f"--{flag} {path}: no such file or folder")
    if training.glove_path:
        word_vectors.check_length(training.glove_path, options.model.embed_size)
    if options.run.mode == TRAIN and not options.checkpoint:
        check_dataset_folder(options.data)


def checkpoint_choice(mode):
    """Which of a run's checkpoints a folder means: the newest to train on, else the best."""
    return "newest" if mode == TRAIN else "best"


def named_paths(options):
    """Yield (flag, path) for what was typed and must be there; shards may be patterns or URLs."""
    data = options.data
    if "data_dir" in options.typed:
        yield "data_dir", Path(data.data_dir)
    if "image_dir" in options.typed and not re.search(r":|\.(tar|tgz)", data.image_dir):
        yield "image_dir", Path(data.image_dir)
    if "captions_file" in options.typed:
        yield "captions_file", Path(data.captions_file)
    if "encoder_weights" in options.typed:
        for source in named_weights(options):
            if source not in ("imagenet", "random"):
                yield "encoder_weights", Path(source)
    for path in options.output.images:
        yield "images", Path(path)
    for path in options.output.runs:
        yield "runs", Path(path)


def named_weights(options):
    """What --encoder_weights names, also where only a checkpoint knows how many encoders there are."""
    weights = options.features.encoder_weights
    if options.checkpoint and "encoder" not in options.typed:
        return [weights] if Path(weights).exists() else weights.split("+")
    return encoder_parts(options.features)[1]


def encoder_parts(features):
    """--encoder and --encoder_weights as lists: the name and the weights of each encoder.

    Raises: ValueError where they are not as many.
    """
    names, weights = features.encoder.split("+"), features.encoder_weights
    if len(names) == 1 or weights in ("imagenet", "random"):
        return names, [weights] * len(names)
    sources = weights.split("+")
    if len(sources) != len(names):
        raise ValueError(
            f"--encoder_weights {weights}: --encoder {features.encoder} takes one for each of its "
            f"{len(names)}, joined by +"
        )
    return names, sources


def check_dataset_folder(data):
    """Raises: ValueError, FileNotFoundError that say how to get the dataset."""
    name, both = data.dataset_type, data.image_dir and data.captions_file
    if name == "custom" and not (both or data.data_dir):
        raise ValueError("--dataset_type custom needs both --image_dir and --captions_file")
    folder = Path(data.data_dir or Path("data") / name)
    if not both and not folder.is_dir():
        raise FileNotFoundError(
            f"--dataset_type {name}: no folder {folder}; "
            f"get the dataset with: python download_datasets.py --dataset {name}"
        )


# ------------------------------------------------------------------------------------------ settling


def settle(typed, stored, origins=MappingProxyType({}), path=""):
    """Options from what was typed, else from --preset or a checkpoint's `stored`, else the table.

    origins: the Origin of what was not typed, but counts as if it were.
    path: the checkpoint's.
    Raises: ValueError naming the flags that contradict each other, or would do nothing.
    """
    origins = dict.fromkeys(typed, Origin(FLAG)) | origins
    typed = without_idle(typed, stored, origins)
    preset = preset_values(typed)
    values = ChainMap({}, typed, preset, stored, DEFAULTS)
    values["save_attention_viz"] |= values["advanced_attention_viz"]
    rule = values["select_by"]
    values["select_by"] = model_selection.OTHER_NAMES.get(rule, rule)
    if values["mode"] == TUNE:
        values["algorithm"] = "beam"
        values["rerank"] = typed.get("rerank", "consensus")  # it tries both
    for name in typed:
        for other, wanted in needs_of(name, values["mode"]).items():
            if values[other] not in wanted:
                raise ValueError(f"--{name} {needed(other, wanted, values[other])}")
    check_contradictions(values, new_plan=not stored or "init_from" in typed)
    check_maps(values, "viz_method" in typed and not origins["viz_method"].tolerant)
    settled = dict.fromkeys(stored, Origin("checkpoint", str(path)))
    settled |= dict.fromkeys(preset, Origin("preset", typed.get("preset")))
    settled |= {name: origins[name] for name in typed}
    return group_options(values, typed, default_origins(settled))


def needs_of(name, mode):
    """What an option needs of others in a mode: debug searches by every algorithm, and always draws."""
    free = ("algorithm", "save_attention_viz") if mode == DEBUG else ()
    needs = TABLE[name].needs.items()
    return {other: wanted for other, wanted in needs if other not in free}


def without_idle(given, stored, origins):
    """`given` without what a file or the environment says in vain.

    That is no mistake where a stronger source made it so, such as --decoder lstm and a file's
    attention_dim; nor is it in the environment, in the record of a run, which names every option,
    or of what a file only implies.
    """
    kept = dict(given)

    def is_excused(name, other):
        origin = origins[name]
        overruled = other in given and (other not in kept or origins[other].is_stronger(origin))
        return origin.tolerant or overruled

    def is_idle(name):
        needs = needs_of(name, values["mode"])
        unmet = [other for other, wanted in needs.items() if values[other] not in wanted]
        return origins[name].source != FLAG and unmet and all(is_excused(name, o) for o in unmet)

    while True:
        values = ChainMap(kept, preset_values(kept), stored, DEFAULTS)
        idle = {name for name in kept if is_idle(name)}
        if not idle:
            return kept
        kept = {name: value for name, value in kept.items() if name not in idle}


def preset_values(typed):
    """What --preset gives: options that were not typed, and that act beside those that were."""
    preset = PRESETS.get(typed.get("preset"), {})
    values = ChainMap(typed, preset, DEFAULTS)
    contradicts = {
        "coarse_size": (values["coarse_size"] or 0) >= (values["image_size"] or math.inf),
        "min_lr": values["min_lr"] > values["learning_rate"],
        "warmup_epochs": values["warmup_epochs"] >= values["epochs"],
        "use_scheduler": not values["epochs"],
        "rerank": values["fine_tune_encoder"],
        "rerank_weight": values["fine_tune_encoder"],
    }
    return {
        name: value
        for name, value in preset.items()
        if all(values[other] in wanted for other, wanted in TABLE[name].needs.items())
        and not contradicts.get(name)
    }


def needed(other, wanted, value):
    """The end of the line about an option that would do nothing because of another one's value."""
    if wanted in ((True,), GIVEN):
        return f"needs --{other}"
    if wanted == (False,):
        return f"does nothing with --{other}"
    return f"belongs to --{other} {' or '.join(wanted)}, not {value}"


def check_contradictions(values, new_plan):
    """Raises: ValueError naming two options that exclude each other. A resumed plan keeps its warm-up."""
    if values["min_length"] >= values["max_length"]:
        raise ValueError(
            f"--min_length {values['min_length']} must be below --max_length {values['max_length']}"
        )
    most = {"greedy": 1} | dict.fromkeys(BEAMS, values["beam_size"])
    most = most.get(values["algorithm"], math.inf)
    if values["num_captions"] > most:
        raise ValueError(
            f"--num_captions {values['num_captions']} is more than "
            f"--algorithm {values['algorithm']} finds ({most})"
        )
    ratios = values["split_ratios"]
    if len(ratios) != 3 or not math.isclose(sum(ratios), 1, abs_tol=1e-6):
        shares = " ".join(map("{:g}".format, ratios))
        raise ValueError(
            f"--split_ratios {shares}: give three shares, of train, val and test, that sum to 1"
        )
    heads = values["attention_heads"]
    has_heads = all(values[name] in kinds for name, kinds in WITH_HEADS.items())
    for name in ("attention_dim", "embed_size"):
        if has_heads and values[name] % heads:
            raise ValueError(f"--attention_heads {heads} does not divide --{name} {values[name]}")
    if values["decoder"] == "gpt2":
        check_gpt2(values)
    if values["mode"] == CAPTION and values["output_dir"] and not values["save_attention_viz"]:
        raise ValueError("--output_dir needs --save_attention_viz in --mode caption")
    if values["coarse_size"] and values["coarse_size"] >= (values["image_size"] or math.inf):
        raise ValueError(
            f"--coarse_size {values['coarse_size']} must be below the image size, "
            f"{values['image_size']} (--image_size)"
        )
    if values["mode"] == TEST and values["split"] == "train" and values["rerank"] != "none":
        raise ValueError(
            "--split train: --rerank consensus would show training images their own captions: "
            "add --rerank none"
        )
    check_fine_tuning(values, new_plan)
    kind = values["scheduler_type"] if values["use_scheduler"] else None
    falls_to_minimum = kind and "min_lr" in SCHEDULES[kind].arguments.values()
    if falls_to_minimum and values["min_lr"] > values["learning_rate"]:
        raise ValueError(
            f"--min_lr {values['min_lr']:g} is above --learning_rate {values['learning_rate']:g}"
        )
    rate = values["encoder_learning_rate"]
    if falls_to_minimum and values["fine_tune_encoder"] and values["min_lr"] > rate:
        raise ValueError(f"--min_lr {values['min_lr']:g} is above --encoder_learning_rate {rate:g}")
    if not values["epochs"] and not values["scst_epochs"]:
        raise ValueError("--epochs 0 leaves nothing to train: it needs --scst_epochs")
    if new_plan and kind and not values["epochs"]:
        raise ValueError(
            "--use_scheduler does nothing with --epochs 0: --scst_learning_rate is constant"
        )
    if new_plan and kind == "one_cycle" and values["warmup_epochs"] >= values["epochs"]:
        raise ValueError(
            f"--warmup_epochs {values['warmup_epochs']} must be below --epochs {values['epochs']}"
        )


def check_gpt2(values):
    """Raises: ValueError naming options of GPT-2 that exclude each other."""
    scratch, width = values["gpt2_model"] == "scratch", values["gpt2_width"]
    if scratch and width % values["gpt2_heads"]:
        raise ValueError(
            f"--gpt2_heads {values['gpt2_heads']} does not divide --gpt2_width {width}"
        )
    if scratch and values["attention_layer"] > values["gpt2_layers"]:
        raise ValueError(
            f"--attention_layer {values['attention_layer']} is above --gpt2_layers {values['gpt2_layers']}"
        )
    if scratch and values["mode"] == TRAIN and values["trainable"] != "all":
        raise ValueError(
            f"--trainable {values['trainable']} would leave what is random as it is: --gpt2_model scratch needs all"
        )


def check_fine_tuning(values, new_plan):
    """Raises: ValueError naming what needs an encoder that stays as it is, or a plan that leaves it so."""
    if not values["fine_tune_encoder"]:
        return
    if "+" in values["encoder"]:
        raise ValueError(f"--fine_tune_encoder takes one encoder, not {values['encoder']}")
    if new_plan and values["fine_tune_after"] >= values["epochs"]:
        raise ValueError(
            f"--fine_tune_after {values['fine_tune_after']} must be below --epochs {values['epochs']}"
        )
    if values["mode"] == TRAIN and values["distill_from"]:
        raise ValueError(
            "--distill_from: its teachers do not know an encoder that --fine_tune_encoder changes"
        )
    if values["mode"] == TRAIN and values["rerank"] != "none":
        raise ValueError(
            f"--rerank {values['rerank']} compares pictures by an encoder that --fine_tune_encoder still "
            "changes: give it to --mode test"
        )


def check_maps(values, method_typed):
    """Raises: ValueError naming the option that asks for maps that there are not, or does nothing."""
    drawn, mode, decoder = values["save_attention_viz"], values["mode"], values["decoder"]
    has_maps = decoder == "attention" or (decoder == "gpt2" and not values["prefix_length"])
    if not has_maps and values["viz_method"] == "attention" and (drawn or method_typed):
        asked = ("viz_method attention", "save_attention_viz", "advanced_attention_viz")
        asked = asked[drawn + values["advanced_attention_viz"]]
        hint = "--viz_method gradient maps any decoder"
        without = "gpt2 with --prefix_length" if decoder == "gpt2" else decoder
        raise ValueError(f"--{asked} belongs to --decoder attention, not {without}: {hint}")
    if values["viz_method"] == "gradient" and decoder == "lstm" and values["encoder"] == "clip":
        raise ValueError(
            "--viz_method gradient: --decoder lstm reads the pooled token of --encoder clip, which has no cells"
        )
    if method_typed and not drawn and mode != TEST:
        raise ValueError(f"--viz_method needs --save_attention_viz in --mode {mode}")


def group_options(values, typed, origins):
    """Options of all values, in their groups."""
    groups = (
        group_type(**{name: values[name] for name in GROUPS[group].rows})
        for group, group_type in GROUP_TYPES.items()
    )
    return Options(*groups, typed=frozenset(typed), origins=origins)


def inherit(options, path, config):
    """The options of a run that starts from a checkpoint: at `path`, with the `config` it stores.

    Raises: ValueError when a typed option contradicts the model, or the config is not usable.
    """
    stored = check_config(path, config)
    stored = {n: value for n, value in stored.items() if is_inherited(TABLE[n], options.run.mode)}
    if options.run.mode == TRAIN and stored["fine_tune_encoder"]:
        stored["rerank"] = "none"  # what tuning or test mode chose is for an encoder that stays
    typed, origins = news_beside(options, stored)
    differing = [
        f"--{name} {value} (stored: {stored[name]})"
        for name, value in typed.items()
        if TABLE[name].stored == FIXED and value != stored[name]
    ]
    with naming_sources(origins):
        if differing:
            raise ValueError(
                f"{path}: trained with other options than {', '.join(differing)}: "
                "leave them out, they come from the checkpoint"
            )
        settled = settle_stored(typed, stored, path, origins)
    named_by = options.origins["resume" if options.run.resume else "model_path"]
    run = settled.run._replace(model_path=str(path), resume=None)
    origins = settled.origins | {"model_path": named_by}
    folder = runs_folder(path) if run.mode == TRAIN and "model_save_dir" not in typed else None
    if folder and folder != Path(run.model_save_dir):
        run = run._replace(model_save_dir=str(folder))  # beside the old run's
        origins["model_save_dir"] = Origin("checkpoint", str(path))
    return settled._replace(run=run, origins=origins)


def news_beside(options, stored):
    """({option: value}, {option: Origin}) of what is typed beside a checkpoint's `stored` values.

    What environment and file give is left out where it is what the checkpoint has, or does nothing.
    """
    origins = {name: options.origins[name] for name in options.typed}
    given = without_idle(options.given, stored, origins)
    same = {
        name
        for name, value in given.items()
        if origins[name].source != FLAG and name in stored and value == stored[name]
    }
    return {name: value for name, value in given.items() if name not in same}, origins


def settle_stored(typed, stored, path, origins):
    """As `settle`; what goes wrong without a typed option is the fault of the checkpoint at `path`."""
    try:
        return settle(typed, stored, origins, path)
    except ValueError as error:
        if any(f"--{name} " in str(error) for name in typed):
            raise
        raise ValueError(f"{path}: its configuration contradicts itself: {error}") from error


def adopt(options, path, config):
    """The options of a new run that begins with the decoder of a checkpoint, at `path`: --init_from.

    The rows of MODEL come from its `config`, and what names the encoder unless that is another one;
    typed ones and --preset's come before. All else is the new run's own.
    Raises: ValueError when an option contradicts the decoder, or the config is not usable.
    """
    stored, names = check_config(path, config), [*MODEL]
    given = preset_values(options.given) | options.given
    if given.get("encoder", stored["encoder"]) == stored["encoder"]:  # else its sizes are its own
        names += [name for name, row in FEATURES.items() if row.stored == FIXED]
        names += ["encoder_weights", "clip_model"]
    built = {name: stored[name] for name in names}
    typed, origins = news_beside(options, built)
    with naming_sources(origins):
        refuse_other_decoder(path, preset_values(typed) | typed, typed, stored)
        return settle_stored(typed | {"init_from": str(path)}, built, path, origins)


def refuse_other_decoder(path, given, typed, stored):
    """Raises: ValueError naming what is `given`, by --preset if not `typed`, and not the stored decoder's."""
    of_preset = f"--preset {typed.get('preset')}; "
    differing = [
        f"--{name} {given[name]} ({'' if name in typed else of_preset}stored: {stored[name]})"
        for name, row in MODEL.items()
        if row.stored == FIXED
        and given.get(name, stored[name]) != stored[name]
        and all(stored[other] in wanted for other, wanted in row.needs.items())
    ]
    if differing:
        raise ValueError(
            f"--init_from {path}: its decoder has other options than {', '.join(differing)}: "
            "leave them out, they come from it, or give what is stored"
        )


def each_alone(options):
    """The options of --model_path, and of each of --seeds as if it alone were tested, without others.

    One that is named twice counts once. With --output_dir each writes into a numbered folder below it.
    Raises: ValueError if there is none but --model_path, or two would write the same files.
    """
    run, output = options.run, options.output
    if not output.seeds:
        return [options]
    paths = {}  # by the files that they are, however spelt
    for path in (run.model_path, *output.seeds):
        paths.setdefault(Path(path).resolve(), path)
    if len(paths) == 1:
        raise ValueError(f"--seeds names no checkpoint but {run.model_path}: give others")
    folders, alone = {}, []
    for number, (file, path) in enumerate(paths.items(), start=1):
        other = folders.setdefault(file.parent, path)
        if other != path and not output.output_dir:
            raise ValueError(
                f"--seeds {path}: its files would replace those of {other}: give --output_dir"
            )
        folder = str(Path(output.output_dir) / str(number)) if output.output_dir else None
        own = {"run": run._replace(model_path=path)}
        own |= {"output": output._replace(seeds=(), output_dir=folder)}
        alone.append(options._replace(**own))
    return alone


def recipe_differences(options, other):
    """In what two runs' training or search differs, seeds aside: "--name other's value (first's)"."""
    rows = MODEL | TRAINING | SCHEDULE | DECODING | RERANK
    first, second = options.as_dict(), other.as_dict()
    names = [n for n in rows if n != "keep_checkpoints" and first[n] != second[n]]
    return [f"--{name} {second[name]} ({first[name]})" for name in names]


def path_notes(options, config):
    """Lines for the console: paths that a checkpoint's `config` decided, one that it did not, and
    what environment or file changed.

    A checkpoint may come from anyone: what it has read is shown, and it never says where to write.
    """
    mode, cache, old_cache = options.run.mode, options.features, config.get("cache_dir")
    values, origins = options.as_dict(), options.origins
    news = [
        f"--{name} {values[name]} ({origins[name]}), not the checkpoint's {config[name]}"
        for name in TABLE
        if mode not in (CAPTION, DEBUG) and name in options.typed and origins[name].source != FLAG
        if is_inherited(TABLE[name], mode) and config.get(name, values[name]) != values[name]
    ]
    read = ("data_dir", "image_dir", "captions_file") if mode in WITH_DATA else ()
    notes = [
        f"{name.replace('_', ' ')} (from the checkpoint): {getattr(options.data, name)}"
        for name in read
        if name not in options.typed and getattr(options.data, name)
    ]
    cached = mode in WITH_DATA and not cache.no_feature_cache
    if cached and "cache_dir" not in options.typed and old_cache not in (None, cache.cache_dir):
        notes.append(
            f"features go to {cache.cache_dir}; the checkpoint's run used --cache_dir {old_cache}: "
            "give it to reuse its features"
        )
    return notes + news


def is_inherited(option, mode):
    """Whether a checkpoint's value stands for one that is not typed, in this mode."""
    if isinstance(option.stored, tuple):
        return mode in option.stored
    return option.stored in (INHERITED, FIXED)


def check_config(path, config):
    """A checkpoint's options, checked as if they were typed: the file may come from anyone.

    Options that the file lacks have their defaults, which do what the program did before there was
    the option. Raises: ValueError naming the first that is not usable.
    """
    checked = {}
    for name, option in TABLE.items():
        if option.stored == OWN:
            continue
        value = checked[name] = config.get(name, option.default)
        absent = value is None and option.default is None
        if not absent and not is_value_of(option, value):
            lacking = missing_plugin(config, name) or "give another checkpoint"
            raise ValueError(f"{path}: its configuration has no usable --{name}: {lacking}")
    return checked


def missing_plugin(config, name):
    """What to type for a stored encoder or algorithm that a plugin registers; "" if it is none."""
    paths = config.get("plugin")
    if name not in ("encoder", "algorithm") or not isinstance(paths, (tuple, list)) or not paths:
        return ""
    return f"{config[name]} is a plugin's, give --plugin {' '.join(map(str, paths))}"


def is_value_of(option, value):
    """Whether typing `value` would give `value`."""
    try:
        if option.several:
            one = option._replace(several=False)
            return isinstance(value, tuple) and all(is_value_of(one, part) for part in value)
        if isinstance(option.kind, tuple):
            return value in option.kind
        if option.kind is bool:
            return isinstance(value, bool)
        return type(value) in (str, int, float) and option.kind(str(value)) == value
    except (TypeError, ValueError, RuntimeError, argparse.ArgumentTypeError):
        return False


# ------------------------------------------------------------------------------------- documentation


def as_markdown():
    """docs/OPTIONS.md: every group as a table."""
    lines = [
        "# Options",
        "",
        "Written by `python caption_options.py` from the program's table of options; a test holds",
        "the two equal, so change the table, not this file.",
        "",
        "A value that is not typed comes from the environment, as CAPTION_BATCH_SIZE, else from the",
        "file of --config (see [EXPERIMENTS.md](EXPERIMENTS.md)), else from the checkpoint when one",
        "is loaded, else from this table; a folder to write in never comes from a checkpoint. *Acts",
        "in* names the modes in which an option does something, and the other options it needs; empty",
        "means always, but for compare, which takes no options but those that name it. Typed where it",
        "would do nothing, an option is refused.",
    ]
    for group in GROUPS.values():
        lines += ["", f"## {group.title}", "", "| option | default | acts in | what |"]
        lines += ["|---|---|---|---|"]
        lines += [markdown_row(name, option) for name, option in group.rows.items()]
    names = [*ENCODERS, *HUB_ENCODERS]
    lines += ["", "Encoders: " + ", ".join(f"`{name}`" for name in names) + "."]
    lines += [
        "",
        "## Presets",
        "",
        "`--preset` stands for these options; those that are typed, too,",
    ]
    lines += ["come before it, and what does nothing beside them is left out.", ""]
    lines += [f"- `{name}`: `{as_flags(preset)}`" for name, preset in PRESETS.items()]
    return "\n".join(lines) + "\n"


def as_flags(values):
    """Values of options as one would type them."""
    typed = {name: value for name, value in values.items() if value is not None}
    return " ".join(f"--{name}" + f" {typed[name]}" * (typed[name] is not True) for name in typed)


def markdown_row(name, option):
    """One option as a row of the table."""
    scope = list(option.modes) if option.modes not in (MODES, EVERY_MODE) else []
    scope += [markdown_need(other, wanted) for other, wanted in option.needs.items()]
    what = option.help
    if isinstance(option.kind, tuple):
        what += "; one of " + ", ".join(option.kind)
    if option.alias:
        what += f"; also spelt `--{option.alias}`"
    what = what.replace("|", "\\|").replace("<", "\\<")
    return f"| `--{name}` | {default_text(option)} | {', '.join(scope)} | {what} |"


def markdown_need(other, wanted):
    """What an option needs of another one, such as "`--decoder` lstm or attention"."""
    if wanted in ((True,), GIVEN):
        return f"`--{other}`"
    if wanted == (False,):
        return f"without `--{other}`"
    return f"`--{other}` {' or '.join(wanted)}"


if __name__ == "__main__":
    print(as_markdown(), end="")
