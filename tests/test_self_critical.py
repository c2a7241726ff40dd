"""self_critical.py: the reward against metrics_utils, the loss against REINFORCE written out."""

import collections
import math
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import CPU, make_batch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import flickr_image_caption as program
import self_critical
from caption_batches import CaptionBatches, Vocabulary
from caption_decoding import Hypothesis
from caption_options import parse_args
from consensus import MAX_WORDS, NO_WORD
from metrics_utils import CaptionScorer
from self_critical import Reward, SelfCritical

WORDS = (
    "dog", "cat", "man", "woman", "ball", "runs", "sits", "jumps", "red", "blue", "on", "in", "the", "a",
    "with", "near", "and", "over",
)  # fmt: skip
VOCABULARY = Vocabulary([*Vocabulary.SPECIALS, *WORDS])
PAD, SOS, EOS, UNK = range(4)


def drawn_captions(seed, images, each, longest=12):
    """Captions of random words, some of them empty or with words twice."""
    draw = random.Random(seed)
    return [
        [" ".join(draw.choices(WORDS, k=draw.randint(0, longest))) for _ in range(each)]
        for _ in range(images)
    ]


def reward_of(references, end=(), **how):
    """A Reward of raw captions, image by image, which may have unlike numbers of them."""
    ids = [[[*VOCABULARY.encode(text), *end] for text in texts] for texts in references]
    flat = [caption for image in ids for caption in image]
    counts = torch.tensor([len(image) for image in ids])
    return Reward(self_critical.padded(flat), counts, len(VOCABULARY), **how)


@pytest.mark.parametrize("bleu_weight", [0.0, 0.3, 1.0])
def test_the_reward_is_that_of_metrics_utils(bleu_weight):
    references = drawn_captions(0, 9, 5)
    references[2], references[5] = references[2][:1], references[5][:3]
    references[4][0] = references[4][1] = "a dog runs on the red ball and the red ball"
    samples = drawn_captions(1, 9, 4)
    samples[4][0], samples[4][1] = references[4][0], "the red ball the red ball the red ball"
    samples[3][2] = references[3][2]
    reward = reward_of(references, bleu_weight=bleu_weight)
    images = torch.arange(9).flip(0)
    ids = [[VOCABULARY.encode(text) for text in samples[image]] for image in images]
    found = reward(images, ids)
    scorer = CaptionScorer(dict(enumerate(references)))
    for number in range(4):
        _, per_image = scorer.score({image: samples[image][number] for image in range(9)})
        for row, image in enumerate(images.tolist()):
            scores = per_image[image]
            expected = (1 - bleu_weight) * scores["CIDEr"] + bleu_weight * scores["BLEU-4"]
            assert float(found[row, number]) == pytest.approx(expected, abs=1e-5)
    assert found.max() > 0.5


def test_cider_d_worked_by_hand():
    """Two images. Words of image 0 that image 1 lacks weigh log 2, "a", which both have, 0."""
    reward = reward_of([["a dog", "dog dog a a a a a a"], ["a cat"]])
    dog, a = VOCABULARY.encode("dog a")
    once, none, twice = reward(torch.tensor([0]), [[[dog], [a], [dog, dog]]])[0].tolist()

    def penalty(bigrams):  # that one caption has more than the other
        return math.exp(-(bigrams**2) / 72)

    # min(1, 1) * 1 / (1 * 1) of the first, min(1, 2) * 2 / (1 * 2) of the second
    assert once == pytest.approx(10 / 4 * (penalty(1) + penalty(7)) / 2)
    assert none == 0.0
    # of "dog" min(2, 1) * 1 / (2 * 1) and all; of "dog dog" 1 of the second's, beside "dog a", 5 "a a"
    unigrams, bigrams = (0.5 + penalty(6)) / 2, penalty(6) / math.sqrt(1 + 1 + 25) / 2
    assert twice == pytest.approx(10 / 4 * (unigrams + bigrams))


def test_a_caption_that_breaks_off_loses_by_its_missing_end():
    references = [["a dog runs on the ball"], ["a cat sits in the red"]]
    samples = [VOCABULARY.encode("a dog runs on the ball")]
    reward = reward_of(references, end=[EOS])
    whole, cut = reward(torch.tensor([0]), [[[*samples[0], EOS], samples[0]]])[0]
    assert float(whole) == pytest.approx(10) and float(cut) < 9.5
    assert float(reward_of(references)(torch.tensor([0]), [samples])) == pytest.approx(10)


def test_document_frequencies_are_those_of_the_training_images_alone():
    """A word that all training images share is worth nothing, however rare it is elsewhere."""
    batches = CaptionBatches([[[4, 5], [4, 6]], [[4, 7]]], 2, 10, seed=0)
    tokens, counts = self_critical.training_references(batches)
    assert tokens.tolist() == [[4, 5, EOS], [4, 6, EOS], [4, 7, EOS]] and counts.tolist() == [2, 1]
    reward = Reward(tokens, counts, len(VOCABULARY))
    unigrams = reward.orders[0]
    idf = dict(zip(unigrams.known.tolist(), unigrams.idf.tolist(), strict=False))
    assert idf == pytest.approx({EOS: 0, 4: 0, 5: math.log(2), 6: math.log(2), 7: math.log(2)})
    assert unigrams.idf[-1] == math.log(2)  # of a word that is new: as if one image had it


def test_references_of_unlike_lengths_end_where_they_end():
    batches = CaptionBatches([[[4]], [[5, 6, 7, 8], []]], 2, 4, seed=0)
    tokens, counts = self_critical.training_references(batches)
    assert tokens.tolist() == [
        [4, EOS, NO_WORD, NO_WORD],
        [5, 6, 7, EOS],
        [EOS, NO_WORD, NO_WORD, NO_WORD],
    ]
    assert counts.tolist() == [1, 2]


def test_too_many_words_are_refused():
    with pytest.raises(ValueError, match="--freq_threshold"):
        Reward(torch.tensor([[4]]), torch.tensor([1]), MAX_WORDS + 1)


# ------------------------------------------------------------------------------------------- the loss


class Bigrams(nn.Module):
    """A decoder whose logits depend on the word before alone, image by image."""

    def __init__(self, images):
        super().__init__()
        words, generator = len(VOCABULARY), torch.Generator().manual_seed(0)
        self.logits = nn.Parameter(2 * torch.randn(images, words, words, generator=generator))

    def forward(self, features, batch):
        images = batch.image_index[batch.caption_index]
        return self.logits[images, batch.inputs], None

    def start(self, features):
        images = torch.arange(len(features)).unsqueeze(1)
        return (), images

    def step(self, tokens, images):
        _, rows = images
        return self.logits[rows, tokens], images, None


FEATURES = torch.zeros(2, 1, 1)


@pytest.fixture
def batch():
    """Two images, of one and of three captions, whose rows in the table are 7 and 3."""
    captions = torch.full((4, 4), 5)
    made = make_batch(captions, torch.tensor([3, 2, 3, 1]), torch.tensor([0, 1, 1, 1]))
    return made._replace(image_rows=torch.tensor([7, 3]))


def log_prob(decoder, image, caption, finished):
    """Of a caption, by probabilities without <PAD>, <SOS> and <UNK>."""
    total, before = 0.0, SOS
    for word in [*caption, *[EOS] * finished]:
        logits = decoder.logits[image, before].clone()
        logits[[PAD, SOS, UNK]] = -math.inf
        total, before = total + logits.log_softmax(0)[word], word
    return total


def test_the_loss_is_reinforce_s_worked_by_hand(batch, monkeypatch):
    """Rewards 3 and 1 of image 0, 0 and 5 of image 1, which has three of four captions; two samples."""
    captions = [[[4, 5], [6]], [[], [7, 8, 9]]]  # the last one is cut, at --max_length 3
    finished = [[True, True], [True, False]]
    given = []

    def reward(images, samples):
        given.append((images.tolist(), samples))
        return torch.tensor([[3.0, 1.0], [0.0, 5.0]], dtype=torch.float64)

    objective, decoder = SelfCritical(reward, VOCABULARY, 2, max_length=3), Bigrams(2)
    drawn = [
        [Hypothesis(words, 0.0, 0.0, end, None) for words, end in zip(*image, strict=True)]
        for image in zip(captions, finished, strict=True)
    ]
    monkeypatch.setattr(objective, "draw", lambda *_: drawn)
    loss, figure = objective(decoder, FEATURES, batch)
    assert given == [([7, 3], [[[4, 5, EOS], [6, EOS]], [[EOS], [7, 8, 9]]])]
    weights = [[2.0, -2.0], [-5.0, 5.0]]  # each minus the other
    expected = 0.0
    for image, share in ((0, 1 / 4), (1, 3 / 4)):
        for sample in range(2):
            own = log_prob(decoder, image, captions[image][sample], finished[image][sample])
            expected -= share * weights[image][sample] * own / 2
    torch.testing.assert_close(loss, expected)
    assert float(figure) / batch.num_tokens == pytest.approx(2.0 / 4 + 2.5 * 3 / 4)


def test_the_baseline_is_the_mean_of_the_others():
    found = self_critical.advantages(torch.tensor([[1.0, 2.0, 6.0]]))
    assert found.tolist() == [[1 - 4, 2 - 3.5, 6 - 1.5]]


def test_captions_are_drawn_as_often_as_they_are_likely_and_finished_ones_end(batch):
    """Their log-probabilities are those by which they were drawn, so REINFORCE has no bias."""
    decoder = Bigrams(1).requires_grad_(False)
    objective = SelfCritical(None, VOCABULARY, 1000, max_length=3)
    torch.manual_seed(0)
    (hypotheses,) = objective.draw(decoder, FEATURES[:1])
    pairs = [(hypothesis.tokens, hypothesis.finished) for hypothesis in hypotheses]
    assert len(pairs) == 1000 and {len(words) for words, ended in pairs if not ended} == {3}
    log_probs, of_token = objective.log_probs(
        decoder, FEATURES[:1], [hypotheses], torch.ones(1, 1000)
    )
    expected = float(sum(log_prob(decoder, 0, *pair) for pair in pairs))
    assert float((log_probs * of_token).sum()) == pytest.approx(expected, rel=1e-4)
    counts = collections.Counter((tuple(words), ended) for words, ended in pairs)
    for pair, count in counts.items():
        expected = 1000 * math.exp(float(log_prob(decoder, 0, *pair)))
        assert count == pytest.approx(expected, abs=5 * math.sqrt(expected) + 3)


@pytest.mark.parametrize("kind", ["lstm", "additive", "multi_head", "adaptive"])
def test_captions_that_score_better_become_likelier(kind):
    """Of every decoder: here captions get 1 for each "dog"; and nothing is dropped out meanwhile."""
    flags = ["--decoder", "lstm"] if kind == "lstm" else ["--decoder", "attention", "--attention", kind]  # fmt: skip
    flags += [
        "--embed_size",
        "16",
        "--hidden_size",
        "16",
        "--num_layers",
        "1",
        "--drop_prob",
        "0.5",
    ]
    flags += ["--attention_dim", "8"] if kind != "lstm" else []
    torch.manual_seed(0)
    decoder = program.build_decoder(parse_args(flags).as_dict(), 6, len(VOCABULARY))
    features = torch.randn(2, 4, 6)

    def reward(images, samples):
        return torch.tensor([[float(caption.count(4)) for caption in s] for s in samples])

    objective = SelfCritical(reward, VOCABULARY, 8, max_length=6)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.01)
    batch = SimpleNamespace(
        image_rows=torch.arange(2), image_index=torch.tensor([0, 1]), num_captions=2, num_tokens=6
    )
    rewards = []
    for _ in range(60):
        loss, figure = objective(decoder, features, batch)
        assert not decoder.training
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append(float(figure) / 6)
    assert sum(rewards[-5:]) / 5 > 4 > 1 > sum(rewards[:5]) / 5


def test_under_bfloat16_the_gradient_is_float32_s_but_for_rounding(batch):
    """Weights that were cast while sampling, without gradients, are not used again."""
    flags = ["--embed_size", "16", "--hidden_size", "16", "--num_layers", "1"]
    flags += ["--decoder", "attention", "--attention_dim", "8"]
    torch.manual_seed(0)
    decoder = program.build_decoder(parse_args(flags).as_dict(), 6, len(VOCABULARY))
    features, gradients = torch.randn(2, 4, 6), []
    objective = SelfCritical(lambda *_: torch.tensor([[3.0, 1.0], [0.0, 5.0]]), VOCABULARY, 2, 6)
    draw, drawn = objective.draw, objective.draw(decoder.eval(), features)
    for precision in ("float32", "bfloat16"):
        objective.draw = lambda *how: (draw(*how), drawn)[1]
        decoder.zero_grad()
        with CPU._replace(precision=precision).autocast():
            loss, _ = objective(decoder, features, batch)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in decoder.parameters()]))
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_probabilities_that_are_not_finite_are_one_line(batch):
    decoder = Bigrams(2)
    decoder.logits.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="--scst_learning_rate"):
        SelfCritical(None, VOCABULARY, 2, 3)(decoder, FEATURES, batch)


def test_the_reward_takes_less_time_than_the_drawing():
    """A batch of 256 captions: 5 samples of 52 images, against 6,000 training images; a small decoder."""
    flags = ["--decoder", "attention", "--attention", "adaptive", "--num_layers", "1"]
    flags += ["--embed_size", "128", "--hidden_size", "128", "--attention_dim", "128"]
    draw, words = random.Random(0), 2500
    lengths = [[draw.randint(6, 16) for _ in range(5)] for _ in range(6000)]
    captions = [[draw.choices(range(4, words), k=k) for k in image] for image in lengths]
    tokens, counts = self_critical.training_references(CaptionBatches(captions, 256, 40, seed=0))
    reward = Reward(tokens, counts, words, bleu_weight=0.5)
    torch.manual_seed(0)
    decoder = program.build_decoder(parse_args(flags).as_dict(), 64, words).eval()
    objective = SelfCritical(reward, VOCABULARY, 5, max_length=16)
    images, features = torch.arange(52), torch.randn(52, 49, 64)
    samples = [captions[image] for image in range(52)]  # which match the most there is to match
    seconds = {"draw": [], "reward": []}
    for _ in range(3):
        started = time.process_time()
        objective.draw(decoder, features)
        drawn = time.process_time()
        assert float(reward(images, samples).min()) > 0
        seconds["draw"].append(drawn - started)
        seconds["reward"].append(time.process_time() - drawn)
    print(seconds)
    assert min(seconds["reward"]) < min(seconds["draw"])
