"""Caption datasets: files of any common format -> one table of (image, captions, split).

    dataset = load_dataset("flickr8k")  # ./data/flickr8k, checked, split by image
    dataset.table                       # one row per image
    rows, problems = read_captions(Path("captions.csv"))

Captions files come from anywhere, so that a bad row or image is counted, named and skipped; only
too many of them are an error.
"""

import contextlib
import csv
import functools
import hashlib
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import pandas as pd
import torch

import image_loading
from image_loading import Shards, content_digests

IMAGE_FOLDERS = ("Images", "images", "flickr30k_images", "flickr30k-images", "Flicker8k_Dataset")
CAPTIONS_FILES = ("captions.txt", "captions.csv", "results.csv", "Flickr8k.token.txt")
CAPTIONS_FILES += ("results_20130124.token", "dataset_{}.json", "captions.json")  # {}: the dataset

SPLITS = ("train", "val", "test")
MADE_WITH = ("train", "val")  # splits that decide what a checkpoint is
SPLIT_OF_WORD = {"train": "train", "restval": "train", "test": "test", "": None}
SPLIT_OF_WORD |= dict.fromkeys(("val", "dev", "valid", "validation"), "val")
LIST_NAMES = {"train": "train", "val": "val|dev", "test": "test"}  # in the file names of lists

IMAGE_COLUMNS = ("image", "image_name", "file_name", "filename")
CAPTION_COLUMNS = ("caption", "comment", "text")
MAX_FILE_BYTES = 2**31  # the largest public captions file (COCO, all splits) has 0.1 GB
MAX_CAPTION_CHARACTERS = 2_000  # spaCy takes quadratic time for a run of quotes

SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one, but no file can hold it
TOKEN_LINE = re.compile(r"[^\t]+#\d+\t")
LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")
PICTURE_NAME = re.compile(r"\.(jpe?g|png|gif|bmp|tiff?|webp|ppm|avif|hei[cf])\b", re.IGNORECASE)


# ---------------------------------------------------------------------------------------- dataset


class Foreign(NamedTuple):
    """How the images of another dataset than the checkpoint's were chosen to be scored.

    splits: the rule.
    left_out: how many the checkpoint was trained or validated on.
    compared_by: "content" or "base name".
    same_names: scored images that by content are none of those, but bear the name of one.
    """

    splits: str
    left_out: int
    compared_by: str
    same_names: int

    def __str__(self):
        renamed = (
            f"; {self.same_names} others have the names of such images: "
            "pictures that were resized or saved again are not recognised"
        )
        return (
            f"another dataset than the checkpoint's, splits: {self.splits}; "
            f"{self.left_out} images left out that the checkpoint was trained or validated on, "
            f"compared by {self.compared_by}{renamed if self.same_names else ''}"
        )


@dataclass
class Dataset:
    """A captioned image collection, split by image.

    table: one row per image: `image` (str, path below image_dir), `captions` (list of str),
        `split` (train|val|test).
    image_dir: `image_dir / image` is what `cached_features` and `open_images` take.
    notes: lines for the console: what was read, which splits, what was skipped and why.
    images_named: how many images the captions file names.
    needed: the splits that must not be empty.
    bad_images: {image: reason} of those skipped so far, at most max_bad_fraction of images_named.
    foreign: None for a dataset of one's own, and for the checkpoint's.
    """

    table: pd.DataFrame
    image_dir: Path | Shards
    captions_file: Path
    notes: list[str]
    max_bad_fraction: float
    images_named: int
    needed: Sequence[str] = SPLITS
    bad_images: dict[str, str] = field(default_factory=dict)
    foreign: Foreign | None = None

    def split_names(self) -> dict[str, list[str]]:
        """{"train": [image, ...], "val": ..., "test": ...}; `load_dataset` takes it as `splits`."""
        return {split: self.table.image[self.table.split == split].tolist() for split in SPLITS}

    def splits(self, known: dict | None = None) -> dict:
        """What a checkpoint remembers: the names per split, and digests of the files' contents.

        "digests": {split: as `content_digests` gives them}, in the order of the names; absent for
        shards. Those that `known`, a checkpoint's splits, holds for the same names are taken over.
        """
        names = self.split_names()
        if isinstance(self.image_dir, Shards):
            return names
        if known and "digests" in known and all(known[split] == names[split] for split in SPLITS):
            return known
        digests = {split: content_digests(self.image_dir, names[split]) for split in SPLITS}
        return names | {"digests": digests}

    def drop_unreadable(self, reasons: dict[str, str]) -> str:
        """Drop these images, {image: reason}; returns the line that counts all skipped so far.

        Raises: ValueError when too many images are bad by now, or a split has none left.
        """
        if not reasons:
            return ""
        self.bad_images |= reasons
        bad = [*self.bad_images.items()]
        note = _skipped(self.captions_file, "images", bad, self.images_named, self.max_bad_fraction)
        self.table = self.table[~self.table.image.isin(list(reasons))].reset_index(drop=True)
        _check_splits(self.table, self.captions_file, self.needed)
        self.notes.append(note)
        return note


def load_dataset(
    dataset_type: str,
    image_dir: str | Path | None = None,
    captions_file: str | Path | None = None,
    *,
    split_seed: int = 42,
    splits: dict | None = None,
    typed: bool = False,
    scored: str | None = None,
    max_bad_fraction: float = 0.01,
    max_train_images: int | None = None,
    max_val_images: int | None = None,
    remote_shards: bool = True,
) -> Dataset:
    """Read, check and split a dataset.

    Args:
        dataset_type: names the default folder only, see `find_dataset`.
        split_seed: for a split drawn here, and for the choice of `max_train_images` and
            `max_val_images`.
        splits: a checkpoint's, as `Dataset.splits` gave them; wins over every other source. With
            their hash alone the dataset is split anew, and must agree with it.
        typed: the user named the dataset anew, so that it may be another one than the checkpoint's:
            one that is foreign splits itself, or is scored by `Foreign`.
        scored: the one split that test mode scores; the others may be empty.
        max_bad_fraction: 0..1, how many rows, and how many images, may be bad before this is an
            error.
        max_train_images, max_val_images: keep only so many of the split, chosen by `split_seed`;
            the others are in none. They do not act on a foreign dataset.
        remote_shards: whether `image_dir` may be shards that a command fetches; False when it comes
            from a checkpoint.
    Raises: ValueError or FileNotFoundError, one line each, naming the file or flag.
    """
    image_dir, captions_file = find_dataset(dataset_type, image_dir, captions_file, remote_shards)
    captions, recorded, bad_images, notes = _read_by_image(captions_file, max_bad_fraction)
    sha256 = splits.get("sha256") if splits else None
    splits = None if sha256 else splits
    names, ours = list(captions), splits
    if splits and typed:
        ours = _splits_of_ours(names, image_dir, splits, scored)
    whole = scored if splits and not ours else None  # a foreign dataset, in test mode
    split_of, split_note = resolve_splits(names, recorded, captions_file, split_seed, ours, whole)
    foreign = None
    if whole:
        rule = split_note.removeprefix("splits: ")
        split_of, foreign = _unknown_images(split_of, scored, image_dir, splits, rule)
    elif splits and not ours:
        split_note += "; no image is the checkpoint's"
    absent = _absent_images(image_dir, split_of)
    bad_images |= absent
    images_named = len(split_of.keys() | bad_images.keys())
    skipped = _skipped(
        captions_file, "images", [*bad_images.items()], images_named, max_bad_fraction
    )

    table = _table({name: split_of[name] for name in split_of if name not in absent}, captions)
    if not foreign:
        table = _fewer_images(table, "train", max_train_images, split_seed)
        table = _fewer_images(table, "val", max_val_images, split_seed)
    needed = [scored] if scored else SPLITS
    _check_splits(table, captions_file, needed)

    notes += [skipped, _uncaptioned(image_dir, captions), split_note, _split_sizes(table)]
    notes = [note for note in notes if note]
    if isinstance(image_dir, Shards):
        image_dir = replace(image_dir, names=tuple(table.image))
    dataset = Dataset(
        table=table,
        image_dir=image_dir,
        captions_file=captions_file,
        notes=notes,
        max_bad_fraction=max_bad_fraction,
        images_named=images_named,
        needed=needed,
        bad_images=bad_images,
        foreign=foreign,
    )
    if sha256 and splits_sha256(dataset.split_names()) != sha256:
        raise ValueError(
            f"{captions_file}: split otherwise than for the checkpoint, and the best.pt that holds "
            "its splits is not beside it: put it there, or use best.pt itself"
        )
    return dataset


def find_dataset(
    dataset_type: str,
    image_dir: str | Path | None = None,
    captions_file: str | Path | None = None,
    remote_shards: bool = True,
) -> tuple[Path | Shards, Path]:
    """(image folder or shards, captions file): those given, else those of ./data/<dataset_type>.

    `custom` has no folder of its own. `remote_shards`: as in `load_dataset`.
    Raises: FileNotFoundError saying which command gets the dataset, ValueError when `custom` lacks
    a path or `image_dir` is refused.
    """
    if dataset_type == "custom" and not (image_dir and captions_file):
        raise ValueError("--dataset_type custom needs both --image_dir and --captions_file")
    if image_dir and not remote_shards:
        image_loading.refuse_remote(str(image_dir))
    root = Path("data") / dataset_type
    image_dir = image_dir or _first_of(root, IMAGE_FOLDERS, "image folder")
    image_dir = image_loading.find_shards(image_dir, PICTURE_NAME) or Path(image_dir)
    captions_file = Path(captions_file or _first_of(root, CAPTIONS_FILES, "captions file"))
    if isinstance(image_dir, Path) and not image_dir.is_dir():
        raise FileNotFoundError(
            f"--image_dir {image_dir}: no such folder; expected the folder that holds the images"
        )
    if not captions_file.is_file():
        raise FileNotFoundError(
            f"--captions_file {captions_file}: no such file; expected a captions CSV, TXT or JSON"
        )
    return image_dir, captions_file


def _first_of(root: Path, names: Sequence[str], what: str) -> Path:
    candidates = [root / name.format(root.name) for name in names]
    for path in candidates:
        if path.exists():
            return path
    raise FileNotFoundError(
        f"{root}: no {what} (looked for {', '.join(path.name for path in candidates)}); "
        f"get the dataset with: python download_datasets.py --dataset {root.name}"
    )


def _read_by_image(captions_file: Path, max_bad_fraction: float):
    """(captions {image: [caption, ...]}, recorded {image: split}, bad {name: reason}, notes)."""
    rows, malformed = read_captions(captions_file)
    captions, recorded, bad_names, contradictions = _group_by_image(rows)
    total = len(rows) + len(malformed)
    skipped = _skipped(captions_file, "rows", malformed + contradictions, total, max_bad_fraction)
    count = sum(map(len, captions.values()))
    notes = [f"{captions_file}: {count} captions of {len(captions)} images", skipped]
    return captions, recorded, bad_names, notes


def _group_by_image(rows):
    """(captions, recorded and bad names as `_read_by_image` returns them, contradictions).

    A name that leads out of the image folder is bad. A row whose split is not that of its image's
    first row is a contradiction, (where, reason).
    """
    captions, recorded, bad_names, contradictions = {}, {}, {}, []
    plain_name = functools.cache(_plain_name)  # parsing paths is slow, and rows repeat them
    for image, caption, split in rows:
        name = plain_name(image)
        if name is None:
            bad_names[image] = "not a relative path below the image folder"
        elif recorded.setdefault(name, split) != split:
            where = f"{image!r} {caption[:40]!r}"
            reason = f"image is in split {recorded[name]} already, not {split}"
            contradictions.append((where, reason))
        else:
            captions.setdefault(name, []).append(caption)
    return captions, recorded, bad_names, contradictions


def _plain_name(name: str) -> str | None:
    """The name without detours ("./a.jpg" is "a.jpg"); None when it may leave the image folder."""
    path = PurePosixPath(name)
    absolute = path.anchor or PureWindowsPath(name).anchor
    if absolute or ".." in re.split(r"[\\/]", name) or "\0" in name:
        return None
    return str(path)


def _absent_images(image_dir: Path | Shards, names: Iterable[str]) -> dict[str, str]:
    """{image: reason} of the images that the folder lacks; shards tell only once they are read."""
    if isinstance(image_dir, Shards):
        return {}
    absent = dict.fromkeys(names, f"not in {image_dir}")
    # listing folders takes a tenth of asking for every file
    for folder in {name.rpartition("/")[0] for name in absent}:
        with contextlib.suppress(OSError), os.scandir(image_dir / folder) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if name in absent and entry.is_file():
                    del absent[name]
    return {
        name: reason
        for name, reason in absent.items()
        if not os.path.isfile(image_dir / name)  # noqa: PTH113 - A.JPG may be a.jpg; over-long names
    }


def _table(split_of: dict[str, str], captions: dict[str, list[str]]) -> pd.DataFrame:
    table = pd.DataFrame({"image": list(split_of)})
    table["captions"] = [captions[name] for name in split_of]
    table["split"] = list(split_of.values())
    return table


def _fewer_images(table: pd.DataFrame, split: str, count: int | None, seed: int) -> pd.DataFrame:
    """The table with at most `count` images of the split; the same ones whatever their order."""
    if count is None:
        return table
    if count < 1:
        raise ValueError(f"--max_{split}_images {count}: expected at least 1")
    names = sorted(table.image[table.split == split])
    random.Random(seed).shuffle(names)
    return table[(table.split != split) | table.image.isin(names[:count])].reset_index(drop=True)


def _check_splits(table: pd.DataFrame, captions_file: Path, needed: Sequence[str]):
    for split in needed:
        if not (table.split == split).any():
            need = "; train, val and test need one each" if len(needed) > 1 else ""
            raise ValueError(f"{captions_file}: the {split} split has no images{need}")


def _skipped(
    path: Path, what: str, bad: list[tuple[str, str]], total: int, max_bad_fraction: float
) -> str:
    """One line that counts bad rows or images, (where, reason), and names ten; "" for none.

    Raises: ValueError when they are more than max_bad_fraction of the total.
    """
    if not bad:
        return ""
    named = "; ".join(f"{where} ({reason})" for where, reason in bad[:10])
    more = "; ..." if len(bad) > 10 else ""
    line = f"{path}: {len(bad)} of {total} {what} skipped: {named}{more}"
    if not line.isprintable():  # names come from the file: no control codes on a terminal
        line = line.encode("unicode_escape").decode()
    if len(bad) > max_bad_fraction * total:
        raise ValueError(
            f"{line}: more than --max_bad_fraction {max_bad_fraction:g}; "
            "mend the dataset or raise it"
        )
    return line


def _uncaptioned(image_dir: Path | Shards, captions: dict[str, list[str]]) -> str:
    """A line that counts the folder's images without captions, "" for none or for shards."""
    if isinstance(image_dir, Shards):
        return ""
    with os.scandir(image_dir) as entries:
        pictures = (entry.name for entry in entries if PICTURE_NAME.search(entry.name))
        count = sum(name not in captions for name in pictures)
    return f"{image_dir}: {count} images have no captions and are left out" if count else ""


def _split_sizes(table: pd.DataFrame) -> str:
    return ", ".join(f"{split} {(table.split == split).sum()}" for split in SPLITS) + " images"


# ----------------------------------------------------------------------------------------- splits


def resolve_splits(
    names: list[str],
    recorded: dict[str, str | None],
    captions_file: Path,
    split_seed: int,
    splits: dict[str, list[str]] | None = None,
    whole: str | None = None,
) -> tuple[dict[str, str], str]:
    """({image: split}, note): from `splits`, else `recorded`, else lists of names, else drawn.

    Splits are by image, so that no caption of a validation image is trained on. Images in no split
    are left out; the note counts them, and names that are not in the data.
    Lists lie beside the captions file: *train*.txt, *dev*.txt or *val*.txt, *test*.txt, an image
    name per line, with or without its extension.

    Args:
        recorded: {image: split} as the captions file says, None where it says nothing.
        splits: names per split, from a checkpoint.
        whole: the only split that is wanted; nothing is drawn: without lists it has all images.
    Raises: ValueError when an image is in two splits, or lists are ambiguous or incomplete.
    """
    if splits is not None:
        splits = checked_splits(splits)
        lists = {split: splits[split] for split in SPLITS}
        return _listed_splits(names, lists, "the checkpoint")
    if any(recorded.values()):
        split_of = {name: recorded[name] for name in names if recorded[name]}
        left_out = _left_out(len(names) - len(split_of))
        return split_of, f"splits: as recorded in {captions_file.name}{left_out}"
    if lists := _split_lists(names, captions_file, [whole] if whole else SPLITS):
        listed = {split: path.read_text("utf-8-sig").splitlines() for split, path in lists.items()}
        return _listed_splits(names, listed, ", ".join(path.name for path in lists.values()))
    if whole:
        return dict.fromkeys(names, whole), "splits: none, all images are scored"
    drawn = f"splits: drawn by image with --split_seed {split_seed}"
    return _drawn_splits(names, split_seed), drawn


def splits_sha256(splits: dict) -> str:
    """Of a checkpoint's splits: over the names, in whatever order, or as it is stored instead."""
    if "train" not in splits:
        return splits["sha256"]
    names = json.dumps([sorted(splits[split]) for split in SPLITS])
    return hashlib.sha256(names.encode()).hexdigest()


def checked_splits(splits) -> dict:
    """A checkpoint's splits: what `Dataset.splits` returned, or {"sha256": of them}.

    Raises: ValueError when they are anything else.
    """
    if isinstance(splits, dict) and "train" not in splits and isinstance(splits.get("sha256"), str):
        return {"sha256": splits["sha256"]}
    lists = [splits.get(split) for split in SPLITS] if isinstance(splits, dict) else [None]
    for names in lists:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(
                "the checkpoint's splits are damaged: "
                "expected lists of image names for train, val and test"
            )
    names = dict(zip(SPLITS, lists, strict=True))
    if "digests" not in splits:
        return names
    digests = splits["digests"] if isinstance(splits["digests"], dict) else {}
    for split in SPLITS:
        shape, dtype = (getattr(digests.get(split), name, None) for name in ("shape", "dtype"))
        if (shape, dtype) != ((len(names[split]),), torch.int64):
            raise ValueError("the checkpoint's splits are damaged: expected a digest per image")
    return names | {"digests": digests}


def _listed_splits(
    names: list[str], lists: dict[str, list[str]], source: str
) -> tuple[dict[str, str], str]:
    """({image: split}, note) from lists of names, which `source` holds."""
    by_name = {name.rpartition(".")[0]: name for name in names} | {name: name for name in names}
    split_of, unknown = {}, 0
    for split, listed in lists.items():
        for line in filter(None, map(str.strip, listed)):
            name = by_name.get(line)
            if name is None:
                unknown += 1
            elif split_of.setdefault(name, split) != split:
                both = f"both {split_of[name]} and {split}"
                raise ValueError(f"splits of {source}: {name!r} is in {both}")
    count = len(names) - len(split_of)
    unused = f"; {count} images that its run did not use are left out" if count else ""
    left_out = unused if source == "the checkpoint" else _left_out(count)
    absent = f"; {unknown} names are not in the data" if unknown else ""
    in_order = {name: split_of[name] for name in names if name in split_of}
    return in_order, f"splits: from {source}{left_out}{absent}"


def _left_out(count: int) -> str:
    return f"; {count} images in no split are left out" if count else ""


def _drawn_splits(names: list[str], seed: int) -> dict[str, str]:
    """{image: split}: a tenth each for val and test, decided by the names and the seed alone."""
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    tenth = max(1, round(len(names) / 10))
    val, test = set(shuffled[:tenth]), set(shuffled[tenth : 2 * tenth])
    return {name: "val" if name in val else "test" if name in test else "train" for name in names}


def _split_lists(names: list[str], captions_file: Path, needed: Sequence[str]) -> dict[str, Path]:
    """{split: list file} beside the captions file; {} without any.

    A *.txt that names no image of ours is no list.
    Raises: ValueError when there are lists, but not one for each split that is needed.
    """
    known = {*names, *(name.rpartition(".")[0] for name in names)} - {""}
    lists = {split: [] for split in SPLITS}
    for path in sorted(captions_file.parent.glob("*.txt")):
        split = _split_in_name(path.name)
        if split and path != captions_file and _names_any(path, known):
            lists[split].append(path)
    if not any(lists.values()):
        return {}
    for split in needed:
        if len(lists[split]) != 1:
            which = " and ".join(path.name for path in lists[split]) or "none"
            raise ValueError(
                f"{captions_file.parent}: expected one {split} list beside the captions, "
                f"found {which}"
            )
    return {split: lists[split][0] for split in needed}


def _split_in_name(file_name: str) -> str | None:
    for split, words in LIST_NAMES.items():
        if re.search(words, file_name, re.IGNORECASE):
            return split
    return None


def _names_any(path: Path, known: set[str]) -> bool:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            return any(line.strip() in known for line in lines)
    except (OSError, UnicodeDecodeError):
        return False


# ------------------------------------------------------------------- images that a checkpoint knows


def _splits_of_ours(
    names: list[str], image_dir: Path | Shards, splits: dict, scored: str | None
) -> dict | None:
    """A checkpoint's splits under our names; None when our dataset is another one.

    It is the checkpoint's if it has all its images, or in test mode those of the split `scored`.
    Training also goes on with a part of them, so that none changes its split.
    """
    same = _same_images(names, image_dir, splits, [scored] if scored else SPLITS)
    if same or scored:
        return same
    known, _ = _known_images(names, image_dir, splits)
    parts = {split: [name for name in known if known[name] == split] for split in SPLITS}
    return parts if known else None


def _same_images(
    names: list[str], image_dir: Path | Shards, splits: dict, needed: Sequence[str]
) -> dict | None:
    """A checkpoint's splits under our names, None unless we have all images of the `needed` ones.

    An image of ours is the checkpoint's by its name, else its base name ("a.jpg" is
    "Images/a.jpg"), and by its content where both are at hand. Other splits come whole or empty.
    """
    ours = _under_our_names(names, splits)
    for split in needed:
        if None in ours[split]:
            return None
        if "digests" in splits and isinstance(image_dir, Path):
            digests = content_digests(image_dir, ours[split]), splits["digests"][split]
            pairs = zip(*map(torch.Tensor.tolist, digests), strict=True)
            if any(mine != known and mine and known for mine, known in pairs):  # 0: not readable
                return None
    return {split: [] if None in ours[split] else ours[split] for split in SPLITS}


def _under_our_names(names: list[str], splits: dict) -> dict[str, list[str | None]]:
    """A checkpoint's splits with each image's name among ours, None where we lack it."""
    by_name = dict(zip(names, names, strict=True))
    by_base_name = _by_base_name(names)
    theirs = _by_base_name(name for split in SPLITS for name in splits[split])

    def our_name(name):
        base_name = _base_name(name)
        return by_name.get(name) or (theirs[base_name] and by_base_name.get(base_name))

    return {split: [our_name(name) for name in splits[split]] for split in SPLITS}


def _by_base_name(names: Iterable[str]) -> dict[str, str | None]:
    """{base name: name}, None where several names share it."""
    by_base_name = {}
    for name in names:
        base_name = _base_name(name)
        by_base_name[base_name] = None if base_name in by_base_name else name
    return by_base_name


def _base_name(name: str) -> str:
    return name.rpartition("/")[2]


def _known_images(
    names: list[str], image_dir: Path | Shards, splits: dict
) -> tuple[dict[str, str], str]:
    """({image: its split in the checkpoint} of those that it knows, what tells).

    "content" tells where the checkpoint holds digests and we have files, so that no other name
    hides an image; else the "base name". What is in several splits is in the first.
    """
    if "digests" in splits and isinstance(image_dir, Path):
        split_of = _split_of({split: splits["digests"][split].tolist() for split in SPLITS})
        split_of.pop(0, None)  # files that could not be read
        digests = content_digests(image_dir, names).tolist()
        known = {name: split_of.get(digest) for name, digest in zip(names, digests, strict=True)}
        told_by = "content"
    else:
        split_of = _split_of(splits)
        of_base_name = _split_of({split: map(_base_name, splits[split]) for split in SPLITS})
        known = {name: split_of.get(name, of_base_name.get(_base_name(name))) for name in names}
        told_by = "base name"
    return {name: split for name, split in known.items() if split}, told_by


def _split_of(listed: dict[str, Iterable]) -> dict:
    """{item: split}, the first one that lists it."""
    return {item: split for split in reversed(SPLITS) for item in listed[split]}


def _unknown_images(
    split_of: dict[str, str], scored: str, image_dir: Path | Shards, splits: dict, rule: str
) -> tuple[dict[str, str], Foreign]:
    """{image: `scored`} of a foreign dataset's images that the checkpoint was not made with.

    Raises: ValueError when it was made with all of them.
    """
    chosen = [name for name in split_of if split_of[name] == scored]
    known, compared_by = _known_images(chosen, image_dir, splits)
    kept = [name for name in chosen if known.get(name) not in MADE_WITH]
    if chosen and not kept:
        raise ValueError(
            f"--captions_file: the checkpoint was trained or validated on all {len(chosen)} images "
            f"({compared_by}s compared): give images that are new to it"
        )
    base_names = {_base_name(name) for split in MADE_WITH for name in splits[split]}
    same_names = sum(_base_name(name) in base_names for name in kept)
    foreign = Foreign(rule, len(chosen) - len(kept), compared_by, same_names)
    return dict.fromkeys(kept, scored), foreign


# ---------------------------------------------------------------------------------------- formats


def read_captions(path: Path) -> tuple[list[tuple[str, str, str | None]], list[tuple[str, str]]]:
    """(rows, malformed rows) of a captions file: (image, caption, split or None), (where, reason).

    Recognised by content:
      - Flickr8k's and Flickr30k's lines `name.jpg#k<TAB>caption`;
      - CSV with , ; | or tab, and a header that names an image and a caption column (Kaggle's
        captions.txt, Flickr30k's results.csv, one's own);
      - JSON: Karpathy's dataset_*.json, COCO captions, a list of {image, caption or captions[,
        split]}, and {image: captions}.
    Raises: ValueError when the file is none of these, or holds no caption at all.
    """
    rows, malformed = [], []
    for where, entry in _entries(path, _read_text(path)):
        fault = entry if isinstance(entry, str) else _fault(*entry)
        if fault:
            malformed.append((where, fault))
        else:
            image, caption, split = entry
            split = SPLIT_OF_WORD[_split_word(split)]
            rows.append((image.strip(), " ".join(caption.split()), split))
    if not rows:
        first = " ({}: {})".format(*malformed[0]) if malformed else ""
        raise ValueError(f"{path}: no captions in it{first}")
    return rows, malformed


def _fault(image, caption, split) -> str | None:
    """What is wrong with an entry, whose values may be of any type; None for nothing."""
    if not isinstance(image, str) or not image.strip():
        return "no image name"
    if not isinstance(caption, str) or not any(map(str.isalnum, caption)):
        return "no words in its caption"
    if SURROGATE.search(image + caption):
        return "half a character (a lone surrogate)"
    if len(caption) > MAX_CAPTION_CHARACTERS:
        return f"its caption has {len(caption)} characters, more than {MAX_CAPTION_CHARACTERS}"
    if not isinstance(split or "", str) or _split_word(split) not in SPLIT_OF_WORD:
        return f"unknown split {str(split)[:20]!r}, expected train, val or test"
    return None


def _split_word(split: str | None) -> str:
    return (split or "").strip().lower()


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such captions file")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(
            f"{path}: {size} bytes, more than the {MAX_FILE_BYTES} a captions file may have"
        )
    content = path.read_bytes()
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # "Unicode text" of spreadsheet programs
    try:
        text = content.decode("utf-16" if utf16 else "utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{path}: not a text file in UTF-8 ({where})") from None
    if "\0" in text:
        raise ValueError(f"{path}: a binary file, expected captions as text")
    if not text.strip():
        raise ValueError(f"{path}: the file is empty, expected captions")
    return text


def _entries(path: Path, text: str) -> Iterator[tuple[str, tuple | str]]:
    """Entries of any format: (where, (image, caption, split)), or (where, what is wrong)."""
    if text.lstrip()[0] in "[{":
        return _json_entries(path, text)
    lines = [line for line in text.lstrip()[:100_000].splitlines() if line.strip()]
    if any(TOKEN_LINE.match(line) for line in lines[:20]):
        return _token_entries(text)
    for delimiter in ",;\t|":
        header = _normalized(next(csv.reader(lines[:1], delimiter=delimiter)))
        columns = [_column(header, names) for names in (IMAGE_COLUMNS, CAPTION_COLUMNS, ["split"])]
        if None not in columns[:2]:
            return _csv_entries(path, text, delimiter, header, columns)
    raise ValueError(
        f"{path}: not a captions file: expected JSON, lines 'image.jpg#0<TAB>caption' or a header "
        f"with image and caption columns, got {lines[0][:60]!r}"
    )


def _lines(text: str) -> Iterator[str]:
    """Lines with their ends; io.StringIO would copy the text at four bytes a character."""
    return (match[0] for match in LINE.finditer(text))


def _token_entries(text: str):
    for number, line in enumerate(_lines(text), start=1):
        head, tab, caption = line.partition("\t")
        image, _, ordinal = head.rpartition("#")
        if tab and image and ordinal.isdecimal():
            yield f"line {number}", (image, caption, None)
        elif line.strip():
            yield f"line {number}", f"expected 'image.jpg#0<TAB>caption', got {line.strip()[:40]!r}"


def _normalized(header: list[str]) -> list[str]:
    return [name.strip().lower() for name in header]


def _column(header: list[str], names: Sequence[str]) -> int | None:
    """Where the header has the first of these names that it has."""
    return next((header.index(name) for name in names if name in header), None)


def _csv_entries(path: Path, text: str, delimiter: str, header: list[str], columns):
    """columns: of image, caption and split in the header; the last may be None."""
    reader = csv.reader(_lines(text), delimiter=delimiter)
    first_line = 1
    try:
        for row in reader:
            lines = range(first_line, reader.line_num + 1)  # several where a quoted field has ends
            first_line = lines.stop
            if any(map(str.strip, row)) and _normalized(row) != header:
                yield from _csv_row_entries(row, lines, len(header), columns)
    except csv.Error as error:
        raise ValueError(
            f"{path}: line {first_line}: damaged CSV ({error}); is a quote left open?"
        ) from None


def _csv_row_entries(row: list[str], lines: range, width: int, columns):
    where = f"line {lines[0]}"
    if len(row) < width or any(map(str.strip, row[width:])):
        yield where, f"{len(row)} fields, expected {width}"
    elif len(lines) > 1 and PICTURE_NAME.search("".join(row)):  # the quote has swallowed rows
        for line in lines:
            yield f"line {line}", f"in a quote opened on {where}"
    else:
        yield where, tuple(None if column is None else row[column] for column in columns)


def _json_entries(path: Path, text: str):
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged JSON ({error})") from None
    if isinstance(data, list):
        return _list_entries(data)
    if isinstance(data.get("images"), list):
        coco = isinstance(data.get("annotations"), list)
        return _coco_entries(data) if coco else _karpathy_entries(data["images"])
    return _dict_entries(data)


def _list_entries(data: list):
    for number, entry in enumerate(data, start=1):
        values = [_get(entry, key) for key in IMAGE_COLUMNS]
        image = next((value for value in values if value is not None), None)
        captions = _get(entry, "captions") or _get(entry, "caption")
        for caption in _as_list(captions):
            yield f"entry {number}", (image, caption, _get(entry, "split"))


def _dict_entries(data: dict):
    for image, captions in data.items():
        for caption in _as_list(captions):
            yield f"image {image[:80]!r}", (image, caption, None)


def _coco_entries(data: dict):
    names = {str(_get(image, "id")): _get(image, "file_name") for image in data["images"]}
    for number, annotation in enumerate(data["annotations"], start=1):
        image = names.get(str(_get(annotation, "image_id")))
        yield f"annotation {number}", (image, _get(annotation, "caption"), None)


def _karpathy_entries(images: list):
    for number, image in enumerate(images, start=1):
        name, folder = _get(image, "filename"), _get(image, "filepath")
        if isinstance(name, str) and isinstance(folder, str) and folder:  # COCO's: val2014
            name = f"{folder}/{name}"
        for sentence in _as_list(_get(image, "sentences")):
            yield f"image {number}", (name, _get(sentence, "raw"), _get(image, "split"))


def _get(entry, key: str):
    """entry[key] of a JSON value, None where it has none or is no object."""
    return entry.get(key) if isinstance(entry, dict) else None


def _as_list(value) -> list:
    """A JSON value as a list; [None], which is reported as a bad entry, when it is empty."""
    return (value if isinstance(value, list) else [value]) or [None]
