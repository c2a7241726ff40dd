"""The tree of a search, on a decoder whose probabilities are a table, and its picture."""

import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import search_tree
from caption_decoding import generate

# of the next word after each: <PAD> <SOS> <EOS> <UNK> a b c
NAMES = ["<PAD>", "<SOS>", "<EOS>", "<UNK>", "a", "b", "c"]
EOS, A, B, C = 2, 4, 5, 6
NEXT = {
    1: {A: 0.6, B: 0.4},
    A: {C: 0.5, B: 0.3, EOS: 0.2},
    B: {EOS: 0.9, A: 0.1},
    C: {EOS: 0.5, C: 0.5},
}
VOCABULARY = SimpleNamespace(pad=0, sos=1, eos=EOS, unk=3, words=NAMES)


class TableDecoder:
    """Words by NEXT, whatever the picture."""

    def start(self, features):
        return (), ()

    def step(self, tokens, state):
        table = torch.full((len(NAMES), len(NAMES)), 1e-9)
        for word, following in NEXT.items():
            for other, probability in following.items():
                table[word, other] = probability
        return table[tokens].log(), state, None


def searched(algorithm="beam", **settings):
    """(tree, the Hypothesis, recorder) of a search for one picture."""
    recorder = search_tree.Recorder(3)
    ((best, *_),) = generate(
        TableDecoder(),
        torch.zeros(1, 1, 1),
        VOCABULARY,
        algorithm=algorithm,
        record=recorder,
        **settings,
    )
    return search_tree.grow(recorder.steps, best, EOS), best, recorder


def written(node):
    return "".join(NAMES[each.word] for each in node.path).replace("<EOS>", ".")


@pytest.mark.parametrize("beam_size", [1, 2, 3])
def test_a_full_beam_that_is_cut_has_one_winner(beam_size):
    """Its places for captions that ended are filled with impossible ones, which may have the winner's words."""
    tree, best, _ = searched("full_beam", beam_size=beam_size, max_length=1, min_length=1)
    assert best.tokens == [A] and not best.finished
    assert [written(node) for node in tree.below if node.has_won] == ["", "a"]


def test_the_tree_of_a_beam_of_two_worked_by_hand():
    """b. has 0.4 * 0.9 = 0.36 and wins; ac has 0.6 * 0.5 = 0.30 and is left, ab with 0.18 never was in the beam."""
    tree, best, _ = searched(beam_size=2)
    nodes = {written(node): node for node in tree.below}
    assert nodes.keys() == {"", "a", "b", "ac", "b."}
    assert best.tokens == [B] and {text for text in nodes if nodes[text].has_won} == {"", "b", "b."}
    assert {text: round(nodes[text].probability, 6) for text in ("a", "b", "ac", "b.")} == {
        "a": 0.6, "b": 0.4, "ac": 0.5, "b.": 0.9,
    }  # fmt: skip
    assert nodes["b."].log_prob == pytest.approx(math.log(0.36)) == pytest.approx(best.log_prob)
    assert (nodes["b"].rank, nodes["b."].rank, nodes["ac"].rank) == (2, 1, 2)
    assert [word for word, _ in nodes["b."].candidates] == [EOS, A, nodes["b."].candidates[2][0]]
    assert nodes["b."].is_last and nodes["ac"].is_last and nodes["ac"].is_kept


def test_in_the_tree_of_a_full_beam_a_live_hypothesis_has_the_place_of_the_one_that_ended():
    """As above, but ab stays beside ac, because b. has ended; places that nothing has are not counted."""
    tree, best, _ = searched("full_beam", beam_size=2)
    nodes = {written(node): node for node in tree.below}
    assert nodes.keys() == {"", "a", "b", "ac", "ab", "b."} and best.tokens == [B]
    assert nodes["b."].has_won and nodes["ac"].is_last and nodes["ab"].is_last
    assert [(nodes[text].rank, nodes[text].beam) for text in ("b.", "ac", "ab")] == [
        (1, 3), (2, 3), (3, 3),
    ]  # fmt: skip
    assert nodes["a"].beam == 2


def test_what_is_pruned_is_not_kept():
    tree, best, _ = searched(beam_size=2, min_length=3)
    kept = [node for node in tree.below if node.is_kept]
    assert {node for node in kept if not any(n.is_last or n.goes_on for n in node.below)} == set()
    assert any(not node.is_kept for node in tree.below)
    assert [n.word for n in tree.below if n.has_won][1:] == best.tokens + [EOS] * best.finished


@pytest.mark.parametrize("algorithm", ["greedy", "beam", "sample"])
def test_recording_changes_no_caption(algorithm):
    settings = {"algorithm": algorithm, "beam_size": 3}
    tree, best, _ = searched(**settings, generator=torch.Generator().manual_seed(3))
    ((alone,),) = generate(
        TableDecoder(),
        torch.zeros(1, 1, 1),
        VOCABULARY,
        **settings,
        generator=torch.Generator().manual_seed(3),
    )
    assert best == alone
    total = sum(math.log(node.probability) for node in tree.below if node.has_won)
    assert total == pytest.approx(best.log_prob, abs=1e-4)


def test_the_steps_as_a_table():
    tree, *_ = searched(beam_size=2)
    head, first, last = search_tree.trace_lines(tree, NAMES, ["row 1, column 2: 40%"], (2, 3))
    assert head.split("  ")[0] == "step" and "looked at, of 2 x 3" in head
    assert first.split()[:6] == ["1", "b", "0.400", "2", "of", "2"]
    assert "row 1, column 2: 40%  a 0.600  b 0.400" in first
    assert first.split()[-1] == "<.001"
    assert last.split()[:6] == ["2", "<EOS>", "0.900", "1", "of", "2"]


def test_peaks_are_shares_of_all_that_a_word_looked_at():
    maps = np.array([[[0.1, 0.2, 0.1], [0.5, 0.1, 0.0]], np.full((2, 3), 1 / 6)])
    assert search_tree.peak_texts(maps, {"language": np.array([0.5, 0.4])}) == [
        "row 2, column 1: 25%, language 50%", "everywhere: 10%, language 40%",
    ]  # fmt: skip


@pytest.mark.parametrize("beam_size, min_length", [(2, 0), (3, 6), (5, 9)])
def test_every_word_has_a_place_of_its_own_and_the_winner_is_straight(beam_size, min_length):
    tree, *_ = searched(beam_size=beam_size, min_length=min_length)
    placed = search_tree.lanes(tree)
    assert placed.keys() == set(tree.below)
    places = [(node.step, lane) for node, lane in placed.items()]
    assert len(set(places)) == len(places)
    assert {placed[node] for node in tree.below if node.has_won} == {0}
    edges = [(n.step, placed[n.parent], placed[n]) for n in tree.below if n.parent]
    for (step, start, end), (other, start_2, end_2) in itertools.combinations(edges, 2):
        if step == other:  # neither crosses the other
            assert (start - start_2) * (end - end_2) >= 0


@pytest.mark.parametrize(
    "form, beginning", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_the_picture_is_of_its_form_and_the_same_each_time(form, beginning, tmp_path):
    tree, *_ = searched(beam_size=3, min_length=4)
    photograph, files = Image.new("RGB", (40, 30), "teal"), []
    for name in ("one", "two"):
        files.append(tmp_path / f"{name}.{form}")
        search_tree.save_search_tree(files[-1], photograph, tree, NAMES, EOS)
    data = files[0].read_bytes()
    assert data.startswith(beginning) and data == files[1].read_bytes()
    if form == "svg":  # its text stays text
        assert data.count(b">end<") >= 1 and b"beam of 3:" in data
