"""Pictures as pixels: files or WebDataset shards, decoded in worker processes.

    pixels = load_image("dog.jpg", 224)  # (224, 224, 3) uint8
    for positions, pixels, reasons in decoded(paths, 224, batch_size=8, num_workers=2): ...
    shards = find_shards("coco-{000..059}.tar", PICTURE_NAME)  # or "https://...", "pipe:COMMAND", a folder of shards
    for name, content in read(shards.urls, {"val2014/a.jpg"}): ...  # the members of these names, as bytes

Shards are read as streams and never unpacked. A stream has no random access: what is wanted of it must be known before,
and one pass brings all. Names of members are only compared, so that none can name a place to write to.
"""

import hashlib
import importlib
import io
import json
import os
import re
import signal
import struct
import tarfile
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader
from tqdm import tqdm

import process_group
from checkpoints import replace_file

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

SHARD_NAME = re.compile(r"\.(tar|tar\.gz|tgz)}*$", re.IGNORECASE)
SCHEME = re.compile(r"(^|::)[a-z][a-z0-9+.-]+:(?!:)")
MAX_IMAGE_BYTES = 2**28  # a member's later bytes are not read
CUT_SHORT = [
    0,
    23,
    141,
    -13,
]  # curl's, a shell's and a command's status when its reader needs no more
FAULTS = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    ImportError,
)
FAULTS += (tarfile.TarError, zlib.error)


# ----------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class Shards:
    """What an image folder is elsewhere: `shards / name` is an image."""

    source: str  # what the user typed, made absolute
    size: int  # of the local shards together, in bytes; 0 for remote ones
    digest: int  # of the local shards' sizes and modification times; 0 for remote ones
    urls: tuple[str, ...] = field(compare=False)  # one per shard
    names: tuple[str, ...] = field(
        compare=False, default=()
    )  # images of all splits, which one pass encodes together

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
        """What the feature cache knows it by; as `feature_cache._stamps` for files."""
        return str(self), self.shards.size, self.shards.digest


def find_shards(source: str | Path, picture_name: re.Pattern) -> Shards | None:
    """The shards that `source` means; None when it is an ordinary folder, or nothing that looks like shards.

    Shards are: a name or URL that ends in .tar, .tar.gz or .tgz, with braces (`{000..059}`) if there are several;
    "pipe:COMMAND"; and a folder of such files in which nothing matches `picture_name` and no folder lies.
    Raises: FileNotFoundError when a local shard is missing, ValueError for a pattern that cannot be expanded.
    """
    source, remote = str(source), is_remote(str(source))
    if os.path.isdir(source):  # noqa: PTH112 - takes over-long names
        others = {path for path in Path(source).iterdir() if not path.name.startswith(".")}
        urls = sorted(str(path) for path in others if SHARD_NAME.search(path.name))
        others -= {*map(Path, urls)}
        if not urls or any(picture_name.search(path.name) or path.is_dir() for path in others):
            return None
    elif remote or SHARD_NAME.search(source):
        urls = _expanded(source)
    else:
        return None
    if remote:
        return Shards(source, 0, 0, tuple(urls))
    urls = [str(Path(url).absolute()) for url in urls]  # so that none can be taken for a command
    if missing := [url for url in urls if not os.path.isfile(url)]:  # noqa: PTH113 - as above
        raise FileNotFoundError(
            f"--image_dir {source}: {len(missing)} of {len(urls)} shards are missing, the first is {missing[0]}; "
            "expected tar files that hold the images"
        )
    stats = [(status.st_size, status.st_mtime_ns) for status in map(os.stat, urls)]
    digest = int.from_bytes(hashlib.sha256(json.dumps(stats).encode()).digest()[:8])
    return Shards(str(Path(source).resolve()), sum(size for size, _ in stats), digest, tuple(urls))


def is_remote(source: str) -> bool:
    """Whether shards are fetched by a command: curl, gsutil, a pipe's own."""
    return bool(SCHEME.search(source)) and not os.path.isdir(source)  # noqa: PTH112 - as above


def refuse_remote(source: str):
    """For what a checkpoint names, which may come from anyone. Raises: ValueError when opening it runs a command."""
    if is_remote(source):
        raise ValueError(
            f"--image_dir {source}: shards that a command fetches are not opened on a checkpoint's word; "
            "give --image_dir yourself"
        )


def _expanded(source: str) -> list[str]:
    if "{" not in source and "::" not in source:
        return [source]
    shardlists = _webdataset("shardlists")
    try:
        return shardlists.expand_urls(source)
    except ValueError as error:
        raise ValueError(f"--image_dir {source}: not a pattern of shards ({error})") from None


def _webdataset(module):
    try:
        return importlib.import_module(
            f"webdataset.{module}"
        )  # takes a while, and only shards need it
    except ImportError:
        raise ValueError(
            "shards need webdataset, which is not installed: pip install webdataset"
        ) from None


def read(urls: Iterable[str], wanted: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the members named in `wanted`, each once, shard after shard.

    A content ends after MAX_IMAGE_BYTES. Reading stops once every wanted member was found.
    Raises: OSError naming the shard that cannot be read to its end.
    """
    missing = set(wanted)
    for url in urls:
        if not missing:
            return
        try:
            yield from _read_shard(url, missing)
        except FAULTS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OSError(f"{url}: a shard that cannot be read: {reason}") from None


def _read_shard(url: str, missing: set[str]) -> Iterator[tuple[str, bytes]]:
    """As `read`, of one shard; what it finds leaves `missing`.

    This loop is ours because webdataset.tariterators reads every member whole and keeps the header
    of every member it skips: measured with 1.0.2, a shard of 9 KB whose sparse member claims 1 GiB
    took 2 GiB of memory, and a stream of 300,000 other members took 140 MB.
    """
    gopen = _webdataset("gopen")
    with gopen.gopen(url) as stream:  # its end raises OSError if the command behind it failed
        gopen.set_options(stream, ignore_status=CUT_SHORT)
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


def load_faults(folder: Path) -> dict[tuple[str, int, int], str]:
    """{stamp: reason} of the images that a whole pass over their shards did not bring, as `save_faults` left them."""
    try:
        return {
            tuple(stamp): str(reason)
            for stamp, reason in json.loads((folder / "faults.json").read_text())
        }
    except (OSError, ValueError, TypeError):
        return {}


def save_faults(folder: Path, faults: dict[tuple[str, int, int], str]):
    """Remember them beside the cached features: the next run need not read the shards again to learn the same."""
    with replace_file(folder / "faults.json") as file:
        file.write(json.dumps([*faults.items()], indent=0).encode())


# --------------------------------------------------------------------------------------- pictures


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
        contents = dict(read(paths[0].shards.urls, [path.name for path in paths]))
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
        self.urls = images[0].shards.urls[process_group.rank() :: process_group.world_size()]

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        urls = self.urls[worker.id :: worker.num_workers] if worker else self.urls
        position_of = {image.name: position for position, image in enumerate(self.images)}
        try:
            for name, content in read(urls, position_of):
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
        own = own[process_group.rank() :: process_group.world_size()]
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
