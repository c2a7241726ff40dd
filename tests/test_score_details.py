"""score_details.py against hand-worked values; WordNet is a small one, or away."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import score_details  # noqa: E402
from metrics_utils import CaptionScorer  # noqa: E402
from score_details import (  # noqa: E402
    base_form,
    describe,
    details_table,
    duller,
    duller_than_before,
    headlines,
    kind_of,
    length_band,
    never_used,
    over_seeds,
    rare_recall,
    recall_by_band,
    seeds_table,
    spread,
    unsupported,
)

# ------------------------------------------------------------------------------------ kinds of words


def sense(uses, name):
    """A WordNet sense of one lemma beside a synonym that is used often."""
    lemma = SimpleNamespace(name=lambda: name, count=lambda: uses)
    return SimpleNamespace(
        lemmas=lambda: [lemma, SimpleNamespace(name=lambda: "x", count=lambda: 99)]
    )


SENSES = {
    ("runs", "v"): [sense(200, "run"), sense(60, "run")],
    ("runs", "n"): [sense(40, "run")],
    ("dog", "n"): [sense(40, "dog")],
    ("dog", "v"): [sense(2, "dog")],
    ("dogs", "n"): [sense(40, "dog")],
    ("ball", "n"): [sense(9, "ball")],
    ("seven", "n"): [sense(3, "seven")],
    ("orange", "n"): [sense(5, "orange")],
    ("large", "a"): [sense(140, "large")],
    ("large", "n"): [sense(0, "large")],
    ("wakeboarder", "n"): [sense(0, "wakeboarder")],
}


def set_wordnet(monkeypatch, wordnet):
    monkeypatch.setattr(score_details.metrics_utils, "find_wordnet", lambda: wordnet)
    kind_of.cache_clear()
    base_form.cache_clear()


@pytest.fixture
def forget_words():
    """What is cached of a test's WordNet is not another's."""
    yield
    kind_of.cache_clear()
    base_form.cache_clear()


@pytest.fixture
def wordnet(monkeypatch, forget_words):
    """A small one."""
    bases = {"runs": "run", "dogs": "dog"}
    fake = SimpleNamespace(
        morphy=lambda word, part: bases.get(word, word),
        synsets=lambda word, part: SENSES.get((word, part), []),
    )
    set_wordnet(monkeypatch, fake)


@pytest.fixture
def no_wordnet(monkeypatch, forget_words):
    set_wordnet(monkeypatch, None)


def test_kinds_of_words(wordnet):
    kinds = {
        "nouns": ["dog", "wakeboarder"],
        "verbs": ["runs"],
        "colours": ["orange", "black"],
        "function words": ["the", "two", "in", "is"],
        "others": ["large", "狗", "perro"],
    }
    assert {
        kind: [w for w in words if kind_of(w) == kind] for kind, words in kinds.items()
    } == kinds


def test_without_wordnet_only_lists_tell_kinds(no_wordnet):
    found = [kind_of(word) for word in ("dog", "runs", "black", "the")]
    assert found == ["others", "others", "colours", "function words"]


def test_the_real_wordnet_tells_nouns_and_their_plurals(monkeypatch, forget_words):
    import nltk

    shared = str(ROOT.parent / "shared" / "nltk_data")
    monkeypatch.setattr(nltk.data, "path", [*nltk.data.path, shared])
    if score_details.metrics_utils.find_wordnet() is None:
        pytest.skip("nltk finds no WordNet here")
    kind_of.cache_clear()
    base_form.cache_clear()
    words = ("dogs", "men", "frisbee", "jumps", "brown", "the", "small")
    kinds = ["nouns", "nouns", "nouns", "verbs", "colours", "function words", "others"]
    assert [kind_of(word) for word in words] == kinds
    assert [base_form(word) for word in ("dogs", "men", "grey", "2")] == [
        "dog", "man", "gray", "two",
    ]  # fmt: skip


# -------------------------------------------------------------------------------------- rare words


def split(*texts):
    return [text.split() for text in texts]


REFERENCES = [
    split("a brown dog catches a frisbee", "the dog with 2 tags leaps"),
    split("two men climb", "climbers on a cliff"),
]


def test_recall_by_band_worked_by_hand():
    """Each word of an image's references counts once, however many of them have it."""
    counts = Counter(dog=1000, brown=999, catches=100, frisbee=99, tags=10, leaps=9)
    counts |= Counter(men=5000, climb=100, cliff=12)  # no training caption has "climbers"
    captions = split("a dog catches a frisbee frisbee", "men climb on a rock")
    assert recall_by_band(REFERENCES, captions, counts) == {
        "0-9": {"words": 2, "recall": 0},  # leaps; climbers
        "10-99": {"words": 3, "recall": 1 / 3},  # frisbee, tags; cliff
        "100-999": {"words": 3, "recall": 2 / 3},  # brown, catches; climb
        "1000+": {"words": 2, "recall": 1},  # dog; men
    }


def test_never_used_words_worked_by_hand(monkeypatch):
    """The most frequent first; "two" and "the" are function words, and "2" begins with no letter."""
    counts = Counter({"the": 99, "2": 98, "two": 97, "dog": 9, "brown": 8, "men": 7, "sled": 6})
    captions = split("a dog catches a frisbee", "a man")
    found = never_used([*REFERENCES, split("a brown cliff", "brown")], [*captions, ["a"]], counts)
    brown = {"word": "brown", "training": 8, "images": 2}
    assert found == [
        brown,
        {"word": "men", "training": 7, "images": 1},
        {"word": "sled", "training": 6, "images": 0},
    ]
    monkeypatch.setattr(score_details, "NEVER_USED", 1)
    assert never_used([*REFERENCES, split("brown")], captions, counts) == [brown]


def test_a_word_of_another_image_s_references_is_no_recall():
    captions = split("men", "dog")
    bands = recall_by_band(REFERENCES, captions, Counter())
    assert bands == {"0-9": {"words": 10, "recall": 0}}


def test_only_content_words_are_to_be_recalled():
    references = [split("the two of them 's in -lrb- $ 5:30 t-shirt 狗")]
    bands = recall_by_band(references, split("狗"), Counter())
    assert bands == {"0-9": {"words": 2, "recall": 0.5}}


def test_rare_recall_is_over_all_words_below_100():
    bands = {"0-9": {"words": 2, "recall": 0}, "10-99": {"words": 3, "recall": 1 / 3}}
    common = {"100-999": {"words": 9, "recall": 1}}
    assert rare_recall(bands | common) == pytest.approx(1 / 5)
    assert rare_recall(common) is None


# --------------------------------------------------------------------- words that no reference has


def test_unsupported_nouns_worked_by_hand(wordnet):
    """A plural is the same noun, a verb is none; another image's do not count, a word twice counts once."""
    references = [split("a dog runs", "dog"), split("the ball"), split("a large thing")]
    captions = split("dogs and ball and ball", "a ball runs", "wakeboarder and dog")
    # dogs, ball*; ball; wakeboarder*, dog*
    assert unsupported(references, captions, "nouns") == {
        "captions": 2 / 3,
        "words": 3 / 5,
        "written": 5,
    }


def test_unsupported_colours_worked_by_hand(no_wordnet):
    references = [split("a grey cat", "a cat"), split("blonde hair"), split("a dog"), split("x")]
    captions = split("a gray and white cat", "blond hair", "a brown black dog", "a dog")
    assert unsupported(references, captions, "colours") == {
        "captions": 2 / 4,
        "words": 3 / 5,
        "written": 5,
    }


def test_unsupported_numbers_worked_by_hand(wordnet):
    """In letters or digits; "seven", which WordNet knows as a noun, is no noun here."""
    references = [split("2 dogs", "dogs"), split("a dog"), split("a dog")]
    captions = split("two dogs", "seven dogs", "a dog")
    numbers = unsupported(references, captions, "numbers")
    assert numbers == {"captions": 1 / 3, "words": 1 / 2, "written": 2}
    assert unsupported(references, captions, "nouns")["captions"] == 0


def test_nouns_are_not_told_without_wordnet_and_no_words_have_no_share(no_wordnet):
    assert unsupported(REFERENCES, split("a zebra", "a zebra"), "nouns") is None
    nothing = {"captions": 0, "words": None, "written": 0}
    assert unsupported(REFERENCES, split("a zebra", ""), "colours") == nothing
    assert unsupported([], [], "colours") == nothing


# ------------------------------------------------------------------------------------- by length


def test_bands_of_length():
    bands = {n: length_band(["a"] * n) for n in (0, 7, 8, 10, 11, 13, 14, 40)}
    assert list(bands.values()) == [
        "0-7", "0-7", "8-10", "8-10", "11-13", "11-13", "14+", "14+",
    ]  # fmt: skip


def test_scores_by_length_are_those_of_their_images_with_all_images_document_frequencies():
    texts = [f"a dog number{i} runs over the green grass today".split() for i in range(6)]
    references = {i: [" ".join(text)] for i, text in enumerate(texts)}
    short = dict.fromkeys(range(2), "a dog runs")
    exact = {i: " ".join(texts[i]) for i in range(2, 6)}
    scorer = CaptionScorer(references)
    scores, per_image = scorer.score(short | exact, group_of=length_band)
    groups = scores["groups"]
    assert {name: group["images"] for name, group in groups.items()} == {"0-7": 2, "8-10": 4}
    assert groups["8-10"]["BLEU-4"] == pytest.approx(1)
    assert groups["8-10"]["CIDEr"] == pytest.approx(10) and groups["0-7"]["BLEU-4"] == 0
    for name, images in (("0-7", range(2)), ("8-10", range(2, 6))):
        mean = sum(per_image[i]["CIDEr"] for i in images) / len(images)
        assert groups[name]["CIDEr"] == pytest.approx(mean)
    assert "groups" not in scorer.score(short | exact)[0]
    assert CaptionScorer({}).score({}, group_of=length_band)[0]["groups"] == {}


def test_describe_puts_them_together(no_wordnet):
    references = {"b.jpg": ["A red sled on snow."], "a.jpg": ["Two dogs run!"]}
    hypotheses = {"a.jpg": "three brown dogs run", "b.jpg": "a red sled"}
    training = ["a sled"] * 12 + ["Dogs run"] * 100
    scorer = CaptionScorer(references, training)
    scores, _ = scorer.score(hypotheses, group_of=length_band)
    details = describe(scorer, hypotheses, scores["groups"])
    assert details["recall"] == {
        "0-9": {"words": 2, "recall": 0.5},  # red, snow
        "10-99": {"words": 1, "recall": 1},  # sled
        "100-999": {"words": 2, "recall": 1},  # dogs, run
    }
    assert details["rare_recall"] == pytest.approx(2 / 3) and details["never_used"] == []
    assert details["unsupported"] == {
        "nouns": None,
        "colours": {"captions": 0.5, "words": 0.5, "written": 2},
        "numbers": {"captions": 0.5, "words": 1, "written": 1},
    }
    assert details["by_length"] == scores["groups"] and scores["groups"]["0-7"]["images"] == 2
    unknown = describe(CaptionScorer(references), hypotheses, scores["groups"])
    assert unknown == details | {"recall": None, "never_used": None, "rare_recall": None}


# ------------------------------------------------------------------------------------- dullness

BEFORE = {"CIDEr": 0.5, "vocabulary_used": 300, "share_unique": 0.9, "rare_recall": 0.04}


def test_a_better_score_with_duller_captions_is_said_to_be_one():
    after = {"CIDEr": 0.52, "vocabulary_used": 250, "share_unique": 0.89, "rare_recall": 0.03}
    line = "CIDEr 0.5000 -> 0.5200, but the captions are duller: words used 300 -> 250, "
    assert duller(BEFORE, after) == line + "recall of rare words 0.04 -> 0.03"
    better = duller(BEFORE, after | {"share_unique": 1})
    assert better == line + "recall of rare words 0.04 -> 0.03; though unique captions 0.9 -> 1"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"CIDEr": 0.5}, False),  # no better
        ({"CIDEr": 0.4}, False),
        ({"vocabulary_used": 286}, False),  # within 5 %
        ({"vocabulary_used": 284}, True),
        ({"vocabulary_used": 284, "share_unique": 0.99}, False),  # one fell, one rose
        ({"vocabulary_used": 284, "share_unique": 0.99, "rare_recall": 0.01}, True),
        ({"vocabulary_used": 400}, False),
    ],
)
def test_captions_are_duller_if_more_measures_fell_than_rose(changed, said):
    after = BEFORE | {"CIDEr": 0.52} | changed
    assert (duller(BEFORE, after) is not None) == said


def test_what_one_of_two_tests_lacks_is_not_compared():
    after = {"CIDEr": 0.52, "vocabulary_used": 200}
    old = {"CIDEr": 0.5, "vocabulary_used": 300, "share_unique": 0.9}
    said = "CIDEr 0.5000 -> 0.5200, but the captions are duller: words used 300 -> 200"
    assert duller(old, after) == said
    assert duller({"CIDEr": 0.5}, after) is None and duller({}, after) is None


TESTED = {"dataset_type": "flickr8k", "split": "test", "images": 500}
DETAILS = {"rare_recall": 0.02, "unsupported": {"nouns": None, "colours": {"captions": 0.25}}}
SCORES = TESTED | BEFORE | {"CIDEr": 0.52, "METEOR": None, "details": DETAILS}
del SCORES["rare_recall"]


def test_headlines_are_the_numbers_that_there_are():
    expected = {"CIDEr": 0.52, "vocabulary_used": 300, "share_unique": 0.9, "rare_recall": 0.02}
    assert headlines(SCORES) == expected | {"unsupported_colours": 0.25}
    assert headlines({"CIDEr": "0.5", "details": [1], "attention": {"peak_in_box": 1}}) == {
        "peak_in_box": 1
    }


def test_an_earlier_test_of_the_same_images_is_compared(tmp_path):
    path = tmp_path / "test_metrics.json"
    assert duller_than_before(path, SCORES) is None  # there is none
    earlier = SCORES | {"CIDEr": 0.5, "details": DETAILS | {"rare_recall": 0.04}}
    path.write_text(json.dumps(earlier))
    said = "CIDEr 0.5000 -> 0.5200, but the captions are duller: recall of rare words 0.04 -> 0.02"
    assert duller_than_before(path, SCORES) == said
    for content in ("{", "[1]", json.dumps(earlier | {"images": 499}), json.dumps({"CIDEr": 0.1})):
        path.write_text(content)
        assert duller_than_before(path, SCORES) is None


# ----------------------------------------------------------------------------------------- seeds


def test_spread_worked_by_hand():
    """The standard deviation divides by n - 1: of 0.4, 0.5, 0.6 it is 0.1."""
    tests = [
        {"CIDEr": 0.4, "BLEU-4": 0.2},
        {"CIDEr": 0.6, "BLEU-4": 0.2, "rare_recall": 0.1},
        {"CIDEr": 0.5, "BLEU-4": 0.2},
    ]
    rows = spread(tests)
    assert list(rows) == ["BLEU-4", "CIDEr"]
    mean = {"mean": pytest.approx(0.5), "sd": pytest.approx(0.1)}
    assert rows["CIDEr"] == mean | {"lowest": 0.4, "highest": 0.6}
    assert rows["BLEU-4"]["sd"] == 0


RUNS = [
    TESTED
    | {"checkpoint": f"{name}/best.pt", "seed": seed, "CIDEr": cider, "vocabulary_used": words}
    for name, seed, cider, words in (("a", 0, 0.5, 300), ("b", 1, 0.58, 260), ("c", 2, 0.54, 310))
]


def test_over_seeds_puts_them_together():
    """The mean of words used is 290, of which 260 is 90 %."""
    summary = over_seeds(RUNS)
    assert {key: summary[key] for key in TESTED} == TESTED
    assert summary["checkpoints"][1] == {
        "checkpoint": "b/best.pt", "seed": 1, "CIDEr": 0.58, "vocabulary_used": 260,
    }  # fmt: skip
    assert summary["spread"] == spread(list(map(headlines, RUNS)))
    said = "CIDEr 0.5400 -> 0.5800, but the captions are duller: words used 290 -> 260"
    assert summary["duller"] == said
    assert seeds_table(summary).splitlines() == [
        "flickr8k test: 3 checkpoints",
        "  seed 0: CIDEr 0.5000  a/best.pt",
        "  seed 1: CIDEr 0.5800  b/best.pt",
        "  seed 2: CIDEr 0.5400  c/best.pt",
        "                             mean        sd    lowest   highest",
        "  CIDEr                    0.5400    0.0400    0.5000    0.5800",
        "  vocabulary_used        290.0000   26.4575  260.0000  310.0000",
        "  sd: standard deviation of a sample, over n - 1",
        f"  the highest CIDEr against the mean: {said}",
    ]
    alike = over_seeds([run | {"vocabulary_used": 300} for run in RUNS])
    assert alike["duller"] is None and "highest CIDEr" not in seeds_table(alike)


# ---------------------------------------------------------------------------------------- tables


def test_the_console_s_table():
    colours = {"captions": 0.25, "words": 0.5, "written": 4}
    details = {
        "rare_recall": 0.0,
        "recall": {"0-9": {"words": 2, "recall": 0.0}, "1000+": {"words": 10, "recall": 0.3}},
        "unsupported": {
            "nouns": {"captions": 0.75, "words": 0.125, "written": 9},
            "colours": colours,
            "numbers": {"captions": 0.0, "words": None, "written": 0},
        },
        "by_length": {"0-7": {"images": 3, "BLEU-4": 0.25, "CIDEr": 1.5, "WER": 1.0}},
    }
    lines = details_table(details).splitlines()
    assert lines == [
        "  content words of the references, by their number in training captions",
        "                     0-9    1000+",
        "    words              2       10",
        "    recall         0.000    0.300",
        "    rare_recall, of those below 100: 0.0000",
        "  words that no reference has: share of captions with one, share of written words",
        "                   nouns  colours  numbers",
        "    captions       0.750    0.250    0.000",
        "    words          0.125    0.500     none",
        "  captions by their number of words",
        "                     0-7",
        "    images             3",
        "    BLEU-4         0.250",
        "    CIDEr          1.500",
    ]
    lines[6:9] = [
        "                 colours",
        "    captions       0.250",
        "    words          0.500",
        "    nltk finds no WordNet: nouns are not told",
    ]
    unknown = {"recall": None, "rare_recall": None}
    without = details | unknown | {"unsupported": {"nouns": None, "colours": colours}}
    assert details_table(without).splitlines() == lines[5:]


def test_it_needs_no_torch():
    code = "import sys, score_details; print({'nltk', 'spacy', 'torch'} & sys.modules.keys())"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert loaded == "set()\n"
