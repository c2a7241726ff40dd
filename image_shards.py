"""Images in WebDataset shards (tar files, local, by URL or from a command), read as streams and never unpacked.

    shards = find_shards("coco-{000..059}.tar", PICTURE_NAME)  # or "https://...", "pipe:COMMAND", a folder of shards
    for name, content in read(shards.urls, {"val2014/a.jpg"}): ...  # the members of these names, as bytes

A stream has no random access: what is wanted of it must be known before, and one pass brings all. Nothing here decodes
pictures, and names of members are only compared, so that none can name a place to write to.
"""

import hashlib
import importlib
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from experiment_utils import replace_file

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
    """(name, content) of the members whose names are wanted, each once, shard after shard, until there are no more.

    Raises: OSError naming the shard that cannot be read to its end.
    """
    wanted = set(wanted)
    for url in urls:
        try:
            for name, content in _members(url, wanted) if wanted else ():
                wanted.remove(name)
                yield name, content
        except FAULTS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OSError(f"{url}: a shard that cannot be read: {reason}") from None


def _members(url, wanted):
    opener = _webdataset("gopen")
    stream = opener.gopen(url)
    try:
        opener.set_options(stream, ignore_status=CUT_SHORT)
        with tarfile.open(fileobj=stream, mode="r|*") as archive:
            for member in archive:
                archive.members.clear()  # it would keep them all
                name = str(PurePosixPath(member.name))
                if member.isreg() and name in wanted:
                    yield name, archive.extractfile(member).read(MAX_IMAGE_BYTES)
                if not wanted:
                    return
        while stream.read(
            2**20
        ):  # the padding too: a command may fail when its reader leaves before its end
            pass
    finally:
        stream.close()  # raises OSError when its command failed


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
