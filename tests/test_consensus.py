"""consensus.py: similar pictures' captions choose among a beam's, against CIDEr written out."""

import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkpoints
import consensus
import reranking
from caption_decoding import Hypothesis

DOG, CAT, RUNS, SITS, A, THE, BALL = range(4, 11)


def plain_cider(captions_of_images, candidate, images):
    """Mean over these images' captions of CIDEr (Vedantam et al. 2015, equations 1 to 3), times 10."""

    def ngrams(caption, n):
        return Counter(tuple(caption[i : i + n]) for i in range(len(caption) - n + 1))

    def vector(caption, n):
        weights = {}
        for ngram, count in ngrams(caption, n).items():
            holds = [any(ngram in ngrams(c, n) for c in image) for image in captions_of_images]
            weights[ngram] = count * math.log(len(captions_of_images) / max(1, sum(holds)))
        return weights

    def cosine(one, other):
        lengths = math.prod(math.sqrt(sum(x * x for x in each.values())) for each in (one, other))
        return sum(x * other.get(n, 0) for n, x in one.items()) / lengths if lengths else 0.0

    references = [caption for image in images for caption in captions_of_images[image]]
    similar = [
        cosine(vector(candidate, n), vector(reference, n))
        for reference in references
        for n in range(1, 5)
    ]
    return 10 * sum(similar) / 4 / len(references)


@pytest.fixture
def captions():
    """Of seven images, 1 to 5 each, of 0 to 9 words."""
    draw = torch.Generator().manual_seed(0)

    def numbers(low, high, count):
        return torch.randint(low, high, (count,), generator=draw).tolist()

    return [[numbers(4, 10, n) for n in [3, *numbers(1, 10, count)]] for count in range(7)]


@pytest.fixture
def features():
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(1))


def hypotheses(*captions, finished=True):
    return [
        Hypothesis(list(c), -float(k), -float(k), finished, None) for k, c in enumerate(captions)
    ]


@pytest.mark.parametrize("neighbours", [1, 3, 7, 100])
def test_agreement_is_the_mean_cider_against_the_neighbours_captions(
    captions, features, neighbours
):
    index = consensus.build_index(features, captions)
    candidates = [[captions[0][0], [4, 5], [3, 99, 4], [], [4, 4, 4, 4, 4]], [captions[5][1]]]
    asked = features[[2, 5]] + 0.1
    nearest = index.nearest(asked, neighbours)
    found = index.agreement(nearest, [hypotheses(*image) for image in candidates])
    for images, of_image, values in zip(nearest.tolist(), candidates, found, strict=True):
        expected = [plain_cider(captions, candidate, images) for candidate in of_image]
        assert values == pytest.approx(expected, abs=1e-5)
    assert max(found[0]) > 0.1


def test_neighbours_are_nearest_by_cosine_of_standardised_features():
    """One channel is a hundred times as large as the others, and all are far from zero."""
    features = torch.tensor([[900.0, 1.0], [100.0, 3.0], [890.0, 3.1], [120.0, 1.2]])
    index = consensus.build_index(features, [[[4]]] * 4)
    assert index.nearest(torch.tensor([[880.0, 3.0], [110.0, 1.1]]), 1).tolist() == [[2], [3]]
    assert index.nearest(torch.tensor([[880.0, 3.0]]), 9).shape == (1, 4)


def test_reranking_adds_the_weighted_agreement_to_the_score(captions, features):
    index = consensus.build_index(features, captions)
    candidates = hypotheses([9, 9], captions[4][0], captions[4][1])
    (agreement,) = index.agreement(index.nearest(features[4:5], 2), [candidates])
    for weight in (0.0, 0.5, 50.0):
        (found,) = consensus.Reranker(index, 2, weight)(features[4:5], [candidates])
        expected = [h.score + weight * a for h, a in zip(candidates, agreement, strict=True)]
        assert [h.score for h in found] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
        assert {h.log_prob for h in found} == {0.0, -1.0, -2.0}
    assert found[0].tokens != [9, 9]


def test_captions_that_were_cut_stay_behind_finished_ones(captions, features):
    index = consensus.build_index(features, captions)
    (cut,) = hypotheses(captions[3][0], finished=False)
    (whole,) = hypotheses([9, 9])
    (found,) = consensus.Reranker(index, 1, 100.0)(features[3:4], [[cut, whole]])
    assert [h.finished for h in found] == [True, False]


def test_what_is_stored_gives_the_same(captions, features, tmp_path):
    index = consensus.build_index(features, captions)
    consensus.save_index(index, tmp_path / "neighbours.pt", "mine")
    again = consensus.load_index(tmp_path / "neighbours.pt", "mine")
    candidates = [hypotheses(captions[1][0], [4, 5, 6])] * 3
    nearest = index.nearest(features[:3], 3)
    assert torch.equal(again.nearest(features[:3], 3), nearest)
    assert again.agreement(nearest, candidates) == index.agreement(nearest, candidates)


def test_another_owners_index_and_no_index_are_none(captions, features, tmp_path):
    file = tmp_path / "neighbours.pt"
    assert consensus.load_index(file, "mine") is None
    consensus.save_index(consensus.build_index(features, captions), file, "theirs")
    assert consensus.load_index(file, "mine") is None


@pytest.mark.parametrize(
    "change",
    [
        {"features": torch.ones(3, 5).half()},
        {"features": torch.ones(7, 5)},
        {"num_captions": torch.tensor([-1, 2, 3, 4, 5, 6, 9], dtype=torch.int32)},
        {"tokens": torch.full((1, 1), 10, dtype=torch.int32)},
        {"tokens": "words"},
        {"owner": 3},
    ],
)
def test_a_damaged_index_is_one_line_that_says_what_to_do(change, captions, features, tmp_path):
    file, index = tmp_path / "neighbours.pt", consensus.build_index(features, captions)
    checkpoints.save_tensors(file, index.plain | {"owner": "mine"} | change)
    if "owner" in change:
        assert consensus.load_index(file, "mine") is None
        return
    with pytest.raises(ValueError, match=r"neighbours\.pt: damaged: delete it"):
        consensus.load_index(file, "mine")


def test_a_damaged_index_of_a_version_is_not_to_be_deleted(captions, features, tmp_path):
    file, index = tmp_path / "neighbours.pt", consensus.build_index(features, captions)
    consensus.save_index(index, file, "mine")
    checkpoints.seal_folder(tmp_path)
    assert consensus.load_index(file, "mine") is not None
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(checkpoints.BrokenSeal, match=r"use another version"):
        consensus.load_index(file, "mine")


def test_an_index_made_for_a_version_is_not_kept_in_it(captions, features, tmp_path, capsys):
    (tmp_path / "best.pt").touch()
    checkpoints.seal_folder(tmp_path)
    index = consensus.build_index(features, captions)
    assert consensus.open_index(tmp_path / "best.pt", "mine", lambda: index) is index
    assert "not kept (a version of a model is never edited)" in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"best.pt", checkpoints.SEAL}


def test_bytes_that_are_no_index_are_one_line(tmp_path):
    (tmp_path / "neighbours.pt").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(ValueError, match=r"neighbours\.pt: damaged: delete it"):
        consensus.load_index(tmp_path / "neighbours.pt", "mine")


def test_an_index_is_made_once_and_used_where_it_cannot_be_kept(
    captions, features, tmp_path, monkeypatch, capsys
):
    made, checkpoint = [], tmp_path / "best.pt"

    def build():
        made.append(consensus.build_index(features, captions))
        return made[-1]

    assert consensus.open_index(checkpoint, "mine") is None
    assert consensus.open_index(checkpoint, "mine", build) is made[0]
    assert consensus.open_index(checkpoint, "mine", build).plain.keys() == made[0].plain.keys()
    assert len(made) == 1
    assert consensus.open_index(checkpoint, "another", build) is made[1]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(consensus, "save_index", full)
    assert consensus.open_index(checkpoint, "a third", build) is made[2]
    assert capsys.readouterr().err == (
        f"{tmp_path / 'neighbours.pt'}: not kept (No space left on device)\n"
    )


def test_mean_features_are_each_images_and_few_grids_are_read_together():
    grids, read = torch.rand(40, 9, 6, generator=torch.Generator().manual_seed(0)), []

    def stream(chunks):
        for rows in chunks:
            read.append(len(rows))
            yield grids[rows]

    features = SimpleNamespace(paths=range(40), stream=stream)
    captioner = SimpleNamespace(encoder=SimpleNamespace(channels=6), grids=nn.Identity())
    means = reranking.mean_features(captioner, features)
    assert torch.equal(means, grids.mean(1)) and read == [16, 16, 8]
