"""Keep the books of one run: its directory, its files, its plots, its seeds and its checkpoints on disk.

Imported by the program; nothing here is run by hand. It knows no models and no datasets: a configuration, an epoch's
scores and a checkpoint are dictionaries of plain values (and tensors). One run writes

    saved_models/flickr8k/resnet_lstm/flickr8k_lstm_ep15_bs64_lr1e-03_cosine_20241201_143022/
        run_config.json  run_summary.txt                            once, before training
        loss_curve.json  metrics_history.json  metrics.csv          after every epoch
        training_losses.png  learning_rate.png                      after every epoch
        best.pt  model_epoch_N.pt  last.pt                          checkpoints

Every file is written under a temporary name, flushed to disk and renamed, so a reader never sees half of one.
"""

import contextlib
import ctypes
import io
import itertools
import json
import math
import os
import pickle
import platform
import random
import re
import shlex
import signal
import struct
import subprocess
import tempfile
import time
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import process_group

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

# The keys that run_config.json opens with, in this order, and the lines of run_summary.txt.
CONFIG_KEYS = (
    "dataset_type", "decoder_type", "epochs", "batch_size", "learning_rate", "embed_size", "hidden_size", "num_layers",
    "attention_dim", "drop_prob", "num_workers", "use_scheduler", "scheduler_type", "scheduler_t_max", "min_lr",
    "save_attention_viz", "attention_viz_samples", "advanced_attention_viz", "timestamp",
)  # fmt: skip
SUMMARY_LINES = {
    "Dataset": "dataset_type", "Decoder": "decoder", "Epochs": "epochs", "Batch Size": "batch_size",
    "Learning Rate": "learning_rate", "Embed Size": "embed_size", "Hidden Size": "hidden_size",
    "Num Layers": "num_layers", "Attention Dim": "attention_dim", "Dropout": "drop_prob", "Num Workers": "num_workers",
}  # fmt: skip
SCHEDULER_LINES = {
    "reduce_lr_on_plateau": {
        "Patience": "scheduler_patience",
        "Factor": "scheduler_factor",
        "Min LR": "min_lr",
    },
    "step": {"Step Size": "scheduler_step_size", "Gamma": "scheduler_gamma"},
    "cosine": {"T_max": "scheduler_t_max", "Min LR": "min_lr"},
    "exponential": {"Gamma": "scheduler_gamma"},
    "one_cycle": {"Warmup Epochs": "warmup_epochs"},
}
ATTENTION_LINES = {"Samples": "attention_viz_samples", "Advanced": "advanced_attention_viz"}
ROW_KEYS = (
    "epoch",
    "train_loss",
    "val_loss",
    "learning_rate",
    "epoch_time_seconds",
)  # the rest of a row is metrics

BLUE, ORANGE, GREY = (
    "#0072B2",
    "#D55E00",
    "#555555",
)  # Okabe and Ito's colours, told apart by colour-blind readers
LINE = {"marker": "o", "markersize": 4, "linewidth": 1.8}


# ---------------------------------------------------------------------------------------------------- random numbers


def set_seed(seed):
    """Seed Python, numpy and torch (every device) with one int in 0..2**32 - 1."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state():
    """The state of torch's generators, which training draws from: a dict of tensors that a checkpoint can hold.

    Accelerators that this process has not used are left asleep: `cuda` is then an empty list, `mps` None.
    """
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def set_random_state(state):
    """Put back what `random_state` returned; generators that this machine lacks are passed over."""
    torch.set_rng_state(state["cpu"])
    for device, device_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(device_state, device)
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


# ------------------------------------------------------------------------------------------------ device and signals


def resolve_device(name):
    """--device -> torch.device; auto takes CUDA, then MPS, then the CPU. Raises: ValueError when it is not there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("another kind of device")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {name}: not to be had here ({reason}): give auto, cpu, cuda, cuda:N or mps"
        ) from error
    return device


def keep_freed_memory():
    """Have the allocator keep what tensors give back; the kernel would hand it out again page by page, zeroed.

    For computing on the CPU: a training step faults in 40,000 pages otherwise. Where malloc is not glibc's, nothing
    happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free bytes at the heap's end that are kept


def check_compiler(device):
    """Compile a little for --compile. Raises: ValueError when torch.compile does not work for this device."""
    try:
        torch.compile(torch.sin)(torch.ones(1, device=device))
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--compile: torch.compile does not work here ({reason}): leave the option out"
        ) from error


def resolve_precision(name, device):
    """--precision -> float32, bfloat16 or float16; auto takes the fastest that the hardware computes itself.

    Raises: ValueError for float16 on a CPU, where torch lacks parts of it.
    """
    if name == "float16" and device.type == "cpu":
        raise ValueError("--precision float16 is for GPUs: give bfloat16 or float32 on a CPU")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    native = device.type == "cpu" and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )
    return "bfloat16" if native else "float32"


class Stopped(Exception):
    """SIGINT or SIGTERM arrived. `args[0]` is its number."""


@contextlib.contextmanager
def listen_for_stop():
    """Yield a list that SIGINT and SIGTERM are appended to; a second one acts at once, as without us."""
    received = []

    def note(signum, _frame):
        received.append(signum)
        signal.signal(signum, before[signum])

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def until_stopped(received, items, apart=False):
    """Yield from `items`; raise Stopped between two of them once a signal has arrived, in any process of the run.

    `apart`: each process has its own number of items, so signals to several of them wait for a step taken together.
    """
    for item in items:
        yield item
        if apart and process_group.size() > 1:
            continue
        signum = process_group.highest(received[0] if received else 0)
        if signum:
            raise Stopped(signum)


# ------------------------------------------------------------------------------------------------------ atomic files


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
        path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalars too
        return _plain(value.tolist())
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


# ------------------------------------------------------------------------------------------------- the run directory


def run_name(config, timestamp):
    """The name of a run's directory, such as `flickr8k_lstm_ep15_bs64_lr1e-03_cosine_att_20241201_143022`."""
    rate = np.format_float_scientific(
        config["learning_rate"], trim="-", exp_digits=2
    )  # 1e-03, 2.5e-04
    parts = [
        config["dataset_type"], config["decoder"], f"ep{config['epochs']}", f"bs{config['batch_size']}", f"lr{rate}",
        *([config["scheduler_type"]] if config["use_scheduler"] else []),
        *(["att"] if config["save_attention_viz"] else []),
        timestamp,
    ]  # fmt: skip
    return "_".join(parts)


def create_run_dir(model_save_dir, config, timestamp=None):
    """Make `<model_save_dir>/<dataset>/<encoder>_<decoder>/<name>/` and return its path.

    No two calls return the same directory, not even from two processes in one second: mkdir is what decides, and
    the later one gets `_2`, `_3`, ... `timestamp` is the local time unless given as `YYYYMMDD_HHMMSS`.
    """
    encoder = {"resnet50": "resnet"}.get(config["encoder"], config["encoder"])
    family = Path(model_save_dir) / config["dataset_type"] / f"{encoder}_{config['decoder']}"
    family.mkdir(parents=True, exist_ok=True)
    name = run_name(config, timestamp or time.strftime(TIMESTAMP_FORMAT))
    number, run_dir = 1, family / name
    while True:
        try:
            run_dir.mkdir()
            return run_dir
        except FileExistsError:
            number += 1
            run_dir = family / f"{name}_{number}"


def git_info():
    """The commit, branch and whether tracked files differ from it, of the program's own folder; None where unknown."""

    def git(*arguments):
        command = [
            "git",
            "--no-optional-locks",
            "-C",
            str(Path(__file__).resolve().parent),
            *arguments,
        ]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit yet
            return None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": git("rev-parse", "--verify", "HEAD"),
        "branch": git("branch", "--show-current") or None,  # empty on a detached HEAD
        "dirty": None if changes is None else bool(changes),
    }


def environment():
    """What the numbers of a run depend on outside its configuration: versions, platform, processor and devices."""

    def version(package):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "torchvision", "numpy")},
        "platform": platform.platform(),
        "cpu_model": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        + (["mps"] if torch.backends.mps.is_available() else []),
    }


def _cpu_model():
    with contextlib.suppress(OSError):  # /proc is Linux only
        found = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()


def run_summary(run_dir_name, config, command):
    """The text of run_summary.txt: what was run, and the command that runs it again (a list of arguments)."""
    scheduler = config["scheduler_type"] if config["use_scheduler"] else "none"
    attention = "Enabled" if config["save_attention_viz"] else "Disabled"

    def lines(labels, indent=""):
        return [f"{indent}{label}: {config[key]}" for label, key in labels.items() if key in config]

    return "\n".join([
        "Training Run Summary", "===================", "",
        f"Run Directory: {run_dir_name}", f"Timestamp: {_timestamp(run_dir_name)}", "",
        *lines(SUMMARY_LINES), "",
        f"Learning Rate Scheduler: {scheduler}", *lines(SCHEDULER_LINES.get(scheduler, {}), "  "), "",
        f"Attention Visualization: {attention}", *(lines(ATTENTION_LINES, "  ") if attention == "Enabled" else []), "",
        "Full configuration saved to: run_config.json", "",
        "Command to reproduce:", f"  {shlex.join(map(str, command))}", "",
    ])  # fmt: skip


def _timestamp(run_dir_name):
    found = RUN_NAME_END.search(run_dir_name)
    return found.group(1) if found else None


class RunTracker:
    """Writes a run's configuration once and its curves after every epoch. `history` is the list of rows so far.

    Args:
        run_dir: the run's directory, which exists.
        config: every option's resolved value under its flag's name.
        command: the list of arguments that reproduces the run.
        history: the rows of the run that this one resumes.
    """

    def __init__(self, run_dir, config, command, history=()):
        self.run_dir = Path(run_dir)
        self.history = list(history)
        values = {
            ("decoder_type" if key == "decoder" else key): value for key, value in config.items()
        }
        values["timestamp"] = _timestamp(self.run_dir.name)
        ordered = {key: values[key] for key in CONFIG_KEYS if key in values} | values
        extra = {
            "command": shlex.join(map(str, command)),
            "git": git_info(),
            "environment": environment(),
        }
        write_json(self.run_dir / "run_config.json", ordered | extra)
        write_text(
            self.run_dir / "run_summary.txt", run_summary(self.run_dir.name, config, command)
        )

    def log_epoch(self, row):
        """Add one epoch and rewrite the curves.

        `row` has the ROW_KEYS (losses in nats per token) and any metrics: `BLEU-4`, `CIDEr`, `share_unique`, ...
        Metrics may come and go between epochs: where a row lacks one, its place is null, or empty in metrics.csv.
        """
        self.history.append(
            _plain(row)
        )  # plain floats: checkpoints hold the history and refuse numpy's
        columns = dict.fromkeys([*ROW_KEYS, *itertools.chain.from_iterable(self.history)])
        table = {name: [past.get(name) for past in self.history] for name in columns}
        curve = {"epochs": "epoch", "train_losses": "train_loss", "val_losses": "val_loss",
                 "learning_rates": "learning_rate"}  # fmt: skip
        metrics = {"epochs": table["epoch"]} | {
            name: table[name] for name in columns if name not in ROW_KEYS
        }
        write_json(
            self.run_dir / "loss_curve.json", {name: table[key] for name, key in curve.items()}
        )
        write_json(self.run_dir / "metrics_history.json", metrics)
        write_text(
            self.run_dir / "metrics.csv",
            pd.DataFrame(table).to_csv(index=False, lineterminator="\n"),
        )
        plot_losses(self.run_dir / "training_losses.png", self.history)
        plot_learning_rate(self.run_dir / "learning_rate.png", self.history)


# ------------------------------------------------------------------------------------------------------------- plots


def best_epoch(history):
    """The row whose model is best.pt: the first with the highest CIDEr, or without CIDEr with the lowest val_loss."""
    scored = [row for row in history if row.get("CIDEr") is not None]
    if scored:
        return max(scored, key=lambda row: row["CIDEr"])
    validated = [row for row in history if row.get("val_loss") is not None]
    return min(validated, key=lambda row: row["val_loss"], default=None)


def plot_losses(path, history):
    """Draw training and validation loss over epochs into the PNG `path`, with the epoch of best.pt marked."""
    figure, axes = _epoch_axes("Training and validation loss", "Loss (nats per token)")
    for key, label, colour in (
        ("train_loss", "Training", BLUE),
        ("val_loss", "Validation", ORANGE),
    ):
        points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=label, **LINE)
    _finish(path, figure, axes, history)


def plot_learning_rate(path, history):
    """Draw the learning rate over epochs into the PNG `path`; on a logarithmic axis when it spans over a decade."""
    figure, axes = _epoch_axes("Learning rate", "Learning rate")
    rates = [row["learning_rate"] for row in history]
    axes.plot([row["epoch"] for row in history], rates, color=BLUE, label="Learning rate", **LINE)
    if 0 < 10 * min(rates) < max(rates):
        axes.set_yscale("log")
        axes.set_ylabel("Learning rate (log scale)")
    else:
        axes.set_ylim(0, 1.08 * max(rates) or 1)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    _finish(path, figure, axes, history)


def _epoch_axes(title, y_label):
    from matplotlib.figure import (
        Figure,
    )  # not pyplot: no display, no global state; here because it takes a second
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 4.0), dpi=200, layout="constrained")
    axes = figure.add_subplot(xlabel="Epoch", ylabel=y_label)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _finish(path, figure, axes, history):
    """Mark the best epoch, add the legend and write the PNG `path`."""
    best = best_epoch(history)
    if best is not None:
        score = (
            f"CIDEr {best['CIDEr']:.3f}"
            if best.get("CIDEr") is not None
            else f"loss {best['val_loss']:.3f}"
        )
        label = f"Best epoch {best['epoch']} ({score})"
        axes.axvline(
            best["epoch"], color=GREY, linestyle="--", linewidth=1.2, zorder=1, label=label
        )
    first, last = history[0]["epoch"], history[-1]["epoch"]
    margin = max(0.5, 0.03 * (last - first))
    axes.set_xlim(first - margin, last + margin)
    figure.legend(
        loc="outside lower center", ncols=3, frameon=False
    )  # outside: it never covers a curve
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with replace_file(path) as file:
        file.write(picture.getbuffer())


# ------------------------------------------------------------------------------------------------------- checkpoints


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
def taking_from(path):
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
