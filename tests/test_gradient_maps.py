"""Gradient maps of decoders whose right map is known, and of real ones against a word at a time."""

import itertools
import math

import pytest
import torch
from small_runs import CPU
from torch import nn

import flickr_image_caption as program
import gradient_maps as room
from caption_batches import Vocabulary
from caption_decoding import Ensemble, Hypothesis, generate
from gradient_maps import gradient_maps, word_batches
from runtime import Hardware

WORDS = Vocabulary([*Vocabulary.SPECIALS, "a", "b", "c", "d", "e"])
CELLS, CHANNELS = 12, 5
CAPTIONS = [[4, 7], [], [5, 8, 6, 4], [8, 8, 4, 5]]
DECODERS = ("lstm", "additive", "multi_head", "adaptive", "ensemble")


def hypothesis(tokens):
    """A caption without maps."""
    return Hypothesis(tokens, 0.0, 0.0, True, None)


def real_decoder(kind):
    """A small one that knows nine words, its features standardised."""
    torch.manual_seed(0)
    if kind == "ensemble":
        return Ensemble([real_decoder(each) for each in ("lstm", "additive", "adaptive")])
    extra = {} if kind == "lstm" else {"attention_dim": 4}
    extra |= {"attention_heads": 2} if kind in ("multi_head", "adaptive") else {}
    decoder = program.DECODERS[kind](CHANNELS, 9, 6, 8, 2, 0.3, **extra).eval()
    decoder.calibrate([pictures(50)])
    with torch.no_grad():
        decoder.head.weight *= 5
    return decoder


def pictures(number=4):
    """Features (N, P, F)."""
    return 2 + 3 * torch.randn(number, CELLS, CHANNELS, generator=torch.Generator().manual_seed(1))


def maps_of(decoder, features, captions=CAPTIONS, hardware=CPU):
    """Their maps, (T, P) each."""
    written = [hypothesis(tokens) for tokens in captions]
    return [h.attention for h in gradient_maps(decoder, features, written, WORDS, hardware)]


def by_hand(decoder, image, tokens):
    """The map of the last word, given an image (P, F): the search's own steps, one image, one word."""
    image = image.clone().requires_grad_()
    state = decoder.start(image.unsqueeze(0))
    for token in [Vocabulary.sos, *tokens[:-1]]:
        logits, state, _ = decoder.step(torch.tensor([[token]]), state)
    logits[0, 0].log_softmax(-1)[tokens[-1]].backward()
    gains = []
    for cell in range(CELLS):
        above = image.detach()[cell] - decoder.feature_mean
        gains.append(max(0.0, float(image.grad[cell] @ above)))
    return torch.tensor(gains) / sum(gains) if sum(gains) else torch.full((CELLS,), 1 / CELLS)


class Sees(nn.Module):
    """A decoder whose logits of words 4 and 5 are what two cells' channels are above the mean.

    Word 4 is seen in cell 7 and, a third as strongly, in cell 2; word 5 in cell 2 alone, but only
    after word 4. Other words are blind.
    """

    def __init__(self):
        super().__init__()
        self.feature_mean = torch.tensor([1.0, 2.0])
        self.rows_at_once = []

    def forward(self, features, batch):
        """features (N, P, 2) -> logits (tokens, 9), None."""
        self.rows_at_once.append(len(features))
        cells = (features - self.feature_mean)[batch.image_index[batch.caption_index]]
        logits = features.new_zeros(len(batch.inputs), 9)
        logits[:, 4] = 3 * cells[:, 7, 0] + cells[:, 2, 1]
        logits[:, 5] = (batch.inputs == 4) * cells[:, 2, 0]
        return logits, None


@pytest.mark.parametrize("tokens_at_once", [1, 9, 1000])
@pytest.mark.parametrize("kind", DECODERS)
def test_one_backward_pass_for_all_words_gives_each_word_s_own_map(
    kind, tokens_at_once, monkeypatch
):
    """Whatever the size of batches, for captions of many lengths in any order."""
    monkeypatch.setattr(room, "BATCH_BYTES", tokens_at_once * CELLS * CHANNELS * 4)
    decoder, features = real_decoder(kind), pictures()
    found = maps_of(decoder, features)
    assert [tuple(maps.shape) for maps in found] == [(len(words), CELLS) for words in CAPTIONS]
    for image, words, maps in zip(features, CAPTIONS, found, strict=True):
        for end, word_map in enumerate(maps, start=1):
            expected = by_hand(decoder, image, words[:end])
            torch.testing.assert_close(word_map, expected, atol=1e-5, rtol=1e-3)
            assert expected.max() > 1.5 / CELLS  # none of them says nothing


def test_maps_of_the_cells_that_say_a_word():
    """3 x 1 in cell 7 and 1 x 1 in cell 2; word 5 is of cell 2 and, against its rival, no other."""
    features = Sees().feature_mean + torch.ones(2, CELLS, 2)
    seen, other = maps_of(Sees(), features, [[4, 5], [6, 8]])
    expected = torch.zeros(2, CELLS)
    expected[0, [7, 2]] = torch.tensor([0.75, 0.25])
    # after <SOS> and 4 both logits count: 5's own is worth (1 - p5) to cell 2, 4's costs p4 there
    exps = [math.exp(4), math.exp(1), 7]
    p4, p5 = exps[0] / sum(exps), exps[1] / sum(exps)
    assert 1 - p5 - p4 > 0
    expected[1, 2] = 1
    torch.testing.assert_close(seen, expected)
    uniform = torch.full((2, CELLS), 1 / CELLS)  # what the cells show speaks against 6 and 8
    torch.testing.assert_close(other, uniform)


def test_a_cell_that_is_as_the_mean_shows_nothing_and_one_below_it_speaks_against():
    decoder = Sees()
    features = decoder.feature_mean + torch.ones(1, CELLS, 2)
    features[0, 7] = decoder.feature_mean
    (only_two,) = maps_of(decoder, features, [[4]])
    assert only_two[0].argmax() == 2 and only_two[0, 2] == 1
    features[0, 2, 1] -= 2
    (none,) = maps_of(decoder, features, [[4]])
    torch.testing.assert_close(none, torch.full((1, CELLS), 1 / CELLS))


def test_the_mean_s_gradient_is_one_for_all_cells():
    """So a decoder that is given the mean has maps that differ by the feature alone."""
    decoder, (image, *_) = real_decoder("lstm"), pictures()
    image[3] = image[9]
    (maps,) = maps_of(decoder, image.unsqueeze(0), [[4, 7, 5]])
    torch.testing.assert_close(maps[:, 3], maps[:, 9])
    assert (maps.amax(1) > 1.5 / CELLS).all()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", DECODERS)
def test_half_precision_changes_maps_by_its_rounding_alone(kind, precision):
    decoder, features = real_decoder(kind), pictures()
    halves = Hardware(torch.device("cpu"), precision)
    for one, other in zip(
        maps_of(decoder, features), maps_of(decoder, features, hardware=halves), strict=True
    ):
        assert other.dtype == torch.float32
        assert len(one) == 0 or 0 < (one - other).abs().sum(1).max() / 2 < 0.1


@pytest.mark.parametrize("kind", DECODERS)
def test_what_was_searched_in_inference_mode_has_maps_and_leaves_no_gradient(kind):
    """Features of the encoder are inference tensors, and a caller may still be in that mode."""
    decoder = real_decoder(kind)
    with torch.inference_mode():
        features = pictures() + 0
        found = [
            best for best, *_ in generate(decoder, features, WORDS, min_length=3, max_length=6)
        ]
        inside = gradient_maps(decoder, features, found, WORDS, CPU)
    assert features.is_inference()
    with torch.no_grad():
        outside = gradient_maps(decoder, features, found, WORDS, CPU)
    for one, other in zip(inside, outside, strict=True):
        assert one.tokens == other.tokens and len(one.attention) == len(one.tokens) > 0
        torch.testing.assert_close(one.attention, other.attention)
        assert not one.attention.requires_grad
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_words_of_a_batch_are_bounded_by_the_steps_before_them():
    lengths = [2, 0, 9, 5]
    captions = [list(range(length)) for length in lengths]
    for most in (1, 7, 20, 1000):
        batches = list(word_batches(captions, most))
        words = list(itertools.chain.from_iterable(batches))
        expected = [
            (row, end) for row, length in enumerate(lengths) for end in range(1, length + 1)
        ]
        assert sorted(words) == expected
        assert [end for _, end in words] == sorted((end for _, end in words), reverse=True)
        assert all(len(batch) == 1 or sum(end for _, end in batch) <= most for batch in batches)
    assert len(batches) == 1


def test_memory_is_bounded(monkeypatch):
    """Copies of an image are made for a few words at a time: 40 words in one batch would be 40."""
    monkeypatch.setattr(room, "BATCH_BYTES", 10 * CELLS * 2 * 4)
    decoder = Sees()
    features = decoder.feature_mean + torch.ones(4, CELLS, 2)
    maps_of(decoder, features, [[4] * 10] * 4)
    rows = decoder.rows_at_once
    assert sum(rows) == 40 and rows[0] == 1 and max(rows) == 5  # of ten steps, and of two


def test_no_captions_no_maps():
    assert gradient_maps(Sees(), torch.zeros(0, CELLS, 2), [], WORDS, CPU) == []
    (none,) = maps_of(Sees(), torch.zeros(1, CELLS, 2), [[]])
    assert none.shape == (0, CELLS)
