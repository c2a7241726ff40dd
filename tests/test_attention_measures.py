"""Attention measured on decoders whose words depend on known cells, by hand and step by step."""

import math

import pytest
import torch
from small_runs import CPU
from torch import nn

import attention_measures
import flickr_image_caption as program
from attention_measures import FRACTIONS, cell_maps, entropy_share, measure
from caption_batches import Vocabulary
from caption_decoding import Ensemble, Hypothesis
from runtime import Hardware

WORDS = ["dog", "grass"]
DOG, GRASS = 4, 5
CELLS = 10
BRIGHT = 3.0
FALL = (
    math.log(6) - math.log(5 + math.exp(BRIGHT)) + BRIGHT
)  # nats; the other five words' logits are 0


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    """No word list nor WordNet: "dog" and "grass" are nouns, every other word one of the others."""
    monkeypatch.setattr(
        attention_measures, "kind_of", lambda w: "nouns" if w in WORDS else "others"
    )


class OneCell(nn.Module):
    """A decoder that sees "dog" in cell 7 alone: its logit is what the cell is above the mean."""

    beside_cells, reads_grid = (), True

    def __init__(self, mean=2.0):
        super().__init__()
        self.feature_mean = torch.tensor([mean])

    def forward(self, features, batch):
        """features (N, P, 1) -> logits (tokens, 6), None."""
        logits = torch.zeros(len(batch.inputs), 6)
        logits[:, DOG] = (features[batch.image_index[batch.caption_index], 7] - self.feature_mean)[
            :, 0
        ]
        return logits, None


def looking_at(*cells, tokens=(DOG,)):
    """A caption whose every word looks at these cells alone."""
    attention = torch.zeros(len(tokens), CELLS)
    attention[:, list(cells)] = 1 / len(cells)
    return Hypothesis(list(tokens), 0.0, 0.0, True, attention)


def measured(hypotheses, decoder=None, chunk=20, **how):
    """What is found where every cell is BRIGHT above the mean."""
    decoder = decoder or OneCell()
    features = (decoder.feature_mean + BRIGHT).expand(len(hypotheses), CELLS, 1)
    vocabulary = Vocabulary([*Vocabulary.SPECIALS, *WORDS])
    return measure(decoder, features.split(chunk), hypotheses, vocabulary, CPU, **how)


# -------------------------------------------------------------------------- deletion and insertion


def test_a_map_on_the_cell_that_says_the_word_loses_it_and_random_cells_as_often_as_they_hit_it():
    found = measured([looking_at(7)] * 1000, seed=1)
    for fraction in FRACTIONS:  # 1, 2 and 5 of 10 cells
        for way in ("deletion", "insertion"):
            fall = found[way][str(fraction)]["nouns"]
            assert fall["map"] == pytest.approx(FALL, abs=1e-5)
            assert fall["random"] / FALL == pytest.approx(fraction, abs=0.06)  # 4 deviations
    deleted = found["deletion"]["0.2"]["nouns"]
    assert found["noun_deletion_ratio"] == deleted["map"] / deleted["random"]
    assert found["images"] == 1000 and found["words"] == {"all": 1000, "nouns": 1000}


def test_a_map_elsewhere_loses_nothing_and_brings_nothing_back():
    found = measured([looking_at(0, 1, 2, 3, 4)] * 3)
    for fraction in map(str, FRACTIONS):
        assert found["deletion"][fraction]["all"]["map"] == pytest.approx(0, abs=1e-6)
        assert found["insertion"][fraction]["all"]["map"] == pytest.approx(0, abs=1e-6)


def test_the_heaviest_cells_go_first():
    """Cell 7 is the second: of 10 cells 10 % leave it, 20 % take it."""
    caption = looking_at(7)
    caption.attention[0, [2, 7, 5]] = torch.tensor([0.5, 0.3, 0.2])
    deletion = measured([caption])["deletion"]
    falls = [deletion[str(fraction)]["all"]["map"] for fraction in FRACTIONS]
    assert falls == pytest.approx([0, FALL, FALL], abs=1e-5)


def test_a_uniform_map_loses_what_random_cells_do():
    """Ties once broken in reading order would measure the picture's upper edge."""
    found = measured([looking_at(*range(CELLS))] * 50)
    for fraction in map(str, FRACTIONS):
        fall = found["deletion"][fraction]["all"]
        assert fall["map"] == fall["random"]
    assert found["noun_deletion_ratio"] == 1 and found["entropy_share"]["all"] == pytest.approx(1)


def test_random_cells_are_the_seed_s():
    captions = [looking_at(7)] * 60
    one, same, other = (measured(captions, seed=seed)["deletion"] for seed in (1, 1, 2))
    assert one == same and one["0.5"]["all"]["random"] != other["0.5"]["all"]["random"]


def test_kinds_are_apart():
    """Only "dog" owes its probability to a cell; the caption's other words lose by it, or nothing."""
    found = measured([looking_at(7, tokens=(DOG, Vocabulary.unk)), looking_at(7, tokens=(DOG,))])
    fall = found["deletion"]["0.1"]
    assert found["words"] == {"all": 3, "nouns": 2, "others": 1}
    assert fall["nouns"]["map"] == pytest.approx(FALL, abs=1e-5)
    gain = math.log(6) - math.log(5 + math.exp(BRIGHT))  # of a word whose rival is deleted
    assert fall["others"]["map"] == pytest.approx(gain, abs=1e-5)
    assert fall["all"]["map"] == pytest.approx((2 * FALL + gain) / 3, abs=1e-5)


def test_captions_without_words_are_passed_over():
    empty = Hypothesis([], 0.0, 0.0, True, torch.zeros(0, CELLS))
    assert measured([empty, empty]) == {"images": 2, "words": {}}
    found = measured([empty, looking_at(7), empty], chunk=1)
    assert found["images"] == 3 and found["words"]["all"] == 1
    assert found["deletion"]["0.1"]["all"]["map"] == pytest.approx(FALL, abs=1e-5)


def attention_decoder(kind="additive"):
    """A small real one that knows six words and 3 x 4 cells of 5 channels, standardised."""
    torch.manual_seed(0)
    heads = {} if kind == "additive" else {"attention_heads": 2}
    decoder = program.DECODERS[kind](5, 9, 6, 8, 2, 0.3, 4, **heads).eval()
    decoder.calibrate([2 + 3 * torch.randn(50, 12, 5)])
    with torch.no_grad():
        decoder.head.weight *= 5
        decoder.project_values.weight *= 3  # each cell counts, also in a mean with a blind decoder
    return decoder


def written(decoder, features):
    """Captions of 4, 0, 2 and 4 words with the decoder's own attention, one of each image."""
    captions = [[4, 7, 5, 8], [], [6, 4], [8, 8, 4, 5]]
    hypotheses = []
    for image, tokens in zip(features, captions, strict=True):
        state = decoder.start(image.unsqueeze(0))
        maps = [torch.zeros(0, 12 + len(decoder.beside_cells))]
        for token in [Vocabulary.sos, *tokens][: len(tokens)]:
            _, state, alphas = decoder.step(torch.tensor([[token]]), state)
            maps.append(alphas[0].detach())
        hypotheses.append(Hypothesis(tokens, 0.0, 0.0, True, torch.cat(maps)))
    return hypotheses


@torch.no_grad()
def step_by_step(decoder, image, tokens):
    """Nats of the last token given those before it and an image (P, F)."""
    state = decoder.start(image.unsqueeze(0))
    for token in [Vocabulary.sos, *tokens[:-1]]:
        logits, state, _ = decoder.step(torch.tensor([[token]]), state)
    return logits[0, 0].log_softmax(-1)[tokens[-1]].item()


@torch.no_grad()
def by_steps(decoder, features, hypotheses):
    """Falls and gains of every word with its map's heaviest cells, {fraction: [mean, mean]}."""
    found = {}
    for fraction in FRACTIONS:
        falls, gains = [], []
        for image, caption in zip(features, hypotheses, strict=True):
            blank = decoder.feature_mean.expand_as(image)
            for t, attention in enumerate(caption.attention):
                heaviest = attention[:12].topk(round(fraction * 12)).indices
                deleted, inserted = image.clone(), blank.clone()
                deleted[heaviest], inserted[heaviest] = decoder.feature_mean, image[heaviest]
                deleted, inserted, whole, nothing = (
                    step_by_step(decoder, each, caption.tokens[: t + 1])
                    for each in (deleted, inserted, image, blank)
                )
                falls.append(whole - deleted)
                gains.append(inserted - nothing)
        found[str(fraction)] = [sum(each) / len(each) for each in (falls, gains)]
    return found


@pytest.mark.parametrize(("bytes_at_once", "chunk"), [(2**26, 4), (1, 4), (10_000, 3)])
@pytest.mark.parametrize(
    ("kind", "members"), [("additive", 1), ("multi_head", 1), ("adaptive", 1), ("adaptive", 2)]
)
def test_teacher_forcing_all_copies_at_once_is_the_decoder_step_by_step(
    bytes_at_once, chunk, kind, members, monkeypatch
):
    """Whatever the size of batches: captions of many lengths, each word with its own image."""
    monkeypatch.setattr(attention_measures, "BATCH_BYTES", bytes_at_once)
    decoder = attention_decoder(kind)
    if members > 1:
        blind = program.LSTMDecoder(5, 9, 6, 8, 1, 0.3).eval()
        blind.feature_mean.copy_(decoder.feature_mean)
        decoder = Ensemble([blind, decoder])
    features = 2 + 3 * torch.randn(4, 12, 5, generator=torch.Generator().manual_seed(1))
    hypotheses = written(decoder, features)
    vocabulary = Vocabulary([*Vocabulary.SPECIALS, "a", "b", "c", "d", "e"])
    found = measure(decoder, features.split(chunk), hypotheses, vocabulary, CPU)
    assert found["words"]["all"] == 10
    assert list(found.get("beside_cells", ())) == list(decoder.beside_cells)
    for fraction, means in by_steps(decoder, features, hypotheses).items():
        pair = [found[way][fraction]["all"]["map"] for way in ("deletion", "insertion")]
        assert pair == pytest.approx(means, abs=1e-4) and min(map(abs, means)) > 1e-3


def test_bfloat16_computes_as_float32_does_but_for_its_rounding():
    decoder = attention_decoder()
    features = 2 + 3 * torch.randn(4, 12, 5, generator=torch.Generator().manual_seed(1))
    vocabulary = Vocabulary([*Vocabulary.SPECIALS, "a", "b", "c", "d", "e"])
    hypotheses = written(decoder, features)
    halves = Hardware(torch.device("cpu"), "bfloat16")
    one, other = (
        measure(decoder, [features], hypotheses, vocabulary, each)["deletion"]["0.5"]["all"]
        for each in (CPU, halves)
    )
    assert one != other and one == pytest.approx(other, abs=0.1)


# ------------------------------------------------------------------------------- entropy, distance


def test_entropy_is_a_share_of_uniform():
    maps = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4])
    assert entropy_share(maps).tolist() == pytest.approx([0, 0.5, 1])
    assert entropy_share(torch.ones(2, 1)).tolist() == [1, 1]  # of one cell every map is uniform


def test_a_map_is_of_the_cells_alone_and_uniform_where_a_word_looked_at_none():
    attention = torch.tensor([[0.1, 0.3, 0, 0, 0.6], [0, 0, 0, 0, 1]])
    maps = cell_maps(attention, 4)
    torch.testing.assert_close(maps, torch.tensor([[0.25, 0.75, 0, 0], [0.25] * 4]))


def test_what_stands_beside_the_cells_is_a_share_of_the_word():
    decoder = OneCell()
    decoder.beside_cells = "picture", "language"
    beside = torch.tensor([[0.2, 0.5], [0.1, 0.7]])
    captions = [looking_at(7, tokens=(DOG, Vocabulary.unk)), looking_at(7)]
    captions[0] = captions[0]._replace(
        attention=torch.cat([captions[0].attention * (1 - beside.sum(1, keepdim=True)), beside], 1)
    )
    captions[1] = captions[1]._replace(
        attention=torch.cat([captions[1].attention * 0.6, torch.tensor([[0.4, 0.0]])], 1)
    )
    found = measured(captions, decoder)
    shares = found["beside_cells"]
    assert shares["picture"] == pytest.approx({"all": 0.7 / 3, "nouns": 0.3, "others": 0.1})
    assert shares["language"] == pytest.approx({"all": 0.4, "nouns": 0.25, "others": 0.7})
    assert found["entropy_share"]["all"] == pytest.approx(0, abs=1e-6)
    assert found["deletion"]["0.1"]["nouns"]["map"] == pytest.approx(FALL, abs=1e-5)


def test_maps_by_gradients_have_nothing_beside_the_cells():
    decoder = OneCell()
    decoder.beside_cells = ("language",)
    found = measured([looking_at(7)], decoder)
    assert "beside_cells" not in found
    assert found["deletion"]["0.1"]["nouns"]["map"] == pytest.approx(FALL, abs=1e-5)


def test_distance_is_between_maps_of_different_words():
    """Of three pairs, that of "dog" twice does not count; half of the weight differs in the others."""
    caption = looking_at(7, tokens=(DOG, DOG, GRASS))
    caption.attention[1] = 0.1
    caption.attention[2] = 0
    caption.attention[2, [0, 7]] = 0.5  # 0.5 from the first map, 0.8 from the second
    assert measured([caption, looking_at(0)])["map_distance"] == pytest.approx(0.65)
    assert measured([looking_at(0)])["map_distance"] is None


def test_mean_entropy_share_counts_words():
    long, short = looking_at(0, 1, tokens=(DOG, GRASS, DOG)), looking_at(0)
    share = math.log(2) / math.log(10)
    found = attention_measures.mean_entropy_share([long, short], CELLS)
    assert found == pytest.approx(0.75 * share)
    blind = Hypothesis([DOG], 0.0, 0.0, True, None)
    assert attention_measures.mean_entropy_share([blind, blind], CELLS) is None
    assert attention_measures.mean_entropy_share([], CELLS) is None


@pytest.mark.parametrize(
    ("shares", "warns"),
    [
        ([0.99], [False]),
        ([0.99, 0.98, 0.98], [False, True, False]),
        ([0.99, 0.97, 0.971], [False, False, True]),
        ([None, None, 0.98], [False, False, True]),  # an older program's epochs
    ],
)
def test_uniform_maps_are_warned_of_once(shares, warns):
    rows = [{"epoch": number, "attention_entropy": s} for number, s in enumerate(shares, start=1)]
    rows = [{"epoch": row["epoch"]} if row["attention_entropy"] is None else row for row in rows]
    found = [attention_measures.newly_uniform(rows[: end + 1]) for end in range(len(rows))]
    assert found == warns


def test_without_wordnet_it_says_so(monkeypatch):
    monkeypatch.setattr(attention_measures.metrics_utils, "find_wordnet", lambda: None)
    assert measured([looking_at(7)])["wordnet"] is False
