"""What a score hides: rare words, words that no reference has, captions by length, dullness, seeds.

    scores, _ = scorer.score(captions, group_of=length_band)
    scores["details"] = describe(scorer, captions, scores.pop("groups"))
    duller_than_before(path, scores)              # a line, if CIDEr rose that way
    over_seeds([scores, scores_of_another_seed])  # mean, standard deviation and limits of each

CIDEr and BLEU reward a caption that fits any picture of its kind, so a better one may come from
captions that say less. Words are tokens as `metrics_utils.tokenize` gives them. The references
hold what five people thought worth saying, not all that the picture shows: a word that none of them
has may be true.

[1] van Miltenburg et al. 2018, Measuring the Diversity of Automatic Image Descriptions.
[2] Rohrbach et al. 2018, Object Hallucination in Image Captioning.
[3] Fellbaum 1998, WordNet.
"""

import functools
import itertools
import operator
import statistics
from collections import Counter

import metrics_utils

# Bands, and where each begins: of a word's number in training captions, of words in a caption.
TRAINING_COUNTS = {"0-9": 0, "10-99": 10, "100-999": 100, "1000+": 1000}
CAPTION_LENGTHS = {"0-7": 0, "8-10": 8, "11-13": 11, "14+": 14}
RARE_BELOW = 100  # times in training captions; where a band begins
NEVER_USED = 24  # words that are listed
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
SPELLINGS = {str(digits): word for digits, word in enumerate(NUMBERS, start=1)}
SPELLINGS |= {"grey": "gray", "blonde": "blond", "golden": "gold"}
SPELLINGS |= {"men": "man"}  # which for WordNet are a work force, too
KINDS = ("nouns", "colours", "numbers")
DULLNESS = {  # scores that fall as captions become duller
    "vocabulary_used": "words used",
    "share_unique": "unique captions",
    "rare_recall": "recall of rare words",
}
NOTABLE = 0.05  # of the value before: a smaller change of one of them is not worth a word

# Where a test's JSON holds the numbers that are compared with other tests'.
_PLAIN = ("caption_length", "vocabulary_used", "share_unique", "share_copied", "share_cut")
_BY_CLIP = ("CLIPScore", "RefCLIPScore")
HEADLINES = {name: (name,) for name in (*metrics_utils.METRIC_NAMES, *_BY_CLIP, *_PLAIN)}
HEADLINES["rare_recall"] = ("details", "rare_recall")
HEADLINES |= {f"unsupported_{k}": ("details", "unsupported", k, "captions") for k in KINDS}
HEADLINES |= {name: ("attention", name) for name in ("peak_in_box", "noun_deletion_ratio")}

# ------------------------------------------------------------------------------------ kinds of words


@functools.cache
def kind_of(word):
    """A lower case English word's kind: nouns, colours, verbs, function words or others.

    Function words are spaCy's stop words, so "two" and "front" are. Nouns and verbs are what WordNet
    [3] counts as one more often than as anything else, whatever the word is in its sentence; without
    WordNet, and where it does not know the word, as in other languages, it is of the others.
    """
    if is_function_word(word):
        return "function words"
    if word in metrics_utils.COLOURS:
        return "colours"
    return {"n": "nouns", "v": "verbs"}.get(_part_of_speech(word), "others")


def is_function_word(word):
    """Whether it is among spaCy's stop words of English."""
    from spacy.lang.en.stop_words import STOP_WORDS  # takes a second, and few runs test

    return word in STOP_WORDS


def _part_of_speech(word):
    """WordNet's most frequent n, v, a or r, by uses counted in text, then senses; None if unknown."""
    wordnet = metrics_utils.find_wordnet()
    found = {}
    for part in "nvar" if wordnet else "":
        base, senses = wordnet.morphy(word, part), wordnet.synsets(word, part)
        lemmas = [lemma for sense in senses for lemma in sense.lemmas()]
        uses = sum(lemma.count() for lemma in lemmas if lemma.name().lower() == base)
        found |= {part: (uses, len(senses))} if senses else {}
    return max(found, key=found.get, default=None)


@functools.cache
def base_form(word):
    """What two spellings of a word have in common: "men" is "man", "grey" "gray", "2" "two".

    Plurals are WordNet's; without it they are words of their own.
    """
    if word in SPELLINGS:
        return SPELLINGS[word]
    wordnet = metrics_utils.find_wordnet()
    return (wordnet.morphy(word, "n") if wordnet else None) or word


# ---------------------------------------------------------------------------------- of one test's captions


def describe(scorer, hypotheses, groups):
    """What the captions of a split say and leave out.

    Args:
        scorer: `metrics_utils.CaptionScorer` of the split.
        hypotheses: {image id: caption}, of its images.
        groups: what it found of these captions with `group_of=length_band`.
    Returns: {"rare_recall": recall of words below RARE_BELOW, "recall": as `recall_by_band`,
        "never_used": as `never_used`, "unsupported": {kind of KINDS: as `unsupported`}, "by_length":
        {band: scores}}. The first three are None without training captions, "rare_recall" also if no
        such words occur.
    """
    references = list(scorer.references.values())
    captions = [metrics_utils.tokenize(hypotheses[image]) for image in scorer.references]
    counts = scorer.training[1] if scorer.training else None
    bands = recall_by_band(references, captions, counts) if counts else None
    return {
        "rare_recall": rare_recall(bands) if bands else None,
        "recall": bands,
        "never_used": never_used(references, captions, counts) if counts else None,
        "unsupported": {kind: unsupported(references, captions, kind) for kind in KINDS},
        "by_length": {band: groups[band] for band in CAPTION_LENGTHS if band in groups},
    }


def recall_by_band(references, captions, counts):
    """Recall of the references' content words, by how often training captions hold them.

    Args:
        references: of each image a list of captions; captions: one of each image. Lists of tokens.
        counts: Counter of the words of all training captions.
    Returns: {band of TRAINING_COUNTS: {"words": pairs of an image and a content word that at least
        one of its references has, "recall": share of them whose word the image's caption has}}, for
        the bands that have words. Content words begin with a letter and are no function words.
    Source: after [1], whose local recall is of all content words.
    """
    totals, hits = dict.fromkeys(TRAINING_COUNTS, 0), dict.fromkeys(TRAINING_COUNTS, 0)
    for texts, caption in zip(references, captions, strict=True):
        for word in set().union(*texts):
            if word[0].isalpha() and not is_function_word(word):
                band = band_of(counts[word], TRAINING_COUNTS)
                totals[band] += 1
                hits[band] += word in caption
    return {b: {"words": n, "recall": hits[b] / n} for b, n in totals.items() if n}


def rare_recall(bands):
    """Recall of the words below RARE_BELOW, from `recall_by_band`'s; None if there are none."""
    rare = [band for name, band in bands.items() if TRAINING_COUNTS[name] < RARE_BELOW]
    words = sum(band["words"] for band in rare)
    return sum(band["words"] * band["recall"] for band in rare) / words if words else None


def never_used(references, captions, counts):
    """The content words that training captions have most often and no caption has.

    Args: as of `recall_by_band`.
    Returns: at most NEVER_USED of {"word", "training": how often training captions have it, "images":
        number of images with a reference that has it}, the most frequent first.
    """
    written = set().union(*captions)
    images = Counter(itertools.chain.from_iterable(set().union(*texts) for texts in references))
    unused = (
        {"word": word, "training": count, "images": images[word]}
        for word, count in counts.most_common()
        if word not in written and word[0].isalpha() and not is_function_word(word)
    )
    return list(itertools.islice(unused, NEVER_USED))


def unsupported(references, captions, kind):
    """Captions with a noun, colour or number that none of their image's references has.

    Args: as of `recall_by_band`; kind: one of KINDS. Numbers are one to ten, in letters or digits.
    Returns: {"captions": share of the captions that hold such a word, "words": share of the captions'
        different words of that kind that are such, None if there are no words of the kind,
        "written": their number}. None for nouns without WordNet. Words are compared by `base_form`.
    Source: after CHAIRs and CHAIRi of [2], which are of COCO's objects, and count synonyms as one.
    """
    if kind == "nouns" and metrics_utils.find_wordnet() is None:
        return None
    written, alone, captions_with_one = 0, 0, 0
    for texts, caption in zip(references, captions, strict=True):
        known = {base_form(word) for text in texts for word in text}
        words = {base_form(word) for word in caption if _is_of(kind, word)}
        written += len(words)
        alone += len(words - known)
        captions_with_one += not words <= known
    return {
        "captions": captions_with_one / max(1, len(captions)),
        "words": alone / written if written else None,
        "written": written,
    }


def _is_of(kind, word):
    is_number = base_form(word) in NUMBERS  # WordNet takes "seven" for a noun
    return is_number if kind == "numbers" else not is_number and kind_of(word) == kind


def length_band(caption):
    """A caption, a list of tokens -> the band of CAPTION_LENGTHS that it is in."""
    return band_of(len(caption), CAPTION_LENGTHS)


def band_of(number, bands):
    """The last of the bands {name: where it begins}, in rising order, that begins at or below it."""
    return [band for band, start in bands.items() if start <= number][-1]


# ------------------------------------------------------------------------------- one test and others


def headlines(scores):
    """{name of HEADLINES: number} of those that a test's scores, as its JSON holds them, have."""
    found = {}
    for name, keys in HEADLINES.items():
        value = scores
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float):
            found[name] = value
    return found


def duller(before, after):
    """A line that says so where CIDEr rose with duller captions; else None.

    Args: `headlines` of two tests of the same images.
    Captions are duller if, of the scores in DULLNESS that changed by more than NOTABLE, more fell
    than rose.
    """
    if "CIDEr" not in before or before["CIDEr"] >= after["CIDEr"]:
        return None
    names = [name for name in DULLNESS if name in before and name in after]
    changed = [name for name in names if abs(after[name] - before[name]) > NOTABLE * before[name]]
    changes = {n: f"{DULLNESS[n]} {before[n]:.3g} -> {after[n]:.3g}" for n in changed}
    fell = [change for name, change in changes.items() if after[name] < before[name]]
    rose = [change for name, change in changes.items() if after[name] > before[name]]
    if len(fell) <= len(rose):
        return None
    score = f"CIDEr {before['CIDEr']:.4f} -> {after['CIDEr']:.4f}"
    though = f"; though {', '.join(rose)}" if rose else ""
    return f"{score}, but the captions are duller: {', '.join(fell)}{though}"


def duller_than_before(path, scores):
    """`duller` of these scores against those of an earlier test of the same images, if `path` has them."""
    try:
        earlier = metrics_utils.read_json(path)
    except ValueError:
        return None
    tested = ("dataset_type", "split", "images")
    if not isinstance(earlier, dict) or any(earlier.get(key) != scores[key] for key in tested):
        return None
    return duller(headlines(earlier), headlines(scores))


def over_seeds(tests):
    """What scores of several checkpoints, as test mode writes them, come to.

    Returns: {"dataset_type", "split", "images", "checkpoints": [{"checkpoint", "seed", and its
        `headlines`}], "spread": as `spread`, "duller": None, or the line of `duller` of the one with
        the highest CIDEr against their mean}.
    """
    rows = list(map(headlines, tests))
    spreads = spread(rows)
    mean, best = (
        {name: row["mean"] for name, row in spreads.items()},
        max(rows, key=operator.itemgetter("CIDEr")),
    )
    return {
        **{key: tests[0][key] for key in ("dataset_type", "split", "images")},
        "checkpoints": [
            {"checkpoint": test["checkpoint"], "seed": test["seed"]} | row
            for test, row in zip(tests, rows, strict=True)
        ],
        "spread": spreads,
        "duller": duller(mean, best),
    }


def spread(tests):
    """`headlines` of several tests -> {name: {"mean", "sd", "lowest", "highest"}} of what all have.

    The standard deviation is that of a sample, over n - 1.
    """
    rows = {name: [test[name] for test in tests if name in test] for name in HEADLINES}
    return {
        name: {
            "mean": statistics.fmean(values),
            "sd": statistics.stdev(values),
            "lowest": min(values),
            "highest": max(values),
        }
        for name, values in rows.items()
        if len(values) == len(tests)
    }


# ------------------------------------------------------------------------------------------- tables


def details_table(details):
    """What `describe` found, as a console's lines."""
    lines, rare = [], details["rare_recall"]
    if details["recall"]:
        lines += ["  content words of the references, by their number in training captions"]
        lines += _columns(details["recall"], "words", "recall")
    if rare is not None:
        lines += [f"    rare_recall, of those below {RARE_BELOW}: {rare:.4f}"]
    kinds = {kind: found for kind, found in details["unsupported"].items() if found}
    lines += ["  words that no reference has: share of captions with one, share of written words"]
    lines += _columns(kinds, "captions", "words")
    if "nouns" not in kinds:
        lines += ["    nltk finds no WordNet: nouns are not told"]
    lines += ["  captions by their number of words"]
    lines += _columns(details["by_length"], "images", "BLEU-4", "CIDEr")
    return "\n".join(lines)


def _columns(values, *rows):
    """{column: {row: number or None}} as lines."""
    lines = [f"    {'':11}" + "".join(f"{column:>9}" for column in values)]
    for row in rows:
        cells = (_cell(column[row]) for column in values.values())
        lines.append(f"    {row:11}" + "".join(f"{cell:>9}" for cell in cells))
    return lines


def _cell(value):
    if value is None:
        return "none"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def seeds_table(summary):
    """What `over_seeds` found, as a console's lines."""
    each = summary["checkpoints"]
    lines = [f"{summary['dataset_type']} {summary['split']}: {len(each)} checkpoints"]
    lines += [
        f"  seed {row['seed']}: CIDEr {row['CIDEr']:.4f}  {row['checkpoint']}" for row in each
    ]
    columns = ("mean", "sd", "lowest", "highest")
    lines += [f"  {'':21}" + "".join(f"{column:>10}" for column in columns)]
    for name, row in summary["spread"].items():
        lines += [f"  {name:21}" + "".join(f"{row[column]:10.4f}" for column in columns)]
    lines += ["  sd: standard deviation of a sample, over n - 1"]
    if summary["duller"]:
        lines += [f"  the highest CIDEr against the mean: {summary['duller']}"]
    return "\n".join(lines)
