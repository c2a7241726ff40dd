"""The records of one run: its directory, the files and plots in it, its seeds and random states.

Imported by the program; nothing here is run by hand. It knows no models and no datasets: a
configuration and an epoch's scores are dictionaries of plain values. One run writes

    saved_models/flickr8k/resnet_lstm/flickr8k_lstm_ep15_bs64_lr1e-03_cosine_20241201_143022/
        run_config.json  run_summary.txt                            once, before training
        loss_curve.json  metrics_history.json  metrics.csv          after every epoch
        training_losses.png  learning_rate.png                      every ten seconds, and at the end
        best.pt  model_epoch_N.pt  last.pt                          checkpoints

A reader never sees half a file: each is written under a temporary name, flushed and renamed.
"""

import contextlib
import io
import itertools
import math
import os
import platform
import random
import re
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import process_group
from checkpoints import (
    RUN_NAME_END,
    TIMESTAMP_FORMAT,
    check_free_space,
    free_bytes,
    plain_values,
    replace_file,
    write_json,
    write_text,
)

# The keys that run_config.json opens with, in this order.
CONFIG_KEYS = (
    "dataset_type", "decoder_type", "epochs", "batch_size", "learning_rate", "embed_size",
    "hidden_size", "num_layers", "attention_dim", "drop_prob", "num_workers", "use_scheduler",
    "scheduler_type", "scheduler_t_max", "min_lr", "save_attention_viz", "attention_viz_samples",
    "advanced_attention_viz", "timestamp",
)  # fmt: skip
# Labels of options in run_summary.txt; of the schedules' options a run prints those it uses.
SUMMARY_LABELS = {
    "dataset_type": "Dataset", "decoder": "Decoder", "epochs": "Epochs", "batch_size": "Batch Size",
    "learning_rate": "Learning Rate", "embed_size": "Embed Size", "hidden_size": "Hidden Size",
    "num_layers": "Num Layers", "attention_dim": "Attention Dim", "drop_prob": "Dropout",
    "num_workers": "Num Workers",
}  # fmt: skip
SCHEDULE_LABELS = {
    "scheduler_patience": "Patience", "scheduler_factor": "Factor",
    "scheduler_step_size": "Step Size", "scheduler_gamma": "Gamma", "scheduler_t_max": "T_max",
    "warmup_epochs": "Warmup Epochs", "min_lr": "Min LR",
}  # fmt: skip
ATTENTION_LABELS = {"attention_viz_samples": "Samples", "advanced_attention_viz": "Advanced"}
# The keys that every epoch's row has; its other keys are metrics.
ROW_KEYS = ("epoch", "train_loss", "val_loss", "learning_rate", "epoch_time_seconds")
# The curves of loss_curve.json and the keys of the rows they are drawn from.
CURVES = {
    "epochs": "epoch", "train_losses": "train_loss", "val_losses": "val_loss",
    "learning_rates": "learning_rate",
}  # fmt: skip

DRAW_SECONDS = 10  # from one drawing of the curves to the next: an epoch may take two
# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"
LINE = {"marker": "o", "markersize": 4, "linewidth": 1.8}


# ----------------------------------------------------------------------------------- random numbers


def set_seed(seed):
    """Seed Python, numpy and torch (every device) with one int in 0..2**32 - 1."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state():
    """The states of torch's generators, which training draws from, as tensors for a checkpoint.

    Does not start CUDA in a process that has not used it: `cuda` is then an empty list.
    """
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def set_random_state(state):
    """Put back what `random_state` returned; generators that this machine lacks are skipped."""
    torch.set_rng_state(state["cpu"])
    for device, device_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(device_state, device)
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


# -------------------------------------------------------------------------------- the run directory


def run_name(config, timestamp):
    """A run directory's name: `flickr8k_lstm_ep15_bs64_lr1e-03_cosine_att_20241201_143022`."""
    # 1e-03, 2.5e-04
    rate = np.format_float_scientific(config["learning_rate"], trim="-", exp_digits=2)
    parts = [
        config["dataset_type"],
        config["decoder"],
        f"ep{config['epochs']}",
        f"bs{config['batch_size']}",
        f"lr{rate}",
        *([config["scheduler_type"]] if config["use_scheduler"] else []),
        *(["att"] if config["save_attention_viz"] else []),
        timestamp,
    ]
    return "_".join(parts)


def create_run_dir(model_save_dir, config, timestamp=None):
    """Make `<model_save_dir>/<dataset>/<encoder>_<decoder>/<name>/` and return its path.

    mkdir decides, so that no two calls return the same directory, not even from two processes in
    one second: the later one gets `_2`, `_3`, ... `timestamp` is the local time unless given as
    `YYYYMMDD_HHMMSS`.
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


def checkpoint_sizes(folder, kept, each, encoder):
    """The line about the most that `kept` epochs' checkpoints of `each` bytes and best.pt will take.

    The checkpoint of an epoch that was the best holds the `encoder`'s bytes, too.
    Raises: ValueError when the disk of `folder` has less free.
    """
    needed = (kept + 1) * each + kept * encoder
    check_free_space(
        folder,
        needed,
        f"--model_save_dir {folder}: the checkpoints to keep ({kept}) and best.pt",
        "give --keep_checkpoints N to keep the newest N only, or another --model_save_dir",
    )
    return (
        f"checkpoints will take {needed / 2**20:,.0f} MiB at most, "
        f"{free_bytes(folder) / 2**20:,.0f} MiB are free: {each / 2**20:,.0f} MiB for "
        f"each epoch kept ({kept}), {encoder / 2**20:,.0f} MiB more for one that is the best; "
        "--keep_checkpoints N keeps the newest N"
    )


def git_info():
    """The program's commit and branch, and whether tracked files differ; None where unknown."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git("rev-parse", "--verify", "HEAD"),
        "branch": _git("branch", "--show-current") or None,  # empty on a detached HEAD
        "dirty": None if changes is None else bool(changes),
    }


def _git(*arguments):
    """What git prints in the program's own folder; None without git, a repository or a commit."""
    folder = Path(__file__).resolve().parent
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def environment():
    """What a run's results depend on beside its configuration: versions, processor, devices."""
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "torchvision", "numpy")},
        "platform": platform.platform(),
        "cpu_model": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world_size": process_group.world_size(),
        "devices": _devices(),
    }


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model():
    with contextlib.suppress(OSError):  # /proc is Linux only
        cpuinfo = Path("/proc/cpuinfo").read_text()
        if match := re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE):
            return match.group(1)
    return platform.processor() or platform.machine()


def _devices():
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return gpus + (["mps"] if torch.backends.mps.is_available() else [])


def launch_command(arguments, variables=()):
    """The words that start this run again: `arguments`, a script and its own, and what runs it.

    That is torchrun, as this process was started, or Python; with the threads that its environment
    set, which decide the results to the last bit, and with its `variables` that gave options.
    """
    environ, world_size = os.environ, process_group.world_size()
    threads = environ.get("OMP_NUM_THREADS")
    launcher = [Path(sys.executable).name]
    if world_size > 1:
        threads = None if threads == "1" else threads  # which torchrun sets by itself
        local = int(environ.get("LOCAL_WORLD_SIZE", world_size))  # processes of this machine
        launcher = ["torchrun", f"--nproc_per_node={local}"]
        if world_size > local:
            launcher += [
                f"--nnodes={world_size // local}",
                f"--node_rank={environ['GROUP_RANK']}",
                f"--master_addr={environ['MASTER_ADDR']}",
            ]
    settings = [f"OMP_NUM_THREADS={threads}"] if threads else []
    settings += [f"{name}={environ[name]}" for name in variables]
    before = ["env", *settings] if settings else []
    return [*before, *launcher, *map(str, arguments)]


def run_summary(run_dir_name, config, command, schedule_options=()):
    """The text of run_summary.txt: what was run, and the command that runs it again.

    Args:
        command: list of arguments.
        schedule_options: names of the options of this run's schedule, in the order to print.
    """
    scheduler = config["scheduler_type"] if config["use_scheduler"] else "none"
    attention = "Enabled" if config["save_attention_viz"] else "Disabled"
    schedule_labels = {name: SCHEDULE_LABELS[name] for name in schedule_options}
    attention_labels = ATTENTION_LABELS if config["save_attention_viz"] else {}

    def lines(labels, indent=""):
        return [f"{indent}{label}: {config[key]}" for key, label in labels.items() if key in config]

    return "\n".join([
        "Training Run Summary", "===================", "",
        f"Run Directory: {run_dir_name}", f"Timestamp: {_timestamp(run_dir_name)}", "",
        *lines(SUMMARY_LABELS), "",
        f"Learning Rate Scheduler: {scheduler}", *lines(schedule_labels, "  "), "",
        f"Attention Visualization: {attention}", *lines(attention_labels, "  "), "",
        "Full configuration saved to: run_config.json", "",
        "Command to reproduce:", f"  {shlex.join(map(str, command))}", "",
    ])  # fmt: skip


def _timestamp(run_dir_name):
    match = RUN_NAME_END.search(run_dir_name)
    return match.group(1) if match else None


class RunTracker:
    """Writes a run's configuration once, and its curves after every epoch.

    `history` is the list of the epochs' rows so far. As a context it draws at its end the plots
    that short epochs have left undrawn, since drawing takes a second.

    Args:
        run_dir: the run's directory, which exists.
        config: every option's resolved value under its flag's name.
        command: the list of arguments that reproduces the run.
        history: the rows of the run that this one resumes.
        schedule_options: names of the options of this run's schedule, in the order to print.
        origins: {option: where its value comes from}.
    """

    def __init__(self, run_dir, config, command, history=(), schedule_options=(), origins=None):
        self.run_dir = Path(run_dir)
        self.history = list(history)
        self._write_config(config, command, origins or {})
        summary = run_summary(self.run_dir.name, config, command, schedule_options)
        write_text(self.run_dir / "run_summary.txt", summary)
        self.drawn, self.drawn_at = len(self.history), -math.inf  # epochs, and when

    def _write_config(self, config, command, origins):
        values = {"decoder_type" if key == "decoder" else key: config[key] for key in config}
        values["timestamp"] = _timestamp(self.run_dir.name)
        ordered = {key: values[key] for key in CONFIG_KEYS if key in values} | values
        origin = {
            "command": shlex.join(map(str, command)),
            "git": git_info(),
            "environment": environment(),
            "origins": {name: str(origin) for name, origin in origins.items()},
        }
        write_json(self.run_dir / "run_config.json", ordered | origin)

    def log_epoch(self, row):
        """Add one epoch and rewrite the curves.

        `row` has the ROW_KEYS (losses in nats per token; of an epoch on the reward `train_reward` for
        `train_loss`) and any metrics: `BLEU-4`, `CIDEr`,
        `share_unique`, ... Metrics may come and go between epochs: where a row lacks one, its place
        is null, or empty in metrics.csv.
        """
        self.history.append(plain_values(row))  # checkpoints hold it and refuse numpy's floats
        columns = dict.fromkeys([*ROW_KEYS, *itertools.chain.from_iterable(self.history)])
        table = {name: [epoch.get(name) for epoch in self.history] for name in columns}
        curves = {name: table[key] for name, key in CURVES.items()}
        metrics = {name: values for name, values in table.items() if name not in ROW_KEYS}
        csv = pd.DataFrame(table).to_csv(index=False, lineterminator="\n")
        write_json(self.run_dir / "loss_curve.json", curves)
        write_json(self.run_dir / "metrics_history.json", {"epochs": table["epoch"]} | metrics)
        write_text(self.run_dir / "metrics.csv", csv)
        if time.monotonic() - self.drawn_at >= DRAW_SECONDS:
            self.draw()

    def draw(self):
        """Draw the curves so far."""
        plot_losses(self.run_dir / "training_losses.png", self.history)
        plot_learning_rate(self.run_dir / "learning_rate.png", self.history)
        self.drawn, self.drawn_at = len(self.history), time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        if self.drawn < len(self.history):
            self.draw()


def epoch_summary(row, epochs, scheduler, is_best, example):
    """What the console says of a finished epoch.

    Args:
        row: as `RunTracker.log_epoch`'s, with the validation captions' scores.
        epochs: the last one of the plan.
        scheduler: the schedule in words.
        example: a validation image's name and its caption, the same image after every epoch.
    """
    seconds, more = row["epoch_time_seconds"], epochs - row["epoch"]
    left = f", about {tqdm.format_interval(more * seconds)} left" if more else ""
    image, caption = example
    measure = "Reward" if "train_reward" in row else "Loss"
    entropy = row.get("attention_entropy")
    attention = "" if entropy is None else f"  Attention entropy: {entropy:.3f} of uniform\n"
    return (
        f"Epoch {row['epoch']} completed ({row['epoch']}/{epochs}):\n"
        f"  Training {measure}: {row[f'train_{measure.lower()}']:.5f}\n"
        f"  Validation Loss: {row['val_loss']:.5f}\n"
        f"  Learning Rate: {row['learning_rate']:.6f}\n"
        f"  Scheduler: {scheduler}\n"
        f"  Validation captions: BLEU-4 {row['BLEU-4']:.4f}, CIDEr {row['CIDEr']:.4f}, "
        f"{row['share_unique']:.0%} unique, {row['share_cut']:.0%} cut at --max_length\n"
        f"{attention}"
        f"  Model checkpoint saved (best: {is_best})\n"
        f"  Time: {seconds:.1f} s{left}\n"
        f"  First validation image {image}: {caption}"
    )


# -------------------------------------------------------------------------------------------- plots


def best_epoch(history):
    """The row whose model is best.pt: of highest CIDEr, of those of lowest val_loss; or by that alone."""
    scored = [row for row in history if row.get("CIDEr") is not None]
    if scored:
        return max(scored, key=lambda row: (row["CIDEr"], -(row.get("val_loss") or 0)))
    validated = [row for row in history if row.get("val_loss") is not None]
    return min(validated, key=lambda row: row["val_loss"], default=None)


def plot_losses(path, history):
    """Draw training and validation loss over epochs into the PNG `path`."""
    figure, axes = _epoch_axes("Training and validation loss", "Loss (nats per token)")
    curves = (("train_loss", "Training", BLUE), ("val_loss", "Validation", ORANGE))
    for key, label, colour in curves:
        points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=label, **LINE)
    _finish(path, figure, axes, history)


def plot_learning_rate(path, history):
    """Draw the learning rate over epochs into the PNG `path`; logarithmic if it spans a decade."""
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
    # Not pyplot, which needs a display and has global state; here because it takes a second.
    from matplotlib.figure import Figure
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
        scored = best.get("CIDEr") is not None
        score = f"CIDEr {best['CIDEr']:.3f}" if scored else f"loss {best['val_loss']:.3f}"
        label = f"Best epoch {best['epoch']} ({score})"
        style = {"color": GREY, "linestyle": "--", "linewidth": 1.2, "zorder": 1}
        axes.axvline(best["epoch"], label=label, **style)
    first, last = history[0]["epoch"], history[-1]["epoch"]
    margin = max(0.5, 0.03 * (last - first))
    axes.set_xlim(first - margin, last + margin)
    # outside the axes, where it covers no curve
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with replace_file(path) as file:
        file.write(picture.getbuffer())
