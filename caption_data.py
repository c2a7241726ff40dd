"""Caption datasets: files of any common format -> one table of (image, captions, split).

    dataset = load_dataset("flickr8k")  # ./data/flickr8k, checked, split by image
    dataset.table                       # one row per image
    rows, problems = read_captions(Path("captions.csv"))

Nothing here knows a model.
"""

import csv
import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import pandas as pd

import image_loading
from image_loading import Shards

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
        image_loading.refuse_remote(str(image_dir))
    root = Path("data") / dataset_type
    image_dir = image_dir or _first_of(root, IMAGE_FOLDERS, "image folder")
    image_dir = image_loading.find_shards(image_dir, PICTURE_NAME) or Path(image_dir)
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
