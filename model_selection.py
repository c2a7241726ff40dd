"""Which epoch of a run is the best: rules over the scores of its validation captions.

    best = None
    for row in history:                    # {"epoch": 1, "val_loss": 2.9, "CIDEr": 0.4, ...}
        best = choose("pareto", best, row)
    best.epoch

A rule says whether an epoch is better than the *marks* of the best one so far: the highest of each
score over the epochs that were the best in their turn. Against the scores of the latest alone,
losses that a rule tolerates would add up from epoch to epoch. The first epoch that has the scores
is the best so far, whatever they are. Nothing here knows a model, and torch is not imported.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

LOSS = "val_loss"
# What a strategy looks at, and how much each weighs in `weighted-composite`.
WEIGHTS = {"METEOR": 0.4, "BLEU-4": 0.2, "ROUGE-L": 0.2, "BLEU-1": 0.1, "BLEU-2": 0.1}
LOWER_IS_BETTER = {LOSS, "WER"}
DIGITS = 9  # gains are rounded to: 0.21 - 0.20 is a little less than 0.01


class Best(NamedTuple):
    """The best epoch so far, as plain values that a checkpoint may hold."""

    epoch: int
    score: float  # what the console names; of `LOWER_IS_BETTER` as it is
    loss: float  # validation loss, infinite where it has none
    marks: dict[str, float]  # what a later epoch is compared with; higher is better


class Rule(NamedTuple):
    """A value of --select_by."""

    title: str  # of the score that the console names
    names: tuple[str, ...]  # the scores of a row that it looks at
    is_better: Callable  # (gains: {name: what an epoch has more than the marks}) -> bool
    weights: dict[str, float] | None = None  # of a sum, which is compared in place of the scores


def is_higher(gains):
    """Whether the only score rose."""
    (gain,) = gains.values()
    return gain > 0


def dominates(gains):
    """Whether no score fell and one rose."""
    return min(gains.values()) >= 0 and max(gains.values()) > 0


def meteor_first(gains):
    """Whether METEOR rose, or fell by less than 0.02 while BLEU-4 rose by 0.01 or ROUGE-L by 0.02."""
    tolerable = gains["METEOR"] > -0.02
    return gains["METEOR"] > 0 or (
        tolerable and (gains["BLEU-4"] >= 0.01 or gains["ROUGE-L"] >= 0.02)
    )


def meteor_and_two_others(gains):
    """Whether METEOR rose, or fell by less than 0.01 while two other scores rose by 0.02."""
    risen = sum(gain >= 0.02 for name, gain in gains.items() if name != "METEOR")
    return gains["METEOR"] > 0 or (gains["METEOR"] > -0.01 and risen >= 2)


def single(name, title=None):
    """The Rule of one score."""
    return Rule(title or name, (name,), is_higher)


SEVERAL = tuple(WEIGHTS)
RULES = {
    "cider": single("CIDEr"),
    "bleu1": single("BLEU-1"),
    "bleu2": single("BLEU-2"),
    "bleu3": single("BLEU-3"),
    "bleu4": single("BLEU-4"),
    "meteor": single("METEOR"),
    "rouge": single("ROUGE-L"),
    "wer": single("WER"),
    "loss": single(LOSS, "validation loss"),
    "meteor-centric": Rule("METEOR (meteor-centric)", SEVERAL, meteor_first),
    "weighted-composite": Rule("weighted composite", SEVERAL, is_higher, WEIGHTS),
    "pareto": Rule("METEOR (pareto)", SEVERAL, dominates),
    "multi-criteria": Rule("METEOR (multi-criteria)", SEVERAL, meteor_and_two_others),
}
OTHER_NAMES = {"bleu": "bleu4"}  # of rules, as the specification's document C has them


def rule_of(config):
    """The --select_by of a run's settings, which a file of any origin may hold; cider where it names none."""
    rule = config.get("select_by") if isinstance(config, dict) else None
    return rule if isinstance(rule, str) and rule in RULES else "cider"


def needs_meteor(select_by):
    """Whether a rule looks at METEOR, which takes seconds for each epoch."""
    return "METEOR" in RULES[select_by].names


def compared(rule, row):
    """{name: value, higher is better} of what a rule compares; None where the row lacks a score."""
    values = {name: row.get(name) for name in rule.names}
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in values.values()):
        return None
    if rule.weights:
        return {rule.title: sum(rule.weights[name] * value for name, value in values.items())}
    return {name: -v if name in LOWER_IS_BETTER else v for name, v in values.items()}


def improves(select_by, best, row):
    """Whether an epoch is better than the best so far, a Best or None; the loss aside.

    row: its scores by name, METRIC_NAMES of metrics_utils, 0..1 or CIDEr's 0..10.
    """
    rule = RULES[select_by]
    scores = compared(rule, row)
    if scores is None or best is None:
        return scores is not None
    gains = {name: round(scores[name] - best.marks[name], DIGITS) for name in scores}
    return rule.is_better(gains)


def choose(select_by, best, row):
    """The Best after an epoch: what was given, or this epoch where it is better.

    Of epochs with the same scores it is that of lower loss: captions of small data score 0 for
    epochs while the loss falls.
    """
    rule = RULES[select_by]
    scores, loss = compared(rule, row), row.get(LOSS)
    loss = math.inf if loss is None else loss
    is_better = improves(select_by, best, row)
    if not is_better and not (best and scores == best.marks and loss < best.loss):
        return best
    marks = {name: max(scores[name], best.marks[name]) for name in scores} if best else scores
    shown = scores[rule.title] if rule.weights else row[rule.names[0]]
    return Best(row["epoch"], shown, loss, marks)


def replay(select_by, history):
    """(Best of a history or None, epochs since the last one that improved on what was before it)."""
    best, stale = None, 0
    for row in history:
        stale = 0 if improves(select_by, best, row) else stale + 1
        best = choose(select_by, best, row)
    return best, stale


def label(select_by, best):
    """A Best's score as a text, such as `CIDEr 0.4123`."""
    return f"{RULES[select_by].title} {best.score:.4f}"


# ------------------------------------------------------------------------------------------- files

BEST, BEST_LOSS, BEST_EVAL = "best.pt", "best_loss.pt", "best_eval.pt"


def rules_of_files(select_by):
    """{checkpoint file: the rule that chooses its epoch}, of a run with this --select_by."""
    return {BEST_LOSS: "loss", BEST_EVAL: "cider" if select_by == "loss" else select_by}


def chosen_file(select_by):
    """The one of these files that best.pt is another name of."""
    return BEST_LOSS if select_by == "loss" else BEST_EVAL


def as_plain(bests, select_by):
    """A checkpoint's record of the Best of each file; `from_plain` reads it."""
    rules = rules_of_files(select_by)
    return {
        file: {"by": rules[file], "best": best and best._asdict()} for file, best in bests.items()
    }


def from_plain(record, select_by, history):
    """{file: its Best or None}; chosen anew from the history where the record has another rule, or none.

    Raises: KeyError, TypeError, ValueError or AttributeError for a record that `as_plain` did not make.
    """
    bests = {}
    for file, rule in rules_of_files(select_by).items():
        known = record.get(file, {})
        if known.get("by") != rule:
            bests[file], _ = replay(rule, history)
        else:
            bests[file] = known["best"] and _checked(rule, **known["best"])
    return bests


def _checked(select_by, epoch, score, loss, marks):
    """A Best of these values. Raises: ValueError where marks are not those of its rule."""
    rule = RULES[select_by]
    expected = (rule.title,) if rule.weights else rule.names
    marks = {name: float(marks[name]) for name in expected}
    if not all(map(math.isfinite, marks.values())):
        raise ValueError(f"marks of --select_by {select_by} are no numbers")
    return Best(int(epoch), float(score), float(loss), marks)
