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
import io
import itertools
import os
import platform
import random
import re
import shlex
import subprocess
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from checkpoints import (
    RUN_NAME_END,
    TIMESTAMP_FORMAT,
    plain_values,
    replace_file,
    write_json,
    write_text,
)

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


# ------------------------------------------------------------------------------------------------------ atomic files


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
            plain_values(row)
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
