"""Files written whole or not at all, and checkpoints: saved, read without running code, found.

    with replace_file("scores.json") as file: file.write(...)  # replaces the old one in one rename
    save_checkpoint("best.pt", state)
    state = load_checkpoint(resolve_checkpoint("saved_models/flickr8k"))

Nothing here knows a model: a checkpoint is a dictionary of plain values and tensors. torch is
imported where one is read or written, so that a path that leads nowhere is found out before.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import struct
import tempfile
import time
import zipfile
from pathlib import Path

FORMAT_VERSION = 5  # raised when older programs could not read what a newer one writes
READABLE_VERSIONS = (4, 5)  # see `_from_version_4`
# The keys of every checkpoint and their types; `object` is any plain value, None included.
CHECKPOINT_KEYS = {
    "config": dict, "vocabulary": dict, "model": dict, "optimizer": object, "scheduler": object,
    "scaler": object, "plan": object, "epoch": int, "step": int, "data_position": object,
    "history": list, "best_score": object, "early_stopping": object, "random_state": object,
    "encoder": dict, "splits": dict,
}  # fmt: skip
MAX_SIZE = 2**20  # of an encoder's picture or channels, on a checkpoint's word
# What a damaged or crafted archive or pickle can raise, beside pickle's and zipfile's own errors.
UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError,
    RuntimeError, TypeError, ValueError, struct.error,
)  # fmt: skip
HUB_FILE = "captioner.json"  # of a folder for the hub, as hub_models writes it
CHECKPOINT_NAME = re.compile(r"(?:best(?:_loss|_eval)?|last|model_epoch_(\d+))\.pt")
RUN_NAME_END = re.compile(r"_(\d{8}_\d{6})(?:_(\d+))?$")  # _20241201_143022, _20241201_143022_2
TIMESTAMP_FORMAT = "%Y%m%d_%H%M%S"
# A folder with this file is sealed: its files are never edited. `sha256sum --check` reads it, too.
SEAL = "version.sha256"
SEALED_LINE = re.compile(r"([0-9a-f]{64})  ([\w.-]+)", re.ASCII)
MAX_SEAL_BYTES = 2**16
NEVER_EDITED = "a version of a model is never edited"


# ------------------------------------------------------------------------------------- atomic files


@contextlib.contextmanager
def replace_file(path):
    """Yield a binary file that replaces `path` in one rename, once it is whole and on the disk.

    Whatever stops the block (a full disk, Ctrl-C), the old file stays as it was and the temporary
    one is removed. Raises: PermissionError in a sealed folder.
    """
    path = Path(path)
    if is_sealed(path.parent):
        raise PermissionError(errno.EPERM, NEVER_EDITED, str(path))
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # gone already if it was renamed
    flush_folder(path.parent)


def link_file(source, path):
    """Give a file a second name, `path`, which keeps its content when `source` is replaced.

    A copy where the file system has no links.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        os.link(source, partial)
    except OSError:
        with replace_file(path) as copy, Path(source).open("rb") as original:
            shutil.copyfileobj(original, copy)
        return
    partial.replace(path)
    flush_folder(path.parent)


def flush_folder(folder):
    """Bring a rename in `folder` to the disk, where the operating system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path, text):
    """Write `text` atomically as UTF-8. Undecodable bytes of file names become `\\udcXX`."""
    with replace_file(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


def write_json(path, value):
    """Write `value` atomically as strict JSON, in the form that `plain_values` gives it."""
    text = json.dumps(plain_values(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json_object(path, most_bytes):
    """The object in a JSON file. Raises: ValueError that names the file."""
    try:
        if path.stat().st_size > most_bytes:
            raise ValueError(f"more than {most_bytes} bytes")
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


def plain_values(value):
    """`value` as JSON can hold it: paths become strings, tensors numbers, NaN and inf None."""
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
    """Raise ValueError naming `flag` unless `path` is or could become a folder to write in.

    Creates nothing.
    """
    path = Path(path)
    nearest = _nearest_existing(path)
    if not nearest.is_dir():
        raise ValueError(
            f"{flag} {path}: {nearest} is not a folder: give a folder, it is created when absent"
        )
    if is_sealed(nearest):
        raise ValueError(f"{flag} {path}: {NEVER_EDITED}: give another folder")
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise ValueError(
            f"{flag} {path}: cannot write in {nearest} ({error.strerror}): give another folder"
        ) from error


def check_free_space(folder, needed, purpose, advice):
    """Raise ValueError unless the disk of `folder`, which may not exist yet, has `needed` bytes free.

    The message is `purpose`, such as "--cache_dir x: the features", both sizes and `advice`.
    """
    free = free_bytes(folder)
    if needed > free:
        raise ValueError(
            f"{purpose} need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; {advice}"
        )


def free_bytes(folder):
    """Bytes free on the disk of `folder`, which may not exist yet."""
    return shutil.disk_usage(_nearest_existing(folder)).free


def _nearest_existing(path):
    """The path itself, or the first of the folders above it that there is."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if os.path.lexists(folder))


# ---------------------------------------------------------------------------------- sealed folders


class BrokenSeal(ValueError):
    """A file of a sealed folder is not what it was when the folder was sealed."""


def is_sealed(folder):
    """Whether `seal_folder` closed the folder."""
    return (Path(folder) / SEAL).is_file()


def seal_folder(folder):
    """Record every file's SHA-256; from now on the folder's files are checked when they are read."""
    files = sorted(Path(folder).iterdir())
    write_text(Path(folder) / SEAL, "".join(f"{_sha256(file)}  {file.name}\n" for file in files))


def sealed_files(folder):
    """{name: SHA-256 as hexadecimal digits} of a sealed folder. Raises: BrokenSeal, OSError."""
    seal = Path(folder) / SEAL
    with seal.open("rb") as file:
        lines = file.read(MAX_SEAL_BYTES).decode("utf-8", errors="replace").splitlines()
    matches = [SEALED_LINE.fullmatch(line) for line in lines]
    if not matches or not all(matches):
        raise BrokenSeal(f"{seal}: damaged: it is no list of SHA-256 sums")
    return {match[2]: match[1] for match in matches}


def check_seal(path):
    """Raise BrokenSeal if `path` lies in a sealed folder and is not the file that was sealed."""
    path = Path(path)
    if not is_sealed(path.parent):
        return
    version, expected = path.absolute().parent.name, sealed_files(path.parent).get(path.name)
    if not path.is_file():
        fault = "missing"
    elif _sha256(path) != expected:
        fault = f"damaged: its SHA-256 is not the one in {SEAL}"
    else:
        return
    raise BrokenSeal(f"{path}: {fault}: use another version than {version}, or register it anew")


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------ saving and loading a checkpoint


def save_checkpoint(path, state):
    """Replace the checkpoint at `path` in one rename.

    Args:
        state: the CHECKPOINT_KEYS with tensors and plain values.
    Raises: OSError (a full disk, a file-size limit); then the old checkpoint is whole and nothing
    else is left behind.
    """
    assert state.keys() >= CHECKPOINT_KEYS.keys(), CHECKPOINT_KEYS.keys() - state.keys()
    save_tensors(path, {"format_version": FORMAT_VERSION, **state})


def save_tensors(path, value):
    """Replace a file by tensors and plain values, as `save_checkpoint` does."""
    import torch

    with replace_file(path) as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch's writer hides it behind its own
                raise error.__context__ from None
            raise


def load_checkpoint(path):
    """Read a checkpoint onto the CPU, without running any code that the file may hold.

    Returns: dict with `format_version` and the CHECKPOINT_KEYS, its parts of the right types.
    Raises: FileNotFoundError if there is no such file; ValueError if it is no checkpoint of this
    program, is cut short or damaged (every byte is checked against its CRC), holds code, or has
    another format version; BrokenSeal in a sealed folder; what torch raises when memory runs out.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file: --mode train writes one")
    state = load_tensors(path)
    check_state(path, state)
    return _from_version_4(path, state) if state["format_version"] == 4 else state


def load_tensors(path):
    """What `save_tensors` wrote. Raises: as `load_checkpoint`, of which this is the first part."""
    import torch

    from runtime import memory_shortage

    path = Path(path)
    check_seal(path)
    _check_archive(path)
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it holds more than tensors and plain values, which could run code"
        raise unusable(path, reason) from error
    except UNREADABLE as error:
        if memory_shortage(error):
            raise
        raise unusable(path, "its contents are not readable") from error
    _check_tensors(path, value)
    return value


def update_config(path, values):
    """Change values of options in a checkpoint; the file is replaced whole, other names of it are not."""
    state = load_checkpoint(path)
    save_checkpoint(path, state | {"config": state["config"] | values})


def _check_archive(path):
    """Raise ValueError unless `path` is a whole zip archive, stored as torch does: no zip bomb."""
    with path.open("rb") as file:  # outside the try: missing permission is an error of its own
        try:
            archive = zipfile.ZipFile(file)
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            fits = sum(entry.file_size for entry in entries) <= path.stat().st_size
            damaged = archive.testzip() if stored and fits else None
        except (zipfile.BadZipFile, OSError, *UNREADABLE) as error:  # OSError: an impossible offset
            raise unusable(path, "it is no torch archive, or was cut short") from error
    if not (stored and fits):
        raise unusable(path, "its archive is compressed, and torch's are not")
    if damaged is not None:
        raise unusable(path, f"its part {damaged[:60]!r} is damaged")


def check_state(path, state):
    """Raise ValueError unless `state` is what a checkpoint holds."""
    _check_contents(path, state)
    _check_parts(path, state)


def _check_contents(path, state):
    """Raise ValueError unless `state` has this program's format version and the CHECKPOINT_KEYS."""
    version = state.get("format_version") if isinstance(state, dict) else None
    if not isinstance(version, int):
        raise unusable(path, "it has no format_version")
    if version not in READABLE_VERSIONS:
        expected = " or ".join(map(str, READABLE_VERSIONS))
        raise ValueError(
            f"{path}: checkpoint format version {version}, expected {expected}: "
            "use the version of this program that wrote it"
        )
    for key, kind in CHECKPOINT_KEYS.items():
        if key not in state or not isinstance(state[key], kind):
            raise unusable(path, f"its {key!r} is missing or not of type {kind.__name__}")


def _check_parts(path, state):
    """Raise ValueError unless the parts that every mode reads hold what this program writes.

    What only a resumed run reads is checked where it is put back.
    """
    fits = {
        "epoch": state["epoch"] >= 0,
        "step": state["step"] >= 0,
        "model": _holds_tensors(state["model"]),
        "encoder": _is_encoder(state["encoder"]),
        "history": all(map(_is_history_row, state["history"])),
    }
    for key, is_right in fits.items():
        if not is_right:
            raise unusable(path, f"its {key!r} is damaged")


def _from_version_4(path, state):
    """The state as this version has it: 4 counted the position inside an epoch in batches.

    What 4 did not know is None, the best epoch's loss infinite.
    """
    try:
        captions = state["data_position"]["batch"] * state["config"]["batch_size"]
        position = state["data_position"] | {"captions": captions, "order": None}
        plan = state["plan"] | {"batches": None}
        early_stopping = state["early_stopping"] | {"best_loss": math.inf}
    except (TypeError, LookupError) as error:
        raise unusable(path, "what it holds of its run is damaged") from error
    return state | {"data_position": position, "plan": plan, "early_stopping": early_stopping}


def _holds_tensors(value):
    """Whether it is a dict of named tensors."""
    import torch

    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    )


def _is_encoder(value):
    """Whether it says which encoder it was: its name, weights, and the sizes of its pictures."""
    texts = [value.get(key) for key in ("name", "weights_sha256")]
    sizes = [value.get(key) for key in ("image_size", "channels")]
    sizes += [value["coarse_size"]] if "coarse_size" in value else []
    weights, parts = value.get("weights"), value.get("parts", [])
    return (
        all(isinstance(text, str) for text in texts)
        and isinstance(parts, list)
        and all(isinstance(part, dict) for part in parts)
        and all(type(size) is int and 0 < size <= MAX_SIZE for size in sizes)
        and (weights is None or _holds_tensors(weights))
    )


def _is_history_row(row):
    """Whether it is an epoch's numbers by name."""
    return (
        isinstance(row, dict)
        and all(isinstance(name, str) for name in row)
        and all(value is None or isinstance(value, int | float | str) for value in row.values())
        and all(type(row.get(name)) in (int, float) for name in ("epoch", "learning_rate"))
    )


def _check_tensors(path, state):
    """Raise ValueError for a tensor that is more than the bytes that the file holds of it.

    A tensor of stride 0 has any shape over one number: to copy it would take terabytes.
    """
    import torch

    pending, seen = [state], set()
    while pending:  # a crafted container may hold itself
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value
        elif isinstance(value, torch.Tensor) and not _is_whole(value):
            raise unusable(path, "it has a tensor without its numbers")


def _is_whole(tensor):
    """Whether a tensor is plain numbers in memory, none of which stands for several."""
    import torch

    in_memory = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not in_memory or tensor.is_complex():
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize


@contextlib.contextmanager
def checkpoint_errors(path):
    """Turn what fails while a checkpoint's parts are put back into one ValueError naming the file.

    For calls of others' code on its contents, such as `load_state_dict`: around more, it would call
    our own bugs a damaged file. A ValueError that already names the file or a flag passes
    unchanged, and so does a want of memory.
    """
    from runtime import memory_shortage

    try:
        yield
    except UNREADABLE as error:
        message = " ".join(str(error).split())
        named = isinstance(error, ValueError) and message.startswith((str(path), "--"))
        if named or memory_shortage(error):
            raise
        raise unusable(path, f"{type(error).__name__}: {message[:100]}") from error


def unusable(path, reason):
    """The ValueError for a checkpoint that cannot be used."""
    return ValueError(
        f"{path}: not a usable checkpoint ({reason}): give a .pt file that --mode train wrote"
    )


# ------------------------------------------------------------------ finding and pruning checkpoints


def resolve_checkpoint(path, prefer="best"):
    """The checkpoint file that `path` means; callers print it where it differs from `path`.

    - a file is itself;
    - a folder for the hub is its captioner.json;
    - another folder is a run at or below it: with prefer="best" the newest run's best.pt, with
      prefer="newest" the newest run's last.pt or model_epoch_N.pt, whichever was written last
      (best.pt only where no run has another);
    - a file that is not there, such as saved_models/flickr8k/resnet_lstm/model_epoch_10.pt, is the
      file of that name in the newest run below its folder.
    Runs that lack such a file (stopped before writing it) are passed over.
    Raises: FileNotFoundError naming what does exist nearby.
    """
    path = Path(path)
    if path.is_file():
        return path
    if (path / HUB_FILE).is_file():
        return path / HUB_FILE
    if path.is_dir():
        below = _checkpoints_below(path)
        best = [file for file in below if file.name == "best.pt"]
        newest = [file for file in below if not file.name.startswith("best")]
        choices = best if prefer == "best" else newest or best
    else:
        choices = [file for file in _checkpoints_below(path.parent) if file.name == path.name]
    if not choices:
        raise FileNotFoundError(f"{path}: no such checkpoint: {_nearby_checkpoints(path)}")
    run_dir = max(choices, key=_run_time).parent
    # by epoch, not by time: a plain copy of a run changes its files' times
    newest = max((file for file in choices if file.parent == run_dir), key=_epoch_number)
    last = run_dir / "last.pt"
    return last if last in choices and last.stat().st_mtime >= newest.stat().st_mtime else newest


def runs_folder(file):
    """The --model_save_dir below which a run has written this checkpoint; None for other places.

    The run's folder is saved_models/flickr8k/resnet_lstm/flickr8k_lstm_ep15_..._20241201_143022.
    """
    for path in (Path(file), Path(file).absolute()):
        if len(path.parents) < 4:
            continue
        run, family, dataset, root = path.parents[:4]
        decoder = family.name.rpartition("_")[2]
        named = run.name.startswith(f"{dataset.name}_{decoder}_ep")
        if named and RUN_NAME_END.search(run.name):
            return root
    return None


def prune_checkpoints(run_dir, keep):
    """Delete all but the last `keep` model_epoch_N.pt of a run; 0 keeps them all."""
    files = sorted(Path(run_dir).glob("model_epoch_*.pt"), key=_epoch_number)
    for file in files[:-keep]:
        file.unlink()


def _checkpoints_below(folder):
    """Checkpoint files up to three folders below `folder`, as deep as runs lie in saved_models.

    A sealed folder is no run: its checkpoint is found where the folder itself is named.
    """
    folder = Path(folder)
    levels = (folder.glob("*/" * depth + "*.pt") for depth in range(4))
    files = itertools.chain.from_iterable(levels)
    files = [file for file in files if CHECKPOINT_NAME.fullmatch(file.name)]
    return [file for file in files if file.parent == folder or not is_sealed(file.parent)]


def _epoch_number(file):
    """N of model_epoch_N.pt, else 0."""
    match = CHECKPOINT_NAME.fullmatch(file.name)
    return int(match.group(1) or 0) if match else 0


def _run_time(file):
    """Sorts runs from old to new by the time in the run's name; a renamed run's is its file's."""
    written = file.stat().st_mtime
    match = RUN_NAME_END.search(file.absolute().parent.name)
    if match:
        stamp, number = match.groups("1")
    else:
        stamp, number = time.strftime(TIMESTAMP_FORMAT, time.localtime(written)), "1"
    return stamp, int(number), written


def _nearby_checkpoints(path):
    """The end of an error message: which checkpoints lie near a path that is not there."""
    folder = path if path.is_dir() else next((up for up in path.parents if up.is_dir()), Path())
    nearby = sorted(_checkpoints_below(folder), key=_run_time, reverse=True)
    if not nearby:
        return f"there is none in {folder.absolute()} or below it: --mode train writes them"
    return f"the newest one nearby is {nearby[0]}"
