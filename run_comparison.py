"""Compare runs: in what they differ, how they score, and which differences are within the noise.

    python flickr_image_caption.py --mode compare --runs RUN RUN [--json]

reads what the runs' folders hold and writes one picture of their curves. What is missing or damaged
is said, and the rest shown. torch is not imported.

Shapes: N images.
"""

import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import metrics_utils
import model_selection
import run_records
from caption_options import TABLE
from checkpoints import plain_values, replace_file

SCORES = ("CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "WER")
PAIRED = ("CIDEr", "ROUGE-L")  # a split's score is the mean of its images' scores
PICTURE = "run_comparison.png"
# of a run that say nothing of its recipe
NOT_SETTINGS = {
    "timestamp", "command", "mode", "model_path", "resume", "model_save_dir", "cache_dir", "device",
    "keep_checkpoints", "num_workers", "threads", "tensorboard", "wandb", "origins", "config", "preset",
}  # fmt: skip
NAME_WIDTH = 24  # of the table's first column
# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")


class RunRecord(NamedTuple):
    """What a run's folder holds, as far as it can be read."""

    folder: Path
    status: str
    settings: dict  # plain values by name; of a nested configuration the names are joined by dots
    scores: dict  # name: (value, low or None, high or None), of one split
    per_image: dict  # image: {score: value}
    curves: dict  # name: list of floats, NaN where there is none, by epoch
    missing: list[str]


def find_runs(paths):
    """The run folders that paths mean: a run, a file in it, or a folder that runs lie below.

    Raises: ValueError unless there are two or more.
    """
    runs = {}
    for path in map(Path, paths):
        folder = path.parent if path.is_file() else path
        levels = [sorted(folder.glob("*/" * depth + "run_*.*")) for depth in range(4)]
        found = [file.parent for level in levels for file in level if is_record(file)]
        if not found:
            raise ValueError(f"--runs {path}: no run's files there: give the folder of a run")
        own = [folder] if folder in found else found
        runs |= {each.resolve(): each for each in own}
    if len(runs) < 2:
        raise ValueError(f"--runs names one run only, {next(iter(runs.values()))}: give others")
    return list(runs.values())


def is_record(file):
    """Whether a file is one of those that every run has."""
    return file.name in ("run_config.json", run_records.FILE_NAME)


# ------------------------------------------------------------------------------------- reading a run


def read_run(folder, split):
    """A run's RunRecord; a run that was killed is marked as failed before."""
    run_records.end_killed(folder)
    summary, missing = run_records.read_summary(folder), []

    def content(name):
        found = run_records.read_object(folder / name)
        if not found:
            missing.append(name)
        return found

    settings = acting(settings_of(content("run_config.json") or summary.get("config")))
    metrics = content(f"{split}_metrics.json")
    if (members := run_records.ensemble_size(metrics)) > 1:
        settings["ensemble"] = members
    scores = scores_of(metrics)
    per_image, curves = read_per_image(folder / f"{split}_captions.json"), read_curves(folder)
    missing += [] if summary else [run_records.FILE_NAME]
    missing += [] if per_image else [f"{split}_captions.json"]
    missing += [] if curves else ["metrics.csv"]
    status = str(run_records.metadata(summary).get("status", "unknown"))
    return RunRecord(folder, status, settings, scores, per_image, curves, missing)


def settings_of(config, prefix=""):
    """A configuration's plain values by name."""
    settings = {}
    for name, value in (config if isinstance(config, dict) else {}).items():
        if name in ("git", "environment", *NOT_SETTINGS):
            continue
        if isinstance(value, dict):
            settings |= settings_of(value, f"{prefix}{name}.")
        else:
            settings[f"{prefix}{name}"] = value
    return settings


def acting(settings):
    """Settings without the options that do nothing beside the others, as --help says."""
    values = settings | {"decoder": settings.get("decoder_type")}
    idle = {
        name
        for name, option in TABLE.items()
        if any(
            other in values and values[other] not in wanted
            for other, wanted in option.needs.items()
        )
    }
    return {name: value for name, value in settings.items() if name not in idle}


def scores_of(metrics):
    """{name: (value, low, high)} of a split's scores that are numbers; no interval: None, None."""
    intervals = metrics.get("intervals")
    intervals = intervals if isinstance(intervals, dict) else {}
    scores = {}
    for name in SCORES:
        if is_number(metrics.get(name)):
            interval = intervals.get(name)
            whole = (
                isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval))
            )
            scores[name] = (metrics[name], *(interval if whole else (None, None)))
    return scores


def is_number(value):
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_per_image(path):
    """{image: its row} of a captions file's rows that have all PAIRED scores; {} without the file."""
    try:
        rows = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return {
        str(row["file_name"]): row
        for row in rows
        if "file_name" in row and all(is_number(row.get(name)) for name in PAIRED)
    }


def read_curves(folder):
    """{column: values by epoch} of metrics.csv; {} where there is none."""
    try:
        text = (folder / "metrics.csv").read_text(encoding="utf-8")
        rows = list(csv.DictReader(text.splitlines()))
        columns = rows[0].keys() if rows else ()
        curves = {name: [float(row[name] or "nan") for row in rows] for name in columns}
    except (OSError, ValueError, TypeError, csv.Error):
        return {}
    return curves if "epoch" in curves else {}


def validation_cider(run):
    """The best epoch's CIDEr on validation images, by the run's --select_by; None where none was written."""
    columns = run.curves
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    best, _ = model_selection.replay(model_selection.rule_of(run.settings), rows)
    scores = [
        row["CIDEr"] for row in rows if best and row["epoch"] == best.epoch and "CIDEr" in row
    ]
    return next(filter(math.isfinite, scores), None)


# ------------------------------------------------------------------------------------------ comparing


def best_first(runs):
    """Runs by CIDEr of the split, then by that of validation; those without scores come last."""

    def rank(run):
        value = run.scores.get("CIDEr", (-math.inf,))[0]
        return value, validation_cider(run) or 0

    return sorted(runs, key=rank, reverse=True)


def differing_settings(runs):
    """{name: each run's value} of settings that differ; None where a run does not name one."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: each for name, each in values.items() if any(v != each[0] for v in each)}


def paired_difference(run, best, score):
    """A run's mean score of images minus the best one's, over the images that both have captioned.

    Returns: {"difference", "low", "high", "images", "within_noise"}, None without such images. The
        interval is that of `metrics_utils.paired_bootstrap`; a difference is within the noise where
        it holds 0.
    """
    images = sorted(run.per_image.keys() & best.per_image.keys())
    if not images:
        return None
    pairs = [(run.per_image[image][score], best.per_image[image][score]) for image in images]
    differences = np.array([own - other for own, other in pairs], dtype=float)  # (N,)
    mean, low, high = metrics_utils.paired_bootstrap(differences)
    return {
        "difference": mean,
        "low": low,
        "high": high,
        "images": len(images),
        "within_noise": low <= 0 <= high,
    }


def compare(runs, split):
    """The comparison as plain values: runs best first, settings that differ, differences to the best."""
    ranked = best_first(runs)
    best = ranked[0]
    entries = []
    for run in ranked:
        entry = {
            "run": run.folder,
            "status": run.status,
            "epochs": len(run.curves.get("epoch", ())),
            "best_validation_CIDEr": validation_cider(run),
            "scores": {
                name: dict(zip(("value", "low", "high"), run.scores[name], strict=True))
                for name in run.scores
            },
            "to_best": None
            if run is best
            else {name: paired_difference(run, best, name) for name in PAIRED},
            "images": len(run.per_image),
            "missing": run.missing,
        }
        entries.append(entry)
    return {"split": split, "runs": entries, "settings": differing_settings(ranked)}


# ------------------------------------------------------------------------------------------- showing


def as_text(comparison):
    """The comparison as a console's table: a column per run."""
    runs, split = comparison["runs"], comparison["split"]
    lines = [f"runs, best first by CIDEr of the {split} split:"]
    for number, run in enumerate(runs, start=1):
        lines.append(f"  {number}  {run['run']}: {run['status']}, epochs: {run['epochs']}")
        if run["missing"]:
            lines.append(f"     missing or damaged: {', '.join(run['missing'])}")
    rows = [["", *map(str, range(1, len(runs) + 1))]]
    settings = comparison["settings"]
    rows += [["settings that differ"]] if settings else [["no settings differ"]]
    rows += [[f"  {name}", *map(shown, values)] for name, values in settings.items()]
    rows += [["scores, 95 % intervals"]]
    rows += [["  validation CIDEr", *(shown(run["best_validation_CIDEr"]) for run in runs)]]
    for name in SCORES:
        if any(name in run["scores"] for run in runs):
            rows.append([f"  {name}", *(shown_score(run["scores"].get(name)) for run in runs)])
    rows += [["difference to run 1, 95 % interval over the same images"]]
    for name in PAIRED:
        rows.append(
            [f"  {name}", "", *(shown_difference(run["to_best"][name]) for run in runs[1:])]
        )
    lines += columns(rows)
    if len({run["images"] for run in runs if run["images"]}) > 1:
        lines.append("the runs have captioned different images: CIDEr's word weights differ, too")
    return "\n".join(map(printable, lines))


def columns(rows):
    """Rows of texts as lines, each column as wide as its widest; headings may run on."""
    tables = [row for row in rows if len(row) > 1]
    widths = [max(len(row[i]) for row in tables) for i in range(len(tables[0]))]
    widths[0] = max(NAME_WIDTH, widths[0])
    padded = ([text.ljust(width) for text, width in zip(row, widths, strict=False)] for row in rows)
    return ["  ".join(row).rstrip() for row in padded]


def shown(value):
    """A value as the table has it."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shown_score(score):
    """`0.5120 [0.4801, 0.5466]`, without an interval where there is none."""
    if score is None:
        return "-"
    interval = "" if score["low"] is None else f" [{score['low']:.4f}, {score['high']:.4f}]"
    return f"{score['value']:.4f}{interval}"


def shown_difference(paired):
    """`-0.0123 [-0.0301, 0.0054] within the noise`."""
    if paired is None:
        return "no images in common"
    verdict = "within the noise" if paired["within_noise"] else "beyond the noise"
    return f"{paired['difference']:+.4f} [{paired['low']:+.4f}, {paired['high']:+.4f}] {verdict}"


def printable(text):
    """`text` with its control characters escaped: names of folders come from anyone."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def draw_curves(path, runs):
    """Draw the runs' losses and validation CIDEr over epochs into the PNG `path`."""
    from matplotlib.figure import Figure  # takes a second
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.2 + 0.22 * len(runs)), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2)
    titles = ("Loss in nats per token: validation, dotted: training", "Validation CIDEr")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("Epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#DDDDDD", linewidth=0.8)
    for number, run in enumerate(runs):
        style = {"color": COLOURS[number % len(COLOURS)], "marker": "o", "markersize": 3}
        name = printable(f"{number + 1}  {run.folder.name}").replace("$", r"\$")
        panels[0].plot([], [], label=name, **style)  # for the legend, whatever curves the run has
        for axes, column, line in (
            (panels[0], "val_loss", "-"),
            (panels[0], "train_loss", ":"),
            (panels[1], "CIDEr", "-"),
        ):
            if column in run.curves:
                axes.plot(run.curves["epoch"], run.curves[column], line, **style)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with replace_file(path) as file:
        file.write(picture.getbuffer())


def main(output):
    """--mode compare, with the options of its group. Returns the status; a fault is one line, status 2."""
    try:
        folders = find_runs(output.runs)
        runs = [read_run(folder, output.split) for folder in folders]
        comparison = compare(runs, output.split)
        picture = Path(output.output_dir or folders[0].parent) / PICTURE
        drawn = any(run.curves for run in runs)
        if drawn:
            picture.parent.mkdir(parents=True, exist_ok=True)
            draw_curves(picture, best_first(runs))
    except (ValueError, OSError) as error:
        print(f"flickr_image_caption.py: error: {printable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    comparison["picture"] = picture if drawn else None
    if output.json:
        print(json.dumps(plain_values(comparison)))
    else:
        print(as_text(comparison))
        print(printable(f"curves: {picture}") if drawn else "no run has curves")
    return 0
