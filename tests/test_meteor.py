"""meteor.py against values by hand, METEOR's own jar where Java is, and published scores."""

import gzip
import json
import random
import shutil
import subprocess

import numpy as np
import pytest
from test_metrics_utils import ORACLE, ROOT, needs_oracle, read_oracle

import meteor
from meteor import DELTA, GAMMA, Aligner, Lexicon, Text, meteor_from_sums, normalize
from metrics_utils import CaptionScorer, tokenize

CAPTIONS = ROOT.parent / "shared" / "data" / "flickr8k" / "captions.txt"
TABLES = meteor.find_tables()
needs_tables = pytest.mark.skipif(TABLES is None, reason="pycocoevalcap is not installed")

# ------------------------------------------------------------------------------------------ by hand

FUNCTION_WORDS = frozenset(("a", "the", "in", "of"))
SYNSETS = {"dog": "7 8", "hound": "8", "jog": "3", "run": "2 3", "box": "5", "case": "5 6"}
LEXICON = Lexicon({}, FUNCTION_WORDS, SYNSETS, {"ran": ["run"]})
PARAPHRASES = {"before": {"in front of": 0}, "grass land": {"field": 1}}


def statistics(caption, reference, paraphrases=PARAPHRASES):
    """The columns of `meteor_from_sums` for two texts, by the small tables above."""
    aligner = Aligner(LEXICON, paraphrases)
    texts = (Text(text.split(), LEXICON, aligner.phrases) for text in (caption, reference))
    return np.array(aligner.statistics(*texts))


def score(caption, reference):
    return meteor_from_sums(statistics(caption, reference))


def f_mean(precision, recall):
    return precision * recall / (0.85 * precision + 0.15 * recall)


def penalty(chunks, matches):
    return 1 - GAMMA * (chunks / matches) ** 0.2


def test_content_words_weigh_three_times_as_much_as_function_words():
    columns = statistics("the dog sits", "the dog of men runs")
    assert columns.tolist() == [1, 1.75, 1, 2.75, 2, 1]  # 0.25 + 0.75 matched; two words, one chunk
    expected = f_mean(1 / 1.75, 1 / 2.75) * penalty(1, 2)
    assert score("the dog sits", "the dog of men runs") == pytest.approx(expected)
    assert score("sits dog", "runs dog") > score("sits the", "runs the")


@pytest.mark.parametrize(
    ("caption", "reference", "weight"),
    [
        ("dog", "dog", 1.0),
        ("trees", "tree", 0.6),
        ("hound", "dog", 0.8),
        ("hounds", "dog", 0.8),  # by the ending s
        ("boxes", "case", 0.8),  # by xes
        ("ran", "jog", 0.8),  # by the list of irregular forms
        ("dog", "cat", 0.0),
        ("dogs", "dog", 0.0),  # the jar: a double match, so not certain, that gains nothing
    ],
)
def test_weight_of_each_module(caption, reference, weight):
    assert score(caption, reference) == pytest.approx(weight)
    assert score(reference, caption) == pytest.approx(weight)


@pytest.mark.parametrize("swap", [False, True])
def test_paraphrases_match_phrases_of_any_length_and_both_ways(swap):
    texts = ["dog in front of field", "dog before grass land"]
    columns = statistics(*(texts[::-1] if swap else texts))
    long, short = 0.75 + 0.6 * (0.25 + 0.75 + 0.25 + 0.75), 0.75 + 0.6 * (0.75 + 1.5)
    matched = [short, long] if swap else [long, short]
    assert [columns[0], columns[2]] == pytest.approx(matched)
    assert columns[4:].tolist() == [(5 + 4) / 2, 0]


def test_chunks_are_matches_side_by_side_in_both_texts():
    assert statistics("dog runs in grass", "dog runs in grass")[5] == 0  # all words, one chunk
    assert statistics("dog runs in grass", "dog runs in grass now")[5] == 1
    assert statistics("in grass dog runs", "dog runs in grass")[5] == 2
    assert statistics("dog now runs in", "dog runs in")[5] == 2
    assert score("grass dog", "dog grass") == pytest.approx(1 - GAMMA)  # two chunks of two matches


def test_a_corpus_is_scored_by_sums_in_which_perfect_captions_have_no_chunk():
    sums = statistics("dog runs", "dog runs") + statistics("grass dog now", "dog grass")
    expected = f_mean(4 / 5, 1) * penalty(2, 4)  # four of five words match; two chunks, not three
    assert meteor_from_sums(sums) == pytest.approx(expected)


def test_the_best_reference_counts():
    rows = Aligner(LEXICON, {}).best_statistics(["dog"], [["cat"], ["dog", "now"], ["now", "dog"]])
    assert rows.tolist() == [DELTA, DELTA, DELTA, 2 * DELTA, 1, 1]


@pytest.mark.parametrize(("caption", "reference"), [("", "dog"), ("dog", ""), ("", ""), ("a", "b")])
def test_nothing_in_common_is_zero(caption, reference):
    with np.errstate(all="raise"):
        assert score(caption, reference) == 0


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ("a t-shirt -lrb- blue -rrb-", "a t shirt -lrb- blue -rrb-"),
        ("a-b-c", "a b-c"),  # the jar: b is taken by the first match
        ("dog 's do n't o'clock 5's", "dog ' s do n 't o 'clock 5 's"),
        ("the '70s", "the ' 70s"),
        ("mr. smith", "mr. smith"),
        ("the u.s. team", "the us team"),
        ("dog. 5", "dog . 5"),
        ("no. 5", "no. 5"),
        ("etc. x vs.", "etc. x vs."),
        ("2,000 a,b wow...", "2,000 a , b wow ..."),
        ("caf\u00e9 \u72ac!!", "caf\u00e9 \u72ac ! !"),
    ],
)
def test_normalization(tokens, words):
    """Right sides are the jar's own output."""
    assert normalize(tokens.split(), {"no": True, "vs": False}) == words.split()


# ------------------------------------------------------------------------------------- as the jar's

# Each is scored otherwise if the search does what its comment says. Values are the jar's.
CHOICES = [
    ("kids playing tag football", "young boys play touch football", 0.202643),  # pays its distance
    ("three boys playing soccer", "uniformed children playing soccer", 0.336931),  # skips first
    ("two male spectators", "two men are watching something", 0.128603),  # candidates backwards
    ("a dog is jumping into the water", "a dog jumps into the water", 0.46076),  # by place first
    (
        "a dog is running through the woods",
        "the two dogs are running into the woods",
        0.33954,
    ),  # 20
    (
        "a baby holds a game control above its head and laughs",
        "a young boy is holding a playstation controller over his head",
        0.126579,  # keeps 400 alignments
    ),
    ("person canoes in lake", "a man paddling in water", 0.103226),  # may skip certain matches
    ("dogs", "dog", 0.0),  # takes what gains nothing
    ("a ski resort", "people skiing down a slope", 0.038462),  # does not round gains down
    (
        "two boys are playing soccer",
        "three child soccer players go for the ball",
        0.1,
    ),  # no doubles
]


def segment_scores(references, captions):
    """METEOR of each caption: N lists of token lists, N token lists -> (N,)."""
    return meteor_from_sums(meteor.meteor_statistics(references, captions, TABLES))


@needs_tables
def test_choices_of_the_search():
    references = [[reference.split()] for _, reference, _ in CHOICES]
    scores = segment_scores(references, [caption.split() for caption, _, _ in CHOICES])
    assert scores == pytest.approx([expected for *_, expected in CHOICES], abs=1e-6)


def real_sets(number):
    """Real references and captions: an image's caption and its other four, or another image's."""
    if not CAPTIONS.is_file():
        pytest.skip(f"{CAPTIONS} is not here")
    images, draw = {}, random.Random(0)
    for line in CAPTIONS.read_text(encoding="utf-8").splitlines()[1:]:
        image, caption = line.split(",", 1)
        images.setdefault(image, []).append(tokenize(caption))
    drawn = draw.sample(sorted(images), number)
    own = [(images[image][1:], images[image][0]) for image in drawn]
    other = [(images[image], images[drawn[i - 1]][0]) for i, image in enumerate(drawn)]
    return [*own[::2], *other[1::2]]


def jar_scores(sets):
    """What the jar says of (references, caption) pairs, called as COCO's evaluation does.

    Returns: scores of the N captions, and of the corpus.
    """
    if not shutil.which("java"):
        pytest.skip("java is not on the path: nothing to compare with")
    command = f"java -jar -Xmx2G {meteor.JAR} - - -stdio -l en -norm".split()
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen(command, cwd=TABLES, **pipe) as jar:

        def ask(*parts):
            jar.stdin.write(" ||| ".join(parts) + "\n")
            jar.stdin.flush()

        rows = []
        for references, caption in sets:
            ask("SCORE", *map(" ".join, references), " ".join(caption))
            rows.append(jar.stdout.readline().strip())
        ask("EVAL", *rows)
        *scores, corpus = (float(jar.stdout.readline()) for _ in range(len(rows) + 1))
        jar.stdin.close()
    return scores, corpus


@pytest.mark.slow
@needs_tables
def test_the_jar_scores_real_captions_alike():
    sets = real_sets(300)
    sets += [([reference.split()], caption.split()) for caption, reference, _ in CHOICES]
    expected, corpus = jar_scores(sets)
    columns = meteor.meteor_statistics(*map(list, zip(*sets, strict=True)), TABLES)
    scores = meteor_from_sums(columns)
    assert scores == pytest.approx(expected, abs=1e-9)
    assert meteor_from_sums(columns.sum(axis=0)) == pytest.approx(corpus, abs=1e-9)
    assert scores[-len(CHOICES) :] == pytest.approx([value for *_, value in CHOICES], abs=1e-6)


@pytest.mark.slow
@needs_tables
@needs_oracle
@pytest.mark.parametrize("run", ["init_1", "merge_3"])
def test_published_meteor(run):
    references = {}
    for annotation in read_oracle("references.json")["annotations"]:
        references.setdefault(annotation["image_id"], []).append(annotation["caption"])
    hypotheses = {entry["image_id"]: entry["caption"] for entry in read_oracle(f"{run}.json")}
    scores, _ = CaptionScorer(references).score(hypotheses, meteor=True)
    published = json.loads((ORACLE / "published_scores.json").read_text())[run]["METEOR"]
    assert scores["METEOR"] == pytest.approx(published, abs=1e-9)


# ------------------------------------------------------------------------------------------- tables


def test_tables_are_read(tables):
    lexicon = meteor.read_lexicon(tables / meteor.JAR)
    assert lexicon.abbreviations == {"vs": False, "No": True}
    assert {"a", "the"} <= lexicon.function_words
    assert lexicon.synsets_of("cars") == lexicon.synsets_of("car") == {"6"}
    assert lexicon.synsets_of("autae") == {"5", "6"}
    path = tables / meteor.PARAPHRASES
    read = meteor.read_paraphrases(path, {"man", "before", "caf\u00e9"}, {"guy", "bar", "in front"})
    assert read == {"man": {"guy": 1}, "guy": {"man": 2}, "caf\u00e9": {"bar": 3}}


def test_blocks_of_the_table_may_end_anywhere(tables, monkeypatch):
    path, phrases = tables / meteor.PARAPHRASES, {"man", "before", "caf\u00e9"}
    whole = meteor._filtered(path, phrases)
    opened = gzip.open

    def open_in_small_blocks(path):
        file = opened(path)
        read = file.read
        file.read = lambda size: read(3)
        return file

    monkeypatch.setattr(meteor.gzip, "open", open_in_small_blocks)
    assert meteor._filtered(path, phrases) == whole
    assert whole == "before\nin front of\nman\nguy\nguy\nman\ncaf\u00e9\nbar\n"


@pytest.fixture
def filtered(tables, monkeypatch):
    """A list that grows by each set of phrases for which the whole table is read."""
    calls, read = [], meteor._filtered
    monkeypatch.setattr(meteor, "_filtered", lambda path, p: calls.append(p) or read(path, p))
    return calls


def score_men(tables, reference="a man"):
    return meteor_from_sums(meteor.meteor_statistics([[reference.split()]], [["a", "guy"]], tables))


def test_the_table_is_read_once_for_the_same_references(tables, filtered):
    first = score_men(tables)
    assert first == pytest.approx((0.25 + 0.6 * 0.75) / 1)  # all words in one chunk
    assert score_men(tables) == first
    meteor.meteor_statistics([[["a", "man"]]], [["quite", "other", "words"]], tables)
    assert len(filtered) == 1
    score_men(tables, "the man")
    score_men(tables)
    assert len(filtered) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:-3],
        lambda raw: raw + b"man\nwoman\n",
        lambda raw: raw.replace(b"guy", b"dog"),
        lambda raw: b"\xff\xfe\x00" + raw,
        lambda raw: b"\x80\x04cos\nsystem\n.",  # a pickle
    ],
)
def test_a_damaged_cache_is_read_anew(tables, filtered, damage):
    first = score_men(tables)
    whole = meteor.cache_file().read_bytes()
    meteor.cache_file().write_bytes(damage(whole))
    assert score_men(tables) == first
    assert len(filtered) == 2
    assert meteor.cache_file().read_bytes() == whole
    assert [path.name for path in meteor.cache_file().parent.iterdir()] == [
        meteor.cache_file().name
    ]


def test_another_table_is_read_anew(tables, filtered):
    first, path = score_men(tables), tables / meteor.PARAPHRASES
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"guy", b"dog")))
    assert score_men(tables) < first
    assert len(filtered) == 2


def test_scores_do_not_need_a_cache(tables, tmp_path, monkeypatch):
    first = score_men(tables)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made in it
    assert score_men(tables) == first
    assert (tmp_path / "file").read_text() == ""


def test_the_cache_is_in_the_user_s_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert meteor.cache_file().parent == tmp_path / ".cache" / "flickr_image_caption"


@pytest.mark.parametrize("name", [meteor.JAR, meteor.PARAPHRASES])
@pytest.mark.parametrize("keep", [0, 40, -20])
def test_a_damaged_table_is_one_error_that_names_it(tables, name, keep):
    path = tables / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{path.name}: cannot be read .*install pycocoevalcap"):
        score_men(tables)


def test_tables_are_found_only_where_both_are(tables, monkeypatch):
    class Spec:
        submodule_search_locations = (str(tables.parent),)

    monkeypatch.setattr(meteor.importlib.util, "find_spec", lambda name: Spec)
    assert meteor.find_tables() == tables
    (tables / meteor.PARAPHRASES).unlink()
    assert meteor.find_tables() is None
    monkeypatch.setattr(meteor.importlib.util, "find_spec", lambda name: None)
    assert meteor.find_tables() is None
