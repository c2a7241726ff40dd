"""The feature cache: each picture is encoded once in its life, whatever runs ask for it, and read from a memory map.

    features, unreadable = cached_features(paths, encoder, cache_dir="feature_cache", key=..., ...)
    features[torch.tensor([3, 0])]  # (2, P, F)

Nothing here knows a model: `encode` is any function from pixels to features, and the caller names its key.
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
import shutil
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
from checkpoints import replace_file
from image_loading import ShardImage

CACHE_FORMAT = 2
COMMIT_SECONDS = 2.0  # work that a killed run may lose


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
    The cache is a folder per key and dtype: `features.f16` or `.f32` (a row per image), `index` (which file
    each row came from: path, size, modification time), `key.json`. Rows reach the disk before the index
    names them, so a run that is killed at any moment leaves a cache that the next one continues; a second run waits for
    the first. Processes of one run share the work: rank 0 keeps the cache, the others hand it what they encode, and all
    must see its folder.
    Shards are read only when the cache lacks one of their images, and then all that it lacks of `Shards.names` are
    encoded; `faults.json` remembers which did not come.
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
    known = image_loading.load_faults(folder)
    todo = _lacking(stamps, store, known)
    if shards := next(
        (path.shards for path in todo.values() if isinstance(path, ShardImage)), None
    ):
        todo |= _lacking(_stamps([shards / name for name in shards.names])[0], store, known)
    _check_free_space(folder, len(todo) * store.row_bytes)
    with tqdm(
        total=len(todo), desc="encoding", unit="image", disable=None if progress and todo else True
    ) as bar:
        if take_means:
            take_means(store, todo, bar)
        own = encoded(process_group.broadcast(list(todo.values())))
        failed = known | _store_encoded(store, list(todo), own, bar)
    if shards:
        image_loading.save_faults(folder, failed)
    return stamps, unreadable | {
        path: failed[stamp] for path, stamp in stamps.items() if stamp in failed
    }


def _lacking(stamps, store, known):
    """{stamp: path}, one path per file, of those that are neither stored nor known to be unreadable."""
    return {
        stamp: path
        for path, stamp in stamps.items()
        if stamp not in store.row_of and stamp not in known
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
    index = file.with_name("index")
    if not (file.exists() and index.exists()):
        return
    lines = index.read_bytes()  # before the size: another run may be adding rows
    row_of, _ = _read_index(lines, file.stat().st_size // (math.prod(shape) * dtype.itemsize))
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
    """{path: (resolved path, size in bytes, modification time in ns)} and {path: reason} of files that have none."""
    stamps, missing = {}, {}
    for path in paths:
        if isinstance(path, ShardImage):
            stamps[path] = path.stamp()
            continue
        try:
            status = path.stat()
            stamps[path] = (str(path.resolve()), status.st_size, status.st_mtime_ns)
        except OSError as error:
            missing[path] = error.strerror
    return stamps, missing


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


def _check_free_space(folder: Path, needed: int):
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"--cache_dir {folder.parent}: the features need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "make room, name another --cache_dir, a narrower --cache_dtype or --no_feature_cache"
        )


def _read_index(index: bytes, stored: int) -> tuple[dict[tuple, int], int]:
    """{stamp: row} of an index up to its first line that is damaged or beyond `stored` rows, and the bytes up to it."""
    row_of, whole = {}, 0
    for line in index.splitlines(keepends=True):
        try:
            row, path, size, modified = json.loads(line)
            if not line.endswith(b"\n") or not 0 <= row < stored:
                break
            row_of[path, size, modified] = row
        except (ValueError, TypeError):
            break
        whole += len(line)
    return row_of, whole


class _Store:
    """The two files of a cache folder, opened for appending: rows reach the disk first, then their index lines."""

    def __init__(self, file: Path, row_bytes: int):
        self.file, self.row_bytes = file, row_bytes
        self.data = file.open("ab", buffering=0)
        self.index = file.with_name("index").open("a+b", buffering=0)
        self.row_of = self._repair()  # {stamp: row}
        self.rows = self.data.tell() // self.row_bytes
        self.pending, self.committed_at = [], time.monotonic()

    def _repair(self) -> dict[tuple, int]:
        """Cut off what a killed run left half-written; what remains is {stamp: row}."""
        self.index.seek(0)
        row_of, whole = _read_index(
            self.index.readall(), self.data.seek(0, os.SEEK_END) // self.row_bytes
        )
        self.index.truncate(whole)
        self.data.truncate((max(row_of.values(), default=-1) + 1) * self.row_bytes)
        self.data.seek(0, os.SEEK_END)
        return row_of

    def append(self, stamps: list[tuple], block: np.ndarray):
        """Add rows (n, ...), of `row_bytes` bytes each, for these files."""
        if self.data.write(block) != block.nbytes:  # a short write: the disk is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.data.name)
        for row, stamp in enumerate(stamps, start=self.rows):
            self.pending.append((row, *stamp))
        self.rows += len(stamps)
        if time.monotonic() - self.committed_at > COMMIT_SECONDS:
            self.commit()

    def commit(self):
        """Make the rows so far durable. An interrupted commit may name a row twice, which is harmless."""
        os.fsync(self.data.fileno())
        lines = b"".join(json.dumps(entry).encode() + b"\n" for entry in self.pending)
        if self.index.write(lines) != len(lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.index.name)
        os.fsync(self.index.fileno())
        self.row_of |= {tuple(stamp): row for row, *stamp in self.pending}
        self.pending, self.committed_at = [], time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        try:
            self.commit()
        finally:
            self.data.close()
            self.index.close()
