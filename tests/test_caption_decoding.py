"""caption_decoding.py: each search against a plain one, on toy decoders of known probabilities.

A toy caption is a list of word ids 4..; 0 to 3 are <PAD> <SOS> <EOS> <UNK>.
"""

import itertools
import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

import caption_decoding
import flickr_image_caption as program
from caption_decoding import Ensemble, Hypothesis, generate

VOCABULARY = SimpleNamespace(pad=0, sos=1, eos=2, unk=3)
PRIME = 4099  # prefixes are told apart by a code below it


class Toy(nn.Module):
    """A decoder with random logits for every image and prefix; its attention tells which they were.

    `logits` (images, PRIME, V); its features are the images' numbers. Its state is nested, as real
    ones may be.
    """

    reads_grid = True

    def __init__(self, images, vocab_size, seed=0, eos=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = 2 * torch.randn(images, PRIME, vocab_size, generator=generator)
        self.logits[..., VOCABULARY.eos] += torch.as_tensor(eos).view(-1, 1)
        self.seen = []  # the per-image part of the state, step by step

    def start(self, features):
        """features (N, 1) image numbers -> nested state."""
        zeros = torch.zeros_like(features)
        return {"image": (features[:, 0],)}, {"code": zeros, "more": (zeros,)}

    def step(self, tokens, state):
        """tokens (N, K) -> logits (N, K, V), state, attention (N, K, 3): image, step, code."""
        (image,) = state[0]["image"]
        (step,) = state[1]["more"]
        assert tokens.shape == step.shape == state[1]["code"].shape
        self.seen.append(image)
        code = self.extend(state[1]["code"], tokens)
        image = image.unsqueeze(1).expand_as(code)
        attention = torch.stack([image, step, code], dim=-1).float()
        state = state[0], {"code": code, "more": (step + 1,)}
        return self.logits[image, code], state, attention

    def extend(self, code, token):
        """The code of a prefix with one more token."""
        return (code * self.logits.size(-1) + token) % PRIME

    def codes(self, words):
        """Codes of the prefixes <SOS>, <SOS> w1, ...: one for each word, one for what follows."""
        prefixes = itertools.accumulate([VOCABULARY.sos, *words], self.extend, initial=0)
        return list(prefixes)[1:]

    def log_prob(self, image, words, finished=True):
        """The decoder's own log-probability of a caption, in nats."""
        tokens = [*words, VOCABULARY.eos] if finished else words
        rows = self.logits[image, self.codes(words)].double().log_softmax(-1)
        return sum(float(row[token]) for row, token in zip(rows, tokens, strict=False))


class Markov(nn.Module):
    """A decoder written by hand: `table` maps a token to the probabilities of what follows it.

    Anything may follow a token that is not in the table.
    """

    reads_grid = True

    def __init__(self, table, vocab_size=7):
        super().__init__()
        self.logits = torch.zeros(vocab_size, vocab_size)
        for token, following in table.items():
            self.logits[token] = -torch.inf
            for word, probability in following.items():
                self.logits[token, word] = math.log(probability)

    def start(self, features):
        """features (N, 1) -> a state that holds nothing."""
        return (), ()

    def step(self, tokens, state):
        """tokens (N, K) -> logits (N, K, V), state, None."""
        return self.logits[tokens], state, None


def search(decoder, images=1, **options):
    """The hypotheses of `images` images."""
    return generate(decoder, torch.arange(images).unsqueeze(1), VOCABULARY, **options)


def plain_greedy(decoder, image, max_length, min_length=0):
    """The likeliest word at every step, one image at a time: (words, finished)."""
    words = []
    while len(words) < max_length:
        row = decoder.logits[image, decoder.codes(words)[-1]].tolist()
        may_end = [VOCABULARY.eos] if len(words) >= min_length else []
        best = max([*may_end, *range(4, len(row))], key=row.__getitem__)
        if best == VOCABULARY.eos:
            return words, True
        words.append(best)
    return words, False


def repeats(words, n):
    """Whether an n-gram stands twice in the caption."""
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return n > 0 and len(set(ngrams)) < len(ngrams)


def every_caption(decoder, image, max_length, penalty=0.0, min_length=0, n=0):
    """All finished captions with their scores, best first, by brute force."""
    captions = []
    for length in range(min_length, max_length):
        for words in itertools.product(range(4, decoder.logits.size(-1)), repeat=length):
            if not repeats(words, n):
                score = decoder.log_prob(image, words) / (length + 1) ** penalty
                captions.append((score, list(words)))
    return sorted(captions, reverse=True)


def check_same(ours, theirs):
    """Both searches' hypotheses agree exactly, scores and attention included."""
    assert [len(hypotheses) for hypotheses in ours] == [len(hypotheses) for hypotheses in theirs]
    for one, other in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert one[:4] == other[:4]
        assert torch.equal(one.attention, other.attention)


def check_log_probs(decoder, results):
    """Every hypothesis has the decoder's own log-probability of its caption."""
    for image, hypotheses in enumerate(results):
        for h in hypotheses:
            expected = decoder.log_prob(image, h.tokens, h.finished)
            assert h.log_prob == pytest.approx(expected, rel=1e-6, abs=1e-4)


# Greedy decoding and beam search


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{"algorithm": "greedy"}, {"beam_size": 1}], ids=str)
def test_a_beam_of_one_is_a_plain_greedy_loop(options, seed):
    decoder = Toy(8, vocab_size=9, seed=seed, eos=0.5)
    expected = [plain_greedy(decoder, image, max_length=7) for image in range(8)]
    results = search(decoder, 8, max_length=7, **options)
    assert [(best.tokens, best.finished) for (best,) in results] == expected
    assert len({len(words) for words, _ in expected}) > 2  # the images end at different times
    check_log_probs(decoder, results)


@pytest.mark.parametrize("penalty", [0.0, 0.7, -0.5, 1.0])
@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("algorithm", ["beam", "full_beam"])
def test_a_full_width_beam_finds_the_best_captions(algorithm, penalty, count):
    decoder = Toy(20, vocab_size=7, seed=1, eos=torch.linspace(-2, 2, 20))
    options = {"max_length": 4, "length_penalty": penalty, "num_captions": count}
    options["algorithm"] = algorithm
    for image, hypotheses in enumerate(search(decoder, 20, beam_size=200, **options)):
        scores, captions = zip(*every_caption(decoder, image, 4, penalty)[:count], strict=True)
        assert [h.tokens for h in hypotheses] == list(captions)
        assert [h.score for h in hypotheses] == pytest.approx(list(scores), abs=1e-4)
        assert all(h.finished for h in hypotheses)


@pytest.mark.parametrize("min_length, n", [(2, 0), (0, 1), (0, 2), (0, 3), (2, 1)])
def test_a_full_width_beam_finds_the_best_of_the_captions_allowed(min_length, n):
    decoder = Toy(10, vocab_size=7, seed=2)
    decoder.logits[..., 5] += 3  # so that it would be repeated
    options = {"max_length": 4, "min_length": min_length, "no_repeat_ngram_size": n}
    results = search(decoder, 10, beam_size=300, num_captions=4, **options)
    for image, hypotheses in enumerate(results):
        expected = every_caption(decoder, image, 4, min_length=min_length, n=n)[:4]
        assert [h.tokens for h in hypotheses] == [words for _, words in expected]


def test_a_wider_beam_is_better_than_greedy_by_hand():
    # greedy takes 4 (0.6) and ends with 0.6 * 0.5 = 0.30; beam search finds 5, which ends with 0.4
    decoder = Markov({1: {4: 0.6, 5: 0.4}, 4: {2: 0.5, 6: 0.5}, 5: {2: 1.0}, 6: {2: 1.0}})
    ((greedy,),) = search(decoder, beam_size=1)
    ((best, second),) = search(decoder, beam_size=2, num_captions=2)
    assert greedy.log_prob == pytest.approx(math.log(0.3))
    assert best.tokens == [5] and best.log_prob == pytest.approx(math.log(0.4))
    assert second.tokens[0] == 4 and second.log_prob == pytest.approx(math.log(0.3))


@pytest.mark.parametrize(
    "penalty, expected",
    [
        (0.0, [([], -0.9163), ([4], -1.0217), ([4, 5], -1.4271)]),  # log 0.4, log 0.36, log 0.24
        (1.0, [([4, 5], -0.4757), ([4], -0.5108), ([], -0.9163)]),  # over 1, 2 and 3 tokens
        (-1.0, [([], -0.9163), ([4], -2.0433), ([4, 5], -4.2813)]),  # times 1, 2 and 3
    ],
)
def test_the_length_penalty_favours_long_captions_above_0_and_short_ones_below(penalty, expected):
    decoder = Markov({1: {2: 0.4, 4: 0.6}, 4: {2: 0.6, 5: 0.4}, 5: {2: 1.0}})
    (hypotheses,) = search(decoder, beam_size=9, length_penalty=penalty, num_captions=3)
    assert [h.tokens for h in hypotheses] == [words for words, _ in expected]
    scores = [score for _, score in expected]
    assert [h.score for h in hypotheses] == pytest.approx(scores, abs=1e-4)
    (best,) = search(decoder, beam_size=9, length_penalty=penalty)  # which may stop early
    assert best == hypotheses[:1]


@pytest.mark.parametrize("penalty", [0.0, 1.0, -1.0])
def test_the_search_goes_on_while_a_better_caption_can_come(penalty):
    decoder = Markov({1: {2: 0.2, 4: 0.8}, 4: {2: 1.0}})  # [] has log_prob -1.61, [4] -0.22
    ((best,),) = search(decoder, beam_size=3, length_penalty=penalty)
    assert best.tokens == [4]
    assert best.score == pytest.approx(math.log(0.8) / 2**penalty)


def test_a_finished_caption_keeps_its_place_in_the_beam():
    # [] has 0.2, and both endless captions 0.4
    decoder = Markov({1: {2: 0.2, 4: 0.8}, 4: {5: 0.5, 6: 0.5}, 5: {5: 1.0}, 6: {6: 1.0}})
    ((first, second),) = search(decoder, beam_size=2, num_captions=2, max_length=5)
    assert (first.tokens, first.finished) == ([], True)
    assert second.tokens in ([4, 5, 5, 5, 5], [4, 6, 6, 6, 6]) and not second.finished


def test_in_a_full_beam_a_finished_caption_leaves_its_place_by_hand():
    # of two places [] takes one; a full beam goes on with 4 and 5, and 5 6 has the best mean
    decoder = Markov({1: {2: 0.5, 4: 0.3, 5: 0.2}, 4: {2: 1.0}, 5: {6: 1.0}, 6: {2: 1.0}})
    options = {"beam_size": 2, "length_penalty": 1.0, "num_captions": 2}
    ((narrow, _),) = search(decoder, **options)
    ((first, second),) = search(decoder, algorithm="full_beam", **options)
    assert narrow.tokens == second.tokens == [4] and first.tokens == [5, 6]
    assert second.score == pytest.approx(math.log(0.3) / 2)
    assert first.score == pytest.approx(math.log(0.2) / 3)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_full_beam_is_the_beam_until_a_caption_ends(penalty):
    options = {"beam_size": 4, "max_length": 6, "num_captions": 4, "length_penalty": penalty}
    decoder = Toy(8, vocab_size=9, eos=-torch.inf)
    check_same(search(decoder, 8, algorithm="full_beam", **options), search(decoder, 8, **options))


# What a search may return


@pytest.mark.parametrize("algorithm", ["greedy", "beam", "full_beam", "sample"])
@pytest.mark.parametrize("never", [-1e9, -torch.inf])
def test_a_decoder_that_never_ends_gives_an_unfinished_caption(algorithm, never):
    decoder = Toy(3, vocab_size=12, eos=never)
    results = search(decoder, 3, algorithm=algorithm, max_length=6)
    for (best,) in results:
        assert not best.finished
        assert len(best.tokens) == len(best.attention) == 6
    check_log_probs(decoder, results)


@pytest.mark.parametrize("algorithm", ["greedy", "beam", "full_beam", "sample"])
def test_a_decoder_that_ends_at_once_gives_an_empty_caption(algorithm):
    for (best,) in search(Toy(3, vocab_size=8, eos=60.0), 3, algorithm=algorithm):
        assert (best.tokens, best.finished, best.attention.shape) == ([], True, (0, 3))
        assert best.log_prob == pytest.approx(0.0, abs=1e-6)


def test_finished_captions_come_before_better_scored_unfinished_ones():
    decoder = Markov({1: {2: 0.01, 4: 0.99}, 4: {4: 1.0}})
    ((first, second),) = search(decoder, beam_size=3, max_length=3, num_captions=3)
    assert (first.tokens, first.finished) == ([], True)
    assert (second.tokens, second.finished) == ([4, 4, 4], False)
    assert first.score < second.score


def test_max_length_counts_the_end():
    decoder = Markov({1: {4: 1.0}, 4: {5: 1.0}, 5: {2: 1.0}})
    cut, whole = (search(decoder, max_length=length)[0][0] for length in (2, 3))
    assert (cut.tokens, cut.finished) == ([4, 5], False)
    assert (whole.tokens, whole.finished) == ([4, 5], True)
    assert search(decoder, max_length=1)[0][0].tokens == [4]


@pytest.mark.parametrize("algorithm", ["greedy", "beam", "full_beam", "sample"])
def test_no_special_token_is_ever_a_word(algorithm):
    decoder = Toy(6, vocab_size=8)
    decoder.logits[..., [0, 1, 3]] += 20  # by far the likeliest
    results = search(decoder, 6, algorithm=algorithm, min_length=3, max_length=6)
    words = [token for (best,) in results for token in best.tokens]
    assert len(words) >= 6 * 3 and min(words) >= 4
    check_log_probs(decoder, results)  # what may not be written keeps its share of the probability
    assert all(best.log_prob < -20 for (best,) in results)


def test_a_vocabulary_without_unk_may_write_id_3():
    decoder = Toy(4, vocab_size=8, eos=-5.0)
    decoder.logits[..., 3] += 20
    vocabulary = SimpleNamespace(pad=0, sos=1, eos=2, unk=None)
    images = torch.arange(4).unsqueeze(1)
    results = generate(decoder, images, vocabulary, algorithm="greedy", max_length=5)
    assert [best.tokens for (best,) in results] == [[3] * 5] * 4


@pytest.mark.parametrize("algorithm", ["greedy", "beam", "full_beam", "sample"])
@pytest.mark.parametrize("length", [0, 1, 4])
def test_min_length_delays_the_end_by_exactly_so_many_words(algorithm, length):
    decoder = Toy(5, vocab_size=8, eos=40.0)
    results = search(decoder, 5, algorithm=algorithm, min_length=length, max_length=9)
    assert [(len(best.tokens), best.finished) for (best,) in results] == [(length, True)] * 5
    if algorithm == "greedy":
        expected = [plain_greedy(decoder, image, 9, min_length=length)[0] for image in range(5)]
        assert [best.tokens for (best,) in results] == expected


@pytest.mark.parametrize("n, words", [(1, [4, 5]), (2, [4, 4, 5, 4]), (3, [4, 4, 4, 5, 4, 4])])
def test_no_ngram_stands_twice_by_hand(n, words):
    likes = {4: 0.6, 5: 0.3, 2: 0.1}  # 4 where it may stand, else 5, else the end
    decoder = Markov({1: likes, 4: likes, 5: likes})
    ((best,),) = search(decoder, algorithm="greedy", no_repeat_ngram_size=n, max_length=9)
    assert best.tokens == words
    assert best.log_prob == pytest.approx(sum(math.log(likes[token]) for token in [*words, 2]))


@pytest.mark.parametrize("algorithm", ["greedy", "beam", "full_beam", "sample"])
def test_a_caption_with_no_word_left_ends_even_below_min_length(algorithm):
    likes = {4: 0.6, 5: 0.3, 2: 0.1}
    options = {"no_repeat_ngram_size": 1, "min_length": 6, "max_length": 9}
    ((best,),) = search(Markov({1: likes, 4: likes, 5: likes}), algorithm=algorithm, **options)
    assert sorted(best.tokens) == [4, 5] and best.finished
    assert best.log_prob == pytest.approx(math.log(0.6 * 0.3 * 0.1))


@pytest.mark.parametrize("n", [1, 2])
def test_sampling_repeats_no_ngram(n):
    decoder = Toy(20, vocab_size=8, eos=-2.0)
    options = {"algorithm": "sample", "max_length": 12, "temperature": 0.5}
    free, blocked = (search(decoder, 20, **options, no_repeat_ngram_size=size) for size in (0, n))
    assert any(repeats(best.tokens, n) for (best,) in free)
    assert not any(repeats(best.tokens, n) for (best,) in blocked)


def test_captions_as_likely_as_each_other_are_all_returned_once():
    likes = dict.fromkeys((2, 4, 5, 6), 0.25)
    decoder = Markov({1: likes, 4: likes, 5: likes, 6: likes})
    (hypotheses,) = search(decoder, beam_size=100, max_length=3, num_captions=13)
    assert len({tuple(h.tokens) for h in hypotheses}) == 13  # 1 + 3 + 9
    assert sorted(len(h.tokens) for h in hypotheses) == [0] + [1] * 3 + [2] * 9
    for h in hypotheses:
        assert h.log_prob == pytest.approx(math.log(0.25) * (len(h.tokens) + 1))


def test_fewer_captions_than_asked_for_are_all_there_are():
    decoder = Markov({1: {4: 0.7, 5: 0.3}, 4: {2: 1.0}, 5: {2: 1.0}})
    (hypotheses,) = search(decoder, beam_size=50, num_captions=50)
    assert [h.tokens for h in hypotheses] == [[4], [5]]


@pytest.mark.parametrize("algorithm", ["greedy", "beam", "full_beam", "sample"])
@pytest.mark.parametrize("fixed_shapes", [True, False])
def test_no_images_have_no_captions(algorithm, fixed_shapes):
    decoder = Toy(1, vocab_size=8)
    assert search(decoder, 0, algorithm=algorithm, fixed_shapes=fixed_shapes) == []


# Many images at once


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_images_searched_together_are_searched_as_if_alone(penalty):
    options = {"beam_size": 4, "max_length": 9, "num_captions": 3, "length_penalty": penalty}
    decoder = Toy(12, vocab_size=10, eos=torch.linspace(-3, 4, 12))
    together = search(decoder, 12, **options)
    assert len({len(images) for images in decoder.seen}) > 3  # they leave at different times
    images = torch.arange(12).view(12, 1, 1)
    check_same(together, [generate(decoder, image, VOCABULARY, **options)[0] for image in images])


@pytest.mark.parametrize("longest", [9, 40])
@pytest.mark.parametrize(
    "options",
    [
        {"num_captions": 3},
        {"num_captions": 3, "length_penalty": 1.0},
        {"num_captions": 3, "length_penalty": -0.5},
        {"num_captions": 3, "min_length": 3},
        {"num_captions": 3, "no_repeat_ngram_size": 2},
        {"num_captions": 1},
        {"algorithm": "greedy"},
        {"algorithm": "full_beam"},
        {"algorithm": "full_beam", "num_captions": 3, "length_penalty": 1.0},
        {"algorithm": "full_beam", "num_captions": 4, "length_penalty": -0.5, "min_length": 2},
    ],
    ids=str,
)
def test_images_that_stay_when_done_get_the_captions_of_images_that_leave(options, longest):
    options = {"beam_size": 4, "max_length": longest, **options}
    leaving, staying = (Toy(12, vocab_size=10, eos=torch.linspace(-3, 4, 12)) for _ in range(2))
    expected = search(leaving, 12, **options, fixed_shapes=False)
    check_same(search(staying, 12, **options, fixed_shapes=True), expected)
    assert len({len(images) for images in leaving.seen}) > 3
    assert {len(images) for images in staying.seen} == {12}
    reads = math.ceil(len(leaving.seen) / caption_decoding.SYNC_EVERY)
    assert len(staying.seen) == min(longest, reads * caption_decoding.SYNC_EVERY)


@pytest.mark.parametrize("algorithm", ["greedy", "beam", "full_beam", "sample"])
def test_each_row_of_attention_belongs_to_the_word_it_wrote(algorithm):
    decoder = Toy(6, vocab_size=9, eos=torch.linspace(-2, 2, 6))
    count = 1 if algorithm == "greedy" else 4
    results = search(decoder, 6, algorithm=algorithm, max_length=7, num_captions=count)
    assert max(len(h.tokens) for h in itertools.chain(*results)) > 3
    for image, hypotheses in enumerate(results):
        for h in hypotheses:
            codes = decoder.codes(h.tokens)[: len(h.tokens)]
            assert h.attention.tolist() == [[image, step, code] for step, code in enumerate(codes)]


@pytest.mark.parametrize("algorithm", ["beam", "full_beam", "sample"])
def test_log_prob_is_the_decoders_own(algorithm):
    decoder = Toy(6, vocab_size=9, eos=torch.linspace(-2, 2, 6))
    results = search(decoder, 6, algorithm=algorithm, beam_size=4, max_length=7, num_captions=4)
    check_log_probs(decoder, results)
    assert all(h.score == h.log_prob for h in itertools.chain(*results))


class Layer(NamedTuple):
    hidden: torch.Tensor


class Layered(Toy):
    """A Toy whose state holds a NamedTuple, of which it uses the name."""

    def start(self, features):
        """As Toy's."""
        image, state = super().start(features)
        return image, {"layer": Layer(state["code"]), "more": state["more"]}

    def step(self, tokens, state):
        """As Toy's."""
        plain = {"code": state[1]["layer"].hidden, "more": state[1]["more"]}
        logits, (image, plain), attention = super().step(tokens, (state[0], plain))
        return logits, (image, {"layer": Layer(plain["code"]), "more": plain["more"]}), attention


def test_a_state_may_hold_named_tuples():
    options = {"beam_size": 4, "max_length": 7, "num_captions": 3}
    expected = search(Toy(6, vocab_size=9), 6, **options)
    check_same(search(Layered(6, vocab_size=9), 6, **options), expected)


def test_what_belongs_to_an_image_is_never_copied_for_its_hypotheses():
    decoder = Toy(6, vocab_size=9, eos=torch.linspace(-3, 3, 6))
    search(decoder, 6, beam_size=5, max_length=8)
    for before, after in itertools.pairwise(decoder.seen):
        assert after.dim() == 1
        assert after is before or len(after) < len(before)  # the same until an image is done
    assert decoder.seen[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert len(decoder.seen[-1]) < 6


def test_a_decoder_without_attention_gives_none():
    ((best,),) = search(Markov({1: {2: 1.0}}))
    assert best == Hypothesis([], 0.0, 0.0, True, None)


# Sampling


def frequencies(seed=0, count=6000, **options):
    """Each first token's share of the samples; 4, 5, 6 and the end have 0.5, 0.3, 0.15, 0.05."""
    decoder = Markov({1: {4: 0.5, 5: 0.3, 6: 0.15, 2: 0.05}})
    options |= {"algorithm": "sample", "max_length": 1, "num_captions": count}
    (samples,) = search(decoder, generator=torch.Generator().manual_seed(seed), **options)
    assert len(samples) == count
    first = [(h.tokens or [2])[0] for h in samples]
    return {token: first.count(token) / count for token in set(first)}


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {4: 0.5, 5: 0.3, 6: 0.15, 2: 0.05}),
        ({"temperature": 0.5}, {4: 0.6849, 5: 0.2466, 6: 0.0616, 2: 0.0068}),  # squares over 0.365
        ({"temperature": 2.0}, {4: 0.3790, 5: 0.2936, 6: 0.2076, 2: 0.1199}),  # roots over 1.8657
        ({"top_k": 1}, {4: 1.0}),
        ({"top_k": 2}, {4: 0.625, 5: 0.375}),
        ({"top_k": 99}, {4: 0.5, 5: 0.3, 6: 0.15, 2: 0.05}),
        ({"top_p": 0.01}, {4: 1.0}),
        ({"top_p": 0.49}, {4: 1.0}),
        ({"top_p": 0.6}, {4: 0.625, 5: 0.375}),
        ({"top_p": 0.9}, {4: 0.5263, 5: 0.3158, 6: 0.1579}),
        ({"top_p": 0.96}, {4: 0.5, 5: 0.3, 6: 0.15, 2: 0.05}),
        ({"top_k": 3, "top_p": 0.83}, {4: 0.625, 5: 0.375}),  # of three left, two hold 0.8 / 0.95
        ({"temperature": 0.5, "top_p": 0.65}, {4: 1.0}),  # the nucleus of the tempered words
        ({"min_length": 1}, {4: 0.5263, 5: 0.3158, 6: 0.1579}),
    ],
)
def test_sampling_draws_from_the_distribution_asked_for(options, expected):
    shares = frequencies(**options)
    assert shares.keys() == expected.keys()
    assert shares == pytest.approx(expected, abs=0.025)  # four standard deviations of 6000 draws


def test_sampling_repeats_itself_from_a_seed_and_leaves_the_global_generator_alone():
    decoder, before = Toy(4, vocab_size=30), torch.get_rng_state()

    def sample(seed):
        options = {"algorithm": "sample", "max_length": 8, "num_captions": 3}
        results = search(decoder, 4, generator=torch.Generator().manual_seed(seed), **options)
        return [h.tokens for h in itertools.chain(*results)]

    assert sample(1) == sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_without_a_generator_uses_torchs_global_one():
    def sample():
        torch.manual_seed(5)
        return search(Toy(4, vocab_size=30), 4, algorithm="sample")

    check_same(sample(), sample())


def test_several_samples_are_drawn_independently_and_ordered():
    decoder = Toy(3, vocab_size=40, eos=1.0)
    for hypotheses in search(decoder, 3, algorithm="sample", max_length=5, num_captions=12):
        assert len(hypotheses) == 12
        assert len({tuple(h.tokens) for h in hypotheses}) > 6
        order = [(h.finished, h.score) for h in hypotheses]
        assert order == sorted(order, reverse=True)
        assert len({h.finished for h in hypotheses}) == 2


@pytest.mark.parametrize("temperature", [1e-3, 1e-20])
def test_a_temperature_near_0_is_greedy_and_leaves_log_prob_as_it_is(temperature):
    decoder = Toy(8, vocab_size=9, eos=0.5)
    samples = search(decoder, 8, algorithm="sample", temperature=temperature, max_length=7)
    greedy = search(decoder, 8, algorithm="greedy", max_length=7)
    for (sampled,), (best,) in zip(samples, greedy, strict=True):
        assert (sampled.tokens, sampled.finished) == (best.tokens, best.finished)
        assert sampled.log_prob == pytest.approx(best.log_prob)


def test_the_nucleus_is_the_fewest_words_that_reach_top_p():
    """Of four that are as likely as each other, exactly two reach 0.5."""
    decoder = Markov({1: dict.fromkeys((2, 4, 5, 6), 0.25)})
    options = {"algorithm": "sample", "max_length": 1, "top_p": 0.5, "num_captions": 200}
    (samples,) = search(decoder, generator=torch.Generator().manual_seed(0), **options)
    assert len({tuple(h.tokens) for h in samples}) == 2


class Remembering(Markov):
    """A decoder that hands out the tensor it keeps."""

    def step(self, tokens, state):
        """As Markov's, of its first token alone."""
        return self.logits[1].view(1, 1, -1), state, None


@pytest.mark.parametrize("algorithm", ["greedy", "sample"])
def test_a_search_changes_no_tensor_of_the_decoder(algorithm):
    decoder = Remembering({1: {2: 0.2, 3: 0.3, 4: 0.5}})
    before = decoder.logits.clone()
    search(decoder, algorithm=algorithm, min_length=2, max_length=5)
    assert torch.equal(decoder.logits, before)


# Ensembles


class Brighter(Toy):
    """A Toy whose attention is one more everywhere."""

    def step(self, tokens, state):
        """As Toy's."""
        logits, state, attention = super().step(tokens, state)
        return logits, state, attention + 1


def test_an_ensemble_writes_with_the_mean_of_its_members_probabilities():
    options = {"beam_size": 4, "num_captions": 4, "max_length": 7}
    members = [Toy(6, vocab_size=9, seed=1), Brighter(6, vocab_size=9, seed=2)]
    mean = Toy(6, vocab_size=9)
    mean.logits = torch.stack([member.logits.softmax(-1) for member in members]).mean(0).log()
    together, expected = search(Ensemble(members), 6, **options), search(mean, 6, **options)
    for one, other in zip(itertools.chain(*together), itertools.chain(*expected), strict=True):
        assert one.tokens == other.tokens
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)
        torch.testing.assert_close(one.attention, other.attention + 0.5)


def test_an_ensembles_step_gives_log_probabilities():
    ensemble = Ensemble([Toy(1, vocab_size=9, seed=1), Toy(1, vocab_size=9, seed=2)])
    state = ensemble.start(torch.zeros(1, 1, dtype=torch.int64))
    log_probs, _, _ = ensemble.step(torch.tensor([[VOCABULARY.sos]]), state)
    assert log_probs.exp().sum().item() == pytest.approx(1)


def test_members_without_attention_do_not_dim_the_ensembles():
    blind = Markov({}, vocab_size=9)
    ((best,),) = search(Ensemble([blind, Toy(1, vocab_size=9), blind]), max_length=3, min_length=2)
    assert best.attention.tolist()[0] == [0, 0, 1]  # image, step and code, as the Toy alone shows
    ((best,),) = search(Ensemble([blind, blind]), max_length=3)
    assert best.attention is None


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_an_ensemble_of_copies_writes_as_the_decoder_alone(copies):
    decoder, options = Toy(6, vocab_size=9), {"beam_size": 3, "num_captions": 3, "max_length": 8}
    alone = search(decoder, 6, **options)
    together = search(Ensemble([decoder] * copies), 6, **options)
    for one, other in zip(itertools.chain(*together), itertools.chain(*alone), strict=True):
        assert one.tokens == other.tokens
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)


def test_an_ensembles_forward_is_the_mean_of_its_members_probabilities_and_maps():
    logits = torch.randn(2, 5, 9)
    maps = torch.rand(2, 5, 4)
    members = [Said(logits[0], maps[0]), Said(logits[1], maps[1]), Said(logits[0], None)]
    log_probs, attention = Ensemble(members)(torch.zeros(1), None)
    mean = (2 * logits[0].softmax(-1) + logits[1].softmax(-1)) / 3
    torch.testing.assert_close(log_probs, mean.log())
    torch.testing.assert_close(attention, maps.mean(0))
    assert Ensemble(members[2:])(torch.zeros(1), None)[1] is None


def test_a_member_that_must_look_at_cells_looks_at_nothing_beside_them():
    torch.manual_seed(0)
    sizes = {"embed_size": 6, "hidden_size": 6, "num_layers": 1, "drop_prob": 0.0}
    additive = program.AttentionDecoder(4, 9, **sizes, attention_dim=4)
    adaptive = program.AdaptiveDecoder(4, 9, **sizes, attention_dim=4, attention_heads=2)
    ensemble = Ensemble([additive.eval(), adaptive.eval()])
    assert ensemble.beside_cells == ("language",)
    features, tokens = torch.randn(1, 3, 4), torch.tensor([[5]])
    one, other, both = (
        decoder.step(tokens, decoder.start(features))[2]
        for decoder in (additive, adaptive, ensemble)
    )
    torch.testing.assert_close(both[..., :3], (one + other[..., :3]) / 2)
    torch.testing.assert_close(both[..., 3], other[..., 3] / 2)


class Said(nn.Module):
    """A decoder whose `forward` returns what it was given."""

    reads_grid = True

    def __init__(self, *output):
        super().__init__()
        self.output = output

    def forward(self, features, batch):
        """Anything -> logits and alphas."""
        return self.output


def test_an_ensemble_reads_the_grid_if_a_member_does():
    blind, toy = Markov({}), Toy(1, vocab_size=7)
    blind.reads_grid = False
    assert Ensemble([blind, toy]).reads_grid and not Ensemble([blind, blind]).reads_grid
