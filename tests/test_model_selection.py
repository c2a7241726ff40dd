"""Which epoch is the best, on score histories that were made up and judged by hand."""

import itertools
import math
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model_selection
from model_selection import RULES, WEIGHTS, Best, as_plain, choose, from_plain, improves, replay

STRATEGIES = ("meteor-centric", "weighted-composite", "pareto", "multi-criteria")


def history(*epochs, names=("METEOR", "BLEU-4", "ROUGE-L", "BLEU-1", "BLEU-2")):
    """Rows of epochs whose scores are given in the order of `names`; the loss is 3 throughout."""
    return [
        {"epoch": number, "val_loss": 3.0} | dict(zip(names, scores, strict=True))
        for number, scores in enumerate(epochs, start=1)
    ]


def best_after_each(select_by, rows):
    """The best epoch's number after each row."""
    best, found = None, []
    for row in rows:
        best = choose(select_by, best, row)
        found.append(best and best.epoch)
    return found


#        METEOR BLEU-4 ROUGE-L BLEU-1 BLEU-2
PLAIN = (
    (0.180, 0.150, 0.420, 0.550, 0.360),  # 1
    (0.200, 0.180, 0.450, 0.580, 0.400),  # 2: all rise
    (0.190, 0.200, 0.440, 0.570, 0.390),  # 3: METEOR -0.010, BLEU-4 +0.020, the others fall
    (
        0.195,
        0.182,
        0.472,
        0.605,
        0.425,
    ),  # 4: METEOR -0.005, three others +0.022 and more, BLEU-4 +0.002
    (0.196, 0.202, 0.473, 0.606, 0.426),  # 5: METEOR -0.004, all others up again
    (0.201, 0.150, 0.400, 0.540, 0.350),  # 6: METEOR +0.001, all others fall
)
# Composites: 1 .277, 2 .304, 3 .300, 4 .3118, 5 .3166, 6 .2794


@pytest.mark.parametrize("select_by, expected", [
    ("meteor", [1, 2, 2, 2, 2, 6]),
    ("bleu4", [1, 2, 3, 3, 5, 5]),
    ("rouge", [1, 2, 2, 4, 5, 5]),
    ("bleu1", [1, 2, 2, 4, 5, 5]),
    ("bleu2", [1, 2, 2, 4, 5, 5]),
    ("meteor-centric", [1, 2, 3, 4, 4, 6]),  # 4: ROUGE-L 0.472 against 0.450; 5: BLEU-4 0.202 against 0.200
    ("weighted-composite", [1, 2, 2, 4, 5, 5]),
    ("pareto", [1, 2, 2, 2, 2, 2]),  # METEOR of 3, 4 and 5 is lower, the others of 6
    ("multi-criteria", [1, 2, 2, 4, 4, 6]),  # 3: METEOR fell by 0.010, and one other rose
])  # fmt: skip
def test_the_best_epoch_of_a_history_judged_by_hand(select_by, expected):
    assert best_after_each(select_by, history(*PLAIN)) == expected


def test_the_composite_is_the_weighted_sum():
    best = choose("weighted-composite", None, history(PLAIN[0])[0])
    by_hand = 0.4 * 0.18 + 0.2 * 0.15 + 0.2 * 0.42 + 0.1 * 0.55 + 0.1 * 0.36
    assert best.score == pytest.approx(by_hand) == pytest.approx(0.277)
    assert math.isclose(sum(WEIGHTS.values()), 1)


def test_pareto_takes_an_epoch_in_which_nothing_fell_and_something_rose():
    start = (0.2, 0.2, 0.4, 0.5, 0.4)
    one_higher, one_lower = (0.2, 0.2, 0.4, 0.5, 0.41), (0.3, 0.3, 0.5, 0.6, 0.409)
    rows = history(start, start, one_higher, one_lower, (0.2, 0.21, 0.4, 0.5, 0.41))
    assert best_after_each("pareto", rows) == [1, 1, 3, 3, 5]


@pytest.mark.parametrize("select_by", RULES)
def test_each_rule_saves_a_first_best_whatever_its_scores_are(select_by):
    """Others compare the first epoch with zeros in each score, or with none, and save nothing for ever."""
    row = dict.fromkeys((*WEIGHTS, "BLEU-3", "CIDEr"), 0.0) | {"WER": 1.0, "val_loss": 9.0}
    best = choose(select_by, None, {"epoch": 1} | row)
    assert best.epoch == 1 and improves(select_by, None, row)
    better = dict.fromkeys(row, 0.5)
    assert choose(select_by, best, {"epoch": 2} | better).epoch == 2


@pytest.mark.parametrize("select_by, step", [("meteor-centric", 0.019), ("multi-criteria", 0.009)])
def test_losses_that_a_rule_tolerates_do_not_add_up(select_by, step):
    """Compared with the last best epoch alone METEOR would fall without end, while another score swings."""
    low, high = (0.20, 0.40, 0.50, 0.40), (0.25, 0.45, 0.55, 0.45)
    scores = [(0.30 - step * n, *(high if n % 2 else low)) for n in range(12)]
    assert best_after_each(select_by, history(*scores)) == [1] + 11 * [2]
    assert scores[1][0] == pytest.approx(0.30 - step)


@pytest.mark.parametrize("select_by", STRATEGIES)
@pytest.mark.parametrize("seed", range(5))
def test_no_history_leads_a_strategy_downwards(select_by, seed):
    """Of random histories: METEOR, or the composite, stays as near its highest as the rule tolerates."""
    draw = random.Random(seed)
    rows = history(*([draw.uniform(0.15, 0.35) for _ in WEIGHTS] for _ in range(300)))
    best, highest = None, 0.0
    tolerance = {"meteor-centric": 0.02, "multi-criteria": 0.01}.get(select_by, 0.0)
    chosen = []
    for row in rows:
        earlier, best = best, choose(select_by, best, row)
        if best is not earlier:
            chosen.append(row)
            highest = max(highest, best.score)
            assert best.score > highest - tolerance or best.score == highest
    assert len(chosen) > (1 if select_by == "pareto" else 2)
    if select_by == "pareto":
        for before, after in itertools.pairwise(chosen):
            assert all(after[name] >= before[name] for name in WEIGHTS)


def test_a_rise_of_exactly_what_a_rule_asks_for_counts():
    """0.21 - 0.20 is less than 0.01 in binary."""
    assert 0.21 - 0.20 < 0.01
    start = (0.300, 0.20, 0.40, 0.5, 0.4)
    rows = history(start, (0.281, 0.21, 0.40, 0.5, 0.4))
    assert best_after_each("meteor-centric", rows) == [1, 2]
    fallen = history(start, (0.280, 0.25, 0.50, 0.5, 0.4))  # by 0.02, which is not less than 0.02
    assert best_after_each("meteor-centric", fallen) == [1, 1]
    two = history(start, (0.291, 0.22, 0.42, 0.5, 0.4), (0.3, 0.24, 0.42, 0.5, 0.4))
    assert best_after_each("multi-criteria", two) == [1, 2, 2]


def test_lower_is_better_for_the_loss_and_wer():
    losses = [{"epoch": n, "val_loss": x} for n, x in enumerate((3.0, 2.5, 2.5, 2.7, 2.4), start=1)]
    assert best_after_each("loss", losses) == [1, 2, 2, 2, 5]
    words = [{"epoch": n, "WER": x} for n, x in enumerate((0.9, 0.95, 0.8), start=1)]
    assert best_after_each("wer", words) == [1, 1, 3]
    best, _ = replay("wer", words)
    assert best.score == 0.8 and best.marks == {"WER": -0.8}


def test_of_equal_scores_the_lower_loss_is_the_best_but_no_improvement():
    rows = [
        {"epoch": 1, "val_loss": 3.0, "CIDEr": 0.0},
        {"epoch": 2, "val_loss": 2.0, "CIDEr": 0.0},
    ]
    assert best_after_each("cider", rows) == [1, 2]
    assert replay("cider", rows)[1] == 1  # epochs since CIDEr rose
    assert best_after_each("cider", rows[::-1]) == [2, 2]


@pytest.mark.parametrize("missing", [None, math.nan, "absent"])
def test_epochs_without_a_rules_scores_are_passed_over(missing):
    rows = history(PLAIN[1], PLAIN[0])
    rows[0]["METEOR"] = missing
    if missing == "absent":
        del rows[0]["METEOR"]
    assert best_after_each("pareto", rows) == [None, 2]
    assert best_after_each("bleu4", rows) == [1, 1]


def test_a_record_gives_back_what_it_was_made_of():
    rows = [row | {"CIDEr": row["BLEU-4"]} for row in history(*PLAIN)]
    rows[3]["val_loss"] = 2.0
    for select_by in RULES:
        rows_with_all = [row | {"BLEU-3": 0.3, "WER": 0.7} for row in rows]
        files = model_selection.rules_of_files(select_by)
        bests = {file: replay(rule, rows_with_all)[0] for file, rule in files.items()}
        assert bests["best_loss.pt"].epoch == 4
        record = as_plain(bests, select_by)
        assert from_plain(record, select_by, []) == bests
        assert from_plain({}, select_by, rows_with_all) == bests  # of an old checkpoint
    other = from_plain(as_plain(bests, "multi-criteria"), "bleu4", rows)
    assert other["best_eval.pt"].epoch == 5 and other["best_loss.pt"] == bests["best_loss.pt"]
    nothing = {"best_loss.pt": None, "best_eval.pt": None}
    assert (
        from_plain(as_plain(nothing, "cider"), "cider", rows) == nothing
    )  # begun anew: it stays so


@pytest.mark.parametrize("damage", [
    {"epoch": "x"}, {"score": None}, {"marks": {}}, {"marks": {"CIDEr": math.nan}}, {"marks": 3},
    {"more": 1},
])  # fmt: skip
def test_a_damaged_record_is_refused(damage):
    record = as_plain(
        {"best_loss.pt": None, "best_eval.pt": Best(1, 0.1, 2.0, {"CIDEr": 0.1})}, "cider"
    )
    record["best_eval.pt"]["best"] |= damage
    with pytest.raises((KeyError, TypeError, ValueError)):
        from_plain(record, "cider", [])


@pytest.mark.parametrize("config, rule", [
    ({}, "cider"), ({"select_by": "pareto"}, "pareto"), ({"select_by": ["x"]}, "cider"),
    ({"select_by": "nonsense"}, "cider"),
])  # fmt: skip
def test_the_rule_of_settings_that_come_from_anywhere(config, rule):
    assert model_selection.rule_of(config) == rule
