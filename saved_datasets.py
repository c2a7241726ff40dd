"""Hugging Face's own files: datasets as `save_to_disk` wrote them, and Parquet tables.

    is_saved(folder)                                        # a Dataset or a DatasetDict
    for where, (image, captions, split) in captioned(folder): ...
    for name, content in read_pictures(file, wanted, limit): ...
    for where, row in parquet_rows(path): ...               # of a table of texts

An image's name is its place: split/file/row, such as train/data-00000-of-00002/17. Arrow files are
mapped into memory and Parquet is read in batches, neither is ever loaded whole. Only pictures that
are embedded in the rows are taken: a path in a row is never opened.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

CAPTION_COLUMNS = ("captions", "caption", "text", "comment", "sentences")
NUMBERED = re.compile(r"(caption|text|comment)_?\d+")  # a column for each caption
PLAIN_NAME = re.compile(r"[\w-][\w.-]*")
ROWS = 1000  # read at a time, without their pictures
# what damaged files raise; pyarrow's and json's own errors are ValueErrors and the like
DAMAGE = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
DAMAGE += (RuntimeError, MemoryError)


def is_saved(folder: Path) -> bool:
    """Whether `datasets` has saved a Dataset or a DatasetDict here."""
    return _index(folder).is_file() or (folder / "state.json").is_file()


def arrow_files(folder: Path) -> list[Path]:
    """The files of all splits, in their order. Raises: ValueError for a damaged dataset."""
    if not _index(folder).is_file():
        return _files_of(folder)
    with _in_one_line(_index(folder)):
        splits = _plain_names(json.loads(_index(folder).read_bytes())["splits"])
    return [path for split in splits for path in _files_of(folder / split)]


def captioned(folder: Path) -> Iterator[tuple[str, tuple[str, list, str | None]]]:
    """(where, (image, captions, split)) of each row; the split is its column's, else its folder's.

    Raises: ValueError for a damaged dataset, and where it lacks pictures or captions.
    """
    for path in arrow_files(folder):
        with _in_one_line(path):
            rows = _open(path)
            _picture_column(rows)
            columns = _caption_columns(rows.column_names)
            split_column = ["split"] if "split" in rows.column_names else []
            texts = rows.select_columns([*columns, *split_column])
            split = path.parent.name if _is_split(path.parent) else None
            for start in range(0, len(texts), ROWS):
                batch = texts[start : start + ROWS]
                splits = batch.get("split", [split] * ROWS)
                captions = zip(*(batch[column] for column in columns), strict=True)
                for place, values in enumerate(captions, start):
                    image = f"{_prefix(path)}{place}"
                    yield f"row {image}", (image, _flat(values), splits[place - start])


def read_pictures(path: Path, wanted: Iterable[str], limit: int) -> Iterator[tuple[str, bytes]]:
    """(name, content) of an Arrow file's pictures that are wanted, at most `limit` bytes of each.

    A row without a picture gives b"". Raises: ValueError for a damaged file.
    """
    prefix = _prefix(path)
    places = [name.removeprefix(prefix) for name in wanted if name.startswith(prefix)]
    with _in_one_line(path):
        rows = _open(path)
        pictures = rows.data.column(_picture_column(rows))
        for place in sorted(int(place) for place in places if place.isdecimal()):
            if place < len(pictures):
                stored = pictures[place]["bytes"].as_buffer()
                content = stored.slice(0, min(limit, stored.size)).to_pybytes() if stored else b""
                yield f"{prefix}{place}", content


def parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, {column: value}) of each row, without columns of pictures.

    Raises: ValueError for a damaged table, or where pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
        import pyarrow.types
    except ImportError:
        raise ValueError(
            f"{path}: Parquet needs pyarrow, which is not installed: {_INSTALL}"
        ) from None
    with _in_one_line(path), pyarrow.parquet.ParquetFile(path) as table:
        schema = table.schema_arrow
        columns = [column.name for column in schema if not pyarrow.types.is_struct(column.type)]
        number = 0
        for batch in table.iter_batches(ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row


_INSTALL = "pip install -r requirements-hub.txt"


def _index(folder: Path) -> Path:
    """The file that a DatasetDict has and a Dataset has not."""
    return folder / "dataset_dict.json"


def _is_split(folder: Path) -> bool:
    return _index(folder.parent).is_file()


def _prefix(path: Path) -> str:
    """What the names of an Arrow file's images begin with."""
    return f"{path.parent.name}/{path.stem}/" if _is_split(path.parent) else f"{path.stem}/"


def _files_of(folder: Path) -> list[Path]:
    """The Arrow files of a Dataset, as it lists them: others may be left from an older one."""
    state = folder / "state.json"
    with _in_one_line(state):
        listed = json.loads(state.read_bytes())["_data_files"]
        return [folder / name for name in _plain_names([entry["filename"] for entry in listed])]


def _plain_names(names: list) -> list[str]:
    """These names, none of which leads out of a folder."""
    for name in names:
        if not PLAIN_NAME.fullmatch(name):
            raise ValueError(f"names {name[:60]!r}, expected a name without folders")
    return names


def _open(path: Path):
    """The rows of an Arrow file, mapped into memory."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"needs datasets, which is not installed: {_INSTALL}") from None
    return datasets.Dataset.from_file(str(path))


def _picture_column(rows) -> str:
    kinds = {name: type(kind).__name__ for name, kind in rows.features.items()}
    pictures = [name for name, kind in kinds.items() if kind == "Image"]
    if not pictures:
        raise ValueError(f"no column of pictures: {', '.join(kinds)}")
    return pictures[0]


def _caption_columns(names: list[str]) -> list[str]:
    columns = [name for name in CAPTION_COLUMNS if name in names][:1]
    columns = columns or sorted(filter(NUMBERED.fullmatch, names))
    if not columns:
        raise ValueError(
            f"no column of captions ({', '.join(CAPTION_COLUMNS)}): {', '.join(names)}"
        )
    return columns


def _flat(values: Iterable) -> list:
    """Captions, where each value is one or a list of them; [None] for none."""
    lists = (value if isinstance(value, list) else [value] for value in values)
    return [caption for captions in lists for caption in captions] or [None]


@contextlib.contextmanager
def _in_one_line(path: Path):
    """Whatever a damaged file raises becomes a ValueError of one line that names it."""
    try:
        yield
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        prefix = "" if reason.startswith(str(path)) else f"{path}: "
        raise ValueError(f"{prefix}{reason[:300]}") from None
