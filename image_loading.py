"""Images as pixels: files, WebDataset shards or saved datasets, decoded in worker processes.

    pixels = load_image("dog.jpg", 224)  # (224, 224, 3) uint8
    for positions, pixels, reasons in decode_images(paths, 224, batch_size=8, num_workers=2): ...
    shards = find_shards("coco-{000..059}.tar", PICTURE_NAME)  # or a folder, a URL, "pipe:COMMAND"
    for name, content in read(shards.urls, {"val2014/a.jpg"}): ...  # members' names and bytes
    digests = content_digests(folder, names)  # (images,) int64: files are told apart by content

Shards are read as streams and never unpacked to disk. A stream has no random access, so the caller
names every image it wants, and one pass brings them all. Members' names are only compared with
those names: none can choose a place to write to.
"""

import hashlib
import importlib
import io
import itertools
import json
import math
import operator
import os
import re
import signal
import struct
import sys
import tarfile
import warnings
import zlib
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pillow_heif
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader

import process_group
import saved_datasets
from progress import Progress
from runtime import available_cpus, printable

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
PICTURE_SUFFIXES |= {".ppm", ".heic", ".heif"}
# pictures of formats that are not read: cameras' raw files, drawings, editors' own
OTHER_SUFFIXES = {".svg", ".eps", ".ai", ".psd", ".xcf", ".jxl", ".jp2", ".ico", ".tga", ".exr"}
OTHER_SUFFIXES |= {".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".pef"}
# Pillow opens other formats too, some by starting a program (EPS: Ghostscript)
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF", "HEIF")
MAX_IMAGE_BYTES = 2**28  # of a shard's member; bytes beyond it are not read

DIGEST_BYTES = 2**14  # of either end of a file
DIGEST_CHUNK, DIGEST_THREADS = 256, 8  # files at a time; each thread mostly waits for the disk

pillow_heif.register_heif_opener()
Image.MAX_IMAGE_PIXELS = None  # Pillow's limit; ours is what decoding takes, see `_check_memory`
MAX_DECODING_BYTES = 3 * 2**28  # of a picture
DECODER_BYTES = {"TIFF": 8, "HEIF": 9, "AVIF": 10, "WEBP": 16}  # a pixel, measured
DRAWN_PIXELS = 1024  # longest side of a picture that is to be drawn

# what damaged files raise, beside OSError
DAMAGE = (EOFError, ValueError, LookupError, ArithmeticError, RuntimeError, MemoryError, zlib.error)
IMAGE_ERRORS = (OSError, *DAMAGE, TypeError, SyntaxError, struct.error)
SHARD_ERRORS = (OSError, *DAMAGE, tarfile.TarError, ImportError)  # hf: needs another package

SHARD_NAME = re.compile(r"\.(tar|tar\.gz|tgz)}*$", re.IGNORECASE)  # or a pattern: "{a.tar,b.tar}"
SCHEME = re.compile(r"(^|::)[a-z][a-z0-9+.-]+:(?!:)")  # "::" stands between shards
# exit statuses of a command that was stopped early: curl's, a shell's, and death by SIGPIPE
STOPPED_EARLY = [0, 23, 141, -13]


# ----------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class Shards:
    """Stands where an image folder stands elsewhere: `shards / name` is an image.

    source: what the user typed; made absolute when it is local.
    size, digest: of the local shards together, in bytes, and of their sizes and modification
        times; 0 for remote ones.
    urls: one per shard.
    names: images of all splits, which one pass encodes together.
    """

    source: str
    size: int
    digest: int
    urls: tuple[str, ...] = field(compare=False)
    names: tuple[str, ...] = field(compare=False, default=())

    def __str__(self) -> str:
        return self.source

    def __truediv__(self, name: str) -> "ShardImage":
        return ShardImage(self, name)


class ShardImage(NamedTuple):
    """An image by its member's name; stands where a path stands elsewhere."""

    shards: Shards
    name: str

    def __str__(self) -> str:
        return f"{self.shards}!{self.name}"

    def stamp(self) -> tuple[str, int, int]:
        """The feature cache's key for it, like `feature_cache._stamps` for files."""
        return str(self), self.shards.size, self.shards.digest


class ImagePaths(Sequence):
    """`folder / name` of each name, joined when it is asked for: a million paths take 0.5 GB."""

    def __init__(self, folder: "Path | Shards", names: Sequence[str]):
        self.folder, self.names = folder, names

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return ImagePaths(self.folder, self.names[index])
        return self.folder / self.names[index]


def all_but(paths: Sequence, left_out: Container) -> Sequence:
    """The others, in their order."""
    if isinstance(paths, ImagePaths):
        names = [name for name in paths.names if paths.folder / name not in left_out]
        return ImagePaths(paths.folder, names)
    return [path for path in paths if path not in left_out]


def find_shards(source: str | Path, picture_name: re.Pattern) -> Shards | None:
    """The shards that `source` means; None when it is an ordinary folder or does not name shards.

    Shards are: a name or URL that ends in .tar, .tar.gz or .tgz, with braces (`{000..059}`) if
    there are several; "pipe:COMMAND"; a folder of such files without subfolders and without files
    that match `picture_name`; and a dataset that Hugging Face's `datasets` saved.
    Raises: FileNotFoundError when a local shard is missing, ValueError for a malformed pattern.
    """
    source = str(source)
    if os.path.isdir(source):  # noqa: PTH112 - accepts names that are too long for a file
        if saved_datasets.is_saved(Path(source)):
            return _local_shards(source, saved_datasets.arrow_files(Path(source)))
        paths = _shards_in(Path(source), picture_name)
        return _local_shards(source, paths) if paths else None
    if is_remote(source):
        return Shards(source, 0, 0, tuple(_expand(source)))
    if SHARD_NAME.search(source):
        return _local_shards(source, _expand(source))
    return None


def is_remote(source: str) -> bool:
    """Whether a command fetches these shards: curl, gsutil, or the one after "pipe:"."""
    return bool(SCHEME.search(source)) and not os.path.isdir(source)  # noqa: PTH112 - as above


def refuse_remote(source: str):
    """Guards against a checkpoint or a file, which may come from anyone and must not run a command.

    Raises: ValueError when opening these shards would run one.
    """
    if is_remote(source):
        raise ValueError(
            f"--image_dir {source}: shards that a command fetches are not opened on a "
            "checkpoint's word, nor a file's; give --image_dir yourself"
        )


def _shards_in(folder: Path, picture_name: re.Pattern) -> list[Path]:
    """A folder's shards in the order of their names; [] when it is an ordinary image folder."""
    shards = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if SHARD_NAME.search(entry.name):
                shards.append(Path(entry.path))
            elif picture_name.search(entry.name) or entry.is_dir():
                return []
    return sorted(shards)


def _local_shards(source: str, paths: Iterable[str | Path]) -> Shards:
    # absolute, so that webdataset takes none of them for a URL or a command
    paths = [str(Path(path).absolute()) for path in paths]
    if missing := [path for path in paths if not os.path.isfile(path)]:  # noqa: PTH113 - as above
        raise FileNotFoundError(
            f"--image_dir {source}: {len(missing)} of {len(paths)} shards are missing, "
            f"the first is {missing[0]}; expected tar files that hold the images"
        )
    stats = [(status.st_size, status.st_mtime_ns) for status in map(os.stat, paths)]
    digest = int.from_bytes(hashlib.sha256(json.dumps(stats).encode()).digest()[:8])
    size = sum(size for size, _ in stats)
    return Shards(str(Path(source).resolve()), size, digest, tuple(paths))


def _expand(source: str) -> list[str]:
    """One URL or path per shard of a pattern."""
    if "{" not in source and "::" not in source:
        return [source]
    shardlists = _webdataset("shardlists")
    try:
        return shardlists.expand_urls(source)
    except ValueError as error:
        raise ValueError(f"--image_dir {source}: not a pattern of shards ({error})") from None


def _webdataset(module: str):
    """A module of webdataset, which only shards need."""
    try:
        return importlib.import_module(f"webdataset.{module}")
    except ImportError:
        raise ValueError(
            "shards need webdataset, which is not installed: pip install webdataset"
        ) from None


def read(urls: Iterable[str], wanted: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the members named in `wanted`, each once, shard after shard.

    At most MAX_IMAGE_BYTES are read of each. Reading stops once every wanted member was found.
    Raises: OSError naming the shard that cannot be read to its end.
    """
    missing = set(wanted)
    for url in urls:
        if not missing:
            return
        try:
            if url.endswith(".arrow"):
                yield from _read_arrow(url, missing)
            else:
                yield from _read_shard(url, missing)
        except SHARD_ERRORS as error:
            reason = _one_line(error).removeprefix(f"{url}: ")
            raise OSError(f"{url}: a shard that cannot be read: {reason}") from None


def _read_shard(url: str, missing: set[str]) -> Iterator[tuple[str, bytes]]:
    """As `read`, of one shard; what it finds leaves `missing`.

    This loop is ours because webdataset.tariterators reads every member whole and keeps the header
    of every member it skips: measured with 1.0.2, a shard of 9 KB whose sparse member claims 1 GiB
    took 2 GiB of memory, and a stream of 300,000 other members took 140 MB.
    """
    gopen = _webdataset("gopen")
    with gopen.gopen(url) as stream:  # its end raises OSError if the command behind it failed
        gopen.set_options(stream, ignore_status=STOPPED_EARLY)
        with tarfile.open(fileobj=stream, mode="r|*") as archive:
            for member in archive:
                archive.members.clear()  # tarfile keeps all headers, for random access
                name = str(PurePosixPath(member.name))
                if member.isreg() and name in missing:
                    missing.remove(name)
                    yield name, archive.extractfile(member).read(MAX_IMAGE_BYTES)
                if not missing:
                    return
        while stream.read(2**20):  # the padding: a command may fail if its reader leaves early
            pass


def _read_arrow(url: str, missing: set[str]) -> Iterator[tuple[str, bytes]]:
    """As `_read_shard`, of a file of a saved dataset."""
    for name, content in saved_datasets.read_pictures(Path(url), missing, MAX_IMAGE_BYTES):
        missing.remove(name)
        yield name, content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --------------------------------------------------------------------------------------- pictures


def open_image(
    path: str | Path | ShardImage, content: bytes | None = None, size: int | None = None
) -> Image.Image:
    """The image in its own size, RGB, turned as EXIF says.

    Transparency becomes white; 16-bit grey is scaled to 8 bits; an animation gives its first frame.

    Args:
        content: the file's bytes, where `path` is only a name.
        size: allows a JPEG to come at a half, a quarter or an eighth of its size, where both sides
            keep twice `size` pixels: that takes a fraction of the time and memory.
    Raises: ValueError naming the file when it is not a readable image, or decoding it would take
        more than MAX_DECODING_BYTES.
    """
    path = Path(path) if content is None else path
    try:
        file = _regular_file(path) if content is None else io.BytesIO(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                original = image.size
                if size:
                    image.draft(None, (2 * size, 2 * size))
                _check_memory(image, original)
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return _to_rgb(image)
    except UnidentifiedImageError:
        formats = ", ".join(IMAGE_FORMATS)
        raise ValueError(f"{path}: not a readable image (none of {formats})") from None
    except IMAGE_ERRORS as error:
        raise ValueError(f"{path}: not a readable image ({_one_line(error)})") from None


def _regular_file(path: Path) -> Path:
    if not path.is_file():  # a FIFO, too: opening it would wait for a writer
        raise ValueError("it is a folder" if path.is_dir() else "there is no such file")
    return path


def _check_memory(image: Image.Image, original: tuple[int, int]):
    """Refuse a picture that takes too much memory to decode at `image.size`.

    original: its size as it is stored. Raises: ValueError with size, limit and remedy.
    """
    needed = math.prod(image.size) * _bytes_per_pixel(image)
    if image.format in ("JPEG", "MPO") and _has_several_scans(image):
        _, across, down, _ = zip(*image.layer, strict=True)  # how finely components are sampled
        samples = sum(map(operator.mul, across, down)) / (max(across) * max(down))  # a pixel
        needed += math.prod(original) * samples * 2  # all coefficients, 2 bytes each
    if needed > MAX_DECODING_BYTES:
        raise ValueError(
            f"decoding its {original[0]} x {original[1]} pixels takes {needed / 1e6:,.0f} MB, more "
            f"than {MAX_DECODING_BYTES / 1e6:,.0f}: scale it down"
        )


def _bytes_per_pixel(image: Image.Image) -> int:
    """What decoding and `_to_rgb` hold at once, at most."""
    stored = 1 if image.mode in ("1", "L", "P") else 4
    decoder = DECODER_BYTES.get(image.format, stored)
    if image.mode == "RGB":
        return decoder
    return decoder + (12 if image.has_transparency_data or image.mode.startswith("I") else 4)


def _has_several_scans(jpeg: Image.Image) -> bool:
    """Whether libjpeg must hold all coefficients until the last scan has refined or added some."""
    if "progressive" in jpeg.info:
        return True
    # Pillow has read the first scan's header; of a Multi-Picture file (MPO) we do not know
    length = 6 + 2 * jpeg.layers  # if all components are in it
    jpeg.fp.seek(max(0, jpeg.fp.tell() - length))
    return jpeg.fp.read(3) != struct.pack(">HB", length, jpeg.layers)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip it to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def open_images(paths: Sequence[Path] | Sequence[ShardImage]) -> Iterator[Image.Image]:
    """Each in turn, to be drawn: as `open_image`, but no side is longer than DRAWN_PIXELS.

    ShardImages must come from the same shards, which are read once, before the first image.
    """
    contents = {}
    if in_shards(paths):
        contents = dict(read(paths[0].shards.urls, [path.name for path in paths]))
    for path in paths:
        content = contents.get(path.name, b"") if in_shards(paths) else None
        image = open_image(path, content, DRAWN_PIXELS)
        image.thumbnail((DRAWN_PIXELS, DRAWN_PIXELS))
        yield image


def load_image(
    path: str | Path | ShardImage,
    size: int,
    content: bytes | None = None,
    interpolation: str = "bilinear",
    box: Sequence[float] | None = None,
) -> np.ndarray:
    """The whole image, squashed to the square that encoders take: (size, size, 3) uint8.

    Args:
        interpolation: one of Pillow's by name.
        box: left, top, width, height of a part to be seen instead, as shares of the image's sides.
    Raises: as `open_image`.
    """
    if box is None:
        image, part = open_image(path, content, size), None
    else:
        left, top, width, height = box
        image = open_image(path, content, math.ceil(size / min(width, height)))
        across, down = image.size
        right, bottom = min(left + width, 1) * across, min(top + height, 1) * down
        part = (left * across, top * down, right, bottom)
    if part or image.size != (size, size):
        image = image.resize((size, size), Image.Resampling[interpolation.upper()], part)
    return np.array(image)


def shown_size(content: bytes) -> tuple[int, int]:
    """Width and height of an image that `open_image` reads, turned as EXIF says, from its header."""
    with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
        is_turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return image.size[::-1] if is_turned else image.size


def pictures_in(path: Path) -> list[Path]:
    """A file as it is; of a folder its pictures in the order of their names.

    Says on stderr how many it holds of formats that are not read.
    Raises: FileNotFoundError, and ValueError when a folder has no pictures.
    """
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"--images {path}: no such file or folder")
        return [path]
    files = sorted(path.iterdir())
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
    others = [file.name for file in files if file.suffix.lower() in OTHER_SUFFIXES]
    if others:
        named = printable(", ".join(others[:3])) + (", ..." if len(others) > 3 else "")
        print(
            f"--images {path}: left out {len(others)} of formats that are not read: {named}",
            file=sys.stderr,
        )
    if not pictures:
        suffixes = " ".join(sorted(PICTURE_SUFFIXES))
        raise ValueError(f"--images {path}: no pictures in this folder ({suffixes})")
    return pictures


def content_digests(folder: Path, names: Sequence[str]) -> torch.Tensor:
    """(images,) int64 of files below a folder: the same for the same content under any name.

    64 bits of SHA-256 over the file's size and its first and last 16 KiB; 0 where it cannot be
    read. The processes of a run share the reading.
    """
    own = names[process_group.shard(len(names))]
    chunks = [own[rows.start : rows.stop] for rows in _split(len(own), DIGEST_CHUNK)]

    def digests_of(chunk):
        return [_content_digest(folder / name) for name in chunk]

    bar = {"each": DIGEST_CHUNK, "disable": process_group.rank() > 0}
    with ThreadPoolExecutor(DIGEST_THREADS) as pool:
        digests = pool.map(digests_of, chunks)
        digests = [*Progress(digests, "hashing", len(chunks), "images", **bar)]
    own_digests = torch.tensor(list(itertools.chain.from_iterable(digests)), dtype=torch.int64)
    return torch.cat(process_group.all_gather(own_digests))


def _content_digest(path: Path) -> int:
    try:
        with _regular_file(path).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            ends = file.read(DIGEST_BYTES)
            file.seek(max(DIGEST_BYTES, size - DIGEST_BYTES))
            ends += file.read(DIGEST_BYTES)
    except (OSError, ValueError):
        return 0
    digest = hashlib.sha256(f"{size}:".encode() + ends).digest()
    return int.from_bytes(digest[:8], signed=True)


# ---------------------------------------------------------------------------------------- batches


class ImageFiles(torch.utils.data.Dataset):
    """Position -> (position, (3, size, size) uint8 pixels), or (position, why it is unreadable)."""

    def __init__(
        self,
        paths: Sequence[Path],
        size: int,
        interpolation: str = "bilinear",
        boxes: torch.Tensor | None = None,
    ):
        """boxes: (paths, 4), each image's as `load_image` takes it; None: whole images."""
        self.paths, self.how = paths, {"size": size, "interpolation": interpolation}
        self.boxes = boxes

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, position: int):
        part = {} if self.boxes is None else {"box": self.boxes[position].tolist()}
        return position, _pixels_or_reason(self.paths[position], **self.how, **part)

    def __getitems__(self, positions: Sequence[int]) -> list:
        """A batch's items in their order: by threads, unless this is one of several processes.

        Pillow decodes and resizes without Python's lock.
        """
        if torch.utils.data.get_worker_info():
            return [self[position] for position in positions]
        # `catch_warnings` is not safe in threads: this one outlives those of `open_image`
        with warnings.catch_warnings(), ThreadPoolExecutor(available_cpus()) as pool:
            warnings.simplefilter("ignore")
            return list(pool.map(self.__getitem__, positions))


class ShardImages(torch.utils.data.IterableDataset):
    """The items of `ImageFiles`, in the order of the shards; (None, reason) for a broken shard.

    Processes of a run, and their workers, read different shards. Images that no shard holds are
    left out.
    """

    def __init__(self, images: Sequence[ShardImage], size: int, interpolation: str = "bilinear"):
        self.images, self.how = images, {"size": size, "interpolation": interpolation}
        self.urls = images[0].shards.urls[process_group.rank() :: process_group.world_size()]

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        urls = self.urls[worker.id :: worker.num_workers] if worker else self.urls
        position_of = {image.name: position for position, image in enumerate(self.images)}
        try:
            for name, content in read(urls, position_of):
                position = position_of[name]
                yield position, _pixels_or_reason(self.images[position], content, **self.how)
        except (OSError, ValueError) as error:
            # an item, because torch would add the worker's traceback to an exception
            yield None, str(error)


def decode_images(
    paths: Sequence[Path] | Sequence[ShardImage],
    image_size: int,
    batch_size: int,
    num_workers: int,
    interpolation: str = "bilinear",
) -> Iterator[tuple[list[int], np.ndarray, dict[int, str]]]:
    """This process's share of the images, batch by batch.

    Yields: positions of the readable images, their pixels (n, 3, image_size, image_size) uint8,
        and {position: reason} of the unreadable ones.
    Raises: OSError when a shard cannot be read.
    """
    if in_shards(paths):
        dataset = ShardImages(paths, image_size, interpolation)
        batches = _data_loader(dataset, min(num_workers, len(dataset.urls)), batch_size=batch_size)
    else:
        ranges = _split(len(paths), batch_size)
        local_ranges = ranges[process_group.rank() :: process_group.world_size()]
        batches = _file_loader(paths, image_size, local_ranges, num_workers, interpolation)
    for positions, pixels, reasons in batches:
        if None in reasons:
            raise OSError(reasons[None])
        yield positions, pixels, reasons


def load_batches(
    paths: Sequence[Path],
    image_size: int,
    batches_of_rows: Sequence[Sequence[int]],
    num_workers: int = 0,
    interpolation: str = "bilinear",
    boxes: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Pixels (n, 3, image_size, image_size) uint8 for each batch of positions in `paths`, in order.

    boxes: (paths, 4), the part of each image that is seen, as `load_image` takes it.
    Raises: ValueError naming the first image that cannot be read.
    """
    batches = [torch.as_tensor(rows).tolist() for rows in batches_of_rows]
    loader = _file_loader(paths, image_size, batches, num_workers, interpolation, boxes)
    for _, pixels, reasons in loader:
        for position, reason in reasons.items():
            raise ValueError(f"{paths[position]}: {reason}")
        yield torch.from_numpy(pixels)


def find_unreadable(
    paths: Sequence[Path], *, num_workers: int = 0, what: str = "images"
) -> dict[Path, str]:
    """{path: reason} of the images that cannot be read: decodes each once.

    For runs without a feature cache, which would meet them while it is filled. `what`: what a
    progress bar calls them.
    """
    if in_shards(paths):
        raise ValueError(
            f"--no_feature_cache: {paths[0].shards} are shards, which are read in order only: "
            "leave it out"
        )
    # at 8 pixels a JPEG is decoded fastest
    batches = _file_loader(paths, 8, _split(len(paths), 32), num_workers)
    unreadable = {}
    silent = process_group.rank() > 0
    with Progress(None, f"checking {what}", len(paths), "images", disable=silent) as bar:
        for positions, _, reasons in batches:
            unreadable |= {paths[position]: reason for position, reason in reasons.items()}
            bar.update(len(positions) + len(reasons))
    return unreadable


def in_shards(paths: Sequence) -> bool:
    """Whether these images are members of shards."""
    return bool(paths) and isinstance(paths[0], ShardImage)


def _split(count: int, batch_size: int) -> list[range]:
    """Positions 0..count-1 as batches; the last may be smaller."""
    return [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]


def _pixels_or_reason(path, content=None, **how):
    try:
        return load_image(path, content=content, **how).transpose(2, 0, 1)
    except ValueError as error:
        return str(error).removeprefix(f"{path}: ")


def _file_loader(
    paths: Sequence[Path],
    size: int,
    batches: Sequence[Sequence[int]],
    num_workers: int,
    interpolation: str = "bilinear",
    boxes: torch.Tensor | None = None,
) -> DataLoader:
    dataset = ImageFiles(paths, size, interpolation, boxes)
    return _data_loader(dataset, min(num_workers, len(batches)), batch_sampler=batches)


def _data_loader(dataset, num_workers: int, **batches) -> DataLoader:
    return DataLoader(
        dataset,
        collate_fn=_collate,
        num_workers=min(num_workers, available_cpus()),
        worker_init_fn=_set_worker_signals,
        generator=torch.Generator(),  # its own: a loader must not advance the global random state
        **batches,
    )


def _collate(items):
    """A batch as `decode_images` yields it.

    Pixels stay an array, which travels to the main process through a pipe: tensors would fill
    /dev/shm, which is small inside a container.
    """
    readable = [(position, pixels) for position, pixels in items if isinstance(pixels, np.ndarray)]
    reasons = {position: reason for position, reason in items if isinstance(reason, str)}
    pixels = [pixels for _, pixels in readable]
    stacked = np.stack(pixels) if pixels else np.empty((0, 3, 0, 0), np.uint8)
    return [position for position, _ in readable], stacked, reasons


def _set_worker_signals(_worker_id):
    """Leaves Ctrl-C, which reaches workers too, to the main process; it stops them by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
