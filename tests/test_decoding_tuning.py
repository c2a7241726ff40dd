"""decoding_tuning.py: which settings are tried, and which are chosen."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import decoding_tuning
from caption_decoding import Hypothesis
from caption_options import group_options, inherit, parse_args
from decoding_tuning import GRID, Search

MODEL = ["--mode", "tune", "--model_path", "best.pt"]


def settled(*typed):
    return inherit(parse_args([*MODEL, *typed]), "best.pt", {})


def grid(*typed):
    return decoding_tuning.make_grid(settled(*typed))


def test_what_is_typed_is_not_tried():
    assert grid() == GRID
    assert grid("--beam_size", "7") == GRID | {"beam_size": (7,)}
    assert grid("--rerank", "none") == GRID | {"rerank_weight": (0.0,)}
    found = grid("--rerank", "consensus", "--rerank_weight", "3", "--length_penalty", "0.5")
    assert found == GRID | {"rerank_weight": (3.0,), "length_penalty": (0.5,)}


def test_a_search_for_each_beam_and_block():
    found = set(decoding_tuning.searches(GRID | {"beam_size": (2, 4)}))
    assert found == {Search(2, 0), Search(2, 3), Search(4, 0), Search(4, 3)}


def hypothesis(tokens, log_prob, finished=True):
    return Hypothesis(tokens, log_prob, None, finished, None)


@pytest.mark.parametrize(
    "penalty, weight, expected",
    [
        (0.0, 0.0, "short"),  # log-probabilities -2 and -3
        (1.0, 0.0, "long"),  # by tokens, <EOS> counted: -1 and -0.6
        (0.0, 1.0, "long"),  # -2 + 0.5 and -3 + 2
        (0.0, 0.5, "short"),  # -1.75 and -2
    ],
)
def test_penalty_and_weight_order_what_a_beam_holds(penalty, weight, expected):
    beam = [hypothesis([4], -2.0), hypothesis([4, 5, 6, 7], -3.0)]
    names = {1: "short", 4: "long"}
    tried = decoding_tuning.try_all(
        {"length_penalty": (penalty,), "rerank_weight": (weight,)},
        {Search(2, 0): ([beam], [[0.5, 2.0]])},
        lambda best: {"CIDEr": 0.1, "caption": names[len(best[0].tokens)]},
    )
    (row,) = tried.to_dict("records")
    assert row == {
        "beam_size": 2,
        "no_repeat_ngram_size": 0,
        "length_penalty": penalty,
        "rerank_weight": weight,
        "CIDEr": 0.1,
        "caption": expected,
    }


def test_a_caption_that_was_cut_is_never_best():
    beam = [hypothesis([4], -9.0), hypothesis([4, 5], -1.0, finished=False)]
    best = []
    decoding_tuning.try_all(
        {"length_penalty": (0.0,), "rerank_weight": (0.0,)},
        {Search(2, 0): ([beam], [[0.0, 9.0]])},
        lambda found: best.extend(found) or {"CIDEr": 0.0},
    )
    assert [h.tokens for h in best] == [[4]]


@pytest.mark.parametrize("weight, rerank", [(0.0, "none"), (0.5, "consensus")])
def test_the_first_of_the_best_is_chosen_and_shown(weight, rerank):
    ciders = iter([0.25, 0.5, 0.5, 0.125])
    small = {"length_penalty": (0.0, 0.8), "rerank_weight": (weight, 9.0)}
    tried = decoding_tuning.try_all(
        small,
        {Search(3, 0): ([[hypothesis([4], -1.0)]], [[0.0]])},
        lambda best: {"CIDEr": next(ciders)},
    )
    chosen = decoding_tuning.choose(tried)
    assert chosen == {
        "beam_size": 3, "no_repeat_ngram_size": 0, "length_penalty": 0.0, "rerank_weight": 9.0
    }  # fmt: skip
    text = decoding_tuning.as_text(tried, chosen)
    assert text.splitlines()[-1] == (
        "best: 0.5000 with --beam_size 3, --no_repeat_ngram_size 0, --length_penalty 0, "
        "--rerank_weight 9"
    )
    assert "0.2500" in text and "0.1250" in text
    options = settled("--neighbours", "7")
    stored = decoding_tuning.as_options(chosen | {"rerank_weight": weight}, options)
    assert stored["rerank"] == rerank and stored["neighbours"] == 7
    values = options.as_dict() | stored
    grouped = group_options(values, options.typed, options.origins)
    assert grouped.as_dict() == values  # each is an option's value
