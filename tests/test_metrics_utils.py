"""metrics_utils.py against hand-worked values, nltk, pycocoevalcap and published scores.

pycocoevalcap's own tokenizer needs Java: its scorers get captions that are already tokenised.
"""

import json
import math
import os
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from nltk.translate.bleu_score import corpus_bleu

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import metrics_utils  # noqa: E402
from metrics_utils import (  # noqa: E402
    METRIC_NAMES,
    CaptionScorer,
    main,
    metrics_from_sums,
    peak_in_box,
    read_boxes,
    scores_table,
    tokenize,
)

ORACLE = ROOT.parent / "shared" / "data" / "metric_oracle"
needs_oracle = pytest.mark.skipif(not ORACLE.is_dir(), reason=f"{ORACLE} is not here")
BLEU_WEIGHTS = [[1 / n] * n for n in range(1, 5)]


def read_oracle(name):
    return json.loads((ORACLE / name).read_text(encoding="utf-8"))


def random_captions(seed, images=60, shortest=4, words=5):
    """References (five each) and a hypothesis per image, of few words: n-grams of any n match."""
    draw = random.Random(seed)

    def caption():
        return " ".join(f"word{draw.randrange(words)}" for _ in range(draw.randint(shortest, 12)))

    references = {i: [caption() for _ in range(5)] for i in range(images)}
    return references, {i: caption() for i in range(images)}


def as_token_lists(references, hypotheses):
    reference_tokens = [[c.split() for c in captions] for captions in references.values()]
    return reference_tokens, [h.split() for h in hypotheses.values()]


# ---------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A dog 's ball , isn't it ?", "a dog 's ball is n't it"),
        ("They\u2019re saying “don\u2019t” …", "they 're saying do n't"),
        ("A T-shirt (blue) & 2.5-inch shoes.", "a t-shirt -lrb- blue -rrb- & 2.5-inch shoes"),
        ("Crowd in Washington D.C.", "crowd in washington d.c."),
        ("The U.S. team at 5:30 p.m.", "the u.s. team at 5:30 p.m."),
        ("Mr. Potato head . ", "mr. potato head"),
        ("We cannot see; I'm gonna go -- now!", "we can not see i 'm gon na go now"),
        ("five o'clock in the '70s, rock 'n' roll", "five o'clock in the '70s rock 'n' roll"),
        ("the boys' game on AT&T at avrovulcan.com", "the boys game on at&t at avrovulcan.com"),
        ("1/2 of a $2,000 hot-dog/soda, 50% off", "1/2 of a $ 2,000 hot-dog/soda 50 % off"),
        ("wow!! #8 @ home", "wow !! # 8 @ home"),
        ("", ""),
        (" . , ' \" ", ""),
    ],
)
def test_tokenize_english(caption, tokens):
    assert tokenize(caption) == tokens.split()


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("两只狗在奔跑。", ["两", "只", "狗", "在", "奔", "跑"]),
        ("犬が走る", ["犬", "が", "走", "る"]),
        ("Двое детей, играют!", ["двое", "детей", "играют"]),
        ("सफेद कुत्ता दौड़ता है।", ["सफेद", "कुत्ता", "दौड़ता", "है"]),
        ("Un café «noir»", ["un", "café", "noir"]),
    ],
)
def test_tokenize_other_scripts(caption, tokens):
    assert tokenize(caption) == tokens


def test_tokens_survive_a_second_tokenization():
    tokens = tokenize("A man's dog can't swim (really) at 5 p.m. in the U.S.")
    assert tokenize(" ".join(tokens)) == tokens


def test_tokenize_is_not_quadratic_in_hostile_captions():
    for part in ("a-", "a.1", "1,", "n", "a/", "w."):
        assert len("".join(tokenize(part * 20_000))) >= 20_000


@needs_oracle
def test_tokenize_agrees_with_the_toolkit():
    samples = read_oracle("ptb_tokens.json")
    agreeing = sum(tokenize(sample["caption"]) == sample["tokens"] for sample in samples)
    assert agreeing / len(samples) >= 0.999


# -------------------------------------------------------------------- against other implementations


@needs_oracle
@pytest.mark.parametrize("run", ["init_1", "merge_3"])
def test_published_scores(run):
    references = {}
    for annotation in read_oracle("references.json")["annotations"]:
        references.setdefault(annotation["image_id"], []).append(annotation["caption"])
    hypotheses = {entry["image_id"]: entry["caption"] for entry in read_oracle(f"{run}.json")}
    scores, _ = CaptionScorer(references).score(hypotheses)
    published = read_oracle("published_scores.json")[run]
    for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"):
        key = name.replace("BLEU-", "Bleu_").replace("-", "_")
        assert scores[name] == pytest.approx(published[key], abs=1e-4), name


@pytest.mark.parametrize("shortest", [1, 4])
def test_bleu_rouge_and_cider_equal_pycocoevalcap(shortest):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    references, hypotheses = random_captions(0, shortest=shortest)
    scores, per_image = CaptionScorer(references).score(hypotheses)
    results = {image: [caption] for image, caption in hypotheses.items()}
    bleu, _ = Bleu(4).compute_score(references, results, verbose=0)
    assert [scores[f"BLEU-{n}"] for n in range(1, 5)] == pytest.approx(bleu, abs=1e-9)
    for scorer, name in ((Rouge(), "ROUGE-L"), (Cider(), "CIDEr")):
        corpus, images = scorer.compute_score(references, results)
        assert scores[name] == pytest.approx(corpus, abs=1e-9)
        assert [row[name] for row in per_image.values()] == pytest.approx(images.tolist(), abs=1e-9)


def test_bleu_equals_nltk_on_the_corpus_and_on_a_resample():
    references, hypotheses = random_captions(1)
    scores, _ = CaptionScorer(references).score(hypotheses)
    reference_tokens, tokens = as_token_lists(references, hypotheses)
    expected = corpus_bleu(reference_tokens, tokens, BLEU_WEIGHTS)
    assert [scores[f"BLEU-{n}"] for n in range(1, 5)] == pytest.approx(expected, abs=1e-12)

    rows = np.random.default_rng(0).integers(len(tokens), size=len(tokens))
    statistics = CaptionScorer(references)._statistics(tokens, meteor_tables=None)
    resampled = metrics_from_sums(np.bincount(rows, minlength=len(tokens)) @ statistics)
    drawn_references, drawn = [reference_tokens[i] for i in rows], [tokens[i] for i in rows]
    expected = corpus_bleu(drawn_references, drawn, BLEU_WEIGHTS)
    assert [resampled[f"BLEU-{n}"] for n in range(1, 5)] == pytest.approx(expected, abs=1e-12)


def test_sentence_bleu_adds_one_to_longer_ngrams():
    _, per_image = CaptionScorer({0: ["a dog runs fast"]}).score({0: "a dog runs slowly"})
    assert per_image[0]["BLEU-4"] == pytest.approx((3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


# ------------------------------------------------------------------------------------------ by hand


def test_rouge_takes_best_precision_and_best_recall():
    scores, _ = CaptionScorer({0: ["a b c d", "a x"]}).score({0: "a c d"})
    assert scores["ROUGE-L"] == pytest.approx(2.44 * 1 * 0.75 / (0.75 + 1.44 * 1))


def test_cider_is_ten_for_the_only_reference_and_zero_without_shared_words():
    references = {0: ["a dog runs over grass"], 1: ["two men play with cards"]}
    hypotheses = {0: "a dog runs over grass", 1: "some women sing"}
    scores, per_image = CaptionScorer(references).score(hypotheses)
    assert per_image[0]["CIDEr"] == pytest.approx(10)
    assert per_image[1]["CIDEr"] == 0
    assert scores["CIDEr"] == pytest.approx(5)


def test_wer_is_edits_over_words_of_the_nearest_reference_summed_over_images():
    dogs, men = ["a dog runs", "a cat sits on the red grass"], ["two men", "two old men sit"]
    hypotheses = {0: "a dog walks fast", 1: "two old men"}
    scores, per_image = CaptionScorer({0: dogs, 1: men}).score(hypotheses)
    assert per_image[0]["WER"] == pytest.approx(2 / 3)
    assert per_image[1]["WER"] == pytest.approx(1 / 4)  # not 1 / 2, of the shorter reference
    assert scores["WER"] == pytest.approx(3 / 7)


def test_caption_statistics():
    references = {i: ["a dog runs"] for i in range(4)}
    hypotheses = {0: "A dog runs.", 1: "a dog runs", 2: "a cat", 3: "two men sit down"}
    scorer = CaptionScorer(references, training_captions=["A cat .", "two men"])
    scores, _ = scorer.score(hypotheses)
    assert scores["caption_length"] == (3 + 3 + 2 + 4) / 4
    vocabulary = {"a", "dog", "runs", "cat", "two", "men", "sit", "down"}
    assert scores["vocabulary_used"] == len(vocabulary)
    assert (scores["share_unique"], scores["share_copied"]) == (3 / 4, 1 / 4)
    assert scorer.training[1] == {"a": 1, "cat": 1, "two": 1, "men": 1}
    unknown = CaptionScorer(references)
    assert unknown.score(hypotheses)[0]["share_copied"] is None and unknown.training is None


def test_groups_of_captions_are_scored_apart():
    """As scorers of their own would, but for CIDEr, whose document frequencies are of all images."""
    references, hypotheses = random_captions(4, words=30)
    scores, per_image = CaptionScorer(references).score(
        hypotheses, group_of=lambda caption: f"{len(caption) % 2}"
    )
    for name, rest in (("0", 0), ("1", 1)):
        images = [i for i, caption in hypotheses.items() if len(caption.split()) % 2 == rest]
        alone, _ = CaptionScorer({i: references[i] for i in images}).score(
            {i: hypotheses[i] for i in images}
        )
        group = scores["groups"][name]
        assert tuple(group) == ("images", *METRIC_NAMES)
        assert group["images"] == len(images) >= 10 and group["METEOR"] is None
        for metric in ("BLEU-1", "BLEU-4", "ROUGE-L", "WER"):
            assert group[metric] == pytest.approx(alone[metric]), metric
        cider = sum(per_image[i]["CIDEr"] for i in images) / len(images)
        assert group["CIDEr"] == pytest.approx(cider) != pytest.approx(alone["CIDEr"])
    assert "groups" not in CaptionScorer(references).score(hypotheses)[0]


@pytest.mark.parametrize("caption", ["", "...", "zebra", "a", "a zebra"])
def test_captions_without_matches_score_low_without_a_warning(caption, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer = CaptionScorer({0: ["a dog runs over grass"], 1: ["..."]})
        scores, per_image = scorer.score({0: caption, 1: caption})
    assert scores["BLEU-2"] == scores["BLEU-3"] == scores["BLEU-4"] == 0
    assert (scores["BLEU-1"] > 0) == (scores["CIDEr"] > 0) == ("a" in caption.split())
    assert per_image[0]["WER"] >= 4 / 5
    assert capsys.readouterr() == ("", "")
    json.dumps([scores, per_image], allow_nan=False)


def test_no_images_at_all():
    scores, per_image = CaptionScorer({}).score({}, bootstrap=3)
    assert (scores["BLEU-4"], scores["CIDEr"], scores["intervals"], per_image) == (0, 0, {}, {})


def test_images_must_agree():
    scorer = CaptionScorer({"a.jpg": ["a dog"], "b.jpg": ["a cat"]})
    with pytest.raises(ValueError, match=r"'c\.jpg' has a caption but no references"):
        scorer.score({"a.jpg": "a dog", "b.jpg": "a cat", "c.jpg": "a man"})
    with pytest.raises(ValueError, match=r"'b\.jpg' has references but no caption"):
        scorer.score({"a.jpg": "a dog"})
    with pytest.raises(ValueError, match=r"'d\.jpg' has no reference captions"):
        CaptionScorer({"d.jpg": []})


def test_scores_are_the_same_to_the_last_bit_in_every_process():
    """Each process orders sets of words anew; a resumed run must still find the same best CIDEr."""
    references, _ = random_captions(3, words=30)
    hypotheses = {i: " ".join(captions[:2]) for i, captions in references.items()}  # much shared
    score = f"metrics_utils.CaptionScorer({references}).score({hypotheses})"
    command = [sys.executable, "-c", f"import metrics_utils; print({score})"]
    environments = [os.environ | {"PYTHONHASHSEED": seed} for seed in "12"]
    outputs = {subprocess.check_output(command, cwd=ROOT, env=env) for env in environments}
    assert len(outputs) == 1


# ---------------------------------------------------------------------------------------- bootstrap


def test_intervals_hold_the_score_and_depend_on_the_seed_alone():
    references, hypotheses = random_captions(2)
    scorer = CaptionScorer(references)
    scores, _ = scorer.score(hypotheses, bootstrap=300, seed=1)
    assert set(scores["intervals"]) == set(METRIC_NAMES) - {"METEOR"}
    for name, (low, high) in scores["intervals"].items():
        assert low < scores[name] < high, name
    assert scorer.score(hypotheses, bootstrap=300, seed=1)[0] == scores
    assert scorer.score(hypotheses, bootstrap=300, seed=2)[0]["intervals"] != scores["intervals"]


def test_intervals_have_the_width_of_the_standard_error():
    """WER of images all wrong or all right is a mean of coin flips, of known standard error."""
    references = {i: ["dog"] for i in range(400)}
    hypotheses = {i: "dog" if i % 2 else "cat" for i in range(400)}
    scores, _ = CaptionScorer(references).score(hypotheses, bootstrap=2000)
    low, high = scores["intervals"]["WER"]
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 400**0.5, rel=0.1)


# ------------------------------------------------------------------------------------------- METEOR


def test_meteor_of_a_corpus_is_of_sums_and_has_intervals(monkeypatch, tables):
    monkeypatch.setattr(metrics_utils, "find_tables", lambda: tables)
    references = {0: ["a dog runs fast"], 1: ["an old auto"], 2: ["two men"]}
    hypotheses = {0: "A dog runs fast.", 1: "an old car", 2: "some women"}
    scorer = CaptionScorer(references)
    scores, per_image = scorer.score(hypotheses, meteor=True, bootstrap=20)
    synonym = 0.8 * 0.75 + 2 * 0.75  # "an" is no function word of these tables
    assert [row["METEOR"] for row in per_image.values()] == pytest.approx([1, synonym / 2.25, 0])
    matched, words = 0.25 + 3 * 0.75 + synonym, 0.25 + 3 * 0.75 + 2.25 + 1.5
    assert scores["METEOR"] == pytest.approx(matched / words)  # each match in one perfect chunk
    low, high = scores["intervals"]["METEOR"]
    assert low < scores["METEOR"] < high
    assert scorer.score(hypotheses)[0]["METEOR"] is None


def test_meteor_without_its_tables_is_none_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(metrics_utils, "find_tables", lambda: None)
    scores, _ = CaptionScorer({0: ["a dog"]}).score({0: "a dog"}, meteor=True)
    stderr = capsys.readouterr().err
    assert scores["METEOR"] is None
    assert stderr.startswith("METEOR is not computed: ")
    assert stderr.count("\n") == 1
    assert "`pip install pycocoevalcap`" in stderr


def test_meteor_of_no_images(monkeypatch, tables):
    monkeypatch.setattr(metrics_utils, "find_tables", lambda: tables)
    assert CaptionScorer({}).score({}, meteor=True)[0]["METEOR"] == 0


# ---------------------------------------------------------------------------------------- attention


def test_peak_in_box_by_hand():
    maps = np.zeros((4, 2, 4))  # cells of 1/4 x 1/2
    maps[:, 0, 0] = 0.1
    maps[1, 1, 2] = maps[3, 0, 1] = 1  # peaks at (5/8, 3/4) and (3/8, 1/4)
    boxes = [
        {"names": ["dog", "puppy"], "box": [0.6, 0.7, 1, 1]},
        {"names": ["ball"], "box": [0.5, 0, 1, 0.5]},
        {"names": ["ball"], "box": [0.75, 0, 1, 1]},  # half of it lies in the other ball's box
    ]
    words = [
        "red",
        "puppy",
        "red",
        "ball",
    ]  # the peaks of "red" are the first cell's, at (1/8, 1/4)
    result = peak_in_box([(words, maps, boxes), (["sky"], maps[:1], boxes)])
    assert result == {
        "peak_in_box": 1 / 2,
        "chance": pytest.approx(0.2475),
        "ratio": pytest.approx(0.5 / 0.2475),
        "nouns": 2,
        "colour_peak_in_box": 0,
        "colours": 2,
    }
    maps[2, 1, 3] = 0.2  # the second "red" peaks at (7/8, 3/4), in a ball's box
    result = peak_in_box([(words, maps, boxes), (["blue", "sky"], maps[:2], boxes)])
    assert (result["colour_peak_in_box"], result["colours"]) == (1 / 2, 2)
    words[2] = "round"
    assert peak_in_box([(words, maps, boxes)])["colours"] == 1


NO_COLOURS = {"colour_peak_in_box": None, "colours": 0}


@pytest.mark.parametrize(("box", "hit"), [([0, 0, 0.125, 1], 0), ([0.125, 0.25, 1, 1], 1)])
def test_a_box_has_its_upper_left_edges_and_not_its_lower_right_ones(box, hit):
    """So that of two boxes side by side one has the centre: here (1/8, 1/4)."""
    attention = np.eye(1, 8).reshape(1, 2, 4)
    result = peak_in_box([(["dog"], attention, [{"names": ["dog"], "box": box}])])
    assert result["peak_in_box"] == hit


BOX = {"names": ["dog", "dogs"], "box": [0, 0.25, 0.5, 1]}


def test_boxes_are_read_as_they_are_written(tmp_path):
    boxes = {"a.jpg": [BOX, BOX | {"names": []}], "b.jpg": []}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    assert read_boxes(tmp_path / "boxes.json", ["b.jpg", "c.jpg"]) == boxes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[1]", "expected"),
        ('{"a.jpg": null}', "expected"),
        ('{"a.jpg": [[0, 0, 1, 1]]}', "expected"),
        (json.dumps({"a.jpg": [{"box": [0, 0, 1, 1]}]}), "expected"),
        (json.dumps({"a.jpg": [BOX | {"names": "dog"}]}), "expected"),
        (json.dumps({"a.jpg": [BOX | {"names": [1]}]}), "expected"),
        (json.dumps({"a.jpg": [BOX | {"box": [0, 0, 1]}]}), "expected"),
        (json.dumps({"a.jpg": [BOX | {"box": [0, 0, 1, "1"]}]}), "expected"),
        (json.dumps({"a.jpg": [BOX | {"box": [0, 0, 1, math.nan]}]}), "expected"),
        (json.dumps({"a.jpg": [BOX], "b.jpg": [BOX | {"box": [10, 20, 30, 40]}]}), "expected"),
        (json.dumps({"a.jpg": [BOX | {"box": [0.5, 0, 0.2, 1]}]}), "expected"),
        (json.dumps({"other.jpg": [BOX]}), "boxes of none of the images"),
        ("{}", "boxes of none of the images"),
    ],
)
def test_foreign_boxes_are_one_line_that_names_the_file(tmp_path, content, message):
    (tmp_path / "boxes.json").write_text(content)
    with pytest.raises(ValueError, match=rf"boxes\.json: .*{message}") as caught:
        read_boxes(tmp_path / "boxes.json", ["a.jpg"])
    assert "\n" not in str(caught.value)


def test_peak_in_box_without_nouns():
    result = peak_in_box([(["a"], np.ones((1, 2, 2)), [])])
    nothing = {"peak_in_box": None, "chance": None, "ratio": None, "nouns": 0}
    assert result == nothing | NO_COLOURS


def test_a_box_without_area_has_no_ratio():
    boxes = [{"names": ["dog"], "box": [0.5, 0.5, 0.5, 0.5]}]
    result = peak_in_box([(["dog"], np.ones((1, 2, 2)), boxes)])
    assert result == {"peak_in_box": 0, "chance": 0, "ratio": None, "nouns": 1} | NO_COLOURS


def test_the_console_s_table():
    scores = dict(zip(METRIC_NAMES, (0.6, 0.4, 0.3, 0.2, None, 0.45, 0.5, 0.75), strict=True))
    scores |= {"intervals": {"BLEU-4": [0.1, 0.25]}, "caption_length": 9.5, "share_copied": None}
    attention = {"peak_in_box": 0.5, "chance": 0.25, "ratio": 2.0, "nouns": 4}
    attention |= {"colour_peak_in_box": 0.75, "colours": 3}
    lines = scores_table(scores | {"attention": attention}).splitlines()
    assert lines[4:6] == [
        "  BLEU-4           0.2000  [0.1000, 0.2500]",
        "  METEOR 1.5       not computed",
    ]
    assert lines[9:] == [
        "  caption_length   9.5",
        "  attention peak in its noun's box: 0.500, 2.0 times chance",
        "    of the colour before it: 0.750",
    ]
    uncoloured = scores_table(scores | {"attention": attention | NO_COLOURS})
    assert uncoloured == "\n".join(lines[:-1])
    unmeasured = scores_table(scores | {"attention": attention | {"chance": 0, "ratio": None}})
    assert unmeasured == scores_table(scores) == "\n".join(lines[:-2])


def test_the_console_s_table_of_attention():
    scores = dict.fromkeys(METRIC_NAMES, 0.5) | {"intervals": {}}
    attention = {
        "images": 2,
        "words": {"all": 12, "nouns": 4},
        "entropy_share": {"all": 0.75, "nouns": 0.5},
        "map_distance": 0.25,
        "deletion": {
            "0.2": {"all": {"map": 1.5, "random": 0.25}, "nouns": {"map": 2, "random": -0.1}}
        },
        "wordnet": False,
    }
    lines = scores_table(scores | {"attention": attention}).splitlines()
    assert lines[-7:] == [
        "  attention maps of 2 images: entropy as a share of uniform, and nats that a",
        "  word loses with its map's heaviest 20 % of cells, or with as many random ones",
        "                     words  entropy  heaviest  random",
        "    all                 12    0.750     1.500   0.250",
        "    nouns                4    0.500     2.000  -0.100",
        "    two words' maps: 0.250 apart, of 1 at most",
        "    nltk finds no WordNet: nouns and verbs are among the others",
    ]
    known = scores_table(
        scores | {"attention": attention | {"wordnet": True, "map_distance": None}}
    )
    assert known.splitlines() == lines[:-2]
    wordless = {"images": 2, "words": {}}
    assert scores_table(scores | {"attention": wordless}) == scores_table(scores)


# ------------------------------------------------------------------------------------------ command

REFERENCES = {
    "images": [{"id": 1}],
    "annotations": [{"id": 7, "image_id": 1, "caption": "A dog runs over grass ."}],
}
HYPOTHESES = [{"image_id": 1, "caption": "a dog runs over grass"}]


def run_command(tmp_path, references, hypotheses):
    """Run the command in this process on files of these contents (bytes as is; None: no file)."""
    arguments = []
    for name, content in (("references", references), ("hypotheses", hypotheses)):
        path = tmp_path / f"{name}.json"
        arguments += [f"--{name}", str(path)]
        if content is not None:
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            path.write_bytes(raw)
    main(arguments)


def test_command_prints_one_json_object(tmp_path, capsys, monkeypatch, tables):
    monkeypatch.setattr(metrics_utils, "find_tables", lambda: tables)
    run_command(tmp_path, REFERENCES, HYPOTHESES)
    scores = json.loads(capsys.readouterr().out)
    assert tuple(scores)[: len(METRIC_NAMES)] == METRIC_NAMES
    assert (scores["BLEU-4"], scores["ROUGE-L"], scores["WER"]) == (1, 1, 0)
    assert scores["caption_length"] == 5
    assert scores["METEOR"] == pytest.approx(1)
    assert scores["METEOR_variant"].startswith("METEOR 1.5")


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [
        (None, HYPOTHESES, r"references\.json: cannot be read \(No such file"),
        (REFERENCES, b"[{", r"hypotheses\.json: not a JSON file"),
        (REFERENCES, b"\xff\xd8\xff\xe0\x00", r"hypotheses\.json: not a JSON file"),
        (REFERENCES, b"[" * 100_000, r"hypotheses\.json: not a JSON file"),
        (HYPOTHESES, HYPOTHESES, r"references\.json: not a COCO annotation file"),
        (REFERENCES, REFERENCES, r"hypotheses\.json: expected a list"),
        (REFERENCES, [{"image_id": 1}], r"hypotheses\.json: entry 1 is not"),
        (REFERENCES, ["a dog"], r"hypotheses\.json: entry 1 is not"),
        (REFERENCES, HYPOTHESES * 2, r"hypotheses\.json: image 1 has two captions"),
        (REFERENCES, [{"image_id": 2, "caption": "a"}], r"image 2 has a caption but no references"),
        (REFERENCES, [], r"image 1 has references but no caption"),
    ],
)
def test_command_refuses_bad_files_with_one_line(tmp_path, capsys, references, hypotheses, message):
    with pytest.raises(SystemExit) as stopped:
        run_command(tmp_path, references, hypotheses)
    stdout, stderr = capsys.readouterr()
    assert (stopped.value.code, stdout, stderr.count("\n")) == (2, "", 1)
    assert re.search(message, stderr)


def test_import_and_help_load_no_heavy_package():
    heavy = {"nltk", "jiwer", "torch", "pandas"}
    code = f"import sys, metrics_utils; print({heavy} & sys.modules.keys())"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert loaded == "set()\n"
    command = [sys.executable, "metrics_utils.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--hypotheses FILE" in done.stdout
