"""Which image is in which split: as a checkpoint, the data or a list says, else drawn.

    split_of, note, foreign = choose_splits(recorded, image_dir, captions_file, split_seed=42)

What a checkpoint remembers of its splits (names, digests of the files' contents, or only a hash)
is made and read here, too: it tells which images a model has seen.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import checkpoints
from image_loading import Shards, content_digests

SPLITS = ("train", "val", "test")
MADE_WITH = ("train", "val")  # splits that decide what a checkpoint is
RATIOS = (0.8, 0.1, 0.1)  # of a split that is drawn
LIST_NAMES = {"train": "train", "val": "val|dev", "test": "test"}  # in the file names of lists


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


def choose_splits(
    recorded: dict[str, str | None],
    image_dir: Path | Shards,
    captions_file: Path,
    split_seed: int,
    splits: dict | None = None,
    typed: bool = False,
    scored: str | None = None,
    split_ratios: Sequence[float] = RATIOS,
) -> tuple[dict[str, str], str, Foreign | None]:
    """({image: split}, note for the console, how a foreign dataset was chosen from or None).

    Args:
        recorded: {image: split} as the captions file says, None where it says nothing.
        split_seed: of a split that is drawn.
        splits: a checkpoint's, as `Dataset.splits` gave them; wins over every other source. With
            their hash alone the dataset is split anew, see `check_hash`.
        typed: the user named the dataset anew, so that it may be another one than the checkpoint's:
            one that is foreign splits itself, or is scored by `Foreign`.
        scored: the one split that test mode scores; the others may be empty.
        split_ratios: shares of train, val and test in a split that is drawn; they sum to 1.
    Raises: ValueError as `resolve_splits`, and when the checkpoint was made with all images.
    """
    names = list(recorded)
    splits = None if splits is None else checked_splits(splits)
    known = None if splits is None or "sha256" in splits else splits
    ours = _splits_of_ours(names, image_dir, known, scored) if known and typed else known
    whole = scored if known and not ours else None  # a foreign dataset, in test mode
    split_of, note = resolve_splits(recorded, captions_file, split_seed, ours, whole, split_ratios)
    if whole:
        rule = note.removeprefix("splits: ")
        split_of, foreign = _unknown_images(split_of, scored, image_dir, known, rule)
        return split_of, note, foreign
    if known and not ours:
        note += "; no image is the checkpoint's"
    return split_of, note, None


def check_hash(names: dict[str, list[str]], splits: dict | None, captions_file: Path):
    """Raise ValueError where a checkpoint holds the hash of other splits than these names."""
    stored = (splits or {}).get("sha256")
    if stored and stored != splits_sha256(names):
        raise ValueError(
            f"{captions_file}: split otherwise than for the checkpoint, and the best.pt that holds "
            "its splits is not beside it: put it there, or use best.pt itself"
        )


def resolve_splits(
    recorded: dict[str, str | None],
    captions_file: Path,
    split_seed: int,
    splits: dict[str, list[str]] | None = None,
    whole: str | None = None,
    split_ratios: Sequence[float] = RATIOS,
) -> tuple[dict[str, str], str]:
    """({image: split}, note): from `splits`, else `recorded`, else lists of names, else drawn.

    Splits are by image, so that no caption of a validation image is trained on. Images in no split
    are left out; the note counts them, and names that are not in the data. A folder of captions may
    lack a split: where it has no test (COCO's official files), half of its val is taken, by
    `split_seed`; without val, it is taken from train; a lone train is split as if nothing were
    recorded.
    Lists lie beside the captions file: *train*.txt, *dev*.txt or *val*.txt, *test*.txt, an image
    name per line, with or without its extension.

    Args:
        recorded: {image: split} as the captions file says, None where it says nothing.
        splits: names per split, from a checkpoint.
        whole: the only split that is wanted; nothing is drawn: without lists it has all images.
        split_seed, split_ratios: of a split that is drawn. The note says where other ratios than
            usual did not act.
    Raises: ValueError when an image is in two splits, or lists are ambiguous or incomplete.
    """
    names = list(recorded)
    idle = "" if tuple(split_ratios) == RATIOS else "; --split_ratios does nothing with these"
    if splits is not None:
        lists = {split: splits[split] for split in SPLITS}
        return _listed_splits(names, lists, "the checkpoint")
    fills = captions_file.is_dir() and not whole
    if any(recorded.values()) and not (fills and {*recorded.values()} == {"train"}):
        split_of = {name: recorded[name] for name in names if recorded[name]}
        note = f"splits: as recorded in {captions_file.name}{_left_out(len(names) - len(split_of))}"
        if fills:
            note += _fill_absent_split(split_of, split_seed)
        return split_of, note + idle
    if lists := _split_lists(names, captions_file, [whole] if whole else SPLITS):
        listed = {split: path.read_text("utf-8-sig").splitlines() for split, path in lists.items()}
        split_of, note = _listed_splits(
            names, listed, ", ".join(path.name for path in lists.values())
        )
        return split_of, note + idle
    if whole:
        return dict.fromkeys(names, whole), "splits: none, all images are scored"
    shares = " ".join(f"{share:g}" for share in split_ratios)
    drawn = f"splits: drawn by image with --split_seed {split_seed} --split_ratios {shares}"
    return _drawn_splits(names, split_seed, split_ratios), drawn


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


def stored_splits(path, checkpoint):
    """The splits that a checkpoint holds: their names or only their hash. Raises: ValueError."""
    try:
        return checked_splits(checkpoint["splits"])
    except ValueError as error:
        raise checkpoints.unusable(path, error) from error


def named_splits(path, splits):
    """A checkpoint's splits; a hash alone stands for those of the best.pt beside it, if they agree."""
    best = Path(path).with_name("best.pt")
    if "sha256" in splits and best.is_file():
        named = stored_splits(best, checkpoints.load_checkpoint(best))
        if splits_sha256(named) == splits["sha256"]:
            return named
    return splits


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


def _drawn_splits(names: list[str], seed: int, ratios: Sequence[float]) -> dict[str, str]:
    """{image: split}, at least one image each for val and test, decided by names, seed and ratios."""
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    num_val, num_test = (max(1, round(len(names) * share)) for share in ratios[1:])
    val, test = set(shuffled[:num_val]), set(shuffled[num_val : num_val + num_test])
    return {name: "val" if name in val else "test" if name in test else "train" for name in names}


def _fill_absent_split(split_of: dict[str, str], seed: int) -> str:
    """Draw the one of val and test that is not recorded, in place; returns a note, "" if both are.

    Test is half of val; val is of train's images what it is where all is drawn.
    """
    absent = {*SPLITS} - {*split_of.values()}
    if absent not in ({"val"}, {"test"}):
        return ""
    (absent,) = absent
    source, share = ("val", 1 / 2) if absent == "test" else ("train", RATIOS[1])
    names = sorted(name for name in split_of if split_of[name] == source)
    random.Random(seed).shuffle(names)
    split_of |= dict.fromkeys(names[: round(len(names) * share)], absent)
    return f"; no {absent} there: {share:.0%} of {source} drawn for it with --split_seed {seed}"


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


def trained_on(names: list[str], image_dir: Path | Shards, splits: dict) -> list[str]:
    """Those of these images that a checkpoint was trained on; none where it holds a hash alone.

    splits: as `stored_splits` or `named_splits` gives them.
    """
    known = {} if "sha256" in splits else _known_images(names, image_dir, splits)[0]
    return [name for name in known if known[name] == "train"]


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
