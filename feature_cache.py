"""The feature cache: each picture is encoded once in its life, whatever runs ask for it, and read from a memory map.

    source = FeatureSource(encoder, paths, pooled=False, cache_dir="feature_cache", dtype=torch.float16,
                           num_workers=2, device=device)
    for features in source.stream([torch.tensor([3, 0])]): ...  # (2, P, F) float32 on the device

Nothing here knows a model: an encoder is any function from pixels to features that says what it is.
Axes: N images, P = h * w grid cells, F feature channels.
"""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import filelock
import numpy as np
import torch
from tqdm import tqdm

import image_loading
import process_group
from checkpoints import check_free_space, replace_file
from image_loading import ShardImage
from runtime import to_device

CACHE_FORMAT = 3
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
DAMAGE = sqlite3.DatabaseError, UnicodeDecodeError  # the latter from a message of SQLite's
# What SQLite reports although the index may be whole.
NOT_DAMAGE = (
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
)  # fmt: skip


class FeatureSource:
    """Encoder output for a list of images: from the feature cache, or encoded whenever asked for.

    `paths` as given, `pooled` as given, `unreadable`: {path: reason}.
    """

    def __init__(
        self, encoder, paths, *, pooled, mirrored=False, cache_dir, dtype, num_workers, device
    ):
        """
        Args:
            encoder: images (n, 3, S, S) uint8 -> (n, P, F), with `grid` (h, w), `channels`
                F, `image_size` S and `key()`, a dict of what decides the features and `name`.
            pooled: the grid's mean, as one cell, is enough.
            mirrored: mirrored images will be asked for, too.
            cache_dir: None for no cache.
            dtype: what the cache holds, torch.float16 or float32.
        """
        self.encoder, self.paths, self.pooled = encoder, paths, pooled
        self.num_workers, self.device = num_workers, device
        if cache_dir is None:
            self.features = None
            self.unreadable = image_loading.find_unreadable(paths, num_workers=num_workers)
            return

        def cached(encode, **more):
            key = encoder.key() | more
            features, unreadable = cached_features(
                paths, encode, cache_dir=cache_dir, key={"encoder": key.pop("name"), **key},
                grid=tuple(encoder.grid), channels=encoder.channels, image_size=encoder.image_size,
                num_workers=num_workers, dtype=dtype, pooled=pooled,
                batch_size=8 if device.type == "cpu" else 32,  # 8 by measurement; 32 is a guess
            )  # fmt: skip
            return self._in_fast_memory(features, unreadable), unreadable

        self.features, self.unreadable = cached(encoder)
        if mirrored and not self.unreadable:
            self.mirrored, _ = cached(lambda images: encoder(images.flip(-1)), mirrored=True)

    def _in_fast_memory(self, features, unreadable):
        """On CUDA a tensor in the GPU's memory where it takes at most half of what is free."""
        if self.device.type != "cuda" or unreadable:
            return features
        free, _ = torch.cuda.mem_get_info(self.device)
        return features.to(self.device) if features.nbytes <= free / 2 else features

    def stream(self, batches, mirror=None):
        """For each batch of positions (n,) in `paths`: features (n, P, F) float32 on the device; P = 1 if pooled.

        `mirror`: (images,) bool, which of them are to be mirrored; None: none.
        """
        if self.features is None:
            yield from self._encoded(batches, mirror)
            return
        for rows in batches:
            features = self._stored(self.features, rows)
            if mirror is not None:
                turned = mirror[rows].nonzero().squeeze(1)
                replaced = to_device(turned, features.device)
                features[replaced] = self._stored(self.mirrored, rows[turned])
            yield features

    def _stored(self, features, rows):
        """Rows of the cache, or of its copy in the GPU's memory: (n, P, F) float32 on the device."""
        if isinstance(features, torch.Tensor):
            return features.index_select(0, to_device(rows, features.device)).float()
        return to_device(features[rows], self.device).float()

    def _encoded(self, batches, mirror):
        """As `stream`, without a cache."""
        batches = list(batches)
        loader = image_loading.load_batches(
            self.paths, self.encoder.image_size, batches, self.num_workers
        )
        for rows, images in zip(batches, loader, strict=True):
            if mirror is not None:
                images[mirror[rows]] = images[mirror[rows]].flip(-1)
            with torch.inference_mode():
                features = self.encoder(images)
            yield (features.mean(1, keepdim=True) if self.pooled else features).clone()


class Features:
    """Features of a list of images, grids or their means, read from the cache's memory map.

    `features[rows]` -> (n, P, F) tensor of `dtype` for positions in the list, P = 1 for means; unreadable images must
    not be asked for.
    """

    def __init__(self, file: Path, rows: np.ndarray, shape: tuple[int, int], dtype: torch.dtype):
        """rows: (images,) int64, where each image lies in the file; -1 for unreadable ones. shape: (P, F)."""
        size = int(rows.max(initial=-1)) + 1, *shape
        kind = _name(dtype)
        self.data = np.memmap(file, kind, "r", shape=size) if size[0] else np.empty(size, kind)
        self.rows, self.shape, self.dtype = rows, shape, dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions) -> torch.Tensor:
        rows = self.rows[np.asarray(positions)]
        if (rows < 0).any():
            raise IndexError("features of an unreadable image asked for")
        return torch.from_numpy(self.data[rows])

    @property
    def nbytes(self) -> int:
        """What `to` takes."""
        return len(self) * math.prod(self.shape) * self.dtype.itemsize

    def to(self, device: torch.device) -> torch.Tensor:
        """All of them in the memory of a device: (images, P, F), to be read as this is."""
        return torch.cat([self[rows].to(device) for rows in torch.arange(len(self)).split(256)])


def cached_features(
    paths: Sequence[Path] | Sequence[ShardImage],
    encode: Callable[[torch.Tensor], torch.Tensor],
    *,
    cache_dir: str | Path,
    key: dict,
    grid: tuple[int, int],
    channels: int,
    image_size: int,
    dtype: torch.dtype = torch.float16,
    pooled: bool = False,
    batch_size: int = 8,
    num_workers: int = 0,
    progress: bool = True,
) -> tuple[Features, dict[Path, str]]:
    """Features of these images and {path: reason} of the unreadable ones; only what the cache lacks is encoded.

    Args:
        encode: (n, 3, image_size, image_size) uint8 on the CPU -> (n, P, F) float on any device.
        key: JSON values that decide the features: `encoder` (its name), its weights' SHA-256, geometry.
        grid, channels: (h, w) and F, so P = h * w.
        dtype: what the features are rounded to: float32 or float16.
        pooled: keep only the mean (1, F) of each rounded grid, float32, in a cache of its own; pictures whose grids the
            other cache of this key and dtype holds are not encoded again.
    The cache is a folder per key and dtype: `features.f16` or `.f32` (a row per image), `index.sqlite` (which
    file each row came from: path, size, modification time), `key.json`. Rows reach the disk before the index
    names them, so a run that is killed at any moment leaves a cache that the next one continues; a second run waits for
    the first. Processes of one run share the work: rank 0 keeps the cache, the others hand it what they encode, and all
    must see its folder.
    Shards are read only when the cache lacks one of their images, and then all that it lacks of `Shards.names` are
    encoded; the index remembers which did not come.
    Raises: ValueError when the folder cannot be used, the disk is too full, or features overflow the dtype; OSError
    when a shard cannot be read.
    """
    cells, name = grid[0] * grid[1], _name(dtype)
    full_key = {**key, "grid": list(grid), "channels": channels, "image_size": image_size, "dtype": name,
                "format": CACHE_FORMAT}  # fmt: skip
    folder = _cache_folder(Path(cache_dir), full_key, "_pooled" if pooled else "")
    grids = f"features.{name.replace('float', 'f')}"
    beside = folder.with_name(folder.name.removesuffix("_pooled")) / grids
    take_means = (
        functools.partial(_take_means, file=beside, shape=(cells, channels), dtype=dtype)
        if pooled
        else None
    )
    file, shape, stored = (folder / grids, (cells, channels), dtype)
    if pooled:
        file, shape, stored = folder / "features.f32", (1, channels), torch.float32
    encoded = functools.partial(
        _encoded, encode=encode, rounded=functools.partial(_rounded, dtype=dtype, pooled=pooled),
        image_size=image_size, batch_size=batch_size, num_workers=num_workers,
    )  # fmt: skip
    if process_group.rank():
        for found in encoded(process_group.broadcast(None)):
            process_group.send(found, to=0)
        rows, unreadable = process_group.broadcast(None)
    else:
        with _locked(folder), _Store(file, math.prod(shape) * stored.itemsize) as store:
            stamps, unreadable = _fill(store, paths, encoded, take_means, progress)
        rows = np.array([store.row_of.get(stamps.get(path), -1) for path in paths], np.int64)
        process_group.broadcast((rows, unreadable))
    return Features(file, rows, shape, stored), unreadable


def _fill(store, paths, encoded, take_means, progress):
    """Rank 0's work: add what the store lacks of these images. Returns their stamps, and {path: reason} as above."""
    folder = store.file.parent
    stamps, unreadable = _stamps(paths)
    todo = _lacking(stamps, store)
    if shards := next(
        (path.shards for path in todo.values() if isinstance(path, ShardImage)), None
    ):
        todo |= _lacking(_stamps([shards / name for name in shards.names])[0], store)
    check_free_space(
        folder,
        len(todo) * store.row_bytes,
        f"--cache_dir {folder.parent}: the features",
        "make room, name another --cache_dir, a narrower --cache_dtype or --no_feature_cache",
    )
    with tqdm(
        total=len(todo), desc="encoding", unit="image", disable=None if progress and todo else True
    ) as bar:
        if take_means:
            take_means(store, todo, bar)
        own = encoded(process_group.broadcast(list(todo.values())))
        failed = _store_encoded(store, list(todo), own, bar)
    if shards:
        store.remember_faults(failed)
    failed |= store.faults
    return stamps, unreadable | {
        path: failed[stamp] for path, stamp in stamps.items() if stamp in failed
    }


def _lacking(stamps, store):
    """{stamp: path}, one path per file, of those that are neither stored nor known to be unreadable."""
    return {
        stamp: path
        for path, stamp in stamps.items()
        if stamp not in store.row_of and stamp not in store.faults
    }


def _encoded(paths, encode, rounded, image_size, batch_size, num_workers):
    """This process's batches: (positions in `paths`, their rows as `_rounded` gives them, {position: reason}).

    None after the last one.
    """
    for positions, pixels, reasons in image_loading.decode_images(
        paths, image_size, batch_size, num_workers
    ):
        features = None
        if positions:
            with torch.inference_mode():
                features = encode(torch.from_numpy(pixels))
                features = rounded(features, [paths[position] for position in positions])
        yield positions, features, reasons
    yield None


def _rounded(
    features: torch.Tensor, paths: Sequence[Path], dtype: torch.dtype, pooled: bool
) -> np.ndarray:
    """Features (n, P, F) of these files as rows (n, P or 1, F). Raises: ValueError naming one that overflows."""
    low, high = features.flatten(1).aminmax(dim=1)  # both nan where any is
    limit = torch.finfo(dtype).max
    for path, fits in zip(paths, ((low >= -limit) & (high <= limit)).tolist(), strict=True):
        if not fits:
            raise ValueError(
                f"{path}: the encoder's output overflows {_name(dtype)}; "
                "use a wider --cache_dtype, or --no_feature_cache, with this encoder"
            )
    features = features.to(dtype).contiguous()
    return (_mean(features) if pooled else features).cpu().numpy()


def _mean(grids: torch.Tensor) -> torch.Tensor:
    """(n, P, F) of any dtype -> (n, 1, F) float32."""
    return grids.float().mean(dim=1, keepdim=True)


def _name(dtype: torch.dtype) -> str:
    """torch's and numpy's name alike, such as float16."""
    return str(dtype).removeprefix("torch.")


def _take_means(store, todo: dict[tuple, Path], bar, *, file: Path, shape, dtype):
    """Append the means of those grids that `file`, of another cache, holds already; they leave `todo`."""
    row_of = _rows_next_door(file, math.prod(shape) * dtype.itemsize)
    known = sorted(todo.keys() & row_of.keys(), key=row_of.get)  # in the order of the disk
    grids = Features(file, np.array([row_of[stamp] for stamp in known], np.int64), shape, dtype)
    for start in range(0, len(known), 256):
        stamps = known[start : start + 256]
        store.append(stamps, _mean(grids[range(start, start + len(stamps))]).numpy())
        for stamp in stamps:
            del todo[stamp]
        bar.update(len(stamps))


def _store_encoded(store, stamps, own, bar) -> dict[tuple, str]:
    """Append what this process and the others encode, in turn; returns {stamp: reason} of those that did not come."""
    failed = dict.fromkeys(stamps, "no shard holds it by this name")
    senders = [*range(process_group.world_size())]
    while senders:
        for sender in [*senders]:
            found = process_group.receive(sender) if sender else next(own)
            if found is None:
                senders.remove(sender)
                continue
            positions, features, reasons = found
            failed |= {
                stamps[position]: why
                for position, why in reasons.items()
                if stamps[position] in failed
            }
            for position in positions:
                failed.pop(stamps[position], None)
            if positions:
                store.append([stamps[position] for position in positions], features)
            bar.update(len(positions) + len(reasons))
    return failed


def _stamps(
    paths: Sequence[Path] | Sequence[ShardImage],
) -> tuple[dict[Path, tuple], dict[Path, str]]:
    """{path: stamp} and {path: reason} of files that have none."""
    stamps, missing = {}, {}
    for path in paths:
        try:
            stamps[path] = _stamp(path)
        except OSError as error:
            missing[path] = error.strerror
    return stamps, missing


def _stamp(path: Path | ShardImage) -> tuple[bytes, int, int]:
    """What a file is known by: resolved path, size in bytes, modification time in ns; for any name and time a blob
    and two of SQLite's signed integers. Raises: OSError where there is no such file."""
    if isinstance(path, ShardImage):
        name, size, modified = path.stamp()
    else:
        status = path.stat()
        name, size, modified = str(path.resolve()), status.st_size, status.st_mtime_ns
    return name.encode("utf-8", "surrogatepass"), size, modified % 2**63


def _cache_folder(cache_dir: Path, key: dict, suffix: str) -> Path:
    """The folder of this key, made if needed."""
    text = json.dumps(key, sort_keys=True, indent=1)
    name = re.sub(r"[^\w.-]", "_", str(key.get("encoder", "encoder")))
    folder = cache_dir / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:12]}{suffix}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
        if not (folder / "key.json").exists():
            with replace_file(folder / "key.json") as opened:
                opened.write(text.encode())
    except OSError as error:
        raise ValueError(
            f"--cache_dir {cache_dir}: cannot be used ({error.strerror}); expected a folder to write in"
        ) from None
    return folder


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


@contextlib.contextmanager
def _transaction(file: Path):
    """The index at `file` opened, and what is done with it committed as one.

    A connection lives no longer: SQLite forbids to carry one into the worker processes.
    """
    with contextlib.closing(sqlite3.connect(file)) as index, index:
        index.execute("PRAGMA journal_mode=DELETE")
        index.execute("PRAGMA synchronous=FULL")
        yield index


def _read_rows(index: sqlite3.Connection, stored: int) -> dict[tuple, int]:
    """{stamp: row} of the rows below `stored`. Raises: sqlite3.DatabaseError when the index is damaged."""
    (verdict,) = index.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)
    found = index.execute(
        "SELECT path, size, modified, row FROM images WHERE row BETWEEN 0 AND ?", (stored - 1,)
    )
    return {tuple(stamp): row for *stamp, row in found}


def _read_index(file: Path, stored: int) -> tuple[dict[tuple, int], dict[tuple, str]]:
    """{stamp: row} and {stamp: reason} of an index, made if needed, rid of rows that were not stored."""
    with _transaction(file) as index:
        index.executescript(TABLES)
        row_of = _read_rows(index, stored)
        index.execute("DELETE FROM images WHERE row NOT BETWEEN 0 AND ?", (stored - 1,))
        faults = index.execute("SELECT path, size, modified, reason FROM faults")
        return row_of, {tuple(stamp): reason for *stamp, reason in faults}


def _read_or_restart_index(file: Path, stored: int) -> tuple[dict[tuple, int], dict[tuple, str]]:
    """As `_read_index`; a damaged one is replaced by an empty one: it is only a cache's."""
    try:
        return _read_index(file, stored)
    except DAMAGE as error:
        reason = " ".join(str(error).split())
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in NOT_DAMAGE:
            raise OSError(f"{file}: {reason}") from None
        print(f"{file}: damaged ({reason}): images are encoded again", file=sys.stderr, flush=True)
        for damaged in file.parent.glob(f"{file.name}*"):  # and its journal
            damaged.unlink()
        return _read_index(file, stored)


def _rows_next_door(file: Path, row_bytes: int) -> dict[tuple, int]:
    """{stamp: row} of another cache, which another run may be filling; none where it is absent or damaged."""
    address = f"{file.with_name(INDEX).absolute().as_uri()}?mode=ro"
    with contextlib.suppress(*DAMAGE, FileNotFoundError):
        stored = file.stat().st_size // row_bytes
        with contextlib.closing(sqlite3.connect(address, uri=True)) as index:
            return _read_rows(index, stored)
    return {}


class _Store:
    """A cache folder opened for appending: rows reach the disk first, then the index that names them."""

    def __init__(self, file: Path, row_bytes: int):
        self.file, self.row_bytes, self.index = file, row_bytes, file.with_name(INDEX)
        self.data = file.open("ab", buffering=0)
        stored = self.data.seek(0, os.SEEK_END) // row_bytes
        self.row_of, self.faults = _read_or_restart_index(self.index, stored)
        self.rows = max(self.row_of.values(), default=-1) + 1
        self.data.truncate(self.rows * row_bytes)  # a killed run's rows that no index names
        self.data.seek(0, os.SEEK_END)
        self.pending, self.committed_at = {}, time.monotonic()

    def append(self, stamps: list[tuple], block: np.ndarray):
        """Add rows (n, ...), of `row_bytes` bytes each, for these files."""
        if self.data.write(block) != block.nbytes:  # a short write: the disk is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.data.name)
        self.pending |= {stamp: row for row, stamp in enumerate(stamps, start=self.rows)}
        self.rows += len(stamps)
        if time.monotonic() - self.committed_at > COMMIT_SECONDS:
            self.commit()

    def commit(self):
        """Make the rows so far durable."""
        os.fsync(self.data.fileno())
        self._insert("images", self.pending)
        self.row_of |= self.pending
        self.pending, self.committed_at = {}, time.monotonic()

    def remember_faults(self, faults: dict[tuple, str]):
        """{stamp: reason} of images that a whole pass over their shards did not bring: the next run makes none."""
        self._insert("faults", faults)

    def _insert(self, table, values):
        try:
            with _transaction(self.index) as index:
                entries = [(*stamp, value) for stamp, value in values.items()]
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
