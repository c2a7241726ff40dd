"""A run's folder -> report.html, one page that explains the run to somebody who was not there.

    python caption_report.py saved_models/sample/vgg11_attention/sample_attention_ep20_bs64_...

Training and test write it by themselves. It is made of the files that they leave in the folder, so
that it can be made again at any time, whatever part of them is there:

    run_config.json, metrics_history.json, loss_curve.json    settings and curves
    test_metrics.json, test_captions.json                     scores, of the split and of each image
    test_examples.json                                        what a few captions are shown with

The last one is written here: photographs, references and attention maps of the best, median and worst
captions and of the first images of the split. The page has no script, font or picture from
elsewhere, and a Content-Security-Policy that lets it have none. What files hold is shown as text.

Shapes: N images, T words of a caption, (h, w) grid cells.
"""

import argparse
import base64
import contextlib
import hashlib
import io
import itertools
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import checkpoints
import metrics_utils
import model_selection
import run_records

FILE_NAME = "report.html"
SPLITS = ("test", "val", "train")  # the first of them that was tested is shown
EACH = 4  # captions in each group of examples
MOST_REFERENCES = 5  # shown of an image
MAX_FILE_BYTES, MAX_PAGE_BYTES = 50_000_000, 5_000_000
PHOTOGRAPH_BYTES, PHOTOGRAPH_SIDES = 90_000, (640, 480, 320, 160)
VEIL_SIDE = 48  # pixels of a map's picture
PARTS = Path(__file__).with_name("report_page")

GROUPS = {
    "best": ("Best", "The highest CIDEr of the split."),
    "median": ("Median", "The middle of the split: half of the captions score higher."),
    "worst": ("Worst", "The lowest CIDEr of the split."),
    "first": ("As they come", "The first images of the split, chosen by no score."),
}
LARGE = {  # scores shown in large, and what they tell
    "CIDEr": "0 to 10: the words that tell this picture from others",
    "BLEU-4": "0 to 1: runs of up to four words",
    "METEOR": "0 to 1: words, synonyms and paraphrases",
    "ROUGE-L": "0 to 1: the longest sequence of words",
}
PLAIN = {
    "caption_length": ("words per caption", "{:.1f}"),
    "vocabulary_used": ("different words", "{:,}"),
    "share_unique": ("captions that are unique", "{:.0%}"),
    "share_copied": ("copied from training", "{:.0%}"),
    "share_cut": ("cut at the longest length", "{:.0%}"),
}
SETTINGS = {
    "dataset_type": "Dataset", "encoder": "Encoder", "image_size": "Picture side, pixels",
    "decoder_type": "Decoder", "attention": "Attention", "embed_size": "Embedding",
    "hidden_size": "Hidden units", "num_layers": "Layers", "attention_dim": "Attention units",
    "drop_prob": "Dropout", "epochs": "Epochs", "batch_size": "Batch size",
    "learning_rate": "Learning rate", "weight_decay": "Weight decay", "seed": "Seed",
    "device": "Device", "precision": "Precision",
}  # fmt: skip
EXTRAS = {  # shown where they were asked for
    "init_from": "Begun as", "fine_tune_encoder": "Encoder blocks that learn",
    "glove_path": "Word vectors", "recurrent_dropout": "Recurrent dropout",
    "distill_from": "Teachers", "scst_epochs": "Epochs on the reward",
}  # fmt: skip


# --------------------------------------------------------------------------------- what test hands over


def choose(rows):
    """The row numbers of the captions to be shown, those of `grouped` in one list."""
    return list(itertools.chain.from_iterable(grouped(rows).values()))


def grouped(rows):
    """The captions to be shown: {group of GROUPS: row numbers}, no row twice.

    rows: of the captions file; the groups go by CIDEr, then BLEU-4. Small splits fill them less.
    Raises: ValueError without rows.
    """
    if not rows:
        raise ValueError("it has no captions")
    order = by_score(rows)
    each = min(EACH, max(1, len(rows) // 3))
    rest = order[each:]
    worst = rest[-each:][::-1]
    rest = rest[: len(rest) - len(worst)]
    start = max(0, (len(rest) - each) // 2)
    groups = {"best": order[:each], "median": rest[start : start + each], "worst": worst}
    shown = set(itertools.chain.from_iterable(groups.values()))
    first = [row for row in range(len(rows)) if row not in shown][:EACH]
    return groups | {"first": first}


def by_score(rows):
    """The rows' numbers, the best first."""
    return sorted(range(len(rows)), key=lambda i: (-rows[i]["CIDEr"], -rows[i]["BLEU-4"], i))


def report(folder, captioner, split, table, paths, hypotheses, method, rows=None):
    """Write {split}_examples.json and, from all that is in the folder, report.html.

    Args:
        captioner: a flickr_image_caption.Captioner, as far as words and maps of hypotheses go.
        table: of the split's images `image` and `captions`; paths: of their photographs.
        hypotheses: one of each image that is to be shown.
        method: what made their maps, if they have any: attention or gradient.
        rows: the numbers of these images in the table; without them the first.
    Raises: ValueError when a photograph cannot be read any more.
    """
    from image_loading import open_images  # and with it torch, which the command does without

    rows = range(len(hypotheses)) if rows is None else rows
    photographs = open_images([paths[row] for row in rows])
    names, captions = (table[column].iloc[list(rows)] for column in ("image", "captions"))
    shown = zip(names, captions, photographs, hypotheses, strict=True)
    examples = [
        example(captioner, name, references, *small_jpeg(photograph), hypothesis)
        for name, references, photograph, hypothesis in shown
    ]
    content = {"method": method, "examples": examples}
    checkpoints.write_json(Path(folder) / f"{split}_examples.json", content)
    path, _ = write_report(folder)
    print(f"report: {path}")


def example(captioner, name, references, jpeg, size, hypothesis):
    """What the page shows an image's caption with, as JSON holds it."""
    shown = {
        "file_name": name,
        "caption": captioner.vocabulary.decode(hypothesis.tokens),
        "words": captioner.words(hypothesis),
        "references": list(references),
        "photograph": _as_text(jpeg),
        "size": list(size),
    }
    if hypothesis.attention is None:
        return shown
    return shown | _packed_maps(captioner, hypothesis)


def _packed_maps(captioner, hypothesis):
    """Attention as JSON holds it: a byte per cell, 255 for the largest weight of the caption."""
    beside = captioner.attention_beside(hypothesis)
    of_cells = 1 - sum(beside.values(), np.zeros(len(hypothesis.tokens)))
    weights = captioner.attention_grid(hypothesis) * of_cells[:, None, None]  # (T, h, w)
    largest = float(weights.max(initial=0))
    cells = np.rint(weights / (largest or 1) * 255).astype(np.uint8)
    return {
        "grid": list(weights.shape[1:]),
        "largest_weight": largest,
        "maps": [_as_text(each.tobytes()) for each in cells],
        "beside": {name: shares.tolist() for name, shares in beside.items()},
    }


def small_jpeg(photograph):
    """A PIL image -> the bytes of a JPEG that fits into a page with others, and its size."""
    for side in PHOTOGRAPH_SIDES:
        small, file = photograph.convert("RGB"), io.BytesIO()
        small.thumbnail((side, side))
        small.save(file, "JPEG", quality=82, optimize=True, progressive=True)
        if file.tell() <= PHOTOGRAPH_BYTES:
            break
    return file.getvalue(), small.size


def _as_text(content):
    return base64.b64encode(content).decode("ascii")


@contextlib.contextmanager
def only_warns():
    """Make a failure to report a warning: what is reported on has been done, and is kept."""
    try:
        yield
    except Exception as error:  # hours of training must not end as failed for want of a page
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        _warn(f"no {FILE_NAME}: {reason}")


def _warn(text):
    from runtime import printable  # and with it torch

    print(f"warning: {printable(text)}", file=sys.stderr)


# ---------------------------------------------------------------------------------------- reading a run


class Folder:
    """A run's folder whose files may be absent or damaged; `notes` says which, a line each."""

    def __init__(self, path):
        self.path, self.notes, self.damaged = Path(path), [], set()

    def has(self, name):
        return (self.path / name).exists()

    def read(self, name, what=None):
        """The content of a JSON file or None; what: the page lacks without it, for the note."""
        path = self.path / name
        if not self.has(name):
            if what:
                self.notes.append(f"{name} is not in the folder: the page lacks {what}.")
            return None
        try:
            if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
                raise ValueError(f"not a file of at most {MAX_FILE_BYTES / 1e6:.0f} MB")
            content = metrics_utils.read_json(path)
            if content is None:
                raise ValueError("it holds nothing")
            return content
        except ValueError as error:
            self.left_out(name, str(error).removeprefix(f"{path}: "))
            return None

    def part(self, name, build, content, *more):
        """`build(content, *more)`; None without content, or where it is not what `name` should hold."""
        if content is None:
            return None
        try:
            return build(content, *more)
        except (OSError, *checkpoints.UNREADABLE) as error:
            self.left_out(name, f"{type(error).__name__}: {error}")
            return None

    def left_out(self, name, reason):
        if name not in self.damaged:
            reason = " ".join(reason.split())[:120]
            self.notes.append(f"{name} is damaged, all or part of it is left out ({reason}).")
        self.damaged.add(name)


def read_run(path):
    """What the page of a run's folder shows: plain values for its template, "notes" among them.

    Raises: ValueError when the folder holds no file of a run.
    """
    folder = Folder(path)
    results = (
        (split, f"{split}_{kind}.json") for split in SPLITS for kind in ("metrics", "captions")
    )
    split = next((split for split, name in results if folder.has(name)), None)
    of_split = {
        kind: f"{split or 'val'}_{kind}.json" for kind in ("metrics", "captions", "examples")
    }
    files = ("run_config.json", "loss_curve.json", "metrics_history.json", *of_split.values())
    if not any(map(folder.has, files)):
        raise ValueError(f"{path}: not the folder of a run: it holds none of {', '.join(files)}")
    config = folder.read("run_config.json", "the settings")
    losses = folder.read("loss_curve.json", "the curves of loss and learning rate")
    history = folder.read("metrics_history.json", "the curves of validation scores")
    scores = folder.read(of_split["metrics"], split and "the scores")
    rows = folder.read(of_split["captions"], split and "the captions and their scores")
    examples = folder.read(of_split["examples"], "photographs and attention maps")
    earlier = folder.part(of_split["metrics"], best_earlier, scores, folder, split, rows)
    cards = folder.part(of_split["examples"], example_cards, examples)
    losses = folder.part("loss_curve.json", checked_curves, losses)
    history = folder.part("metrics_history.json", checked_curves, history, losses)
    curves = (losses or {}) | (history or {})
    groups = folder.part(of_split["captions"], caption_groups, rows, cards or {})
    groups = groups or (sample_group(cards) if cards else [])
    shown = list((cards or {}).values())
    return {
        "name": folder.path.resolve().name,
        "split": split or "validation",
        "heading": folder.part("run_config.json", heading, config),
        "settings": folder.part("run_config.json", settings, config),
        "scores": folder.part(of_split["metrics"], score_table, scores, earlier),
        "test": folder.part(of_split["metrics"], described_test, scores),
        "details": folder.part(of_split["metrics"], described_details, scores),
        "earlier": earlier,
        "groups": groups,
        "photographs": bool(cards),
        "methods": {card["method"] for card in shown if card["method"]},
        "shared": any(card["shared"] for card in shown),
        "charts": charts(curves, model_selection.rule_of(config)) if curves else None,
        "notes": folder.notes,
    }


# -------------------------------------------------------------------------------------------- settings


def heading(config):
    """{"title", "date", "commit"} of a run."""
    attention = config.get("attention") if config["decoder_type"] == "attention" else None
    decoder = f"{attention} attention" if attention else config["decoder_type"]
    stamp, commit = str(config.get("timestamp") or ""), (config.get("git") or {}).get("commit")
    day, time = stamp[:8], stamp[9:13]
    return {
        "title": f"{config['encoder']}, {decoder}",
        "dataset": str(config["dataset_type"]),
        "date": f"{day[:4]}-{day[4:6]}-{day[6:]} {time[:2]}:{time[2:]}" if stamp else None,
        "commit": commit and str(commit)[:10],
    }


def settings(config):
    """{"rows": (label, value) of the settings that a reader asks for, "command": of the run}."""
    shown = [
        (label, f"{config[key]:g}" if isinstance(config[key], float) else config[key])
        for key, label in (SETTINGS | EXTRAS).items()
        if (config.get(key) if key in EXTRAS else config.get(key) is not None)
    ]
    schedule = config["scheduler_type"] if config.get("use_scheduler") else "constant"
    shown.append(("Schedule", schedule))
    return {"rows": shown, "command": str(config.get("command") or "")}


# ---------------------------------------------------------------------------------------------- scores


def described_test(scores):
    """How the captions were written, in words."""
    decoding, rerank = scores["decoding"], scores.get("rerank")
    search = decoding["algorithm"]
    beams = {"beam": "beam search of", "full_beam": "full beam search of"}
    search = f"{beams[search]} {decoding['beam_size']}" if search in beams else f"{search} decoding"
    if rerank:
        search += f", reranked by the consensus of {rerank['neighbours']} neighbours"
    search += by_ensemble(scores)
    plain = [
        (form.format(scores[key]), label)
        for key, (label, form) in PLAIN.items()
        if scores.get(key) is not None
    ]
    return {
        "images": f"{scores['images']:,}",
        "search": search,
        "dataset": scores["dataset_type"],
        "foreign": bool(scores.get("foreign_dataset")),
        "plain": plain,
        "duller": scores.get("duller"),
    }


def by_ensemble(scores):
    """What to add where these are the scores of an --ensemble, not of the run alone."""
    members = run_records.ensemble_size(scores)
    return f", by an ensemble of {members}" if members > 1 else ""


def best_earlier(scores, folder, split, rows):
    """The run of highest CIDEr that began before this one and was tested on the same split; or None.

    Runs are those below the same dataset's folder of the same --model_save_dir.
    Returns: {"name", "scores", "difference": of `paired_difference`, or None}.
    """
    path = folder.path.resolve()
    started = _started(path)
    if (
        not started
        or not checkpoints.runs_folder(path / "best.pt")
        or scores.get("foreign_dataset")
    ):
        return None
    tested = {key: scores[key] for key in ("dataset_type", "split", "images")}
    best = None
    for file in sorted(path.parents[1].glob(f"*/*/{split}_metrics.json")):
        began, other = _started(file.parent), Folder(file.parent)
        found = other.read(file.name) if began and began < started else None
        comparable = other.part(file.name, _is_such_a_test, found, tested)
        folder.notes += [f"The earlier run {file.parent.name}: {note}" for note in other.notes]
        if comparable and (best is None or found["CIDEr"] > best[1]["CIDEr"]):
            best = other, found
    if best is None:
        return None
    other, found = best
    before = other.read(f"{split}_captions.json")
    return {
        "name": other.path.name + by_ensemble(found),
        "scores": {name: found.get(name) for name in metrics_utils.METRIC_NAMES},
        "intervals": found["intervals"],
        "difference": rows and other.part("", paired_difference, before, rows),
    }


def _started(path):
    """Sorts runs by the time in the name of their folder; None for other names."""
    match = checkpoints.RUN_NAME_END.search(path.name)
    return match and (match[1], int(match[2] or 1))


def _is_such_a_test(found, tested):
    same = all(found[key] == value for key, value in tested.items())
    numbers = isinstance(found["CIDEr"], float) and isinstance(found["intervals"], dict)
    return same and numbers and not found.get("foreign_dataset")


def paired_difference(before, rows):
    """CIDEr of these captions less that of others of the same images, and its 95 % interval.

    Args: rows of captions files.
    Returns: {"mean", "low", "high": as text, "clear": whether 0 is outside}; None if images differ.
    """
    earlier = {row["file_name"]: row["CIDEr"] for row in before}
    if earlier.keys() != {row["file_name"] for row in rows} or not rows:
        return None
    differences = np.array([row["CIDEr"] - earlier[row["file_name"]] for row in rows])
    mean, low, high = metrics_utils.paired_bootstrap(differences)
    return {"mean": signed(mean), "low": signed(low), "high": signed(high), "clear": low * high > 0}


def score_table(scores, earlier):
    """A row for each metric: its value, interval, and what the best earlier run had.

    "line" holds places from 0 to 100 on a scale of the row's own, for the picture of both intervals.
    """
    table = []
    for name in metrics_utils.METRIC_NAMES:
        value, limits = scores.get(name), scores["intervals"].get(name)
        if value is None or not limits:
            continue
        low, high = limits
        row = {"name": name, "value": f"{value:.3f}", "low": f"{low:.3f}", "high": f"{high:.3f}"}
        before = earlier and earlier["scores"].get(name)
        before_limits = earlier and earlier["intervals"].get(name)
        if before is not None and before_limits:
            change = value - before
            row["earlier"], row["change"] = f"{before:.3f}", signed(change)
            gain = round(-change if name == "WER" else change, 3)
            row["verdict"] = "better" if gain > 0 else "worse" if gain < 0 else "the same"
            row["line"] = _places(low, value, high, before_limits[0], before, before_limits[1])
        table.append(row)
    by_name = {row["name"]: row for row in table}
    large = [by_name[name] | {"tells": text} for name, text in LARGE.items() if name in by_name]
    return {"large": large, "table": table}


def _places(*values):
    """Values -> places from 4 to 96, the smallest first."""
    place = scale(min(values), max(values), 4, 96)
    return [round(place(value), 1) for value in values]


def signed(value):
    """A difference with its sign, for people."""
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def described_details(scores):
    """What `score_details.describe` found, as rows of tables."""
    found = scores["details"]
    recall = [
        {"band": band, "words": f"{row['words']:,}", "share": 100 * row["recall"]}
        for band, row in (found.get("recall") or {}).items()
    ]
    unsupported = [
        {"kind": kind, "share": 100 * row["captions"], "written": f"{row['written']:,}"}
        for kind, row in found["unsupported"].items()
        if row
    ]
    by_length = [
        {"band": band, "images": f"{row['images']:,}"}
        | {name: f"{row[name]:.3f}" for name in ("CIDEr", "BLEU-4")}
        for band, row in found["by_length"].items()
    ]
    never_used = [
        {"word": row["word"], "training": f"{row['training']:,}", "images": f"{row['images']:,}"}
        for row in found.get("never_used") or []
    ]
    return {
        "recall": recall,
        "rare_recall": found.get("rare_recall"),
        "unsupported": unsupported,
        "by_length": by_length,
        "never_used": never_used,
    }


# -------------------------------------------------------------------------------------------- captions


def example_cards(examples):
    """The content of {split}_examples.json -> {file name: what the page shows of an image}."""
    method = examples.get("method")
    return {example["file_name"]: example_card(example, method) for example in examples["examples"]}


def example_card(example, method):
    """What the page shows of an image, from one of a file's examples.

    Raises: ValueError, TypeError or LookupError when the example is damaged.
    """
    photograph = base64.b64decode(example["photograph"], validate=True)
    width, height = example["size"]
    if not all(1 <= side <= PHOTOGRAPH_SIDES[0] for side in (width, height)):
        raise ValueError(f"a photograph of {width} x {height} pixels")
    words = example_words(example) if "maps" in example else []
    references = [str(text) for text in example["references"]]
    return {
        "file_name": str(example["file_name"]),
        "caption": str(example["caption"]),
        "photograph": _as_text(photograph),
        "width": width,
        "height": height,
        "words": words,
        "method": method if "maps" in example else None,
        "shared": bool(example.get("beside")),
        "note": "Over the whole caption: {:.0f}% from the picture".format(
            np.mean([word["picture"] for word in words])
        )
        if words
        else "",
        "scores": [],
        "references": references[:MOST_REFERENCES],
        "more": len(references) - MOST_REFERENCES,
        "rank": None,
    }


def example_words(example):
    """An example's words with their maps' pictures and, if any, what they took from the picture."""
    words, beside = example["words"], example["beside"]
    others = [dict(zip(beside, each, strict=True)) for each in zip(*beside.values(), strict=True)]
    others = others or [{} for _ in words]
    return [
        {"text": str(word), "veil": _as_text(veil)} | attention_share(word, each)
        for word, veil, each in zip(words, veil_pictures(example), others, strict=True)
    ]


def attention_share(word, others):
    """What a word took from the picture, in percent, and that in words. others: shares by name."""
    picture = round(100 * (1 - sum(others.values())))
    parts = [
        f"{picture}% from the picture",
        *(f"{share:.0%} from {name}" for name, share in others.items()),
    ]
    return {
        "picture": picture,
        "note": f"\N{LEFT DOUBLE QUOTATION MARK}{word}\N{RIGHT DOUBLE QUOTATION MARK}: {', '.join(parts)}",
    }


def veil_pictures(example):
    """Yield for each word's map a PNG that darkens the photograph where the word did not look.

    As bright as `attention_visualization.overlay` makes it: from the uniform weight, darkest, to
    the largest of the caption.
    """
    import attention_visualization as pictures  # and with it matplotlib, which takes a second

    height, width = example["grid"]
    cells = [np.frombuffer(base64.b64decode(each), np.uint8) for each in example["maps"]]
    weights = np.reshape(cells, (-1, height, width)) / 255 * example["largest_weight"]
    uniform = 1 / (height * width)
    full = np.clip(weights.max(initial=0), *(min(times * uniform, 1) for times in pictures.FULL))
    for each in weights:
        smooth = pictures.upsample_map(each, (VEIL_SIDE, VEIL_SIDE))
        light = pictures.brightness(smooth, uniform, full)
        alpha = np.rint(255 * (1 - pictures.DIM) * (1 - light)).astype(np.uint8)
        alpha = Image.fromarray(alpha)
        file = io.BytesIO()
        Image.merge("LA", (Image.new("L", alpha.size), alpha)).save(file, "PNG", optimize=True)
        yield file.getvalue()


def caption_groups(rows, cards):
    """The groups of `choose` with their cards; of an image without one the caption alone."""
    groups, ranks = [], {i: rank for rank, i in enumerate(by_score(rows), start=1)}
    for group, chosen in grouped(rows).items():
        title, text = GROUPS[group]
        shown = [caption_card(rows[i], cards.get(rows[i]["file_name"])) for i in chosen]
        for card, i in zip(shown, chosen, strict=True):
            card["rank"] = f"{ranks[i]:,} of {len(rows):,} by CIDEr"
        if shown:
            groups.append({"title": title, "text": text, "cards": shown})
    return groups


def caption_card(row, card):
    """A captions file's row with its image's card, unless that is of another caption."""
    if card is None or card["caption"] != row["caption"]:
        card = {"file_name": str(row["file_name"]), "caption": str(row["caption"])}
        card |= dict.fromkeys(("photograph", "method", "shared", "references"))
    scores = [(name, f"{row[name]:.2f}") for name in (*LARGE, "WER") if row.get(name) is not None]
    return card | {"scores": scores}


def sample_group(cards):
    """The one group of a run that is not tested."""
    text = "The first images of the validation split, captioned by the best epoch. Not yet tested."
    return [{"title": "A sample", "text": text, "cards": list(cards.values())}]


# ---------------------------------------------------------------------------------------------- curves

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 26  # margins


def checked_curves(content, others=None):
    """Curves as they are. Raises: ValueError unless each has a number or None for each epoch."""
    epochs = content["epochs"]
    for name, values in content.items():
        numbers = all(value is None or isinstance(value, int | float) for value in values)
        if not numbers or len(values) != len(epochs):
            raise ValueError(f"{name} is not a list of a number for each epoch")
    if not epochs or None in epochs or (others and others["epochs"] != epochs):
        raise ValueError("its epochs are none, or others than the losses'")
    return content


def charts(curves, select_by):
    """The charts of a run's epochs, and the table of their numbers.

    curves: {"epochs": [...], name of a score or of `loss_curve.json`: [...], ...}.
    select_by: the rule of model_selection that marks the best epoch.
    """
    epochs = curves["epochs"]
    named = {"epochs": "epoch", "val_losses": "val_loss"}  # as a row of the run's history has them
    columns = {named.get(name, name): values for name, values in curves.items()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    best, _ = model_selection.replay(select_by, rows)
    best = best and best.epoch
    wanted = {
        "Loss": ("nats per token", {"train_losses": "training", "val_losses": "validation"}),
        "CIDEr": ("of validation captions", {"CIDEr": "CIDEr"}),
        "BLEU-4": ("of validation captions", {"BLEU-4": "BLEU-4"}),
        "Learning rate": ("", {"learning_rates": "learning rate"}),
    }
    drawn, columns = [], {}
    for title, (unit, names) in wanted.items():
        series = {
            label: curves[key]
            for key, label in names.items()
            if any(v is not None for v in curves.get(key, []))
        }
        columns |= series
        if series:
            drawn.append({"title": title, "unit": unit} | chart(epochs, series, best))
    numbers = [
        [epoch, *("" if value is None else f"{value:.4g}" for value in values)]
        for epoch, *values in zip(epochs, *columns.values(), strict=True)
    ]
    return {"charts": drawn, "columns": ["epoch", *columns], "numbers": numbers, "best": best}


def chart(epochs, series, best):
    """The places of what a line chart shows, in a picture of WIDTH x HEIGHT.

    Args: series: {label: a value or None for each epoch}, the last one drawn in colour.
    """
    from matplotlib.ticker import MaxNLocator

    values = [value for each in series.values() for value in each if value is not None]
    y_ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(min(values), max(values))
    x_ticks = MaxNLocator(6, integer=True, min_n_ticks=1).tick_values(epochs[0], epochs[-1])
    across = scale(epochs[0], epochs[-1], LEFT + 6, WIDTH - RIGHT - 6)
    up = scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    lines = []
    for label, each in series.items():
        points = [
            {
                "x": round(across(epoch), 1),
                "y": round(up(value), 1),
                "text": f"epoch {epoch}: {value:.4g}",
            }
            for epoch, value in zip(epochs, each, strict=True)
            if value is not None
        ]
        lines.append({"label": label, "points": points})
    return {
        "lines": lines,
        "x_ticks": [
            (round(across(x), 1), f"{x:g}") for x in x_ticks if epochs[0] <= x <= epochs[-1]
        ],
        "y_ticks": [(round(up(y), 1), f"{y:.6g}") for y in y_ticks],
        "best": None if best is None else round(across(best), 1),
    }


def scale(low, high, start, end):
    """The linear function that takes low to start and high to end; their middle, where low is high."""
    if low == high:
        return lambda _value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


# ------------------------------------------------------------------------------------------------ page


def render(run):
    """The page of what `read_run` found, as text."""
    import jinja2

    style, script = ((PARTS / name).read_text("utf-8") for name in ("style.css", "script.js"))
    loader = jinja2.FileSystemLoader(PARTS, encoding="utf-8")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    size = {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": RIGHT,
        "bottom": BOTTOM,
        "top": TOP,
    }
    return environment.get_template("page.html").render(
        run,
        style=style,
        script=script,
        style_hash=csp_hash(style),
        script_hash=csp_hash(script),
        size=size,
    )


def csp_hash(text):
    """What a Content-Security-Policy calls an inline style or script."""
    return f"sha256-{_as_text(hashlib.sha256(text.encode()).digest())}"


def write_report(folder):
    """Write a run's report.html. Returns its path and the notes of what it lacks.

    Raises: ValueError when the folder holds no file of a run, or so much that the page is too long.
    """
    run = read_run(folder)
    page, path = render(run), Path(folder) / FILE_NAME
    if len(page.encode(errors="backslashreplace")) > MAX_PAGE_BYTES:
        raise ValueError(
            f"{path}: would be larger than {MAX_PAGE_BYTES / 1e6:.0f} MB: its texts are too long"
        )
    checkpoints.write_text(path, page)
    return path, run["notes"]


def main(argv=None):
    """The command: writes the page. A folder of no run is one line on stderr and status 2."""
    parser = argparse.ArgumentParser(
        description="Write a run's report.html from the files in its folder.",
        usage="caption_report.py RUN [RUN ...]",
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="folder of a run, or of a test's output"
    )
    args = parser.parse_args(argv)
    try:
        for run in args.runs:
            path, notes = write_report(run)
            for note in notes:
                _warn(f"{run}: {note}")
            print(f"written: {path}")
    except (OSError, ValueError) as error:
        parser.exit(2 if isinstance(error, ValueError) else 1, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
