"""Trained models as a run begins with them: found, read, their options taken over; and which go together.

    options, checkpoint = open_checkpoint(options)            # what was not typed is the checkpoint's
    member, config = load_member(options, "ensemble", "other/best.pt", in_common(path, checkpoint))

A model is a checkpoint, a folder of runs with one, or a folder for the hub. What its tensors mean is
the affair of who builds it.
"""

import sys
from pathlib import Path

import caption_splits
import checkpoints
import hub_models
import process_group
from caption_options import (
    CAPTION,
    DEBUG,
    adopt,
    checkpoint_choice,
    inherit,
    path_notes,
    recipe_differences,
)
from model_versions import resolve_model_path
from runtime import counted, printable, warn


def open_checkpoint(options):
    """(settled options, checkpoint or None): what was not typed comes from the checkpoint.

    Raises: FileNotFoundError, ValueError that name the file or the flag.
    """
    if options.training.init_from:
        path = resolve_model_path(options.training.init_from)
        return adopt(options, path, load_model(path)["config"]), None
    if options.checkpoint is None:
        return options, None
    path = find_checkpoint(options, options.checkpoint)
    checkpoint = load_model(path)
    if path.name == checkpoints.HUB_FILE and options.run.mode == "train":
        raise ValueError(
            f"{path}: holds nothing of a training to go on with: give it as --init_from"
        )
    options = inherit(options, path, checkpoint["config"])
    if process_group.rank() == 0:
        for note in path_notes(options, checkpoint["config"]):
            print(printable(note))
    splits = caption_splits.stored_splits(path, checkpoint)
    if options.run.mode not in (CAPTION, DEBUG):
        splits = caption_splits.named_splits(path, splits)
    members = tuple(str(find_checkpoint(options, member)) for member in options.output.ensemble)
    seeds = tuple(str(find_checkpoint(options, seed)) for seed in options.output.seeds)
    options = options._replace(output=options.output._replace(ensemble=members, seeds=seeds))
    return options, checkpoint | {"splits": splits}


def load_model(path):
    """What a checkpoint holds, or a folder for the hub, whose captioner.json `path` is then."""
    is_folder = Path(path).name == checkpoints.HUB_FILE
    return hub_models.read_pretrained(path) if is_folder else checkpoints.load_checkpoint(path)


def find_checkpoint(options, path):
    """The file that `path`, a file or a folder of runs, means; printed where it is another."""
    file = resolve_model_path(path, checkpoint_choice(options.run.mode))
    if str(file) != str(path):
        stream = sys.stderr if options.run.mode == "caption" else sys.stdout
        print(f"checkpoint: {printable(file)}", file=stream)
    return file


# ------------------------------------------------------------------------------ which go together


def described(captioner, splits):
    """What a checkpoint says of the pictures, words and splits that its decoder knows."""
    vocabulary = captioner.vocabulary.to_plain()
    return {"encoder": {**captioner.encoder.key()}, "vocabulary": vocabulary, "splits": splits}


def in_common(path, checkpoint):
    """What the members of an ensemble must have in common."""
    encoder, splits = checkpoint["encoder"], caption_splits.stored_splits(path, checkpoint)
    parts = encoder.get("parts", [encoder])
    own = [part["configuration"] for part in parts if "configuration" in part]
    return {
        "encoder": [encoder["weights_sha256"], encoder["channels"], *own],
        "image size": [encoder["image_size"], encoder.get("coarse_size")],
        "split": caption_splits.splits_sha256(splits),
        "vocabulary": checkpoint["vocabulary"],
    }


def load_member(options, flag, path, expected):
    """Another checkpoint, of an --ensemble or a teacher's, and its options' values. expected: as `in_common`.

    Raises: ValueError when it has other words, pictures or splits (whose test images it may know).
    """
    member = load_model(path)
    options = options._replace(typed=frozenset({"mode"}))
    config = inherit(options, path, member["config"]).as_dict()
    actual = in_common(path, member)
    differing = [name for name in expected if expected[name] != actual[name]]
    if differing:
        raise ValueError(
            f"--{flag} {path}: has another {differing[0]} than {options.run.model_path or 'this run'}: "
            "members must be trained alike"
        )
    return member, config


def compare_seed(options, checkpoint, path):
    """What to say of a checkpoint of --seeds that is of another recipe than the first, or None.

    Raises: ValueError if it has another split.
    """
    first, other = options.run.model_path, load_model(path)
    expected, actual = in_common(first, checkpoint), in_common(path, other)
    if all(each["config"].get("fine_tune_encoder") for each in (checkpoint, other)):
        del expected["encoder"]  # each seed's has learnt something else
    differing = [f"another {name}" for name in expected if expected[name] != actual[name]]
    if "another split" in differing:
        raise ValueError(
            f"--seeds {path}: has another split than {first}: scores of different images have no mean"
        )
    differing += recipe_differences(options, inherit(options, path, other["config"]))
    epochs = [each["plan"].get("epochs") for each in (checkpoint, other)]
    if epochs[0] != epochs[1]:
        differing.append(f"a plan of {counted(epochs[1], 'epoch')} ({epochs[0]})")
    difference = ", ".join(differing)
    return f"--seeds {path}: not the recipe of {first}: it has {difference}" if differing else None


def warn_of_seen_images(initial, dataset, options):
    """Say if --init_from's decoder has learnt from images that this run is scored on."""
    scored = dataset.table.image[dataset.table.split != "train"].tolist()
    if seen := caption_splits.trained_on(scored, dataset.image_dir, initial["splits"]):
        warn(
            f"{len(seen)} of {counted(len(scored), 'validation and test image')} are among those that "
            f"{options.training.init_from} was trained on: scores on them tell nothing of new pictures"
        )
