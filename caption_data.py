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
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import pandas as pd

import image_loading
import saved_datasets
from caption_splits import RATIOS, SPLITS, Foreign, check_hash, choose_splits
from image_loading import Shards, content_digests

IMAGE_FOLDERS = ("Images", "images", "flickr30k_images", "flickr30k-images", "Flicker8k_Dataset")
CAPTIONS_FILES = ("captions.txt", "captions.csv", "results.csv", "Flickr8k.token.txt")
CAPTIONS_FILES += ("results_20130124.token", "dataset_{}.json", "captions.json")  # {}: the dataset
CAPTIONS_FILES += ("annotations",)  # COCO's own folder of them

SPLIT_OF_WORD = {"train": "train", "restval": "train", "test": "test", "": None}
SPLIT_OF_WORD |= dict.fromkeys(("val", "dev", "valid", "validation"), "val")

IMAGE_COLUMNS = ("image", "image_name", "file_name", "filename")
CAPTION_COLUMNS = ("caption", "comment", "text")
COCO_CAPTIONS = re.compile(r"captions_((train|val)(\d{4}))\.json")  # of the pictures in train2014
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # Hugging Face's imagefolder
MAX_FILE_BYTES = 2**31  # the largest public captions file (COCO, all splits) has 0.1 GB
MAX_CAPTION_CHARACTERS = 2_000  # spaCy takes quadratic time for a run of quotes

SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one, but no file can hold it
TOKEN_LINE = re.compile(r"[^\t]+#\d+\t")
LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")
PICTURE_NAME = re.compile(r"\.(jpe?g|png|gif|bmp|tiff?|webp|ppm|avif|hei[cf])\b", re.IGNORECASE)


# ---------------------------------------------------------------------------------------- dataset


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
    data_dir: str | Path | None = None,
    split_seed: int = 42,
    splits: dict | None = None,
    typed: bool = False,
    scored: str | None = None,
    max_bad_fraction: float = 0.01,
    max_train_images: int | None = None,
    max_val_images: int | None = None,
    remote_shards: bool = True,
    split_ratios: Sequence[float] = RATIOS,
) -> Dataset:
    """Read, check and split a dataset.

    Args:
        dataset_type, data_dir: name the default folder only, see `find_dataset`.
        split_seed, splits, typed, scored, split_ratios: as in `choose_splits`.
        max_bad_fraction: 0..1, how many rows, and how many images, may be bad before this is an
            error.
        max_train_images, max_val_images: keep only so many of the split, chosen by `split_seed`;
            the others are in none. They do not act on a foreign dataset.
        remote_shards: whether `image_dir` may be shards that a command fetches; False when it comes
            from a checkpoint or a configuration file.
    Raises: ValueError or FileNotFoundError, one line each, naming the file or flag.
    """
    image_dir, captions_file = find_dataset(
        dataset_type, image_dir, captions_file, remote_shards, data_dir
    )
    captions, recorded, bad_images, notes = _read_by_image(captions_file, max_bad_fraction)
    split_of, split_note, foreign = choose_splits(
        recorded, image_dir, captions_file, split_seed, splits, typed, scored, split_ratios
    )
    absent = _absent_images(image_dir, split_of)
    bad_images |= absent
    images_named = len(split_of.keys() | bad_images.keys())
    bad = [*bad_images.items()]
    skipped = _skipped(captions_file, "images", bad, images_named, max_bad_fraction)

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
    counts = max_bad_fraction, images_named, needed, bad_images
    dataset = Dataset(table, image_dir, captions_file, notes, *counts, foreign)
    check_hash(dataset.split_names(), splits, captions_file)
    return dataset


def find_dataset(
    dataset_type: str,
    image_dir: str | Path | None = None,
    captions_file: str | Path | None = None,
    remote_shards: bool = True,
    data_dir: str | Path | None = None,
) -> tuple[Path | Shards, Path]:
    """(image folder or shards, captions file): those given, else those of `data_dir`.

    That is ./data/<dataset_type> where it is not given; `custom` has no such folder.
    `remote_shards`: as in `load_dataset`.
    Raises: FileNotFoundError saying which command gets the dataset, ValueError when `custom` lacks
    a path or `image_dir` is refused.
    """
    if dataset_type == "custom" and not (data_dir or (image_dir and captions_file)):
        raise ValueError("--dataset_type custom needs both --image_dir and --captions_file")
    if image_dir and not remote_shards:
        image_loading.refuse_remote(str(image_dir))
    root = Path(data_dir or Path("data") / dataset_type)
    if not image_dir and dataset_type == "coco" and root.is_dir():
        image_dir = root  # its pictures lie in two folders, train2014 and val2014
    image_dir = image_dir or _first_of(root, dataset_type, IMAGE_FOLDERS, "image folder")
    image_dir = image_loading.find_shards(image_dir, PICTURE_NAME) or Path(image_dir)
    captions_file = Path(
        captions_file or _first_of(root, dataset_type, CAPTIONS_FILES, "captions file")
    )
    if isinstance(image_dir, Path) and not image_dir.is_dir():
        raise FileNotFoundError(
            f"--image_dir {image_dir}: no such folder; expected the folder that holds the images"
        )
    if not captions_file.exists():
        raise FileNotFoundError(
            f"--captions_file {captions_file}: no such file; expected a captions CSV, TXT or JSON"
        )
    return image_dir, captions_file


def _first_of(root: Path, dataset_type: str, names: Sequence[str], what: str) -> Path:
    candidates = [root / name.format(dataset_type) for name in names]
    for path in candidates:
        if path.exists():
            return path
    remedy = f"get the dataset with: python download_datasets.py --dataset {dataset_type}"
    if dataset_type == "custom":
        remedy = "give --image_dir and --captions_file"
    raise FileNotFoundError(
        f"{root}: no {what} (looked for {', '.join(path.name for path in candidates)}); {remedy}"
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


# ---------------------------------------------------------------------------------------- formats


def read_captions(path: Path) -> tuple[list[tuple[str, str, str | None]], list[tuple[str, str]]]:
    """(rows, malformed rows) of a captions file: (image, caption, split or None), (where, reason).

    Recognised by content:
      - Flickr8k's and Flickr30k's lines `name.jpg#k<TAB>caption`;
      - CSV with , ; | or tab, and a header that names an image and a caption column (Kaggle's
        captions.txt, Flickr30k's results.csv, one's own);
      - JSON: Karpathy's dataset_*.json, COCO captions, a list of {image, caption or captions[,
        split]}, such objects line by line, and {image: captions};
      - Parquet with such columns;
      - a folder: COCO's annotations, Hugging Face's imagefolder, or a dataset that `datasets` saved.
    Raises: ValueError when the file is none of these, or holds no caption at all.
    """
    rows, malformed = [], []
    for where, entry in _folder_entries(path) if path.is_dir() else _file_entries(path):
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


def _folder_entries(folder: Path) -> Iterator[tuple[str, tuple | str]]:
    """As `_entries`, of a folder that holds captions. Raises: ValueError when it does not."""
    if saved_datasets.is_saved(folder):
        return _row_entries(saved_datasets.captioned(folder))
    names = sorted(path.name for path in folder.iterdir())
    if coco := [*filter(None, map(COCO_CAPTIONS.fullmatch, names))]:
        return _annotation_entries(folder, coco)
    levels = [[*folder.glob(f"{level}metadata.*")] for level in ("", "*/", "*/*/")]
    if files := sorted(path for level in levels for path in level if path.name in METADATA):
        return _imagefolder_entries(folder, files)
    raise FileNotFoundError(
        f"--captions_file {folder}: no such file in this folder: expected {', '.join(METADATA)}, "
        "COCO's captions_train2014.json, or a dataset that `datasets` saved"
    )


def _row_entries(rows: Iterable) -> Iterator[tuple[str, tuple]]:
    for where, (image, captions, split) in rows:
        for caption in captions:
            yield where, (image, caption, split)


def _annotation_entries(folder: Path, files: Sequence[re.Match]):
    """COCO's official files: a picture lies in the folder, and is in the split, of its file."""
    years = sorted({file[3] for file in files})
    if len(years) > 1:
        raise ValueError(
            f"{folder}: captions of {' and '.join(years)}, which are of the same pictures: "
            "leave those of one year"
        )
    for file in files:
        for where, entry in _file_entries(folder / file[0]):
            if not isinstance(entry, str):
                image, caption, _ = entry
                entry = _below(file[1], image), caption, file[2]
            yield f"{file[0]} {where}", entry


def _imagefolder_entries(folder: Path, files: Sequence[Path]):
    """Names begin where their file lies; a folder called train, validation or test is a split."""
    parents = [path.parent for path in files]
    for parent in parents:
        if parents.count(parent) > 1:
            raise ValueError(f"{parent}: several of {', '.join(METADATA)}, expected one of them")
    for path in files:
        below = path.parent.relative_to(folder).as_posix()
        for where, entry in _file_entries(path):
            if not isinstance(entry, str):
                image, caption, split = entry
                image = image if below == "." else _below(below, image)
                entry = image, caption, split or _split_of_folders(image)
            yield f"{path.relative_to(folder)} {where}", entry


def _below(folder: str, image) -> str | None:
    """The name of an image in a subfolder; what is absolute, or no name, stays what it is."""
    named = isinstance(image, str) and image.strip()
    return str(PurePosixPath(folder) / image) if named else image


def _split_of_folders(image) -> str | None:
    """The first of an image's folders that is called as a split is."""
    folders = image.lower().split("/")[:-1] if isinstance(image, str) else []
    return next((folder for folder in folders if folder and folder in SPLIT_OF_WORD), None)


def _file_entries(path: Path) -> Iterator[tuple[str, tuple | str]]:
    if path.is_file() and _starts_as_parquet(path):
        return _object_entries(saved_datasets.parquet_rows(path))
    return _entries(path, _read_text(path))


def _starts_as_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


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
        if _is_object(next(_lines(text.lstrip()))):
            return _object_entries(_json_lines(text))
        raise ValueError(f"{path}: damaged JSON ({error})") from None
    if isinstance(data, list):
        return _object_entries((f"entry {n}", entry) for n, entry in enumerate(data, start=1))
    if _image_of(data) is not None and _captions_of(data):  # one line of JSON Lines
        return _object_entries([("line 1", data)])
    if isinstance(data.get("images"), list):
        coco = isinstance(data.get("annotations"), list)
        return _coco_entries(data) if coco else _karpathy_entries(data["images"])
    return _dict_entries(data)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(text: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(_lines(text), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError):
                yield f"line {number}", f"damaged JSON: {line.strip()[:40]!r}"


def _object_entries(objects: Iterable[tuple[str, object]]):
    """Of (where, {image, caption or captions[, split]}), or (where, what is wrong)."""
    for where, entry in objects:
        if isinstance(entry, str):
            yield where, entry
            continue
        for caption in _as_list(_captions_of(entry)):
            yield where, (_image_of(entry), caption, _get(entry, "split"))


def _image_of(entry):
    values = (_get(entry, key) for key in IMAGE_COLUMNS)
    return next((value for value in values if value is not None), None)


def _captions_of(entry):
    """One caption or a list of them."""
    values = (_get(entry, key) for key in ("captions", *CAPTION_COLUMNS))
    return next(filter(None, values), None)


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
