"""What explains a trained model to others: configuration, vocabulary, scores, and a card to read.

    metadata = describe(Path("run/best.pt"), checkpoint, version="1.2.0")
    write_documents(folder, Path("run/best.pt"), checkpoint, metadata)   # config.json, ... README.md

Everything comes from the checkpoint and from the files that its run left beside it. What these say
may come from anyone, so it is text in the card, never markup.
"""

import hashlib
import json
import math
import re
from datetime import UTC, datetime
from pathlib import Path

from checkpoints import is_sealed, write_json, write_text

METADATA, CONFIG, VOCABULARY, SCORES, CARD = (
    "metadata.json", "config.json", "vocabulary.json", "scores.json", "README.md",
)  # fmt: skip
EXAMPLES = 5
# Numbers among a run's scores that are none.
NO_SCORES = {
    "epoch", "learning_rate", "epoch_time_seconds", "train_loss", "images", "seed",
    "wall_time_seconds",
}  # fmt: skip
LABELS = {
    "created_at": "described", "run_id": "run", "epoch": "epoch", "dataset_type": "trained on",
    "encoder": "encoder", "encoder_weights": "encoder weights", "decoder": "decoder",
    "words": "words in the vocabulary",
}  # fmt: skip
LICENCE = (
    "The program is under the MIT licence. The weights were learnt from a dataset, and from an "
    "encoder's weights, that have terms of their own (Flickr8k and Flickr30k: research and education "
    "only): these terms hold for the model, too."
)
USE = "python flickr_image_caption.py --mode caption --images dog.jpg --model_path {}"


# ----------------------------------------------------------------------------------------- the facts


def describe(source, state, *, version="", description="", run_id=None, metrics=None):
    """What metadata.json holds of a checkpoint.

    Args:
        source: the checkpoint's file, beside which its run's files lie; state: what it holds.
        metrics: {name: number} beside those of the run.
    """
    if is_sealed(source.parent):  # a version, which was described when it was registered
        known = read_json(source.with_name(METADATA)) or {}
        return known | ({"description": description} if description else {})
    config, splits = state["config"], state["splits"]
    names = {split: splits.get(split) for split in ("val", "test")}
    test = test_scores(source)
    found = _named_numbers("val", validation_scores(state)) | _named_numbers("test", test)
    of_config = ("dataset_type", "encoder", "encoder_weights", "decoder")
    return {
        "version": version,
        "description": description or "",
        "run_id": run_id or _run_id(source),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": str(source.absolute()),
        "epoch": state["epoch"],
        **{name: config.get(name) for name in of_config},
        "words": len(words) if (words := state["vocabulary"].get("words")) else None,
        "images": {
            split: hashlib.sha256(json.dumps(sorted(of)).encode()).hexdigest()
            for split, of in names.items()
            if isinstance(of, list)
        },
        "metrics": found | (metrics or {}),
        "intervals": _intervals(test),
        "command": _text((read_json(source.with_name("run_config.json")) or {}).get("command")),
        "examples": _examples(source, test, state["epoch"]),
    }


def validation_scores(state):
    """The row of the checkpoint's epoch, {} without one."""
    rows = [row for row in state["history"] if row["epoch"] == state["epoch"]]
    return rows[-1] if rows else {}


def test_scores(source):
    """The test_metrics.json beside a checkpoint, {} where it is not of this very file.

    That is of another file's name, older than this one, of an ensemble, or of other data.
    """
    file = source.with_name("test_metrics.json")
    scores = read_json(file) or {}
    is_its_own = (
        Path(str(scores.get("checkpoint"))).name == source.name
        and not scores.get("ensemble")
        and not scores.get("foreign_dataset")
        and file.stat().st_mtime >= source.stat().st_mtime
    )
    return scores if is_its_own else {}


def _run_id(source):
    """The run's name as its run_summary.json has it, else its folder's."""
    metadata = (read_json(source.with_name("run_summary.json")) or {}).get("metadata")
    recorded = metadata.get("run_id") if isinstance(metadata, dict) else None
    return recorded if isinstance(recorded, str) else source.absolute().parent.name


def _named_numbers(split, scores):
    """Scores as {"val_CIDEr": number}; val_loss has its name already."""
    return {
        name if name.startswith(f"{split}_") else f"{split}_{name}": value
        for name, value in scores.items()
        if is_number(value) and name not in NO_SCORES
    }


def _intervals(scores):
    """{"test_CIDEr": [low, high]} of a test's bootstrap."""
    given = scores.get("intervals")
    return {
        f"test_{name}": pair
        for name, pair in (given.items() if isinstance(given, dict) else ())
        if isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair))
    }


def _examples(source, test, epoch):
    """[[picture, caption]] of the first test images, else of validation images after this epoch."""
    if test:
        rows = _rows(source.with_name("test_captions.json"))
        pairs = [(row.get("file_name"), row.get("caption")) for row in rows]
    else:
        entries = _rows(source.with_name("sample_captions.json"))
        pairs = [
            (each.get("image"), _caption_after(epoch, each.get("captions"))) for each in entries
        ]
    return [[*map(str, pair)] for pair in pairs if None not in pair][:EXAMPLES]


def _caption_after(epoch, captions):
    rows = [row for row in captions or () if isinstance(row, dict)]
    return next((row.get("caption") for row in rows if row.get("epoch") == epoch), None)


def _rows(path):
    """The objects of a JSON file's list; [] where there is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _text(value):
    return value if isinstance(value, str) else ""


# ----------------------------------------------------------------------------------------- the files


def write_documents(folder, source, state, metadata):
    """Write what explains the weights of a registered version."""
    write_json(folder / CONFIG, state["config"])
    write_json(folder / VOCABULARY, state["vocabulary"])
    write_json(folder / SCORES, all_scores(source, state))
    write_json(folder / METADATA, metadata)
    use = USE.format(f"registry:{metadata['version']}")
    write_text(folder / CARD, model_card(metadata, use))


def all_scores(source, state):
    """What scores.json holds: everything that validation and test found."""
    if is_sealed(source.parent):
        return read_json(source.with_name(SCORES)) or {}
    return {"validation": validation_scores(state), "test": test_scores(source)}


def model_card(metadata, use):
    """The text of README.md. use: lines of code, the last section but one."""
    name = metadata["version"] or metadata["run_id"]
    known = {LABELS[key]: metadata[key] for key in LABELS if metadata.get(key) is not None}
    facts = [f"| {label} | {as_cell(value)} |" for label, value in known.items()]
    command, examples = metadata.get("command"), metadata.get("examples")
    shown = [f"| {as_cell(image)} | {as_cell(caption)} |" for image, caption in examples or ()]
    return "\n".join([
        f"# Image captioning model {as_cell(name)}", "",
        *([as_cell(metadata["description"]), ""] if metadata["description"] else []),
        "| | |", "|---|---|", *facts, "",
        "## Scores", "",
        "BLEU, METEOR and ROUGE-L out of 1, CIDEr out of 10; `val_`: of the images that chose the "
        "epoch, `test_`: of the test split. In brackets: 95 % intervals by bootstrap over images.", "",
        *_score_rows(metadata), "",
        *(["## Training", "", f"    {printable(command)}", ""] if command else []),
        *(["## Captions of the first images", "", "| picture | caption |", "|---|---|", *shown, ""]
          if shown else []),
        "## Use", "",
        *(f"    {line}" for line in use.splitlines()), "",
        f"It describes pictures like those it was trained on ({as_cell(metadata['dataset_type'])}). "
        "A caption may name what is not there: have a person read it where that matters.", "",
        "## Licence", "", LICENCE, "",
    ])  # fmt: skip


def _score_rows(metadata):
    """Lines of the card's table of scores."""
    intervals, rows = metadata.get("intervals") or {}, []
    for name, value in metadata["metrics"].items():
        low, high = intervals.get(name, (None, None))
        interval = "" if low is None else f" [{low:.4g}, {high:.4g}]"
        rows.append(f"| {as_cell(name)} | {value:.4g}{interval} |")
    return ["| score | value |", "|---|---|", *rows] if rows else ["None were recorded."]


def as_cell(value):
    """Text of a Markdown table's cell, with no markup of its own."""
    text = " ".join(printable(str(value)).split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)


def printable(text):
    """One line without characters that move the cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def is_number(value):
    """Whether a score is one: finite, and no truth value."""
    return type(value) in (int, float) and math.isfinite(value)


def read_json(path):
    """The dict in a JSON file; None where there is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
