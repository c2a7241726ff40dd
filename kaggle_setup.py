"""Kaggle and Colab: finds the data below the input folder and writes a configuration that trains on it.

    python kaggle_setup.py --output configs/kaggle.yaml
    python flickr_image_caption.py --config configs/kaggle.yaml

    from kaggle_setup import create_kaggle_config, setup_kaggle_training
    create_kaggle_config()                           # the same, from a notebook
    environment = setup_kaggle_training(verbose=True)

A captions file is known by reading it, and its images by their names in it, so that folders may be called
anything. Folders are listed once, and no image is opened or asked for its size.
"""

import importlib.metadata
import itertools
import os
import platform
import re
import shutil
import socket
import threading
from pathlib import Path
from typing import NamedTuple

from caption_options import DEFAULTS, ENCODERS, LAPTOP, Parser
from checkpoints import write_text

MOST_FOLDERS, MOST_LEVELS = 10_000, 8  # looked through; a mounted Drive may hold anything
PROBED_IMAGES = 20  # of a captions file, whose folders are then compared by all its images
CAPTIONS_FILE = re.compile(r"(?!.*lemma).*(caption|comment|results|token|dataset_).*", re.I)
CAPTIONS_SUFFIXES = {".txt", ".csv", ".tsv", ".json", ".token"}
GLOVE_FILE = re.compile(r"glove.*?(\d+)d.*\.(txt|gz|zip)", re.I)
# levels of /kaggle/input/datasets/OWNER/NAME and of drive/MyDrive/NAME; elsewhere a dataset is a folder
DATASETS_INSIDE = {"datasets": 3, "drive": 3}
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
INTERNET = ("download.pytorch.org", 443)
INTERNET_SECONDS = 3


class Place(NamedTuple):
    """Where a machine keeps what goes in and what comes out."""

    name: str
    root: Path  # data lies somewhere below it
    runs: Path  # what is to be kept
    cache: Path  # fast and large


class Tree(NamedTuple):
    """What lies below a folder."""

    pictures: dict[Path, set[str]]  # {folder: names of its pictures}
    files: list[Path]  # all others
    notes: list[str]


class Found(NamedTuple):
    """A captions file and the folder that its images are in."""

    captions_file: Path
    image_dir: Path
    images: int  # of the file that are in the folder
    captions: int
    has_splits: bool


# ---------------------------------------------------------------------------------------------- places


def find_place(root=None, working=None):
    """The Place: Kaggle or Colab, or the folders that are given instead. Raises: FileNotFoundError."""
    working = Path(working) if working else None
    if root:
        if not Path(root).is_dir():
            raise FileNotFoundError(
                f"--root {root}: no such folder; expected the one that data is below"
            )
        return Place("this machine", Path(root), working or Path(), working or Path())
    kaggle, colab, drive = Path("/kaggle"), Path("/content"), Path("/content/drive/MyDrive")
    if (kaggle / "input").is_dir():
        runs = working or kaggle / "working"
        return Place("Kaggle", kaggle / "input", runs, runs)
    if colab.is_dir():
        runs = drive / "flickr_image_caption" if drive.is_dir() else colab
        return Place("Colab", colab, working or runs, working or colab)
    raise FileNotFoundError(
        "neither /kaggle/input nor /content is here: give --root, the folder that the data is below"
    )


# ---------------------------------------------------------------------------------------------- search


def look_through(root):
    """The Tree below a folder. Links are followed, each folder once; our own and hidden ones are left out."""
    from caption_data import PICTURE_NAME

    tree, unreadable = Tree({}, [], []), []
    seen = {identity(Path(__file__).parent)}
    for path, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable.append):
        folder = Path(path)
        here = identity(folder)
        if here in seen:
            subfolders.clear()
            continue
        seen.add(here)
        if len(seen) > MOST_FOLDERS:
            tree.notes.append(f"{root}: only the first {MOST_FOLDERS} folders were looked through")
            break
        is_deepest = len(folder.relative_to(root).parts) == MOST_LEVELS
        subfolders[:] = [] if is_deepest else sorted(n for n in subfolders if n[0] != ".")
        pictures = {name for name in names if PICTURE_NAME.search(name)}
        if pictures:
            tree.pictures[folder] = pictures
        tree.files.extend(folder / name for name in sorted(names) if name not in pictures)
    tree.notes.extend(f"{error.filename}: not readable ({error.strerror})" for error in unreadable)
    return tree


def identity(folder):
    """What tells a folder from all others, however it is reached."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def find_datasets(tree):
    """The list of Found; files that only look like captions are added to the tree's notes."""
    from caption_data import read_captions

    found = []
    for file in tree.files:
        if file.suffix.lower() not in CAPTIONS_SUFFIXES or not CAPTIONS_FILE.fullmatch(file.name):
            continue
        try:
            rows, _ = read_captions(file)
        except (OSError, ValueError) as error:
            tree.notes.append(f"passed over: {error}")
            continue
        images = dict.fromkeys(image for image, _, _ in rows)
        image_dir, present = find_image_dir(file, images, tree.pictures)
        if 2 * present < len(images):
            where = f"most in {image_dir}, {present}" if image_dir else "none is here"
            tree.notes.append(f"passed over: {file}: of its {len(images)} images {where}")
            continue
        has_splits = any(split for _, _, split in rows)
        found.append(Found(file, image_dir, present, len(rows), has_splits))
    return found


def find_image_dir(captions_file, images, pictures):
    """(folder below which most of the names `images` are, how many are); (None, 0) where none is.

    pictures: {folder: names}, as in Tree.
    """
    folders = {}
    for name in itertools.islice(images, PROBED_IMAGES):
        *parents, last = name.split("/")  # COCO's may be val2014/name
        for folder, names in pictures.items():
            is_its = (
                last in names and list(folder.parts[len(folder.parts) - len(parents) :]) == parents
            )
            if is_its:
                base = folder.parents[len(parents) - 1] if parents else folder
                folders[base] = count_images(base, images, pictures)

    def rank(folder):  # of equal folders the nearest: mirrors of a dataset have the same names
        shared = os.path.commonpath([folder, captions_file.parent])
        return -folders[folder], -len(shared), len(folder.parts), folder

    best = min(folders, key=rank, default=None)
    return best, folders.get(best, 0)


def count_images(base, images, pictures):
    """How many of the names are pictures below `base`."""
    listed, count = {}, 0
    for image in images:
        parent, _, name = image.rpartition("/")
        if parent not in listed:
            listed[parent] = pictures.get(base / parent, ())
        count += name in listed[parent]
    return count


def choose_dataset(found, root, wanted=None):
    """(the Found to train on, those that lie beside it).

    wanted: OWNER/NAME or NAME of a dataset, a folder below the root.
    Raises: FileNotFoundError when there is none, ValueError when there are several.
    """
    if wanted:
        found = [
            f
            for f in found
            if is_of(wanted, f.image_dir, root) or is_of(wanted, f.captions_file, root)
        ]
    if not found:
        what = f"below a folder {folder_name(wanted)} " if wanted else ""
        raise FileNotFoundError(
            f"{root}: no images with a captions file {what}(Flickr8k, Flickr30k or COCO): "
            "add such a dataset, on Kaggle by Add Input"
        )
    best, *others = sorted(
        found, key=lambda f: (not f.has_splits, -f.images, -f.captions, f.captions_file)
    )
    names = sorted({mounted(f.image_dir, root) for f in found})
    if len(names) > 1:
        raise ValueError(
            f"{root}: several datasets, {', '.join(names)}: choose by flickr_dataset (--flickr_dataset NAME)"
        )
    return best, others


def mounted(path, root):
    """The name, below the root, of the dataset that a path is in."""
    parts = path.relative_to(root).parts
    return "/".join(parts[: DATASETS_INSIDE.get(parts[0], 1)]) if parts else "."


def folder_name(dataset):
    """NAME of OWNER/NAME, as Kaggle mounts it."""
    return dataset.rstrip("/").rpartition("/")[2]


def is_of(dataset, path, root):
    """Whether the path lies in a folder of a dataset's name."""
    return folder_name(dataset).lower() in str(path.relative_to(root)).lower().split("/")


def find_glove(tree, root, wanted=None):
    """(file, length of its vectors) of the longest that our attention can split, or None.

    Raises: FileNotFoundError where `wanted`, the name of a dataset, has none.
    """
    found = []
    for file in tree.files:
        match = GLOVE_FILE.fullmatch(file.name)
        if match and (not wanted or is_of(wanted, file, root)):
            if int(match[1]) % DEFAULTS["attention_heads"]:
                tree.notes.append(
                    f"passed over: {file}: its length is no multiple of the attention heads"
                )
            else:
                found.append((file, int(match[1])))
    if wanted and not found:
        raise FileNotFoundError(f"{root}: no glove...d.txt below a folder {folder_name(wanted)}")
    return max(found, key=lambda glove: glove[1], default=None)


def find_weights(tree):
    """{encoder: file} of state dicts named as torchvision's: resnet50-0676ba61.pth, resnet50_imagenet.pth."""
    found = {}
    for file in tree.files:
        names = [n for n in ENCODERS if re.fullmatch(rf"{re.escape(n)}([-_.].*)?\.pth", file.name)]
        if names:
            found.setdefault(max(names, key=len), file)
    return found


# ------------------------------------------------------------------------------------------ the two calls


def create_kaggle_config(
    output_path="configs/kaggle.yaml", flickr_dataset=None, glove_dataset=None, *, root=None, working=None
):  # fmt: skip
    """Find the data, say what was found, and write a file for --config.

    Args:
        flickr_dataset, glove_dataset: OWNER/NAME or NAME on Kaggle, where several are there.
        root: the folder that the data is below, instead of /kaggle/input or Colab's /content.
        working: where runs and features go, instead of /kaggle/working, or Colab's Drive and /content.
    Returns: the file's path.
    Raises: FileNotFoundError, ValueError of one line.
    """
    from runtime import printable

    place = find_place(root, working)
    tree = look_through(place.root)
    found = find_datasets(tree)
    try:
        dataset, others = choose_dataset(found, place.root, flickr_dataset)
        glove = find_glove(tree, place.root, glove_dataset)
    finally:
        for note in tree.notes:
            print(printable(note))
    weights = find_weights(tree)
    settings = settings_of(place, dataset, glove, weights)
    for line in described(dataset, others, glove, weights, settings):
        print(printable(line))
    path = Path(output_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, as_yaml(settings))
    print(printable(f"written: {path}; train with: python flickr_image_caption.py --config {path}"))
    return path


def settings_of(place, dataset, glove, weights):
    """{option: value} for the configuration."""
    where = f"{dataset.captions_file} {dataset.image_dir}".lower()
    kinds = [kind for kind in ("flickr8k", "flickr30k") if kind in where]
    settings = {
        "dataset_type": kinds[0] if kinds else "custom",
        "image_dir": str(dataset.image_dir),
        "captions_file": str(dataset.captions_file),
        "model_save_dir": str(place.runs / "saved_models"),
        "cache_dir": str(place.cache / "feature_cache"),
        "preset": "laptop",
    }
    if weights:
        liked = (LAPTOP["encoder"], DEFAULTS["encoder"], *sorted(weights))
        encoder = next(name for name in liked if name in weights)
        settings |= {"encoder": encoder, "encoder_weights": str(weights[encoder])}
    if glove:
        settings |= {"glove_path": str(glove[0]), "embed_size": glove[1]}
    return settings


def described(dataset, others, glove, weights, settings):
    """Lines that say what was found, and what was chosen of it."""
    splits = ", with its splits" if dataset.has_splits else ""
    yield f"images: {dataset.image_dir}, {dataset.images} that have captions"
    yield f"captions: {dataset.captions_file}, {dataset.captions}{splits}"
    if others:
        yield f"not used: {', '.join(str(other.captions_file) for other in others)}"
    if weights:
        yield f"encoder weights: {settings['encoder_weights']}, of {', '.join(sorted(weights))}"
    else:
        yield f"encoder weights: none here; {LAPTOP['encoder']}'s will be downloaded, which needs internet"
    yield (
        f"GloVe: {glove[0]}, {glove[1]} numbers a word"
        if glove
        else "GloVe: none here; words begin at random"
    )


def as_yaml(settings):
    """The text of the configuration."""
    import yaml

    head = (
        "# Written by kaggle_setup.py. Any flag of flickr_image_caption.py may be added as a key.\n"
    )
    return head + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def setup_kaggle_training(verbose=True):
    """What this machine has, as a dict; printed, if `verbose`. Sizes in GB (1e9 bytes)."""
    import torch

    from runtime import available_cpus

    try:
        place = find_place()
    except FileNotFoundError:
        place = Place("this machine", None, Path(), Path())
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    environment = {
        "place": place.name,
        "input": str(place.root) if place.root else None,
        "runs": str(place.runs / "saved_models"),
        "cache": str(place.cache / "feature_cache"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpus": [{"name": d.name, "memory_gb": round(d.total_memory / 1e9, 1)} for d in devices],
        "cpu_cores": available_cpus(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "disk_free_gb": round(shutil.disk_usage(place.cache).free / 1e9, 1),
        "internet": has_internet(),
    }
    if verbose:
        print("\n".join(report_of(environment)))
    return environment


def report_of(environment):
    """Lines for the console of what `setup_kaggle_training` returns."""
    gpus = [f"{gpu['name']}, {gpu['memory_gb']} GB" for gpu in environment["gpus"]]
    advice = " (on Kaggle: Settings, Accelerator)" if environment["place"] == "Kaggle" else ""
    yield f"{environment['place']}: Python {environment['python']}, torch {environment['torch']}"
    yield f"GPU: {'; '.join(gpus) or 'none' + advice}"
    yield f"CPU cores: {environment['cpu_cores']}; memory: {environment['memory_gb']} GB"
    yield f"input: {environment['input'] or 'none'}"
    yield f"runs: {environment['runs']}; features: {environment['cache']}, {environment['disk_free_gb']} GB free"
    yield f"internet: {'yes' if environment['internet'] else 'no: encoder weights must be in a dataset'}"


def has_internet(address=INTERNET, seconds=INTERNET_SECONDS):
    """Whether a connection is made within so many seconds; looking up the name may hang, and is left to."""
    answered = threading.Event()

    def connect():
        try:
            socket.create_connection(address, timeout=seconds).close()
            answered.set()
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def missing_packages(requirements=REQUIREMENTS):
    """Lines of requirements.txt whose package is not installed in any version: a notebook keeps its own torch."""
    missing = []
    for line in requirements.read_text().splitlines():
        requirement = line.partition("#")[0].strip()
        try:
            importlib.metadata.version(requirement.partition("==")[0] or "pip")
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement)
    return missing


def main(argv=None):
    """The command: status 2 and one line where the data is not to be found or not clear."""
    parser = Parser(
        prog="kaggle_setup.py",
        description="Find a dataset, GloVe vectors and encoder weights, and write a file for --config.",
    )
    parser.add_argument("--output", default="configs/kaggle.yaml", metavar="FILE.yaml")
    parser.add_argument("--root", metavar="FOLDER", help="instead of /kaggle/input or /content")
    parser.add_argument("--working", metavar="FOLDER", help="where runs and features go")
    parser.add_argument("--flickr_dataset", metavar="NAME", help="where several are there")
    parser.add_argument("--glove_dataset", metavar="NAME", help="where several are there")
    args = parser.parse_args(argv)
    try:
        create_kaggle_config(
            args.output,
            args.flickr_dataset,
            args.glove_dataset,
            root=args.root,
            working=args.working,
        )
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    except OSError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
