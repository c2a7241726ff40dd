"""The feature cache: each picture is encoded once in its life, whatever runs ask for it.

    source = FeatureSource(encoder, paths, pooled=False, cache_dir="feature_cache",
                           dtype=torch.float16, num_workers=2, device=device)
    for features in source.stream([torch.tensor([3, 0])]): ...  # (2, P, F) float32 on the device

Nothing here knows a model. An encoder is anything that turns images (n, 3, S, S) uint8 into
features (n, P, F) and has `grid` (h, w), `channels` F, `image_size` S, `interpolation`, by which
pictures are scaled to it, `batch_size`, which it likes best, and `key()`: a dict of JSON values that
decide the features, its `name` among them.
Axes: n images, P = h * w grid cells, F feature channels, S pixels a side.
"""

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import re
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import torch

import image_loading
import process_group
from checkpoints import check_free_space, replace_file
from image_loading import ImagePaths, ShardImage
from progress import Progress
from runtime import to_device

CACHE_FORMAT = 3  # part of every key; raised when older caches must not be read
COMMIT_SECONDS = 2.0  # work that a killed run may lose
INDEX = "index.sqlite"
TABLES = """
    CREATE TABLE IF NOT EXISTS images (
        path BLOB, size INTEGER, modified INTEGER, row INTEGER NOT NULL,
        PRIMARY KEY (path, size, modified)
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS faults (
        path BLOB, size INTEGER, modified INTEGER, reason TEXT NOT NULL,
        PRIMARY KEY (path, size, modified)
    ) WITHOUT ROWID;
"""
DAMAGE = sqlite3.DatabaseError, UnicodeDecodeError  # the latter where SQLite quotes the damage
# What SQLite reports although the index may be whole.
NOT_DAMAGE = (
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
)  # fmt: skip

Stamp = tuple[bytes, int, int]  # what a file is known by: path, size, modification time
# Positions of readable images, their features (n, P, F), {position: reason} of the others.
Batch = tuple[list[int], np.ndarray | None, dict[int, str]]


class FeatureSource:
    """Encoder output for a list of images: from the feature cache, or encoded whenever asked for.

    `paths`: the readable ones of those given, which positions count; `unreadable`: {path: reason}
    of the others. `pooled` as given.
    """

    def __init__(
        self,
        encoder,
        paths,
        *,
        pooled,
        mirrored=False,
        cache_dir,
        dtype,
        num_workers,
        device,
        what="images",
    ):
        """
        Args:
            pooled: the mean over the grid, as one cell, is enough.
            mirrored: mirrored images will be asked for, too.
            cache_dir: None for no cache.
            dtype: what the cache holds, torch.float16 or float32.
            what: what a progress bar calls them.
        """
        self.encoder, self.pooled, self.features = encoder, pooled, None
        self.num_workers, self.device, self.what = num_workers, device, what
        if cache_dir is None:
            self.unreadable = image_loading.find_unreadable(
                paths, num_workers=num_workers, what=what
            )
        else:
            self.features, self.unreadable = self._cached(paths, cache_dir, dtype)
        if self.unreadable:
            paths = image_loading.all_but(paths, self.unreadable)
        self.paths = paths
        if mirrored and cache_dir is not None:
            self.mirrored, _ = self._cached(self.paths, cache_dir, dtype, mirrored=True)

    def _cached(self, paths, cache_dir, dtype, mirrored=False):
        """(features of the readable images, {path: reason} of the others).

        On a GPU they lie in its memory where they take at most half of what is free.
        """
        features, unreadable = cached_features(
            paths,
            self.encoder,
            cache_dir=cache_dir,
            dtype=dtype,
            pooled=self.pooled,
            mirrored=mirrored,
            num_workers=self.num_workers,
            batch_size=self.encoder.batch_size,
            what=self.what,
        )
        features = features.readable()
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            features = features.to(self.device) if features.nbytes <= free / 2 else features
        return features, unreadable

    def stream(self, batches_of_rows, mirror=None, crops=None):
        """For each batch of positions (n,) in `paths`: features (n, P, F) float32 on the device.

        P = 1 if pooled. `mirror`: (images,) bool, which are to be mirrored; None: none.
        `crops`: (images, 4), the part of each that is seen, before it is mirrored, as
        `image_loading.load_image` takes it; past the cache, which holds whole ones. None: all.
        """
        if self.features is None or crops is not None:
            yield from self._encoded(batches_of_rows, mirror, crops)
            return
        for rows in batches_of_rows:
            features = self._read(self.features, rows)
            if mirror is not None:
                turned = mirror[rows].nonzero().squeeze(1)
                places = to_device(turned, features.device)
                features[places] = self._read(self.mirrored, rows[turned])
            yield features

    def _read(self, features, rows):
        """Rows of the cache or of its copy on the GPU: (n, P, F) float32 on the device."""
        if isinstance(features, torch.Tensor):
            return features.index_select(0, to_device(rows, features.device)).float()
        return to_device(features[rows], self.device).float()

    def _encoded(self, batches_of_rows, mirror, crops=None):
        """As `stream`, without a cache."""
        batches = list(batches_of_rows)
        encoder = self.encoder
        how = (self.num_workers, encoder.interpolation, crops)
        loader = image_loading.load_batches(self.paths, encoder.image_size, batches, *how)
        for rows, images in zip(batches, loader, strict=True):
            if mirror is not None:
                images[mirror[rows]] = images[mirror[rows]].flip(-1)
            with torch.no_grad():  # inference tensors could not be trained on
                features = self.encoder(images)
            yield features.mean(1, keepdim=True) if self.pooled else features


class SideBySideSource:
    """Features of several encoders for the same images, each from a cache of its own, joined cell by cell.

    It has what is asked of a FeatureSource: `paths`, `unreadable`, `device` and `stream`.
    """

    def __init__(self, encoder, paths, **how):
        """encoder: has `parts`, encoders, and `join`; the others as FeatureSource takes them."""
        self.join, self.sources, self.unreadable = encoder.join, [], {}
        for part in encoder.parts:
            source = FeatureSource(part, paths, **how)
            self.sources.append(source)
            self.unreadable |= source.unreadable
            paths = source.paths
        self.paths, self.device = paths, source.device

    def stream(self, batches_of_rows, mirror=None):
        """As FeatureSource.stream, F channels of all encoders together."""
        copies = itertools.tee(batches_of_rows, len(self.sources))
        streams = zip(self.sources, copies, strict=True)
        each = [source.stream(batches, mirror) for source, batches in streams]
        yield from map(self.join, zip(*each, strict=True))


def open_source(encoder, paths, *, cache_dir, **how):
    """The FeatureSource of an encoder, or of each of its `parts`, so that runs of one share its cache."""
    shares = cache_dir is not None and len(encoder.parts) > 1
    source = SideBySideSource if shares else FeatureSource
    return source(encoder, paths, cache_dir=cache_dir, **how)


class FeatureFile(NamedTuple):
    """Features on the disk: a row (P, F) per image and nothing else."""

    path: Path
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Features:
    """Features of a list of images, read from the cache's memory map.

    `features[positions]` -> (n, P, F) tensor; unreadable images must not be asked for.
    """

    def __init__(self, file: FeatureFile, rows: np.ndarray):
        """rows: (images,) int64, where each image lies in the file; -1 for unreadable ones."""
        shape = int(rows.max(initial=-1)) + 1, *file.shape
        dtype = _name(file.dtype)
        self.data = (
            np.memmap(file.path, dtype, "r", shape=shape) if shape[0] else np.empty(shape, dtype)
        )
        self.file, self.rows, self.nbytes = file, rows, len(rows) * file.row_bytes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions) -> torch.Tensor:
        rows = self.rows[np.asarray(positions)]
        if (rows < 0).any():
            raise IndexError("features of an unreadable image asked for")
        return torch.from_numpy(self.data[rows])

    def readable(self) -> "Features":
        """Those of the readable images."""
        return Features(self.file, self.rows[self.rows >= 0])

    def to(self, device: torch.device) -> torch.Tensor:
        """All of them in the memory of a device: (images, P, F), to be read as this is."""
        shape, positions = (len(self), *self.file.shape), torch.arange(len(self))
        features = torch.empty(shape, dtype=self.file.dtype, device=device)
        for part, rows in zip(features.split(256), positions.split(256), strict=True):
            part.copy_(self[rows])
        return features


def cached_features(
    paths: Sequence[Path] | Sequence[ShardImage],
    encoder,
    *,
    cache_dir: str | Path,
    dtype: torch.dtype = torch.float16,
    pooled: bool = False,
    mirrored: bool = False,
    batch_size: int = 8,
    num_workers: int = 0,
    progress: bool = True,
    what: str = "images",
) -> tuple[Features, dict[Path, str]]:
    """Features of these images, and {path: reason} of the unreadable ones.

    Only what the cache lacks is encoded. A run killed at any moment leaves a cache that the next
    one continues; a second run waits for the first. Processes of one run share the work, and must
    all see `cache_dir`.
    Args:
        dtype: what features are rounded to, float16 or float32.
        pooled: keep only the mean (1, F) of each rounded grid, as float32.
        mirrored: of the mirrored images.
        what: what a progress bar calls them.
    Raises: ValueError when the folder cannot be used, the disk is too full, or features overflow
    the dtype; OSError when a shard cannot be read, or the disk fills up.
    """
    key = encoder.key() | {"mirrored": mirrored, "dtype": _name(dtype), "format": CACHE_FORMAT}
    grids, means = _feature_files(Path(cache_dir), key, encoder, dtype)
    file = means if pooled else grids
    _make_folder(file.path.parent, key)

    def features_of(images, files):
        features = encoder(images.flip(-1) if mirrored else images)
        _check_range(features, files, dtype)
        features = features.to(dtype).contiguous()
        return (_mean(features) if pooled else features).cpu().numpy()

    def encoded(files):
        decoded = image_loading.decode_images(
            files, encoder.image_size, batch_size, num_workers, encoder.interpolation
        )
        return _encoded(decoded, files, features_of)

    if process_group.rank():
        rows, unreadable = _assist(encoded)
    else:
        with _locked(file.path.parent), _Store(file) as store:
            title = f"encoding {what}" if progress else None
            found = _fill(store, paths, encoded, grids if pooled else None, title)
        rows, unreadable = process_group.broadcast(found)
    return Features(file, rows), unreadable


# ------------------------------------------------------------------------------------ filling it


def _fill(
    store: "_Store",
    paths: Sequence[Path] | Sequence[ShardImage],
    encoded: Callable[[list], Iterator[Batch]],
    grids: FeatureFile | None,
    title: str | None,
) -> tuple[np.ndarray, dict[Path, str]]:
    """Rank 0's part: add what the store lacks. Returns each image's row, and {path: reason}.

    `grids`: the file of another cache, of whose rows the means are wanted. `title`: of a progress
    bar, or None.
    """
    stamps, unreadable = _stamps(paths)
    rows, known_faults = store.find(stamps)
    unreadable |= known_faults
    lacking = [place for place in np.flatnonzero(rows < 0).tolist() if place not in unreadable]
    todo = {stamps[place]: paths[place] for place in lacking}
    in_shards = image_loading.in_shards(paths)
    if todo and in_shards:
        todo |= _others_in_shards(store, paths[0].shards)
    _check_room(store.file, len(todo))
    with Progress(None, title, len(todo), "images", disable=not (title and todo)) as bar:
        if grids and todo:
            _take_means(store, todo, grids, bar)
        own = encoded(process_group.broadcast(list(todo.values())))
        faults = _store_batches(store, list(todo), _received(own), bar)
    if in_shards:
        store.remember_faults(faults)
    for place in lacking:
        rows[place] = store.added.get(stamps[place], -1)
        if rows[place] < 0:
            unreadable[place] = faults[stamps[place]]
    return rows, {paths[place]: unreadable[place] for place in sorted(unreadable)}


def _assist(encoded: Callable[[list], Iterator[Batch]]) -> tuple[np.ndarray, dict[Path, str]]:
    """Any other rank's part: hand rank 0 its share of what is to be encoded. Returns as `_fill`."""
    for batch in encoded(process_group.broadcast(None)):
        process_group.send(batch, to=0)
    process_group.send(None, to=0)
    return process_group.broadcast(None)


def _others_in_shards(store: "_Store", shards) -> dict[Stamp, ShardImage]:
    """{stamp: image} of all that the store lacks: one pass over the shards brings them all."""
    images = [shards / name for name in shards.names]
    stamps, _ = _stamps(images)
    rows, faults = store.find(stamps)
    lacking = [place for place in np.flatnonzero(rows < 0).tolist() if place not in faults]
    return {stamps[place]: images[place] for place in lacking}


def _check_room(file: FeatureFile, images: int):
    folder = file.path.parent
    purpose = f"--cache_dir {folder.parent}: the features"
    advice = "make room, name another --cache_dir, a narrower --cache_dtype or --no_feature_cache"
    check_free_space(folder, images * file.row_bytes, purpose, advice)


def _take_means(store: "_Store", todo: dict[Stamp, Path], grids: FeatureFile, bar: Progress):
    """Append the means of those grids that another cache holds already; they leave `todo`."""
    row_of = _rows_next_door(grids, todo)
    known = sorted(todo.keys() & row_of.keys(), key=row_of.get)  # in the order of the disk
    features = Features(grids, np.array([row_of[stamp] for stamp in known], np.int64))
    for start in range(0, len(known), 256):
        stamps = known[start : start + 256]
        store.append(stamps, _mean(features[range(start, start + len(stamps))]).numpy())
        for stamp in stamps:
            del todo[stamp]
        bar.update(len(stamps))


def _store_batches(
    store: "_Store", stamps: list[Stamp], batches: Iterable[Batch], bar: Progress
) -> dict[Stamp, str]:
    """Append what comes; returns {stamp: reason} of those that did not."""
    faults = dict.fromkeys(stamps, "no shard holds it by this name")
    for positions, features, reasons in batches:
        for position, reason in reasons.items():
            if stamps[position] in faults:  # another shard may have held a readable one
                faults[stamps[position]] = reason
        readable = [stamps[position] for position in positions]
        for stamp in readable:
            faults.pop(stamp, None)
        if readable:
            store.append(readable, features)
        bar.update(len(positions) + len(reasons))
    return faults


def _received(own: Iterator[Batch]) -> Iterator[Batch]:
    """Batches of this process and of the other ranks in turn, until none has more."""
    senders = [*range(process_group.world_size())]
    while senders:
        for sender in [*senders]:
            batch = process_group.receive(sender) if sender else next(own, None)
            if batch is None:
                senders.remove(sender)
            else:
                yield batch


def _encoded(decoded, files: list, features_of: Callable) -> Iterator[Batch]:
    """This process's share, encoded. `decoded`: batches as `image_loading.decode_images` gives them."""
    for positions, pixels, reasons in decoded:
        features = None
        if positions:
            with torch.inference_mode():
                readable = [files[position] for position in positions]
                features = features_of(torch.from_numpy(pixels), readable)
        yield positions, features, reasons


def _check_range(features: torch.Tensor, files: list, dtype: torch.dtype):
    """Raise ValueError naming the first of these files whose features the dtype cannot hold."""
    low, high = features.flatten(1).aminmax(dim=1)  # both nan where any is
    limit = torch.finfo(dtype).max
    for file, fits in zip(files, ((low >= -limit) & (high <= limit)).tolist(), strict=True):
        if not fits:
            raise ValueError(
                f"{file}: the encoder's output overflows {_name(dtype)}; "
                "use a wider --cache_dtype, or --no_feature_cache, with this encoder"
            )


def _mean(grids: torch.Tensor) -> torch.Tensor:
    """(n, P, F) of any dtype -> (n, 1, F) float32."""
    return grids.float().mean(dim=1, keepdim=True)


def _name(dtype: torch.dtype) -> str:
    """torch's and numpy's name alike, such as float16."""
    return str(dtype).removeprefix("torch.")


def _stamps(
    paths: Sequence[Path] | Sequence[ShardImage],
) -> tuple[list[Stamp | None], dict[int, str]]:
    """The stamp of each, and {position: reason} of files that have none."""
    images = paths
    if isinstance(paths, ImagePaths) and isinstance(paths.folder, Path):
        images = (f"{paths.folder}/{name}" for name in paths.names)  # no Path for each
    stamps, missing, real_folder = [], {}, functools.cache(os.path.realpath)
    for position, image in enumerate(images):
        try:
            stamps.append(_stamp(image, real_folder))
        except OSError as error:
            stamps.append(None)
            missing[position] = error.strerror
    return stamps, missing


def _stamp(image: str | Path | ShardImage, real_folder: Callable) -> Stamp:
    """`real_folder`: os.path.realpath that remembers. Raises: OSError where there is no such file."""
    if isinstance(image, ShardImage):
        name, size, modified = image.stamp()
    else:
        status = os.lstat(image)
        folder, name = os.path.split(image)
        if stat.S_ISLNK(status.st_mode):
            name, status = os.path.realpath(image), os.stat(image)  # noqa: PTH116 - text is faster
        else:
            name = f"{real_folder(folder)}/{name}"
        size, modified = status.st_size, status.st_mtime_ns
    # names that are not UTF-8 and numbers of 64 bits: SQLite takes neither as text and integer
    return name.encode("utf-8", "surrogatepass"), size, modified % 2**63


# --------------------------------------------------------------------------------- on the disk


def _feature_files(
    cache_dir: Path, key: dict, encoder, dtype: torch.dtype
) -> tuple[FeatureFile, FeatureFile]:
    """The files of this key's grids, and of their means: each in a folder of its own."""
    name = re.sub(r"[^\w.-]", "_", key["name"])
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = cache_dir / f"{name}_{digest[:12]}"
    file_name = "features." + _name(dtype).replace("float", "f")  # .f16 or .f32
    grids = FeatureFile(folder / file_name, (encoder.num_cells, encoder.channels), dtype)
    pooled = folder.with_name(folder.name + "_pooled")
    return grids, FeatureFile(pooled / "features.f32", (1, encoder.channels), torch.float32)


def _make_folder(folder: Path, key: dict):
    """Raise ValueError unless it can be used."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
        if not (folder / "key.json").exists():
            with replace_file(folder / "key.json") as file:
                file.write(json.dumps(key, sort_keys=True, indent=1).encode())
    except OSError as error:
        raise ValueError(
            f"--cache_dir {folder.parent}: cannot be used ({error.strerror}); "
            "expected a folder to write in"
        ) from None


@contextlib.contextmanager
def _locked(folder: Path):
    lock = filelock.FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"waiting for another run that fills {folder}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _Store:
    """A cache folder opened for appending: rows reach the disk first, then the index names them.

    `added`: {stamp: row} of what came since.
    """

    def __init__(self, file: FeatureFile):
        self.file, self.index = file, file.path.with_name(INDEX)
        self.data = file.path.open("ab", buffering=0)
        stored = self.data.seek(0, os.SEEK_END) // file.row_bytes
        self.rows = _open_or_restart_index(self.index, stored)
        self.data.truncate(self.rows * file.row_bytes)  # a killed run's rows that no index names
        self.data.seek(0, os.SEEK_END)
        self.added, self.pending, self.committed_at = {}, {}, time.monotonic()

    def find(self, stamps: list[Stamp | None]) -> tuple[np.ndarray, dict[int, str]]:
        """The row of each, -1 where there is none, and {position: reason} of what shards lacked."""
        with _transaction(self.index) as index:
            rows = np.fromiter(_look_up(index, "row", "images", stamps, -1), np.int64, len(stamps))
            if not index.execute("SELECT 1 FROM faults LIMIT 1").fetchone():
                return rows, {}
            reasons = enumerate(_look_up(index, "reason", "faults", stamps, None))
            return rows, {position: reason for position, reason in reasons if reason is not None}

    def append(self, stamps: list[Stamp], features: np.ndarray):
        """Add features (n, P, F) for these files."""
        if self.data.write(features) != features.nbytes:  # a short write: the disk is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.data.name)
        added = {stamp: row for row, stamp in enumerate(stamps, start=self.rows)}
        self.added |= added
        self.pending |= added
        self.rows += len(stamps)
        if time.monotonic() - self.committed_at > COMMIT_SECONDS:
            self.commit()

    def commit(self):
        """Make the rows so far durable."""
        os.fsync(self.data.fileno())
        self._insert("images", self.pending)
        self.pending, self.committed_at = {}, time.monotonic()

    def remember_faults(self, faults: dict[Stamp, str]):
        """After a whole pass over the shards: the next run makes none to learn the same."""
        self._insert("faults", faults)

    def _insert(self, table: str, values: dict[Stamp, int | str]):
        entries = [(*stamp, value) for stamp, value in values.items()]
        try:
            with _transaction(self.index) as index:
                index.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?)", entries)
        except sqlite3.Error as error:
            raise OSError(f"{self.index}: {error}") from None

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        try:
            self.commit()
        finally:
            self.data.close()


@contextlib.contextmanager
def _transaction(file: Path):
    """The index at `file`, opened; what is done with it is committed as one.

    A connection lives no longer than this, because worker processes must not inherit one.
    """
    with contextlib.closing(sqlite3.connect(file)) as index, index:
        index.execute("PRAGMA journal_mode=DELETE")
        index.execute("PRAGMA synchronous=FULL")
        yield index


def _look_up(
    index: sqlite3.Connection, column: str, table: str, stamps: Iterable[Stamp | None], default
) -> Iterator:
    """What a table says of each stamp: nothing else of it is read, as it may know other datasets."""
    query = f"SELECT {column} FROM {table} WHERE path = ? AND size = ? AND modified = ?"
    for stamp in stamps:
        found = index.execute(query, stamp).fetchone() if stamp else None
        yield found[0] if found else default


def _open_or_restart_index(file: Path, stored: int) -> int:
    """As `_open_index`. A damaged one is replaced by an empty one, because a cache can be refilled.

    Raises: OSError when the disk or another program's lock is at fault.
    """
    try:
        return _open_index(file, stored)
    except DAMAGE as error:
        reason = " ".join(str(error).split())
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in NOT_DAMAGE:
            raise OSError(f"{file}: {reason}") from None
        print(f"{file}: damaged ({reason}): images are encoded again", file=sys.stderr, flush=True)
        for damaged in file.parent.glob(f"{file.name}*"):  # its journal, too
            damaged.unlink()
        return _open_index(file, stored)


def _open_index(file: Path, stored: int) -> int:
    """How many rows it names; made if needed, rid of rows that the data lacks."""
    with _transaction(file) as index:
        index.executescript(TABLES)
        _check(index)
        index.execute("DELETE FROM images WHERE row NOT BETWEEN 0 AND ?", (stored - 1,))
        (last,) = index.execute("SELECT max(row) FROM images").fetchone()
        return 0 if last is None else last + 1


def _rows_next_door(file: FeatureFile, stamps: Iterable[Stamp]) -> dict[Stamp, int]:
    """{stamp: row} of those in another cache, which another run may be filling; none if it is unusable."""
    address = f"{file.path.with_name(INDEX).absolute().as_uri()}?mode=ro"
    with contextlib.suppress(*DAMAGE, FileNotFoundError):
        stored = file.path.stat().st_size // file.row_bytes
        with contextlib.closing(sqlite3.connect(address, uri=True)) as index:
            _check(index)
            rows = zip(stamps, _look_up(index, "row", "images", stamps, -1), strict=True)
            return {stamp: row for stamp, row in rows if 0 <= row < stored}
    return {}


def _check(index: sqlite3.Connection):
    """Raises: one of DAMAGE where it is damaged, or no index of ours."""
    (verdict,) = index.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)
    index.execute("SELECT path, size, modified, row FROM images LIMIT 0")
    index.execute("SELECT path, size, modified, reason FROM faults").fetchall()  # they are few
