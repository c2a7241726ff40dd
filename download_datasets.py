"""Get the datasets and encoder weights: download, check and unpack; draw the sample dataset.

    python download_datasets.py                     # Flickr8k and Flickr30k (1.1 and 4.4 GB)
    python download_datasets.py --dataset flickr8k
    python download_datasets.py --dataset flickr8k --verify_only
    python download_datasets.py --dataset coco      # 2014 with Karpathy's splits: 20 GB
    python download_datasets.py --dataset coco --coco_year 2017 --max_images 200  # for a trial
    python download_datasets.py --dataset sample    # drawn in seconds, no network
    python download_datasets.py --entities Flickr30kEntities  # boxes.json of Flickr30k's phrases
    python download_datasets.py --dataset resnet50  # ../../resources/models/resnet50-19c8e357.pth

A dataset lies in DATA_DIR/NAME (./data/NAME): `Images/`, a captions file as its authors wrote it,
and the official split. Every file is pinned by size and checksum, so any mirror may serve it:
Flickr8k's MD5s are those that torchvision for R pins, the SHA-256s stand in Hugging Face's LFS
pointers, and resnet50's begins with the digits in its name. For COCO's zips no checksum was at
hand: their sizes are pinned, each file in them is compared with its CRC-32, and what is unpacked
with what the captions name. A broken download goes on where it
stopped (HTTP Range); a wrong file is deleted and the next source tried; TLS certificates are
checked. Flickr8k and Flickr30k are for non-commercial research: their authors hand them out at
MANUAL.

Exit status: 0 all well, 1 something failed (one line each on stderr), 2 misuse, 130 interrupted.
"""

import argparse
import gzip
import hashlib
import http.client
import itertools
import json
import lzma
import os
import pickle
import shutil
import socket
import ssl
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import coco_files
from encoder_models import ADDED, find_model
from progress import Progress
from sample_dataset import write_sample_dataset


class DownloadError(OSError):
    """A source that cannot be used: unreachable, wrong, or hostile. The next one may do."""


class Remote(NamedTuple):
    """One file of known content, and the addresses that serve it."""

    name: str
    size: int  # bytes
    checksum: str  # "md5:..." or "sha256:..."; "" of a zip for which none is known
    urls: tuple[str, ...]
    keep: tuple[str, ...] = ()  # base names worth unpacking, as shell patterns
    into: str = ""  # the folder for them; else pictures go into Images, the rest lies beside it


HUGGING_FACE = "https://huggingface.co"
GITHUB_FLICKR8K = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
# The authors' own buckets; at images.cocodataset.org itself, Amazon's certificate does not fit.
COCO_AMAZON = "https://s3.amazonaws.com/images.cocodataset.org"
COCO_GOOGLE = "https://storage.googleapis.com/images.cocodataset.org"
FAST_AI = "https://s3.amazonaws.com/fast-ai-coco"
PJREDDIE = "https://pjreddie.com/media/files"


def karpathy_splits(name):
    """Karpathy's captions and the official splits: one archive for Flickr8k, Flickr30k and COCO."""
    return Remote(
        "caption_datasets.zip",
        36_745_453,
        "sha256:4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
        (
            "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
            f"{HUGGING_FACE}/datasets/gpantaz/karpathy_split/resolve/main/caption_datasets.zip",
            f"{HUGGING_FACE}/datasets/acul3/pmd_indonesia/resolve/main/data/caption_datasets.zip",
        ),
        (f"dataset_{name}.json",),
    )


def coco_pictures(subset, size, mirror):
    """COCO's zip of one folder of pictures."""
    urls = f"{COCO_AMAZON}/zips/{subset}.zip", f"{mirror}/{subset}.zip"
    return Remote(f"{subset}.zip", size, "", urls, ("*.jpg",), subset)


def coco_annotations(year, size, *mirrors):
    """COCO's zip of captions, of which only those are kept."""
    name = f"annotations_trainval{year}.zip"
    bases = f"{COCO_AMAZON}/annotations", f"{COCO_GOOGLE}/annotations", *mirrors
    urls = tuple(f"{base}/{name}" for base in bases)
    return Remote(name, size, "", urls, ("captions_*.json",), "annotations")


# dataset -> its parts (images, captions) -> the archives that hold the part, in the order of trial
DATASETS = {
    "flickr8k": (
        (
            Remote(
                "Flickr8k_Dataset.zip",
                1_115_419_746,
                "md5:f18a1e2920de5bd84dae7cf08ec78978",
                (f"{GITHUB_FLICKR8K}/Flickr8k_Dataset.zip",),
                ("*.jpg",),
            ),
            Remote(
                "Images.zip",
                1_112_428_992,
                "sha256:497c137eaf599f85c8cc3fd71202c220f1299a19c05351d112ec8cc99c33252f",
                (
                    f"{HUGGING_FACE}/datasets/shivangibithel/Flickr8k/resolve/main/Images.zip",
                    f"{HUGGING_FACE}/spaces/shivangibithel/Text2ImageRetrieval"
                    "/resolve/main/Images.zip",
                ),
                ("*.jpg",),
            ),
        ),
        (
            Remote(
                "Flickr8k_text.zip",
                2_340_801,
                "md5:bf6c1abcb8e4a833b7f922104de18627",
                (f"{GITHUB_FLICKR8K}/Flickr8k_text.zip",),
                ("Flickr8k.token.txt", "Flickr_8k.*Images.txt"),
            ),
            karpathy_splits("flickr8k"),
        ),
    ),
    "flickr30k": (
        (
            Remote(
                "flickr30k-images.zip",
                4_390_240_817,
                "sha256:2ce2420c0d17f0531deaa89ac657b4d5067ec519da16ff1ea12acbf5619c7391",
                (
                    f"{HUGGING_FACE}/datasets/nlphuji/flickr30k/resolve/main/flickr30k-images.zip",
                    f"{HUGGING_FACE}/datasets/TPagent/Flickr30k/resolve/main/flickr30k-images.zip",
                ),
                ("*.jpg",),
            ),
            Remote(
                "flickr30k-images.tar.gz",
                4_375_349_371,
                "sha256:051f4ddfa010caf652f74210c9aa34561251a72d00a03b0cb696b21a6d57953c",
                (
                    f"{HUGGING_FACE}/datasets/JimmyUnleashed/Flickr30k"
                    "/resolve/main/flickr30k-images.tar.gz",
                ),
                ("*.jpg",),
            ),
        ),
        (karpathy_splits("flickr30k"),),
    ),
    "coco2014": (
        (coco_annotations(2014, 252_872_794),),
        (coco_pictures("val2014", 6_645_013_297, PJREDDIE),),
        (coco_pictures("train2014", 13_510_573_713, PJREDDIE),),
    ),
    "coco2017": (
        (coco_annotations(2017, 252_907_541, FAST_AI),),
        (coco_pictures("val2017", 815_585_330, FAST_AI),),
        (coco_pictures("train2017", 19_336_861_798, FAST_AI),),
    ),
}
# what a dataset does without: its splits are then drawn
OPTIONAL = {"coco2014": (karpathy_splits("coco"),)}
FOLDERS = {f"coco{year}": "coco" for year in coco_files.YEARS}  # below DATA_DIR
# (images, captions) a folder must hold at least. Copies differ: of Flickr8k's 8,091 images 8,000
# are in a split, of Flickr30k's 31,783 Karpathy's captions cover 31,014. The smaller number is
# complete for every published experiment.
EXPECTED = {"flickr8k": (8_000, 40_000), "flickr30k": (31_014, 155_070)}
EXPECTED |= {"coco2014": (123_287, 616_767), "coco2017": (123_287, 616_767)}
PICTURES = {".jpg", ".jpeg", ".png"}
CAPTION_FILES = ("captions.txt", "results.csv", "Flickr8k.token.txt", "dataset_*.json")
MANUAL = {
    "flickr8k": "https://forms.illinois.edu/sec/1713398",
    "flickr30k": "https://forms.illinois.edu/sec/229675",
    "coco2014": "https://cocodataset.org/#download",
    "coco2017": "https://cocodataset.org/#download",
}
RESNET50 = Remote(
    "resnet50-19c8e357.pth",
    102_502_400,
    "sha256:19c8e3572231adff6824a2da93fd67b5986919a2e65f8b6007eab4edee220097",
    ("https://download.pytorch.org/models/resnet50-19c8e357.pth",),
)
WEIGHTS_DIR = Path("../../resources/models")  # from the folder the commands run in

ATTEMPTS = 5  # in a row without a new byte
RETRY_SECONDS = 2.0  # before the second attempt; doubles with each one
TIMEOUT_SECONDS = 60
# What decompressors raise for a damaged archive.
DAMAGE = (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)
# More than every archive above has; an archive that has still more is a bomb.
MAX_MEMBERS, MAX_UNPACKED_BYTES = 150_000, 25_000_000_000
# of single pictures: threads that fetch, the largest answer, and what is reckoned for one
FETCHERS, MAX_PICTURE_BYTES, PICTURE_BYTES = 8, 2**25, 200_000


# ------------------------------------------------------- folders that appear complete or not at all


def holds_something(folder):
    """Whether `folder` exists and is not empty."""
    return folder.exists() and any(folder.iterdir())


@contextmanager
def new_folder(folder, replace=False):
    """Yield an empty sibling folder; it becomes `folder` at the end, or is removed on an exception.

    What `folder` holds by then is kept (another process was faster) unless `replace` is on.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists() and (replace or not holds_something(folder)):
            folder.rename(old)
        if not folder.exists():
            partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# -------------------------------------------------------------------------------------- downloading


def fetch(url, part, size=None):
    """Download `url` into `part` until it has `size` bytes, going on where an attempt stopped.

    size: None for a picture, whose size is what the server says, at most MAX_PICTURE_BYTES.
    Raises: DownloadError if the server refuses, offers another size, or sends nothing new ATTEMPTS
    times in a row.
    """
    failures, best = 0, part.stat().st_size if part.exists() else 0
    while True:
        try:
            return fetch_once(url, part, size)
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise DownloadError(f"{url}: HTTP {error.code} {error.reason}") from None
            reason = f"HTTP {error.code} {error.reason}"
        except urllib.error.URLError as error:  # no connection
            if isinstance(error.reason, socket.gaierror | ssl.SSLCertVerificationError):
                raise DownloadError(f"{url}: {error.reason}") from None  # will not mend itself
            reason = error.reason
        except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            reason = error
        reached = part.stat().st_size if part.exists() else 0
        failures = 0 if reached > best else failures + 1
        best = max(best, reached)
        if failures >= ATTEMPTS:
            raise DownloadError(f"{url}: {reason}")
        time.sleep(RETRY_SECONDS * 2 ** max(failures - 1, 0))


def fetch_once(url, part, size):
    """One request for the bytes that `part` lacks. Raises ConnectionError if it ends early."""
    received = part.stat().st_size if part.exists() else 0
    if size is not None and received >= size:
        return
    headers = {"User-Agent": "download_datasets.py", "Range": f"bytes={received}-"}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        start = first_byte(url, response, received, size)
        size, silent = size or picture_size(url, response, start), size is None
        received = append_response(response, part, start, size, silent)
    if received < size:
        raise ConnectionError(f"the connection ended at {received:,} of {size:,} bytes")


def first_byte(url, response, asked, size):
    """Where the response begins: at the byte asked for, or at 0 if the server ignores ranges.

    Raises: DownloadError for another range, or a file of another size.
    """
    content_range = response.headers.get("Content-Range")
    resumed = response.status == 206 and (content_range or "").startswith(f"bytes {asked}-")
    if response.status == 206 and not resumed:
        raise DownloadError(f"{url}: sent another range than asked for: {content_range}")
    start = asked if resumed else 0
    if None not in (size, response.length) and start + response.length != size:
        offered = start + response.length
        raise DownloadError(f"{url}: offers {offered:,} bytes, expected {size:,}")
    return start


def picture_size(url, response, start):
    """How many bytes the whole file has, as the response says. Raises: DownloadError."""
    size = None if response.length is None else start + response.length
    if size is None or not 0 < size <= MAX_PICTURE_BYTES:
        said = "no size" if size is None else f"{size:,} bytes"
        raise DownloadError(f"{url}: says {said}, expected 1 to {MAX_PICTURE_BYTES:,} bytes")
    return size


def append_response(response, part, start, size, silent=False):
    """Write the response into `part` from byte `start` on, at most to `size`. Returns its end."""
    bar = Progress(
        title=part.stem, total=size, unit="B", initial=start, unit_scale=True, disable=silent
    )
    end = start
    with bar, part.open("ab" if start else "wb") as file:
        while end < size and (chunk := response.read(min(1 << 20, size - end))):
            file.write(chunk)
            end += len(chunk)
            bar.update(len(chunk))
    return end


def check_file(path, remote):
    """Raise DownloadError unless `path` has the size and checksum of `remote`.

    Where none is known it must be a zip in which every file has the CRC-32 that is noted for it.
    """
    if not remote.checksum:
        check_zip(path, remote.size)
        return
    algorithm, _, expected = remote.checksum.partition(":")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, algorithm).hexdigest()
    if path.stat().st_size != remote.size or digest != expected:
        raise DownloadError(f"{path}: {algorithm} is {digest}, expected {expected}")


def check_zip(path, size):
    """Raise DownloadError unless `path` is a whole zip of this size."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, *DAMAGE) as error:
        raise DownloadError(f"{path}: not a whole zip archive: {error}") from None
    if damaged is not None:
        raise DownloadError(f"{path}: its {damaged[:60]!r} is damaged")
    if path.stat().st_size != size:
        raise DownloadError(f"{path}: {path.stat().st_size:,} bytes, expected {size:,}")


def download(remote, folder):
    """`remote` as a checked file in `folder`, from the first address that serves it.

    Raises: DownloadError if none does.
    """
    target = folder / remote.name
    part = folder / f"{remote.name}.part"
    folder.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(part)  # checked again below
    leftover = part.exists()  # may be what is wrong: then every address gets a second chance
    for url in remote.urls * (2 if leftover else 1):
        try:
            fetch(url, part, remote.size)
            try:
                check_file(part, remote)
            except DownloadError as error:
                part.unlink()
                raise DownloadError(f"{url}: wrong content, deleted: {error}") from None
            part.rename(target)
            return target
        except DownloadError as error:
            print(error, file=sys.stderr)
    raise DownloadError(f"{remote.name}: no source works")


# ---------------------------------------------------- unpacking: archives are hostile until checked


def members_of_zip(archive):
    """(name, size, is a plain file, open) of each member that is not a folder."""
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on Unix
        if not info.is_dir():
            plain = kind in (0, stat.S_IFREG) and not info.flag_bits & 1  # bit 0: encrypted
            yield info.filename, info.file_size, plain, lambda info=info: archive.open(info)


def members_of_tar(archive):
    """(name, size, is a plain file, open) of each member that is not a folder."""
    for info in archive:
        if not info.isdir():
            yield info.name, info.size, info.isreg(), lambda info=info: archive.extractfile(info)


def unpack(path, folder, keep, into=""):
    """Unpack what fits a pattern in `keep` from a zip or tar, without the folders inside it.

    All goes into folder/into; without that, pictures into folder/Images, the rest into `folder`.
    An archive that tries to write elsewhere
    is refused whole. Returns the number of files.
    Raises: DownloadError for a damaged archive, an absolute or `..` path, a link, device or
    encrypted member, two members of one name, more than MAX_MEMBERS members or more than
    MAX_UNPACKED_BYTES bytes.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return write_members(path, members_of_zip(archive), folder, keep, into)
        with tarfile.open(path) as archive:
            return write_members(path, members_of_tar(archive), folder, keep, into)
    except (zipfile.BadZipFile, tarfile.TarError, *DAMAGE) as error:
        reason = str(error).partition("\n")[0]
        raise DownloadError(f"{path}: not a whole zip or tar archive: {reason}") from None


def write_members(path, members, folder, keep, into):
    """The checks and copies of `unpack`. Returns the number of files written."""
    written = total = 0
    for number, (name, size, plain, open_member) in enumerate(members, start=1):
        inner = PurePosixPath(name.replace("\\", "/"))
        if not plain or inner.is_absolute() or ".." in inner.parts or ":" in name:
            reason = "it holds a link, a device, or a path that leads outside"
            raise DownloadError(f"{path}: refused, {reason}: {name[:60]!r}")
        total += size
        if number > MAX_MEMBERS or total > MAX_UNPACKED_BYTES:
            limits = f"{MAX_MEMBERS:,} files or {MAX_UNPACKED_BYTES:,} bytes"
            raise DownloadError(f"{path}: refused, it unpacks to more than {limits}")
        if inner.name.startswith(".") or not any(fnmatch(inner.name, pattern) for pattern in keep):
            continue
        is_picture = inner.suffix.lower() in PICTURES
        target = folder / (into or ("Images" if is_picture else "")) / inner.name
        target.parent.mkdir(exist_ok=True)
        try:
            with open_member() as source, target.open("xb") as copy:
                shutil.copyfileobj(source, copy)
        except FileExistsError:
            raise DownloadError(f"{path}: refused, it holds {inner.name!r} twice") from None
        written += 1
    if not written:
        raise DownloadError(f"{path}: holds no {' or '.join(keep)}")
    return written


# ----------------------------------------------------------------------------------------- datasets


def images_in(folder):
    """The files of folder/Images that begin as a JPEG or PNG does."""
    paths = sorted((folder / "Images").iterdir()) if (folder / "Images").is_dir() else []
    return [path for path in paths if path.suffix.lower() in PICTURES and starts_as_picture(path)]


def starts_as_picture(path):
    """Whether the first bytes are JPEG's or PNG's."""
    with path.open("rb") as file:
        return file.read(4).startswith((b"\xff\xd8", b"\x89PNG"))


def count_captions(folder):
    """The number of captions in the folder's captions file.

    Raises: ValueError if there is none or it cannot be read.
    """
    path = next((path for pattern in CAPTION_FILES for path in sorted(folder.glob(pattern))), None)
    if path is None:
        raise ValueError(f"{folder}: no captions file, expected one of {', '.join(CAPTION_FILES)}")
    if path.suffix == ".json":
        try:
            return sum(len(image["sentences"]) for image in json.loads(path.read_bytes())["images"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not one of Karpathy's dataset files: {error!r}") from None
    with path.open("rb") as file:
        rows = [line[:5] for line in file if line.strip()]
    return len(rows) - (rows[:1] == [b"image"])  # without the header


def draw_sample_dataset(folder, seed=0, num_images=900, force=False):
    """Draw the sample dataset into `folder`, in Flickr8k's layout, or find it there and do nothing.

    Scenes of one to three toy objects, 224 x 224 pixels, five captions each. Every picture depends
    only on `seed` and its number: captions and splits are the same on every machine, pixels and
    boxes up to the Pillow version's rounding. The folder appears complete or not at all.

    Args:
        seed: any int.
        num_images: at least 10, so that no split is empty.
        force: draw again over what is there.
    Returns: `folder` as a Path, with the files of `write_sample_dataset`.
    Raises: ValueError for too few images, or if `folder` holds something else.
    """
    folder = Path(folder)
    if num_images < 10:
        raise ValueError(f"num_images must be at least 10, got {num_images}")
    names = [f"sample_{seed}_{number:04d}.jpg" for number in range(num_images)]
    if not force and holds_something(folder):
        verify_sample(folder, names)
        return folder
    with new_folder(folder, replace=force) as partial:
        (partial / "Images").mkdir()
        write_sample_dataset(partial, seed, names)
    return folder


def verify_sample(folder, names=None):
    """(images, captions) of a sample dataset.

    Raises: ValueError unless it is whole and, if given, has these file names.
    """
    try:
        boxes = json.loads((folder / "boxes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        boxes = {}
    present = {path.name for path in images_in(folder)}
    whole = boxes and isinstance(boxes, dict) and boxes.keys() == present
    if not whole or present != set(names or boxes):
        raise ValueError(
            f"{folder}: not the complete sample dataset with these settings; "
            "draw it again with: python download_datasets.py --dataset sample --force"
        )
    captions = count_captions(folder)
    if captions != 5 * len(boxes):
        raise ValueError(
            f"{folder}: {captions} captions, expected {5 * len(boxes)}; draw it again with --force"
        )
    return len(boxes), captions


def verify_dataset(name, folder):
    """(images, captions) in a dataset's folder. Raises ValueError if fewer than EXPECTED."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: not there; get it with: {command_for(name)}")
    if name == "sample":
        return verify_sample(folder)
    if name in FOLDERS:
        counts = coco_files.count(folder, year_of(name))
        if coco_files.part_size(folder, year_of(name)):
            return counts
    else:
        counts = len(images_in(folder)), count_captions(folder)
    for what, count, expected in zip(("images", "captions"), counts, EXPECTED[name], strict=True):
        if count < expected:
            shortage = f"{count:,} {what}, expected at least {expected:,}"
            raise ValueError(f"{folder}: {shortage}; get it again with --force")
    return counts


def year_of(name):
    """Of coco2014 and coco2017."""
    return int(name.removeprefix("coco"))


def command_for(name):
    """What gets a dataset."""
    chosen = f"coco --coco_year {year_of(name)}" if name in FOLDERS else name
    return f"python download_datasets.py --dataset {chosen}"


def download_dataset(name, data_dir, force=False):
    """Flickr8k, Flickr30k or COCO, downloaded, unpacked and checked in its folder, unless it is there.

    Archives stay in data_dir/.downloads until the dataset is complete, so that a second call goes
    on where the first stopped. Returns (images, captions).
    Raises: DownloadError if no source works; ValueError if the folder holds something incomplete
    and `force` is off, or if the disk is too small.
    """
    folder, downloads = data_dir / FOLDERS.get(name, name), data_dir / ".downloads"
    if not force and holds_something(folder):
        check_extent(name, folder)
        return verify_dataset(name, folder)
    needed = 2 * sum(alternatives[0].size for alternatives in DATASETS[name])  # packed and unpacked
    check_room(data_dir, needed - sum(path.stat().st_size for path in downloads.glob("*")))
    with new_folder(folder, replace=force) as partial:
        for alternatives in DATASETS[name]:
            get_part(name, alternatives, downloads, partial)
        get_optional_part(name, downloads, partial)
        counts = verify_dataset(name, partial)
    for remote in itertools.chain(*DATASETS[name], OPTIONAL.get(name, ())):
        (downloads / remote.name).unlink(missing_ok=True)
    return counts


def get_optional_part(name, downloads, folder):
    """The split file of a dataset that does without, or a line that says what follows."""
    for remote in OPTIONAL.get(name, ()):
        try:
            get_part(name, (remote,), downloads, folder)
        except DownloadError:
            print(
                f"{name}: without {remote.keep[0]} its splits will be drawn from the official val; "
                "put it beside the pictures' folders for Karpathy's",
                file=sys.stderr,
            )


def check_extent(name, folder, wanted=None):
    """Raise ValueError where a folder of COCO was not made with the `wanted` pictures, None for all."""
    if name not in FOLDERS or not coco_files.is_there(folder, year_of(name)):
        return
    there = coco_files.part_size(folder, year_of(name))
    if there != wanted:
        made, asked = (f"{count or 'all'} pictures" for count in (there, wanted))
        raise ValueError(
            f"{folder}: made with {made}, not {asked}; get these with --force, "
            "or beside it with another --data_dir"
        )


def get_part(name, alternatives, downloads, folder):
    """Download and unpack the first archive of `alternatives` that works into `folder`."""
    for remote in alternatives:
        try:
            archive = download(remote, downloads)
            with new_folder(folder / remote.name) as unpacked:
                unpack(archive, unpacked, remote.keep, remote.into)
        except DownloadError as error:
            print(error, file=sys.stderr)
            continue
        for entry in (folder / remote.name).iterdir():
            entry.rename(folder / entry.name)
        (folder / remote.name).rmdir()
        return
    final = folder.parent / FOLDERS.get(name, name)
    if name in FOLDERS:
        advice = f"get it at {MANUAL[name]} and unpack it into {final}"
    else:
        advice = (
            f"ask for it at {MANUAL[name]} and put the pictures into {final / 'Images'} and the "
            "captions file beside that folder"
        )
    raise DownloadError(f"{name}: no source of {alternatives[0].name} works; {advice}")


# ------------------------------------------------------------------------------------ a part of COCO


def download_coco_part(name, data_dir, max_images, force=False):
    """`max_images` pictures of COCO, one by one, with their captions; the same ones at every call.

    The zip of annotations is fetched whole. Pictures stay in data_dir/.downloads until all are
    there, so that a second call goes on where the first stopped. Returns (images, captions).
    Raises: DownloadError if pictures cannot be had; ValueError as `download_dataset`.
    """
    folder, downloads, year = data_dir / FOLDERS[name], data_dir / ".downloads", year_of(name)
    if not force and holds_something(folder):
        check_extent(name, folder, max_images)
        return verify_dataset(name, folder)
    annotations, stash = DATASETS[name][0], downloads / f"{name}_pictures"
    check_room(data_dir, 2 * annotations[0].size + max_images * PICTURE_BYTES)
    with new_folder(folder, replace=force) as partial:
        get_part(name, annotations, downloads, partial)
        get_optional_part(name, downloads, partial)
        pictures = coco_files.read_pictures(partial, year)
        chosen = coco_files.choose(pictures, coco_files.read_splits(partial), max_images)
        coco_files.keep_only(partial, year, chosen)
        for subset in coco_files.subsets(year):
            (stash / subset).mkdir(parents=True, exist_ok=True)
            (partial / subset).mkdir()
        fetch_pictures({each: pictures[each] for each in chosen}, stash)
        for each in chosen:
            (stash / each).rename(partial / each)
        counts = verify_dataset(name, partial)
    shutil.rmtree(stash)
    for remote in (*annotations, *OPTIONAL.get(name, ())):
        (downloads / remote.name).unlink(missing_ok=True)
    return counts


def fetch_pictures(pictures, folder):
    """Each of {name: coco_files.Picture} as folder/name, unless it is there; several at a time.

    Raises: DownloadError that counts those that no source has.
    """
    with ThreadPoolExecutor(FETCHERS) as pool:
        found = pool.map(lambda item: fetch_picture(*item, folder), pictures.items())
        failures = [*filter(None, Progress(found, "pictures", len(pictures), "images"))]
    if failures:
        count = f"{len(failures):,} of {len(pictures):,} pictures"
        raise DownloadError(f"{count}: no source works; the first is {failures[0]}")


def fetch_picture(name, picture, folder):
    """One of them. Returns what is wrong with each source, "" where it is there."""
    path, reasons = folder / name, []
    if path.exists():  # it was checked before it got this name
        return ""
    part = path.with_suffix(".part")
    own = [f"{bucket}/{name}" for bucket in (COCO_AMAZON, COCO_GOOGLE)]
    for url in filter(None, dict.fromkeys((*own, picture.url))):
        try:
            fetch(url, part)
            coco_files.check_picture(part, picture.size)
            part.rename(path)
            return ""
        except DownloadError as error:
            reasons.append(str(error))
        except ValueError as error:
            reasons.append(f"{url}: {error}")
        part.unlink(missing_ok=True)
    return "; ".join(reasons)


def check_room(folder, needed):
    """Raise ValueError unless the disk of `folder` has `needed` bytes free."""
    from checkpoints import check_free_space  # brings torch, which --help does not wait for

    check_free_space(
        folder, needed, f"{folder}: the files", "make room, or get them on another disk"
    )


def download_weights(folder, force=False):
    """The path of the ResNet50 weights in `folder`, downloaded if absent and checked."""
    if (folder / RESNET50.name).exists() and not force:
        return verify_weights(folder)
    check_room(folder, RESNET50.size)
    return download(RESNET50, folder)


def verify_weights(folder):
    """The path of the ResNet50 weights in `folder`. Raises DownloadError unless as published."""
    path = folder / RESNET50.name
    if not path.exists():
        raise DownloadError(
            f"{path}: not there; get it with: python download_datasets.py --dataset resnet50"
        )
    check_file(path, RESNET50)
    return path


# ---------------------------------------------------------------------------------- encoder weights


def load_encoder_weights(name, source, seed, model=None):
    """State dict of the model `name`. `source`: imagenet, random (drawn from `seed`) or a file.

    model: its EncoderModel, which torchvision's need not have.
    Raises: FileNotFoundError or ValueError that say how to get the weights: an encoder is never
    silently random.
    """
    import torch  # takes seconds, and downloading needs none of it
    import torchvision

    model = model or ADDED.get(name)
    if source == "random":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return (model or find_model(name)).build().state_dict()
    if source != "imagenet":
        state = read_weights(Path(source))
        return model.translate(state) if model and model.translate else state
    if model and model.weights:
        return model.weights()
    if name in ADDED:
        raise ValueError(
            f"--encoder_weights imagenet: --encoder {name} comes without weights: give a FILE or random"
        )
    url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
    names = [RESNET50.name] if name == "resnet50" else []  # document A's file, looked for first
    names += [Path(url).name]
    placed = [WEIGHTS_DIR / name for name in names if (WEIGHTS_DIR / name).is_file()]
    return read_placed_weights(placed[0]) if placed else fetch_weights(url)


def read_placed_weights(file):
    """State dict in a published file whose name ends in its hash. Raises: ValueError."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if not digest.startswith(file.stem.rpartition("-")[2]):
        raise ValueError(
            f"{file}: its SHA-256 {digest[:8]}... is not the one in its name: fetch it again"
        )
    # document A's file has a format older than weights_only
    return read_weights(file, trusted=f"sha256:{digest}" == RESNET50.checksum)


def fetch_weights(url):
    """State dict from torch's own download folder, or downloaded into it. Raises: FileNotFoundError."""
    import torch

    from checkpoints import UNREADABLE

    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except (urllib.error.URLError, OSError, pickle.UnpicklingError, *UNREADABLE) as error:
        reason = str(error).splitlines()[0] or type(error).__name__
        raise FileNotFoundError(
            f"--encoder_weights imagenet: cannot download {url} ({reason}): "
            f"put the file into {WEIGHTS_DIR}/, or give --encoder_weights FILE or random"
        ) from error


def read_weights(file, trusted=False):
    """State dict in a file; unless `trusted`, no code in it runs.

    Raises: FileNotFoundError or ValueError that name the file.
    """
    import torch

    from checkpoints import UNREADABLE
    from runtime import memory_shortage

    if not file.is_file():
        raise FileNotFoundError(
            f"--encoder_weights {file}: no such file: "
            "give imagenet, random or a torchvision state dict"
        )
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on pickles that it then refuses
            state = torch.load(file, map_location="cpu", weights_only=not trusted)
    except (pickle.UnpicklingError, *UNREADABLE) as error:
        if memory_shortage(error):
            raise
        raise ValueError(
            f"--encoder_weights {file}: not a readable state dict: give a torchvision .pth file"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(
            f"--encoder_weights {file}: holds a {type(state).__name__}, "
            "expected a torchvision state dict"
        )
    return state


def read_safetensors(file):
    """State dict in a .safetensors file. Raises: ValueError that names the file."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError(
            f"--encoder_weights {file}: needs the package safetensors: "
            "pip install -r requirements-hub.txt"
        ) from error
    try:
        return safetensors.torch.load(file.read_bytes())  # not mapped: the file may be written anew
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"--encoder_weights {file}: no readable safetensors ({error})") from error


# ------------------------------------------------------------------------------------- command line


def get(name, args):
    """Get or verify one thing. Returns the line to print."""
    if name == "resnet50":
        folder = WEIGHTS_DIR
        path = verify_weights(folder) if args.verify_only else download_weights(folder, args.force)
        return f"resnet50: {path}, checksum as published"
    folder = args.data_dir / FOLDERS.get(name, name)
    if args.entities:
        return convert_entities(args.entities, folder)
    if args.verify_only:
        images, captions = verify_dataset(name, folder)
    elif name == "sample":
        images, captions = verify_sample(draw_sample_dataset(folder, force=args.force))
    elif args.max_images:
        images, captions = download_coco_part(name, args.data_dir, args.max_images, args.force)
    else:
        images, captions = download_dataset(name, args.data_dir, args.force)
    is_part = name in FOLDERS and coco_files.part_size(folder, year_of(name))
    note = ", a part of it" if is_part else ""
    return f"{name}: {images:,} images and {captions:,} captions in {folder}{note}"


def convert_entities(entities, folder):
    """Write boxes.json into Flickr30k's folder. Returns the line to print. Raises: ValueError."""
    from flickr30k_entities import write_boxes  # brings torch, which --help does not wait for

    if not folder.is_dir():
        raise ValueError(
            f"{folder}: not there; get it with: python download_datasets.py --dataset flickr30k"
        )
    path = folder / "boxes.json"
    images, boxes, outside = write_boxes(entities, path)
    note = f"; {outside:,} without area in their picture left out" if outside else ""
    return f"flickr30k: {boxes:,} named boxes of {images:,} images in {path}{note}"


def parse_args(argv=None):
    """The options; a mistake exits with status 2 and one line."""
    parser = argparse.ArgumentParser(
        usage="download_datasets.py [--dataset NAME] [--data_dir DIR] "
        "[--coco_year YEAR] [--max_images N] [--force | --verify_only | --entities FOLDER]",
        description="Download, check and unpack the datasets and weights, "
        "or draw the sample dataset.",
    )
    names = ["flickr8k", "flickr30k", "coco", "both", "sample", "resnet50"]
    parser.add_argument("--dataset", default="both", choices=names)
    parser.add_argument(
        "--data_dir",
        type=Path,
        default=Path("data"),
        help="where the dataset folders are (default: data)",
    )
    parser.add_argument(
        "--coco_year",
        type=int,
        choices=coco_files.YEARS,
        help="of --dataset coco: 2014 (default), which has Karpathy's splits, or 2017",
    )
    parser.add_argument(
        "--max_images",
        type=int,
        metavar="N",
        help="of --dataset coco: fetch only so many of its pictures, one by one, for a trial",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--force",
        action="store_true",
        help="get it again, replacing what is there once the new one is complete",
    )
    action.add_argument(
        "--verify_only",
        "--verify-only",
        action="store_true",
        help="only count and check what is there",
    )
    action.add_argument(
        "--entities",
        type=Path,
        metavar="FOLDER",
        help="of Flickr30k Entities, with Annotations and Sentences: write their boxes into "
        "DATA_DIR/flickr30k/boxes.json, with which --mode test compares attention",
    )
    args = parser.parse_args(argv)
    check_args(parser, args)
    if args.dataset == "coco":
        args.dataset = f"coco{args.coco_year or coco_files.YEARS[0]}"
    return args


def check_args(parser, args):
    """End with status 2 and one line where options do not fit each other."""
    if args.entities and args.dataset not in ("both", "flickr30k"):
        parser.error(f"--entities has boxes of flickr30k, not of --dataset {args.dataset}")
    for flag in ("coco_year", "max_images"):
        if getattr(args, flag) is not None and args.dataset != "coco":
            parser.error(f"--{flag} is of --dataset coco, not of --dataset {args.dataset}")
    if args.max_images is not None and args.verify_only:
        parser.error("--max_images is of a download: --verify_only counts what is there")
    if args.max_images is not None and args.max_images < 3:
        parser.error(f"--max_images {args.max_images}: expected at least 3: train, val and test")
    if args.data_dir.exists() and not args.data_dir.is_dir():
        parser.error(f"--data_dir {args.data_dir}: is a file, expected a folder")


def main(argv=None):
    """The command; where one dataset fails, the next is still got. Returns its exit status."""
    args = parse_args(argv)
    status = 0
    names = ("flickr8k", "flickr30k") if args.dataset == "both" else (args.dataset,)
    names = ("flickr30k",) if args.entities else names
    for name in names:
        try:
            print(get(name, args))
        except (OSError, ValueError) as error:
            print(f"download_datasets.py: error: {error}", file=sys.stderr)
            status = 1
        except KeyboardInterrupt:
            message = "download_datasets.py: interrupted; the same command goes on from here"
            print(message, file=sys.stderr)
            return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
