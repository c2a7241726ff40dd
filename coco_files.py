"""COCO's captions as its authors lay them out, or a part of them: what they name and what is there.

    pictures = read_pictures(folder, 2014)  # {"train2014/COCO_train2014_000000000009.jpg": Picture}
    names = choose(pictures, read_splits(folder), 100)
    keep_only(folder, 2014, names)

A folder holds train2014/ and val2014/ with the pictures, annotations/captions_train2014.json and
captions_val2014.json, and for 2014's names Karpathy's splits, dataset_coco.json.
"""

import json
import random
import re
import warnings
from pathlib import Path
from typing import NamedTuple

YEARS = (2014, 2017)
KARPATHY = "dataset_coco.json"
PART = "part_of_coco"  # our key in the files of a part: how many pictures it has
MAX_SIDE = 4096  # pixels; COCO's have at most 640
PLAIN_NAME = re.compile(r"\w[\w-]*\.jpg")  # COCO's, with which no file can be written elsewhere
URL = re.compile(r"https?://[^\s/]+/\S+")
KARPATHYS_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


class Picture(NamedTuple):
    """What COCO says of one: its address, its size in pixels and how many captions it has."""

    url: str
    size: tuple[int, int]
    captions: int


def subsets(year: int) -> tuple[str, str]:
    """The folders of pictures."""
    return f"train{year}", f"val{year}"


def captions_file(folder: Path, subset: str) -> Path:
    """Where the captions of a folder of pictures lie."""
    return folder / "annotations" / f"captions_{subset}.json"


def read_pictures(folder: Path, year: int) -> dict[str, Picture]:
    """{"train2014/NAME": Picture} of both files. Raises: ValueError naming the file."""
    pictures = {}
    for subset in subsets(year):
        path = captions_file(folder, subset)
        content = _read(path)
        try:
            captions_of = dict.fromkeys((image["id"] for image in content["images"]), 0)
            for annotation in content["annotations"]:
                captions_of[annotation["image_id"]] += 1
            for image in content["images"]:
                name, url = image["file_name"], image.get("coco_url", "")
                size = image["width"], image["height"]
                known_url = not url or URL.fullmatch(url)
                if not (
                    PLAIN_NAME.fullmatch(name)
                    and known_url
                    and 0 < min(size) <= max(size) <= MAX_SIDE
                ):
                    raise ValueError(f"{name[:60]!r} of {size} pixels at {url[:60]!r}")
                pictures[f"{subset}/{name}"] = Picture(url, size, captions_of[image["id"]])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not COCO's captions file: {error!r}") from None
    return pictures


def read_splits(folder: Path) -> dict[str, str]:
    """{"train2014/NAME": train|val|test} as Karpathy's file says, {} where it is not there."""
    path = folder / KARPATHY
    if not path.exists():
        return {}
    try:
        return {_name(image): KARPATHYS_SPLITS[image["split"]] for image in _read(path)["images"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not Karpathy's file of COCO: {error!r}") from None


def choose(pictures: dict[str, Picture], split_of: dict[str, str], count: int) -> list[str]:
    """Names of `count` pictures, the same ones at every call, so that no split is empty.

    A tenth is val and a tenth test where `split_of` says which they are; else a fifth is from the
    official val, of which the program makes both. `count`: at least 3.
    """
    groups = {}
    for name in sorted(pictures):
        official = "train" if name.startswith("train") else "val"
        groups.setdefault(split_of.get(name) if split_of else official, []).append(name)
    tenth = max(1, round(count / 10))
    wanted = {"val": tenth, "test": tenth} if split_of else {"val": 2 * tenth}
    wanted["train"] = count - 2 * tenth
    chosen, others = [], []
    for split, names in groups.items():
        random.Random(0).shuffle(names)
        chosen += names[: wanted.get(split, 0)]
        others += names[wanted.get(split, 0) :]
    return sorted(chosen + others[: count - len(chosen)])  # where a split has too few


def keep_only(folder: Path, year: int, names: list[str]):
    """Take all other pictures out of the captions files, which say then that they are a part."""
    kept = set(names)
    for subset in subsets(year):
        path = captions_file(folder, subset)
        content = _read(path)
        images = [image for image in content["images"] if f"{subset}/{image['file_name']}" in kept]
        ids = {image["id"] for image in images}
        captions = [entry for entry in content["annotations"] if entry["image_id"] in ids]
        part = {"images": images, "annotations": captions, PART: len(names)}
        path.write_text(json.dumps(content | part))
    if (folder / KARPATHY).exists():
        content = _read(folder / KARPATHY)
        images = [image for image in content["images"] if _name(image) in kept]
        (folder / KARPATHY).write_text(json.dumps(content | {"images": images}))


def is_there(folder: Path, year: int) -> bool:
    """Whether the folder has captions of this year."""
    return captions_file(folder, subsets(year)[0]).exists()


def part_size(folder: Path, year: int) -> int | None:
    """How many pictures a part was made with; None for the whole."""
    return _read(captions_file(folder, subsets(year)[0])).get(PART)


def count(folder: Path, year: int) -> tuple[int, int]:
    """(pictures, captions) that are there. Raises: ValueError when a named picture is not."""
    pictures = read_pictures(folder, year)
    present = {
        f"{subset}/{path.name}" for subset in subsets(year) for path in _jpegs(folder / subset)
    }
    if missing := sorted(pictures.keys() - present):
        raise ValueError(
            f"{folder}: {len(missing):,} of {len(pictures):,} pictures are missing or no JPEG, "
            f"the first is {missing[0]}; get it again with --force"
        )
    return len(pictures), sum(picture.captions for picture in pictures.values())


def check_picture(path: Path, size: tuple[int, int]):
    """Raise ValueError unless the file is a whole JPEG of this size in pixels."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=["JPEG"]) as image:
                if image.size != tuple(size):
                    shown, expected = ("{} x {}".format(*pair) for pair in (image.size, size))
                    raise ValueError(f"a picture of {shown} pixels, expected {expected}")
                image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a whole JPEG ({str(error).partition(chr(10))[0]})") from None


def _jpegs(folder: Path):
    """Files of a folder that begin as a JPEG does."""
    for path in folder.iterdir() if folder.is_dir() else []:
        with path.open("rb") as file:
            if file.read(2) == b"\xff\xd8":
                yield path


def _name(image: dict) -> str:
    return f"{image['filepath']}/{image['filename']}"


def _read(path: Path) -> dict:
    """A JSON object. Raises: ValueError naming the file."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "damaged JSON"
        raise ValueError(f"{path}: {reason}, expected COCO's captions") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON {type(content).__name__}, expected COCO's captions")
    return content
