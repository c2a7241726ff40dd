"""Caption datasets: files of any common format -> one table of (image, captions, split) -> words, pixels, batches.

    dataset = load_dataset("flickr8k")                        # ./data/flickr8k, checked, split by image
    vocabulary = Vocabulary.build(training_captions, 5)       # words seen at least five times
    for positions, pixels, reasons in decoded(paths, 224, batch_size=8, num_workers=2): ...
    for batch in CaptionBatches(word_ids, 128, 50, seed=0).epoch(0): ...

Nothing here knows a model: ids mean words only. Axes: N images, B captions, T steps (words and <EOS>).
"""

import array
import csv
import functools
import io
import json
import os
import random
import re
import signal
import struct
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np
import pandas as pd
import regex
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader
from tqdm import tqdm

import image_shards
import process_group
from image_shards import ShardImage, Shards

# ---------------------------------------------------------------------------------------------------------------------
# Datasets: where they lie, and one table from any of their formats
# ---------------------------------------------------------------------------------------------------------------------

IMAGE_FOLDERS = ("Images", "images", "flickr30k_images", "flickr30k-images", "Flicker8k_Dataset")
CAPTIONS_FILES = (
    "captions.txt",
    "captions.csv",
    "results.csv",
    "Flickr8k.token.txt",
    "results_20130124.token",
    "dataset_{}.json",
    "captions.json",
)
SPLITS = ("train", "val", "test")
LIST_WORDS = {"train": "train", "val": "val|dev", "test": "test"}  # in the names of split lists
SPLIT_WORDS = {
    "train": "train",
    "restval": "train",
    "val": "val",
    "dev": "val",
    "valid": "val",
    "validation": "val",
}
SPLIT_WORDS |= {"test": "test", "": None}
IMAGE_COLUMNS = ("image", "image_name", "file_name", "filename")
CAPTION_COLUMNS = ("caption", "comment", "text")
MAX_FILE_BYTES = 2**31  # the largest public captions file (COCO, all splits) has 0.1 GB
MAX_CAPTION_CHARACTERS = 2_000  # spaCy takes quadratic time for a run of quotes
SURROGATE = re.compile("[\ud800-\udfff]")  # what JSON allows and no file can hold
TOKEN_LINE = re.compile(r"[^\t]+#\d+\t")
LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")
PICTURE_NAME = re.compile(r"\.(jpe?g|png|gif|bmp|tiff?|webp)\b", re.IGNORECASE)


@dataclass
class Dataset:
    """A captioned image collection, split by image.

    table: one row per image: `image` (str, path below image_dir), `captions` (list of str), `split` (train|val|test).
    image_dir: `image_dir / image` is what `cached_features` and `open_images` take.
    notes: lines for the console: what was read, which splits, what was skipped and why.
    bad_images: {image: reason} of the images skipped so far; at most max_bad_fraction of the `images_named`.
    """

    table: pd.DataFrame
    image_dir: Path | Shards
    captions_file: Path
    notes: list[str]
    max_bad_fraction: float
    images_named: int
    bad_images: dict[str, str] = field(default_factory=dict)

    def split_names(self) -> dict[str, list[str]]:
        """{"train": [image, ...], "val": ..., "test": ...}: what a checkpoint keeps; comes back as `splits`."""
        return {split: self.table.image[self.table.split == split].tolist() for split in SPLITS}

    def drop_unreadable(self, reasons: dict[str, str]) -> str:
        """Leave these images ({image: reason}) out, counted with those skipped before; returns the line about them.

        Raises: ValueError when too many images are bad by now, or a split has none left.
        """
        if not reasons:
            return ""
        self.bad_images |= reasons
        bad = [*self.bad_images.items()]
        note = _counted(self.captions_file, "images", bad, self.images_named, self.max_bad_fraction)
        self.table = self.table[~self.table.image.isin(list(reasons))].reset_index(drop=True)
        _check_splits(self.table, self.captions_file)
        self.notes.append(note)
        return note


def load_dataset(
    dataset_type: str,
    image_dir: str | Path | None = None,
    captions_file: str | Path | None = None,
    *,
    split_seed: int = 42,
    splits: dict[str, list[str]] | None = None,
    max_bad_fraction: float = 0.01,
    max_train_images: int | None = None,
    remote_shards: bool = True,
) -> Dataset:
    """Read, check and split a dataset. `dataset_type` names the default folder only, see `find_dataset`.

    Args:
        split_seed: for a split drawn here, and for the choice of `max_train_images`.
        splits: names per split as `Dataset.split_names` gave them; wins over every other source.
        max_bad_fraction: 0..1, how many rows, and how many images, may be bad before this is an error.
        max_train_images: keep only so many training images, chosen by `split_seed`; val and test stay whole.
        remote_shards: whether `image_dir` may be shards that a command fetches; no, when it comes from a checkpoint.
    Raises: ValueError or FileNotFoundError, one line each, naming the file or flag.
    """
    image_dir, captions_file = find_dataset(dataset_type, image_dir, captions_file, remote_shards)
    rows, problems = read_captions(captions_file)
    total_rows = len(rows) + len(problems)
    captions, recorded, bad_images = _group_by_image(rows, problems)
    skipped_rows = _counted(captions_file, "rows", problems, total_rows, max_bad_fraction)

    split_of, split_note = resolve_splits(
        list(captions), recorded, captions_file, split_seed, splits
    )
    in_shards = isinstance(image_dir, Shards)  # what they lack is known once they have been read
    on_disk = {name: in_shards or os.path.isfile(image_dir / name) for name in split_of}  # noqa: PTH113 - long names
    bad_images |= {name: f"not in {image_dir}" for name, present in on_disk.items() if not present}
    images_named = len(split_of.keys() | bad_images.keys())
    skipped_images = _counted(
        captions_file, "images", [*bad_images.items()], images_named, max_bad_fraction
    )

    names = [name for name, present in on_disk.items() if present]
    table = pd.DataFrame({"image": names})
    table["captions"] = [captions[name] for name in names]
    table["split"] = [split_of[name] for name in names]
    if max_train_images is not None:
        table = _fewer_train_images(table, max_train_images, split_seed)
    _check_splits(table, captions_file)

    if in_shards:
        image_dir = replace(image_dir, names=tuple(table.image))
    pictures = (
        []
        if in_shards
        else [path.name for path in image_dir.iterdir() if PICTURE_NAME.search(path.name)]
    )
    uncaptioned = sum(name not in captions for name in pictures)
    notes = [
        f"{captions_file}: {sum(map(len, captions.values()))} captions of {len(captions)} images",
        skipped_rows,
        skipped_images,
        f"{image_dir}: {uncaptioned} images have no captions and are left out"
        if uncaptioned
        else "",
        split_note,
        ", ".join(f"{split} {(table.split == split).sum()}" for split in SPLITS) + " images",
    ]
    notes = [note for note in notes if note]
    return Dataset(
        table, image_dir, captions_file, notes, max_bad_fraction, images_named, bad_images
    )


def find_dataset(
    dataset_type, image_dir=None, captions_file=None, remote_shards=True
) -> tuple[Path | Shards, Path]:
    """(image folder or shards, captions file) of ./data/<dataset_type>, unless given; `custom` has none of its own.

    Raises: FileNotFoundError saying which command gets the dataset, ValueError when `custom` lacks a path.
    """
    if dataset_type == "custom" and not (image_dir and captions_file):
        raise ValueError("--dataset_type custom needs both --image_dir and --captions_file")
    if image_dir and not remote_shards:
        image_shards.refuse_remote(str(image_dir))
    root = Path("data") / dataset_type
    image_dir = image_dir or _first_of(root, IMAGE_FOLDERS, "image folder")
    image_dir = image_shards.find_shards(image_dir, PICTURE_NAME) or Path(image_dir)
    captions_file = (
        Path(captions_file) if captions_file else _first_of(root, CAPTIONS_FILES, "captions file")
    )
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


def _group_by_image(rows, problems):
    """(captions {image: [caption, ...]}, recorded {image: split}, bad names {image: reason}) from rows.

    A name that leads out of the image folder is bad. A row whose split contradicts its image's first is a problem.
    """
    captions, recorded, bad_names, clean = {}, {}, {}, {}
    for image, caption, split in rows:
        if image not in clean:
            clean[image] = _inside(image)
        if (name := clean[image]) is None:
            bad_names[image] = "not a relative path below the image folder"
        elif recorded.setdefault(name, split) != split:
            problems.append(
                (
                    f"{image!r} {caption[:40]!r}",
                    f"image is in split {recorded[name]} already, not {split}",
                )
            )
        else:
            captions.setdefault(name, []).append(caption)
    return captions, recorded, bad_names


def _inside(name: str) -> str | None:
    """The name in its plainest form ("./a.jpg" is "a.jpg"), or None when it may lead out of the image folder."""
    path = PurePosixPath(name)
    if (
        path.anchor
        or PureWindowsPath(name).anchor
        or ".." in re.split(r"[\\/]", name)
        or "\0" in name
    ):
        return None
    return str(path)


def _counted(
    path: Path, what: str, bad: list[tuple[str, str]], total: int, max_bad_fraction: float
) -> str:
    """One line that counts bad rows or images and names the first ten; "" without any, ValueError with too many."""
    if not bad:
        return ""
    named = "; ".join(f"{name} ({reason})" for name, reason in bad[:10])
    line = f"{path}: {len(bad)} of {total} {what} skipped: {named}" + (
        "; ..." if len(bad) > 10 else ""
    )
    line = (
        line.encode("unicode_escape").decode() if not line.isprintable() else line
    )  # no control codes on a terminal
    if len(bad) > max_bad_fraction * total:
        raise ValueError(
            f"{line}: more than --max_bad_fraction {max_bad_fraction:g}; mend the dataset or raise it"
        )
    return line


def _check_splits(table: pd.DataFrame, captions_file: Path):
    for split in SPLITS:
        if not (table.split == split).any():
            raise ValueError(
                f"{captions_file}: the {split} split has no images; train, val and test need one each"
            )


def _fewer_train_images(table: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    if count < 1:
        raise ValueError(f"--max_train_images {count}: expected at least 1")
    train = sorted(table.image[table.split == "train"])
    random.Random(seed).shuffle(train)
    return table[(table.split != "train") | table.image.isin(train[:count])].reset_index(drop=True)


# Splits, always by image


def resolve_splits(
    names: list[str],
    recorded: dict[str, str | None],
    captions_file: Path,
    split_seed: int,
    splits: dict[str, list[str]] | None = None,
) -> tuple[dict[str, str], str]:
    """({image: split}, note): from `splits`, else as recorded in the file, else lists beside it, else drawn.

    Images that no split holds are left out; they are counted in the note, as are names that are not in the data.
    Lists: *train*.txt, *dev*.txt or *val*.txt, *test*.txt, an image name per line, with or without its extension.
    Raises: ValueError when an image is in two splits, or lists are ambiguous or incomplete.
    """
    if splits is not None:
        return _listed_splits(names, _checked_splits(splits), "the checkpoint")
    if any(recorded.values()):
        held = {name: recorded[name] for name in names if recorded[name]}
        return (
            held,
            f"splits: as recorded in {captions_file.name}{_left_out(len(names) - len(held))}",
        )
    if lists := _split_lists(names, captions_file):
        listed = {split: path.read_text("utf-8-sig").splitlines() for split, path in lists.items()}
        return _listed_splits(names, listed, ", ".join(path.name for path in lists.values()))
    shuffled = sorted(names)
    random.Random(split_seed).shuffle(shuffled)
    tenth = max(1, round(len(names) / 10))
    drawn = dict.fromkeys(shuffled[:tenth], "val") | dict.fromkeys(
        shuffled[tenth : 2 * tenth], "test"
    )
    return {
        name: drawn.get(name, "train") for name in names
    }, f"splits: drawn by image with --split_seed {split_seed}"


def _checked_splits(splits):
    lists = [splits.get(split) for split in SPLITS] if isinstance(splits, dict) else [None]
    if any(
        not isinstance(names, list) or any(not isinstance(name, str) for name in names)
        for names in lists
    ):
        raise ValueError(
            "the checkpoint's splits are damaged: expected lists of image names for train, val and test"
        )
    return dict(zip(SPLITS, lists, strict=True))


def _listed_splits(
    names: list[str], lists: dict[str, list[str]], source: str
) -> tuple[dict[str, str], str]:
    by_name = {name.rpartition(".")[0]: name for name in names} | {name: name for name in names}
    split_of, unknown = {}, 0
    for split, listed in lists.items():
        for line in filter(None, map(str.strip, listed)):
            name = by_name.get(line)
            if name is None:
                unknown += 1
            elif split_of.setdefault(name, split) != split:
                raise ValueError(
                    f"splits of {source}: {name!r} is in both {split_of[name]} and {split}"
                )
    absent = f"; {unknown} names are not in the data" if unknown else ""
    ordered = {name: split_of[name] for name in names if name in split_of}
    return ordered, f"splits: from {source}{_left_out(len(names) - len(ordered))}{absent}"


def _left_out(count: int) -> str:
    return f"; {count} images in no split are left out" if count else ""


def _split_lists(names: list[str], captions_file: Path) -> dict[str, Path]:
    """{split: list file} beside the captions file; {} without any. A *.txt that names no image of ours is no list."""
    known = {*names, *(name.rpartition(".")[0] for name in names)} - {""}
    found = {split: [] for split in SPLITS}
    for path in sorted(captions_file.parent.glob("*.txt")):
        split = next(
            (
                split
                for split, word in LIST_WORDS.items()
                if re.search(word, path.name, re.IGNORECASE)
            ),
            None,
        )
        if split and path != captions_file and _names_any(path, known):
            found[split].append(path)
    if not any(found.values()):
        return {}
    for split, paths in found.items():
        if len(paths) != 1:
            which = " and ".join(path.name for path in paths) or "none"
            raise ValueError(
                f"{captions_file.parent}: expected one {split} list beside the captions, found {which}"
            )
    return {split: paths[0] for split, paths in found.items()}


def _names_any(path: Path, known: set[str]) -> bool:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            return any(line.strip() in known for line in lines)
    except (OSError, UnicodeDecodeError):
        return False


# Formats, recognised by content


def read_captions(path: Path) -> tuple[list[tuple[str, str, str | None]], list[tuple[str, str]]]:
    """Rows (image, caption, split or None) of a captions file, and its malformed rows as (where, reason).

    Recognised by content: Flickr8k/Flickr30k `name.jpg#k<TAB>caption`; CSV with , ; | or tab and a header that names an
    image and a caption column (Kaggle's captions.txt, Flickr30k's results.csv, one's own); Karpathy's dataset_*.json;
    COCO captions JSON; JSON lists of {image, caption or captions[, split]} and {image: captions}.
    Raises: ValueError when the file is none of these, or holds no caption at all.
    """
    rows, problems = [], []
    for where, entry in _recognise(path, _read_text(path)):
        fault = entry if isinstance(entry, str) else _fault(*entry)
        if fault:
            problems.append((where, fault))
        else:
            image, caption, split = entry
            rows.append(
                (
                    image.strip(),
                    " ".join(caption.split()),
                    SPLIT_WORDS[(split or "").strip().lower()],
                )
            )
    if not rows:
        first = " ({}: {})".format(*problems[0]) if problems else ""
        raise ValueError(f"{path}: no captions in it{first}")
    return rows, problems


def _fault(image, caption, split) -> str | None:
    if not isinstance(image, str) or not image.strip():
        return "no image name"
    if not isinstance(caption, str) or not any(map(str.isalnum, caption)):
        return "no words in its caption"
    if SURROGATE.search(image + caption):
        return "half a character (a lone surrogate)"
    if len(caption) > MAX_CAPTION_CHARACTERS:
        return f"its caption has {len(caption)} characters, more than {MAX_CAPTION_CHARACTERS}"
    if not isinstance(split or "", str) or (split or "").strip().lower() not in SPLIT_WORDS:
        return f"unknown split {str(split)[:20]!r}, expected train, val or test"
    return None


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such captions file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes, more than the {MAX_FILE_BYTES} a captions file may have"
        )
    content = path.read_bytes()
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # "Unicode text" of spreadsheet programs
    try:
        text = content.decode("utf-16" if utf16 else "utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    if "\0" in text:
        raise ValueError(f"{path}: a binary file, expected captions as text")
    if not text.strip():
        raise ValueError(f"{path}: the file is empty, expected captions")
    return text


def _recognise(path: Path, text: str) -> Iterator[tuple[str, tuple | str]]:
    """The entries of a captions file, each (where, (image, caption, split)) or (where, what is wrong)."""
    if text.lstrip()[0] in "[{":
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: damaged JSON ({error})") from None
        return _json_entries(data)
    lines = [line for line in text.lstrip()[:100_000].splitlines() if line.strip()]
    if any(TOKEN_LINE.match(line) for line in lines[:20]):
        return _token_entries(text)
    for delimiter in ",;\t|":
        header = [name.strip().lower() for name in next(csv.reader(lines[:1], delimiter=delimiter))]
        image, caption = (
            next((header.index(name) for name in names if name in header), None)
            for names in (IMAGE_COLUMNS, CAPTION_COLUMNS)
        )
        if image is not None and caption is not None:
            return _csv_entries(path, text, delimiter, header, image, caption)
    raise ValueError(
        f"{path}: not a captions file: expected JSON, lines 'image.jpg#0<TAB>caption' or a header with "
        f"image and caption columns, got {lines[0][:60]!r}"
    )


def _lines(text: str) -> Iterator[str]:
    """Lines with their ends, one at a time: io.StringIO would take four bytes for every character of the text."""
    return (match[0] for match in LINE.finditer(text))


def _token_entries(text: str):
    for number, line in enumerate(_lines(text), start=1):
        head, tab, caption = line.partition("\t")
        image, _, ordinal = head.rpartition("#")
        if tab and image and ordinal.isdecimal():
            yield f"line {number}", (image, caption, None)
        elif line.strip():
            yield f"line {number}", f"expected 'image.jpg#0<TAB>caption', got {line.strip()[:40]!r}"


def _csv_entries(path, text, delimiter, header, image, caption):
    split = header.index("split") if "split" in header else None
    reader = csv.reader(_lines(text), delimiter=delimiter)
    first = 1
    try:
        for row in reader:
            lines = range(first, reader.line_num + 1)
            first = lines.stop
            if not any(map(str.strip, row)) or [name.strip().lower() for name in row] == header:
                continue
            if len(row) < len(header) or any(map(str.strip, row[len(header) :])):
                yield f"line {lines[0]}", f"{len(row)} fields, expected {len(header)}"
            elif len(lines) > 1 and PICTURE_NAME.search("".join(row)):
                yield from (
                    (f"line {line}", f"in a quote opened on line {lines[0]}") for line in lines
                )
            else:
                yield (
                    f"line {lines[0]}",
                    (row[image], row[caption], None if split is None else row[split]),
                )
    except csv.Error as error:
        raise ValueError(
            f"{path}: line {first}: damaged CSV ({error}); is a quote left open?"
        ) from None


def _get(entry, key):
    return entry.get(key) if isinstance(entry, dict) else None


def _listed(value) -> list:
    return value if isinstance(value, list) else [value]


def _json_entries(data):
    if (
        isinstance(data, dict)
        and isinstance(data.get("annotations"), list)
        and isinstance(data.get("images"), list)
    ):
        yield from _coco_entries(data)
    elif isinstance(data, dict) and isinstance(data.get("images"), list):
        yield from _karpathy_entries(data["images"])
    elif isinstance(data, dict):
        for image, captions in data.items():
            for caption in _listed(captions) or [None]:
                yield f"image {image[:80]!r}", (image, caption, None)
    else:
        for number, entry in enumerate(data, start=1):
            image = next(
                (value for key in IMAGE_COLUMNS if (value := _get(entry, key)) is not None), None
            )
            captions = _get(entry, "captions") or _get(entry, "caption")
            for caption in _listed(captions) or [None]:
                yield f"entry {number}", (image, caption, _get(entry, "split"))


def _coco_entries(data):
    names = {str(_get(image, "id")): _get(image, "file_name") for image in data["images"]}
    for number, annotation in enumerate(data["annotations"], start=1):
        image = names.get(str(_get(annotation, "image_id")))
        yield f"annotation {number}", (image, _get(annotation, "caption"), None)


def _karpathy_entries(images):
    for number, image in enumerate(images, start=1):
        name = _get(image, "filename")
        if isinstance(folder := _get(image, "filepath"), str) and folder and isinstance(name, str):
            name = f"{folder}/{name}"
        for sentence in _listed(_get(image, "sentences")) or [None]:
            yield f"image {number}", (name, _get(sentence, "raw"), _get(image, "split"))


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------

UNSPACED = regex.compile(  # a character of a script that puts no spaces between words, with its combining marks
    r"(?V1)[[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Thai}\p{scx=Laoo}\p{scx=Khmr}\p{scx=Mymr}]&&[\p{L}\p{N}]]\p{M}*"
)
INVISIBLE = regex.compile(
    r"(?V1)[\p{Cf}--[\u200c\u200d]]"
)  # direction marks and the like; joiners belong to words
WORD = re.compile(r"[^\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")  # what a stored vocabulary may hold


@functools.cache
def _spacy_tokenizer():
    """spaCy's English tokenizer, which splits other scripts well too; a hyphen inside a word no longer splits it."""
    import spacy  # takes seconds, and captioning a picture needs none of it
    from spacy.lang.char_classes import HYPHENS

    language = spacy.blank("en")
    infixes = [rule.replace(HYPHENS, "--+|–|—+|~") for rule in language.Defaults.infixes]  # noqa: RUF001
    language.tokenizer.infix_finditer = spacy.util.compile_infix_regex(infixes).finditer
    return language.tokenizer


def tokenize(text: str) -> list[str]:
    """Words of a caption: lower case, NFC, without punctuation and symbols; "A t-shirt!" -> ["a", "t-shirt"].

    In scripts without spaces (Han, Kana, Thai, Lao, Khmer, Burmese) every character with its marks is a word.
    """
    return [word for chunk in text.split() for word in _words(chunk)]


@functools.lru_cache(
    2**15
)  # captions repeat few chunks: spaCy would take ten times as long for all of them
def _words(chunk: str) -> tuple[str, ...]:
    """Words of what stands between two spaces, which is how spaCy splits a text first."""
    chunk = INVISIBLE.sub("", unicodedata.normalize("NFC", chunk))
    chunk = UNSPACED.sub(r" \g<0> ", chunk)
    return tuple(
        word for token in _spacy_tokenizer()(chunk) if any(map(str.isalnum, word := token.lower_))
    )


class Vocabulary:
    """Words and their ids, the four specials first; a caption's words are lower case, so never one of these."""

    pad, sos, eos, unk = range(4)
    SPECIALS = ("<PAD>", "<SOS>", "<EOS>", "<UNK>")

    def __init__(self, words: Sequence[str]):
        """words: all of them in the order of their ids, specials included."""
        self.words = list(words)
        self.ids = {word: index for index, word in enumerate(self.words)}

    @classmethod
    def build(cls, captions: Iterable[str], freq_threshold: int = 5) -> "Vocabulary":
        """Words seen at least `freq_threshold` times in these (training) captions, the most frequent first."""
        counts = Counter(word for caption in captions for word in tokenize(caption))
        kept = [word for word, count in counts.items() if count >= freq_threshold]
        return cls([*cls.SPECIALS, *sorted(kept, key=lambda word: (-counts[word], word))])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Word ids of a caption, without <SOS> and <EOS>; unknown words are `unk`."""
        return [self.ids.get(word, self.unk) for word in tokenize(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The caption up to <EOS>, other specials dropped; no spaces beside characters of unspaced scripts."""
        words = []
        for index in map(int, ids):
            if index == self.eos:
                break
            if index >= len(self.SPECIALS):
                words.append(self.words[index])
        unspaced = [bool(UNSPACED.match(word)) for word in words]
        gaps = ["" if i == 0 or unspaced[i - 1] or unspaced[i] else " " for i in range(len(words))]
        return "".join(gap + word for gap, word in zip(gaps, words, strict=True))

    def to_plain(self) -> dict:
        """What a checkpoint stores."""
        return {"words": self.words}

    @classmethod
    def from_plain(cls, plain: dict) -> "Vocabulary":
        """The vocabulary a checkpoint stored. Raises: ValueError when it is damaged."""
        words = plain.get("words") if isinstance(plain, dict) else None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("vocabulary: expected {'words': [...]}, a list of words")
        if tuple(words[:4]) != cls.SPECIALS or len(set(words)) != len(words):
            raise ValueError(
                f"vocabulary: expected different words that begin with {' '.join(cls.SPECIALS)}"
            )
        if bad := [word for word in words if not WORD.fullmatch(word)]:
            raise ValueError(f"vocabulary: {bad[0][:40]!r} is not a word")
        return cls(words)


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """B captions of N images, padded to the longest caption."""

    image_rows: (
        torch.Tensor
    )  # (N,) int64, which images: positions in the list that CaptionBatches was given
    captions: torch.Tensor  # (B, T + 1) int64, <SOS> words <EOS> <PAD>...
    lengths: torch.Tensor  # (B,) int64, targets per caption: its words and <EOS>
    image_index: torch.Tensor  # (B,) int64, 0..N-1: whose caption it is


class CaptionBatches:
    """Every caption once per epoch, `batch_size` captions at a time; captions of one image stay together.

    Args:
        captions: per image a list of captions, each a list of word ids without specials.
        max_length: steps a caption may have, <EOS> among them; longer ones lose their last words.
        seed: with the epoch it alone decides the order of the images.
    """

    def __init__(
        self,
        captions: Iterable[Sequence[Sequence[int]]],
        batch_size: int,
        max_length: int,
        seed: int,
    ):
        tokens, lengths, counts = array.array("i"), array.array("i"), array.array("i")
        for image in captions:
            counts.append(len(image))
            for words in image:
                tokens.extend((Vocabulary.sos, *words[: max_length - 1], Vocabulary.eos))
                lengths.append(min(len(words), max_length - 1) + 1)
        if not lengths:
            raise ValueError("no captions to make batches of")
        self.batch_size, self.seed = batch_size, seed
        self.tokens = torch.from_numpy(np.array(tokens))  # of all captions, one after the other
        self.lengths, self.counts = (
            torch.tensor(numbers) for numbers in (lengths, counts)
        )  # counts: per image
        self.start = (self.lengths + 1).cumsum(0) - (
            self.lengths + 1
        )  # where each caption's tokens begin
        self.first = self.counts.cumsum(0) - self.counts  # row of each image's first caption
        self.num_batches = -(-len(lengths) // batch_size)

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)

    def mirrored(self, epoch: int) -> torch.Tensor:
        """(images,) bool: which images are seen mirrored in an epoch, each with probability 1/2."""
        return torch.rand(len(self.counts), generator=self._generator(epoch)) < 0.5

    def epoch(self, epoch: int, start: int = 0, shuffle: bool = True) -> Iterator[Batch]:
        """Batches of an epoch from number `start` on: the same ones whatever `start`."""
        images = torch.arange(len(self.counts))
        if shuffle:
            images = torch.randperm(len(images), generator=self._generator(epoch))
        counts = self.counts[images]
        owner = images.repeat_interleave(
            counts
        )  # (captions,) image of each caption, in the order of this epoch
        within = torch.arange(len(owner)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        rows = self.first[owner] + within
        for begin in range(start * self.batch_size, len(rows), self.batch_size):
            batch = slice(begin, begin + self.batch_size)
            lengths = self.lengths[rows[batch]]
            image_rows, image_index = owner[batch].unique_consecutive(return_inverse=True)
            steps = torch.arange(int(lengths.max()) + 1)
            places = (self.start[rows[batch]].unsqueeze(1) + steps).clamp_max(len(self.tokens) - 1)
            captions = self.tokens[places].long()
            captions[steps > lengths.unsqueeze(1)] = Vocabulary.pad
            yield Batch(image_rows, captions, lengths, image_index)


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------

PICTURE_SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
    ".ppm",
}
IMAGE_FORMATS = (
    "JPEG",
    "PNG",
    "GIF",
    "BMP",
    "TIFF",
    "WEBP",
    "PPM",
    "AVIF",
)  # none that starts a program
BROKEN_IMAGE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    SyntaxError,
    EOFError,
)
BROKEN_IMAGE += (
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def open_image(
    path: str | Path | ShardImage, content: bytes | None = None, size: int | None = None
) -> Image.Image:
    """The picture in its own size, turned as EXIF says, RGB. `content`: its bytes, where `path` is no file.

    `size`: a JPEG comes at a half, a quarter or an eighth of its size where both sides keep twice `size` pixels, which
    takes a fraction of the time.
    Transparent pictures lie on white; 16-bit grey is scaled to 8 bits; of an animation the first frame is taken.
    Raises: ValueError naming the file when it is not a readable image.
    """
    path = Path(path) if content is None else path
    try:
        if content is None and not path.is_file():
            raise ValueError("it is a folder" if path.is_dir() else "there is no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(
                path if content is None else io.BytesIO(content), formats=IMAGE_FORMATS
            ) as image:
                if size:
                    image.draft(None, (2 * size, 2 * size))
                return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise ValueError(
            f"{path}: not a readable image (none of {', '.join(IMAGE_FORMATS)})"
        ) from None
    except BROKEN_IMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a readable image ({reason})") from None


def open_images(paths: Sequence[Path] | Sequence[ShardImage]) -> Iterator[Image.Image]:
    """`open_image` of each in turn; all of them from the same shards, of which one pass is made first."""
    if paths and isinstance(paths[0], ShardImage):
        contents = dict(image_shards.read(paths[0].shards.urls, [path.name for path in paths]))
        return (open_image(path, contents.get(path.name, b"")) for path in paths)
    return map(open_image, paths)


def load_image(
    path: str | Path | ShardImage, size: int, content: bytes | None = None
) -> np.ndarray:
    """`open_image`, squashed whole to a square as encoders see it: (size, size, 3) uint8. Raises: as `open_image`."""
    image = open_image(path, content, size)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip it to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def pictures_in(path):
    """A file as it is, a folder's pictures in the order of their names. Raises: FileNotFoundError, ValueError."""
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"--images {path}: no such file or folder")
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES)
    if not found:
        raise ValueError(
            f"--images {path}: no pictures in this folder ({' '.join(sorted(PICTURE_SUFFIXES))})"
        )
    return found


class ImageFiles(torch.utils.data.Dataset):
    """Position -> (position, (3, size, size) uint8 pixels), or (position, reason) where the image cannot be read."""

    def __init__(self, paths: Sequence[Path], size: int):
        self.paths, self.size = paths, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, position: int):
        return position, _pixels_or_reason(self.paths[position], self.size)


class ShardImages(torch.utils.data.IterableDataset):
    """The items of `ImageFiles`, in the order of the shards; (None, reason) where a shard cannot be read.

    Processes of a run, and their workers, read different shards. Images that no shard holds do not come.
    """

    def __init__(self, images: Sequence[ShardImage], size: int):
        self.images, self.size = images, size
        self.urls = images[0].shards.urls[process_group.rank() :: process_group.size()]

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        urls = self.urls[worker.id :: worker.num_workers] if worker else self.urls
        position_of = {image.name: position for position, image in enumerate(self.images)}
        try:
            for name, content in image_shards.read(urls, position_of):
                position = position_of[name]
                yield position, _pixels_or_reason(self.images[position], self.size, content)
        except (
            OSError,
            ValueError,
        ) as error:  # raised here, a worker's traceback would come with it
            yield None, str(error)


def _pixels_or_reason(path, size, content=None):
    try:
        return load_image(path, size, content).transpose(2, 0, 1)
    except ValueError as error:
        return str(error).removeprefix(f"{path}: ")


def _collate(items):
    """(positions of the readable ones, their pixels (n, 3, H, W) uint8 array, {position: reason} of the others).

    Arrays travel through a pipe: tensors would fill /dev/shm, which is small inside a container.
    """
    good = [(position, pixels) for position, pixels in items if isinstance(pixels, np.ndarray)]
    reasons = {position: reason for position, reason in items if isinstance(reason, str)}
    pixels = np.stack([pixels for _, pixels in good]) if good else np.empty((0, 3, 0, 0), np.uint8)
    return [position for position, _ in good], pixels, reasons


def _worker_signals(_worker_id):
    """Ctrl-C and SIGTERM are the main process's business; it stops its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _decoded(paths, size, batches: Sequence[Sequence[int]], num_workers: int) -> DataLoader:
    return _loader(ImageFiles(paths, size), min(num_workers, len(batches)), batch_sampler=batches)


def decoded(
    paths: Sequence[Path] | Sequence[ShardImage], image_size: int, batch_size: int, num_workers: int
) -> Iterator[tuple[list[int], np.ndarray, dict[int, str]]]:
    """This process's share of the images, batch by batch: as `_collate` puts them together.

    Raises: OSError when a shard cannot be read.
    """
    if paths and isinstance(paths[0], ShardImage):
        dataset = ShardImages(paths, image_size)
        batches = _loader(dataset, min(num_workers, len(dataset.urls)), batch_size=batch_size)
    else:
        own = [range(i, min(i + batch_size, len(paths))) for i in range(0, len(paths), batch_size)]
        own = own[process_group.rank() :: process_group.size()]
        batches = _decoded(paths, image_size, own, num_workers) if own else ()
    for positions, pixels, reasons in batches:
        if None in reasons:
            raise OSError(reasons[None])
        yield positions, pixels, reasons


def _loader(dataset, num_workers: int, **batches) -> DataLoader:
    return DataLoader(
        dataset,
        collate_fn=_collate,
        num_workers=min(num_workers, os.cpu_count() or 1),
        worker_init_fn=_worker_signals,
        generator=torch.Generator(),  # its own: a loader must not advance the global random state
        **batches,
    )


def image_loader(
    paths: Sequence[Path],
    image_size: int,
    batches_of_rows: Sequence[Sequence[int]],
    num_workers: int = 0,
) -> Iterator[torch.Tensor]:
    """Pixels (n, 3, image_size, image_size) uint8 for each batch of positions in `paths`, in order.

    Raises: ValueError naming the first image that cannot be read.
    """
    batches = [torch.as_tensor(rows).tolist() for rows in batches_of_rows]
    for _, pixels, reasons in _decoded(paths, image_size, batches, num_workers):
        for position, reason in reasons.items():
            raise ValueError(f"{paths[position]}: {reason}")
        yield torch.from_numpy(pixels)


def find_unreadable(
    paths: Sequence[Path], *, num_workers: int = 0, progress: bool = True
) -> dict[Path, str]:
    """{path: reason} of the images that cannot be read: decodes each once, for runs without a feature cache."""
    if paths and isinstance(paths[0], ShardImage):
        raise ValueError(
            f"--no_feature_cache: {paths[0].shards} are shards, which are read in order only: leave it out"
        )
    batches = [list(range(i, min(i + 32, len(paths)))) for i in range(0, len(paths), 32)]
    unreadable = {}
    with tqdm(
        total=len(paths), desc="checking", unit="image", disable=None if progress else True
    ) as bar:
        for positions, _, reasons in _decoded(paths, 8, batches, num_workers):
            unreadable |= {paths[position]: reason for position, reason in reasons.items()}
            bar.update(len(positions) + len(reasons))
    return unreadable
