"""The records of one run: its directory, the files and plots in it, its seeds and random states.

Imported by the program; nothing here is run by hand. It knows no models and no datasets: a
configuration and an epoch's scores are dictionaries of plain values. One run writes

    saved_models/flickr8k/resnet_lstm/flickr8k_lstm_ep15_bs64_lr1e-03_cosine_20241201_143022/
        run_config.json  run_summary.txt  config_snapshot.json      once, before training
        loss_curve.json  metrics_history.json  metrics.csv          after every epoch
        run_summary.json  sample_captions.json                      the same; how the run ended
        training_losses.png  learning_rate.png                      every ten seconds, and at the end
        best.pt  best_loss.pt  best_eval.pt                         checkpoints of the best epochs,
        model_epoch_N.pt  last.pt                                   of every one, of a stop

A reader never sees half a file: each is written under a temporary name, flushed and renamed. Code of
one's own tracks its runs in the same way:

    set_global_seed(42)
    with ExperimentTracker("experiments/run_001", run_name="baseline", seed=42) as tracker:
        tracker.log_config({"model": {"hidden_dim": 256}, "training": {"epochs": 20}})
        tracker.log_metrics(epoch=1, train_loss=2.5, val_loss=2.8, learning_rate=1e-4, accuracy=0.85)
        tracker.log_bleu_scores(bleu1=0.65, bleu2=0.45, bleu3=0.35, bleu4=0.25, split="test")
        tracker.log_artifact("predictions", {"dog.jpg": "a dog runs"})  # artifacts/predictions.json
"""

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import model_selection
import process_group
import run_records
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
from runtime import printable

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

SAMPLES_FILE, SAMPLE_IMAGES = "sample_captions.json", 10
DRAW_SECONDS = 10  # from one drawing of the curves to the next: an epoch may take two
# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"
LINE = {"marker": "o", "markersize": 4, "linewidth": 1.8}


# ----------------------------------------------------------------------------------- random numbers


def set_global_seed(seed):
    """Seed Python, numpy and torch (every device) with one int in 0..2**32 - 1.

    Processes that are started from now on hash strings alike, and cuDNN takes deterministic
    algorithms only.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)
    torch.backends.cudnn.deterministic = True


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
    encoder = {"resnet50": "resnet"}.get(config["encoder"], config["encoder"]).replace("/", "_")
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


def checkpoint_sizes(folder, kept, bests, each, encoder):
    """The line about the most that a run's checkpoints of `each` bytes will take.

    They are of the `kept` newest epochs, and `bests` more. That of an epoch that was the best holds
    the `encoder`'s bytes, too.
    Raises: ValueError when the disk of `folder` has less free.
    """
    needed = (kept + bests) * each + (kept + bests - 1) * encoder
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


def get_git_info():
    """The program's commit and branch, whether tracked files differ, and origin; None where unknown."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    remote = _git("config", "--get", "remote.origin.url")
    return {
        "commit": _git("rev-parse", "--verify", "HEAD"),
        "branch": _git("branch", "--show-current") or None,  # empty on a detached HEAD
        "dirty": None if changes is None else bool(changes),
        # without the password that a URL may hold
        "remote_url": remote and re.sub(r"^(\w+://)[^/@]*@", r"\1", remote),
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


def write_run_files(run_dir, config, command, schedule_options=(), origins=None):
    """Write run_config.json and run_summary.txt, which say what the run is.

    Args:
        run_dir: the run's directory, which exists.
        config: every option's resolved value under its flag's name.
        command: the list of arguments that reproduces the run.
        schedule_options: names of the options of this run's schedule, in the order to print.
        origins: {option: where its value comes from}.
    """
    values = {"decoder_type" if key == "decoder" else key: config[key] for key in config}
    values["timestamp"] = _timestamp(run_dir.name)
    ordered = {key: values[key] for key in CONFIG_KEYS if key in values} | values
    origin = {
        "command": shlex.join(map(str, command)),
        "git": get_git_info(),
        "environment": environment(),
        "origins": {name: str(source) for name, source in (origins or {}).items()},
    }
    write_json(run_dir / "run_config.json", ordered | origin)
    summary = run_summary(run_dir.name, config, command, schedule_options)
    write_text(run_dir / "run_summary.txt", summary)


# ---------------------------------------------------------------------------------------- the tracker


@dataclass
class RunMetadata:
    """The first part of run_summary.json."""

    run_id: str  # 20241201_143022_1a2b3c4d
    run_name: str
    start_time: str  # ISO 8601, local
    seed: int | None
    git_info: dict
    environment: dict
    end_time: str | None = None
    status: str = "running"  # then completed or failed
    error: str | None = None

    @classmethod
    def of_new_run(cls, run_name, seed):
        """Of a run that begins now, here."""
        here, now = environment(), datetime.now()
        return cls(
            run_id=f"{now.strftime(TIMESTAMP_FORMAT)}_{uuid.uuid4().hex[:8]}",
            run_name=run_name,
            start_time=now.isoformat(timespec="seconds"),
            seed=seed,
            git_info=get_git_info(),
            environment={
                "python_version": here["python"],
                "torch_version": here["torch"],
                "gpu_available": bool(here["devices"]),
                "gpu_devices": here["devices"],
            },
        )


class Sample(NamedTuple):
    """One of the validation images that are captioned after every epoch, and its latest caption."""

    image: str
    path: object  # as image_loading.open_images takes it
    references: list[str]
    caption: str
    words: list[str]  # T
    maps: np.ndarray | None = None  # (T, h, w) where the words looked, each map sums to 1
    beside: dict | None = None  # (T,) by name: what no cell got


class ExperimentTracker:
    """Keeps a run's records: its files are complete after every epoch, whatever stops it later.

    `history` is the list of the epochs' rows so far. As a context it ends the run: completed, or
    failed with the error that left the context, unless `finalize` has said how before.

    Args:
        output_dir: the run's directory, made if absent.
        run_name: the directory's name unless given.
        seed: noted; `set_global_seed` is what sets it.
        history: the rows of the run that this one resumes.
        sample_captions: its sample_captions.json.
        listeners: hear what is logged, by the methods of `tracking_backends.Listener`. One that
            fails is heard of on stderr and told no more: the run goes on.
    """

    def __init__(
        self, output_dir, run_name=None, seed=None, *, history=(), sample_captions=(), listeners=()
    ):
        self.run_dir = Path(output_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.history, self.sample_captions = list(history), list(sample_captions)
        self.config, self.bleu_scores, self.listeners = {}, {}, list(listeners)
        self.metadata = RunMetadata.of_new_run(run_name or self.run_dir.name, seed)
        self.lock = run_records.hold(self.run_dir)
        self.drawn, self.drawn_at = len(self.history), -math.inf  # epochs, and when
        self._write_summary()

    @property
    def select_by(self):
        """The rule by which an epoch is the best: the config's."""
        return model_selection.rule_of(self.config)

    def log_config(self, config):
        """Write config_snapshot.json: the config, nested or flat, and a hash that tells configs apart."""
        self.config = plain_values(config)
        text = json.dumps(self.config, sort_keys=True)
        digest = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
        snapshot = self.config | {"_config_hash": digest[:8]}
        write_json(self.run_dir / "config_snapshot.json", snapshot)
        self._write_summary()
        self._tell("config_logged", self.config)

    def log_metrics(self, epoch, **values):
        """Add an epoch, or more values of the latest one, and rewrite the curves.

        `values` are the other ROW_KEYS (losses in nats per token; of an epoch on the reward
        `train_reward` for `train_loss`) and any metrics: `BLEU-4`, `CIDEr`, `share_unique`, ...
        They may come and go between epochs: where a row lacks one, its place is null, or empty in
        metrics.csv.
        """
        row = plain_values({"epoch": epoch} | values)  # checkpoints hold it: none of numpy's floats
        if self.history and self.history[-1]["epoch"] == epoch:
            self.history[-1] |= row
        else:
            self.history.append(row)
        self._write_curves()
        self._write_summary()
        self._tell("metrics_logged", row)
        if time.monotonic() - self.drawn_at >= DRAW_SECONDS:
            self.draw()

    def _write_curves(self):
        columns = dict.fromkeys([*ROW_KEYS, *itertools.chain.from_iterable(self.history)])
        table = {name: [epoch.get(name) for epoch in self.history] for name in columns}
        curves = {name: table[key] for name, key in CURVES.items()}
        metrics = {name: values for name, values in table.items() if name not in ROW_KEYS}
        csv = pd.DataFrame(table).to_csv(index=False, lineterminator="\n")
        write_json(self.run_dir / "loss_curve.json", curves)
        write_json(self.run_dir / "metrics_history.json", {"epochs": table["epoch"]} | metrics)
        write_text(self.run_dir / "metrics.csv", csv)

    def log_samples(self, epoch, samples):
        """Add an epoch's captions of the same few images, a list of Sample, to sample_captions.json."""
        known = {entry["image"]: entry for entry in self.sample_captions}
        for sample in samples:
            if sample.image not in known:
                entry = {"image": sample.image, "references": sample.references, "captions": []}
                known[sample.image] = entry
                self.sample_captions.append(entry)
            known[sample.image]["captions"].append({"epoch": epoch, "caption": sample.caption})
        write_json(self.run_dir / SAMPLES_FILE, self.sample_captions)
        self._tell("samples_logged", epoch, samples)

    def log_bleu_scores(self, bleu1, bleu2, bleu3, bleu4, split="test"):
        """Note the scores of a split, 0..1, in run_summary.json."""
        scores = run_records.bleu_scores(split, [bleu1, bleu2, bleu3, bleu4])
        self.bleu_scores |= plain_values(scores)
        self._write_summary()

    def log_artifact(self, name, data, artifact_type="json"):
        """Write artifacts/<name>.json, or .npy of an array with "numpy". Returns its Path.

        Raises: ValueError for another type, or a name that would lie elsewhere.
        """
        if not name or Path(name).name != name:
            raise ValueError(f"artifact {name!r}: give a plain name, without folders")
        writers = {"json": (".json", write_json), "numpy": (".npy", _write_array)}
        if artifact_type not in writers:
            kinds = " or ".join(writers)
            raise ValueError(f"artifact {name}: type {artifact_type!r} is unknown: give {kinds}")
        ending, write = writers[artifact_type]
        path = self.run_dir / "artifacts" / f"{name}{ending}"
        path.parent.mkdir(exist_ok=True)
        write(path, data)
        return path

    def finalize(self, error=None):
        """End the run: completed, or failed with the error, a text. Returns the summary's Path."""
        self.metadata.status = "failed" if error else "completed"
        self.metadata.error = str(error) if error else None
        self.metadata.end_time = datetime.now().isoformat(timespec="seconds")
        if self.drawn < len(self.history):
            self.draw()
        self._write_summary()
        self._tell("run_ended", self.summary())
        return self.run_dir / run_records.FILE_NAME

    def summary(self):
        """The content of run_summary.json."""
        return {
            "metadata": asdict(self.metadata),
            "config": self.config,
            "final_metrics": self.history[-1] if self.history else {},
            "best_metrics": best_epoch(self.history, self.select_by) or {},
            "bleu_scores": self.bleu_scores,
            "total_epochs": len(self.history),
        }

    def _write_summary(self):
        run_records.write_summary(self.run_dir, self.summary(), self.lock)

    def _tell(self, event, *values):
        """Call the listeners' method; other people's code must not end a run."""
        for listener in [*self.listeners]:
            try:
                getattr(listener, event)(*values)
            except Exception as error:  # TensorBoard's or W&B's, which may raise anything
                self.listeners.remove(listener)
                fault = printable(f"{type(error).__name__}: {error}".splitlines()[0])
                print(
                    f"warning: {listener.name} hears no more of this run: {fault}", file=sys.stderr
                )

    def draw(self):
        """Draw the curves so far, which takes a second."""
        plot_losses(self.run_dir / "training_losses.png", self.history, self.select_by)
        plot_learning_rate(self.run_dir / "learning_rate.png", self.history, self.select_by)
        self.drawn, self.drawn_at = len(self.history), time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _traceback):
        if self.metadata.status != "running":
            return
        if not kind:
            self.finalize()
            return
        with contextlib.suppress(OSError):  # a full disk is what the error says already
            self.finalize(str(error) or kind.__name__)


def _write_array(path, data):
    with replace_file(path) as file:
        np.save(file, np.asarray(data), allow_pickle=False)


def earlier_sample_captions(folder, epoch):
    """What a run that goes on after `epoch` takes over of the old one's sample_captions.json."""
    try:
        entries = json.loads((Path(folder) / SAMPLES_FILE).read_bytes())
        return [
            {
                "image": str(entry["image"]),
                "references": [str(reference) for reference in entry["references"]],
                "captions": [
                    {"epoch": int(past["epoch"]), "caption": str(past["caption"])}
                    for past in entry["captions"]
                    if past["epoch"] <= epoch
                ],
            }
            for entry in entries
        ]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return []  # without it captions are watched from here on


def epoch_summary(row, epochs, scheduler, is_best, example):
    """What the console says of a finished epoch.

    Args:
        row: as `ExperimentTracker.log_metrics`', with the validation captions' scores.
        epochs: the last one of the plan.
        scheduler: the schedule in words.
        example: the Sample of the same validation image after every epoch.
    """
    seconds, more = row["epoch_time_seconds"], epochs - row["epoch"]
    left = f", about {tqdm.format_interval(more * seconds)} left" if more else ""
    measure = "Reward" if "train_reward" in row else "Loss"
    entropy = row.get("attention_entropy")
    attention = "" if entropy is None else f"  Attention entropy: {entropy:.3f} of uniform\n"
    meteor = row.get("METEOR")
    meteor = "" if meteor is None else f"METEOR {meteor:.4f}, "
    return (
        f"Epoch {row['epoch']} completed ({row['epoch']}/{epochs}):\n"
        f"  Training {measure}: {row[f'train_{measure.lower()}']:.5f}\n"
        f"  Validation Loss: {row['val_loss']:.5f}\n"
        f"  Learning Rate: {row['learning_rate']:.6f}\n"
        f"  Scheduler: {scheduler}\n"
        f"  Validation captions: BLEU-4 {row['BLEU-4']:.4f}, {meteor}CIDEr {row['CIDEr']:.4f}, "
        f"{row['share_unique']:.0%} unique, {row['share_cut']:.0%} cut at --max_length\n"
        f"{attention}"
        f"  Model checkpoint saved (best: {is_best})\n"
        f"  Time: {seconds:.1f} s{left}\n"
        f"  First validation image {printable(example.image)}: {example.caption}"
    )


# -------------------------------------------------------------------------------------------- plots


def best_epoch(history, select_by="cider"):
    """The row whose model is best.pt by a rule of model_selection; where no row has its scores, by the loss."""
    best, _ = find_best(history, select_by)
    return best and next(row for row in history if row["epoch"] == best.epoch)


def find_best(history, select_by):
    """(model_selection.Best of a history or None, the rule that it is the best by)."""
    for rule in (select_by, "loss"):
        best, _ = model_selection.replay(rule, history)
        if best:
            return best, rule
    return None, select_by


def plot_losses(path, history, select_by="cider"):
    """Draw training and validation loss over epochs into the PNG `path`."""
    figure, axes = _epoch_axes("Training and validation loss", "Loss (nats per token)")
    curves = (("train_loss", "Training", BLUE), ("val_loss", "Validation", ORANGE))
    for key, label, colour in curves:
        points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=label, **LINE)
    _finish(path, figure, axes, history, select_by)


def plot_learning_rate(path, history, select_by="cider"):
    """Draw the learning rate over epochs into the PNG `path`; logarithmic if it spans a decade."""
    figure, axes = _epoch_axes("Learning rate", "Learning rate")
    rated = [row for row in history if row.get("learning_rate") is not None]
    rates = [row["learning_rate"] for row in rated]
    axes.plot([row["epoch"] for row in rated], rates, color=BLUE, label="Learning rate", **LINE)
    if rates and 0 < 10 * min(rates) < max(rates):
        axes.set_yscale("log")
        axes.set_ylabel("Learning rate (log scale)")
    else:
        axes.set_ylim(0, 1.08 * max(rates, default=0) or 1)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    _finish(path, figure, axes, history, select_by)


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


def _finish(path, figure, axes, history, select_by):
    """Mark the best epoch, add the legend and write the PNG `path`."""
    best, rule = find_best(history, select_by)
    if best is not None:
        label = f"Best epoch {best.epoch} ({model_selection.label(rule, best)})"
        style = {"color": GREY, "linestyle": "--", "linewidth": 1.2, "zorder": 1}
        axes.axvline(best.epoch, label=label, **style)
    first, last = history[0]["epoch"], history[-1]["epoch"]
    margin = max(0.5, 0.03 * (last - first))
    axes.set_xlim(first - margin, last + margin)
    # outside the axes, where it covers no curve
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with replace_file(path) as file:
        file.write(picture.getbuffer())
