"""Files written whole or not at all, and checkpoints: saved, read without running code, found and deleted.

    with replace_file("scores.json") as file: file.write(...)  # takes the old file's place in one rename
    save_checkpoint("best.pt", state)
    state = load_checkpoint(resolve_checkpoint("saved_models/flickr8k"))

Nothing here knows a model: a checkpoint is a dictionary of plain values and tensors.
"""

import contextlib
import itertools
import json
import math
import os
import pickle
import re
import struct
import tempfile
import time
import zipfile
from pathlib import Path

import torch

FORMAT_VERSION = (
    3  # of a checkpoint; raised when an older program could not read what a newer one writes
)
# What every checkpoint holds, and of which type; `object` is any plain value, None included.
CHECKPOINT_KEYS = {
    "config": dict, "vocabulary": dict, "model": dict, "optimizer": object, "scheduler": object, "scaler": object,
    "plan": object, "epoch": int, "step": int, "data_position": object, "history": list, "best_score": object,
    "early_stopping": object, "random_state": object, "encoder": dict, "splits": dict,
}  # fmt: skip
# What reading a damaged or crafted archive or pickle can raise, beside pickle's and zipfile's own errors.
UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError,
    ValueError, struct.error,
)  # fmt: skip
CHECKPOINT_NAME = re.compile(r"(?:best|last|model_epoch_(\d+))\.pt")
RUN_NAME_END = re.compile(
    r"_(\d{8}_\d{6})(?:_(\d+))?$"
)  # ..._20241201_143022, or ..._20241201_143022_2
TIMESTAMP_FORMAT = "%Y%m%d_%H%M%S"


@contextlib.contextmanager
def replace_file(path):
    """Yield a binary file that takes the place of `path` in one rename, once it is whole and on the disk.

    Whatever stops the block (a full disk, Ctrl-C), the old file stays as it was and the temporary one is removed.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # after the rename this name is gone already
    with contextlib.suppress(
        OSError
    ):  # the rename itself reaches the disk, where a folder can be flushed
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path, text):
    """Write `text` atomically as UTF-8. Bytes of a file name that are not UTF-8 come out as `\\udcXX`, as in JSON."""
    with replace_file(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


def write_json(path, value):
    """Write `value` atomically as strict JSON: paths become strings, arrays and tensors numbers, NaN and inf null."""
    write_text(
        path, json.dumps(plain_values(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def plain_values(value):
    if isinstance(value, dict):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalars too
        return plain_values(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def check_writable_dir(path, flag):
    """Raise ValueError, naming `flag`, unless `path` is a folder to write in or could become one. Creates nothing."""
    path = Path(path)
    nearest = next(
        folder for folder in (path.absolute(), *path.absolute().parents) if os.path.lexists(folder)
    )
    if not nearest.is_dir():
        raise ValueError(
            f"{flag} {path}: {nearest} is not a folder: give a folder, it is created when absent"
        )
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise ValueError(
            f"{flag} {path}: cannot write in {nearest} ({error.strerror}): give another folder"
        ) from error


def save_checkpoint(path, state):
    """Replace the checkpoint at `path` in one rename; `state` has the CHECKPOINT_KEYS: tensors and plain values.

    Raises OSError (a full disk, a file-size limit) with the old checkpoint whole and nothing else left behind.
    """
    assert state.keys() >= CHECKPOINT_KEYS.keys(), CHECKPOINT_KEYS.keys() - state.keys()
    with replace_file(path) as file:
        try:
            torch.save({"format_version": FORMAT_VERSION, **state}, file)
        except (
            RuntimeError
        ) as error:  # torch's archive writer hides the disk's own error behind one of its own
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_checkpoint(path):
    """Read a checkpoint onto the CPU, without running any code that the file may hold.

    Returns: dict with `format_version` and the CHECKPOINT_KEYS.
    Raises: FileNotFoundError if there is no such file; ValueError if it is no checkpoint of this program, is cut
    short or damaged (every byte is checked against its CRC), holds code, or has another format version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file: --mode train writes one")
    _check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unusable(
            path, "it holds more than tensors and plain values, which could run code"
        ) from error
    except UNREADABLE as error:
        raise _unusable(path, "its contents are not readable") from error
    version = state.get("format_version") if isinstance(state, dict) else None
    if not isinstance(version, int):
        raise _unusable(path, "it has no format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: checkpoint format version {version}, expected {FORMAT_VERSION}: "
            "use the version of this program that wrote it"
        )
    for key, kind in CHECKPOINT_KEYS.items():
        if key not in state or not isinstance(state[key], kind):
            raise _unusable(path, f"its {key!r} is missing or not of type {kind.__name__}")
    return state


@contextlib.contextmanager
def checkpoint_errors(path):
    """While parts of a checkpoint are put to use, whatever they make fail becomes one ValueError that names the file.

    A ValueError that names a file or a flag of its own accord passes as it is.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        told = " ".join(str(error).split())
        if isinstance(error, ValueError) and told.startswith((str(path), "--")):
            raise
        raise _unusable(path, f"{type(error).__name__}: {told[:100]}") from error


def _unusable(path, reason):
    return ValueError(
        f"{path}: not a usable checkpoint ({reason}): give a .pt file that --mode train wrote"
    )


def _check_archive(path):
    """Raise ValueError unless `path` is a whole zip archive, stored as torch writes it: no room for a zip bomb."""
    with path.open("rb") as file:  # opened here, so that a lack of permission is still told as one
        try:
            archive = zipfile.ZipFile(file)
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            fits = sum(entry.file_size for entry in entries) <= path.stat().st_size
            damaged = archive.testzip() if stored and fits else None
        except (
            zipfile.BadZipFile,
            OSError,
            *UNREADABLE,
        ) as error:  # OSError: an offset that is none
            raise _unusable(path, "it is no torch archive, or was cut short") from error
    if not (stored and fits):
        raise _unusable(path, "its archive is compressed, and torch's are not")
    if damaged is not None:
        raise _unusable(path, f"its part {damaged[:60]!r} is damaged")


def resolve_checkpoint(path, prefer="best"):
    """Which checkpoint file `path` means; the caller prints the choice where it differs from `path`.

    - a file is itself;
    - a folder is a run at or below it: with prefer="best" the newest run's best.pt, with prefer="newest" the newest
      run's last.pt or model_epoch_N.pt, whichever was written last (best.pt only where no run has another);
    - a file that is not there, such as saved_models/flickr8k/resnet_lstm/model_epoch_10.pt, is the file of that name
      in the newest run below its folder.
    Runs that have no such file (stopped before writing it) are passed over.
    Raises: FileNotFoundError naming what does exist nearby.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        found = _checkpoints_below(path)
        choices = [file for file in found if (file.name == "best.pt") == (prefer == "best")]
        choices = choices or (found if prefer == "newest" else [])
    else:
        choices = [file for file in _checkpoints_below(path.parent) if file.name == path.name]
    if not choices:
        raise FileNotFoundError(f"{path}: no such checkpoint: {_nearby(path)}")
    run_dir = max(choices, key=_run_age).parent
    newest = max(
        (file for file in choices if file.parent == run_dir), key=_epoch_number
    )  # N survives a plain copy
    last = run_dir / "last.pt"
    return last if last in choices and last.stat().st_mtime >= newest.stat().st_mtime else newest


def prune_checkpoints(run_dir, keep):
    """Delete all but the last `keep` model_epoch_N.pt of a run; 0 keeps them all."""
    files = sorted(Path(run_dir).glob("model_epoch_*.pt"), key=_epoch_number)
    for file in files[:-keep]:
        file.unlink()


def _checkpoints_below(folder):
    """Checkpoint files in `folder` and down to three folders below it, the depth of a run under saved_models."""
    found = itertools.chain.from_iterable(
        Path(folder).glob("*/" * depth + "*.pt") for depth in range(4)
    )
    return [file for file in found if CHECKPOINT_NAME.fullmatch(file.name)]


def _epoch_number(file):
    found = CHECKPOINT_NAME.fullmatch(file.name)
    return int(found.group(1) or 0) if found else 0


def _run_age(file):
    """Sorts runs from old to new by the time stamp in the name; a renamed run's is when its file was written."""
    written = file.stat().st_mtime
    named = RUN_NAME_END.search(file.absolute().parent.name)
    stamp, number = (
        named.groups("1")
        if named
        else (time.strftime(TIMESTAMP_FORMAT, time.localtime(written)), "1")
    )
    return stamp, int(number), written


def _nearby(path):
    """What to say of the checkpoints close to a path that is not there."""
    folder = path if path.is_dir() else next((up for up in path.parents if up.is_dir()), Path())
    found = sorted(_checkpoints_below(folder), key=_run_age, reverse=True)
    if not found:
        return f"there is none in {folder.absolute()} or below it: --mode train writes them"
    return (
        "existing ones are " + ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
    )
