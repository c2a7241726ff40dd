"""Caption metrics: references and hypotheses in, scores out.

    python metrics_utils.py --references references.json --hypotheses captions.json

reads COCO's annotation and results formats and prints one JSON object. BLEU-1..4, ROUGE-L and
CIDEr-D follow the COCO caption toolkit and need no Java; CIDEr takes its document frequencies from
the references it is given. WER is jiwer's word edits to the nearest reference, over that
reference's words. METEOR is version 1.5, as the toolkit's jar scores it: meteor.py. Scores lie in
0..1, except CIDEr, 0..10, and WER, which passes 1 when captions are far too long.

Shapes: N images, S = 21 statistics per image, R bootstrap resamples, T words of a caption,
(h, w) grid cells.
[1] Papineni et al. 2002, BLEU.  [2] Lin 2004, ROUGE.
[3] Vedantam et al. 2015, CIDEr.  [4] Chen et al. 2015, COCO.
"""

import argparse
import functools
import itertools
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from meteor import find_tables, meteor_from_sums, meteor_statistics

METRIC_NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "WER")
METEOR_VARIANT = "METEOR 1.5, English, -norm, default weights: comparable with published figures"
ROUGE_BETA = 1.2  # [4]: recall weighs more than precision
CIDER_SIGMA = 6.0  # [3]: words, width of the length penalty
COLOURS = {  # in English captions
    "beige", "black", "blond", "blonde", "blue", "brown", "gold", "golden", "gray", "green", "grey",
    "maroon", "orange", "pink", "purple", "red", "silver", "tan", "turquoise", "violet", "white",
    "yellow",
}  # fmt: skip

# ---------------------------------------------------------------------------------------- tokenizer

# Scripts without spaces between words, Thai to Chinese; combining marks, which \w lacks; letters
# and digits of all other scripts.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\U00020000-\U0003ffff"
)
_MARKS = "\u0300-\u036f\u0591-\u05bd\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff\u200c\u200d"
_LETTER = rf"(?:[^\W_{_UNSPACED}]|[{_MARKS}])"
_ABBREVIATIONS = (
    "jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri|mr|mrs|ms|drs?"
    "|profs?|sens?|reps?|govs?|lt|col|gen|adm|rev|maj|sgt|cpl|pvt|mt|capt|ste?|ave|pres|hon|jr|sr"
    "|bros|esq|blvd|rd|inc|cos?|corp|ltd|plc|dept|univ|intl|assn|etc|al|vs|cf|est|ext|sq|tel|ft|ala"
    "|ariz|calif|colo|conn|dak|del|fla|ga|ind|kans?|ky|la|md|mich|minn|mo|mont|neb|nev|okla|pa|penn"
    "|tenn|tex|va|vt|wisc?|wyo"
)

# One alternative per kind of token; the first that matches wins. What none of them matches is
# dropped: spaces, quotation marks and the toolkit's list of punctuation (. , : ; ? ! - -- ...).
_PTB_TOKEN = re.compile(
    rf"""
      https?://[^\s"<>|()]*[^\s"<>|.!?(){{}},-]                   # web addresses
    | (?:[a-z0-9-]{{1,63}}\.){{1,4}}(?:com|net|org|edu)\b         # flickr.com
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b)  # two words in one
    | [a-z]*[a-mo-z](?=n't\b) | n't\b                             # ca n't
    | 'n' | '(?:[smdn]|re|ve|ll|em|till?|cause|[2-9]0s)\b | '\d\d(?!\S)  # 's 'n' '70s
    | 't(?=(?:is|was)\b) | y'(?=[a-z]) | ol' | c'mon | s'mores    # 't is, y' all
    | [a-z]+[aeiouy]'(?:[aeiou]|(?-i:[A-Z]))[a-z]*                # ma'am
    | (?-i:[A-HJ-XZ])'[a-z]{{2,}}                                 # O'Brien
    | (?-i:[A-Z]+(?:[+&][A-Z]+)+)                                 # AT&T, in capitals only
    | [a-z](?:\.[a-z])+(?!\S) | [a-z](?:\.[a-z])*\.               # u.s. p.
    | (?:{_ABBREVIATIONS})\. | nos?\.(?=\s*\d)                    # mr.
    | {_LETTER}+(?:-{_LETTER}+)*(?:/{_LETTER}+(?:-{_LETTER}+)*){{1,2}}  # hot-dog/soda 1/2
    | [a-z0-9][a-z0-9.,]{{0,40}}(?:-[a-z0-9]+)+                   # 2.5-inch
    | [-+]?\d*(?:[.:,]\d+)+ | [-+]\d+                             # 2,000 5:30 -5
    | (?:[dol]'(?={_LETTER}{{2}}))?{_LETTER}+(?:[-_]{_LETTER}+)*(?:\.(?=[,;:]))?  # t-shirt o'clock
    | [{_UNSPACED}]                                               # one character: Chinese, Thai
    | [?!]{{2,}} | -[lr][rsc]b- | @\w+ | @+ | \#[a-z]+ | \#+ | \*+ | _+  # !! -lrb- @name #tag
    | [][(){{}}$%&+/<=>\\^|~]                                     # brackets and symbols
    | [\u00a2-\u00a9\u00ac-\u00ba\u00bc-\u00be\u20a0-\u20cf\u2100-\u2bff]
    """,
    re.IGNORECASE | re.VERBOSE,
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def tokenize(caption):
    """Split a raw caption as the COCO toolkit's PTBTokenizer (Stanford's 3.4.1) does, without Java.

    Lower case; punctuation dropped; "can't" is ca n't; "(" is -lrb-; hyphens and British spellings
    stay. One departure: scripts without spaces (Chinese, Japanese, Thai, ...) give a token per
    character. Stanford's makes one token of a sentence: every n-gram metric would be 0 or 1.
    """
    tokens = _PTB_TOKEN.findall(caption.replace("\u2019", "'"))
    return [_BRACKETS.get(token, token.lower()) for token in tokens]


# ------------------------------------------------------------------------------------------- scores


class CaptionScorer:
    """Score captions against one fixed set of references.

    What follows from the references alone is computed once, when it is first needed.

    Args:
        references: {image id: [raw caption, ...]}, at least one caption per image. These images are
            the scored split: their captions give CIDEr's document frequencies.
        training_captions: raw captions of the training images, for "share_copied", or None.
    Raises: ValueError naming the first image without reference captions.
    """

    def __init__(self, references, training_captions=None):
        for image, captions in references.items():
            if not captions:
                reason = "has no reference captions; each scored image needs at least one"
                raise ValueError(f"image {image!r} {reason}")
        self.raw_references, self.training_captions = references, training_captions

    @functools.cached_property
    def references(self):
        """{image id: [tokens of a caption, ...]}."""
        raw = self.raw_references.items()
        return {image: [tokenize(caption) for caption in captions] for image, captions in raw}

    @functools.cached_property
    def document_frequency(self):
        """Counter: the number of images whose references hold an n-gram."""
        per_image = (set().union(*map(count_ngrams, c)) for c in self.references.values())
        return Counter(itertools.chain.from_iterable(per_image))

    @functools.cached_property
    def cider_vectors(self):
        """{image id: [`_cider_vectors` of a caption, ...]}."""
        return {
            image: [self._cider_vectors(count_ngrams(caption)) for caption in captions]
            for image, captions in self.references.items()
        }

    @functools.cached_property
    def training(self):
        """(hashes of the training captions (n,), Counter of their words), or None without them.

        A hash takes 8 bytes, a caption's words a kilobyte.
        """
        if self.training_captions is None:
            return None
        counts = Counter()

        def hashes():
            for tokens in map(tokenize, self.training_captions):
                counts.update(tokens)
                yield hash(tuple(tokens))

        return np.fromiter(hashes(), np.int64), counts

    def score(self, hypotheses, *, meteor=False, bootstrap=0, seed=0, group_of=None):
        """Score one caption per image.

        Args:
            hypotheses: {image id: caption}, exactly the images of `references`.
            meteor: also compute METEOR, which takes seconds. Without pycocoevalcap's tables it is
                None, and stderr says how to get them.
            bootstrap: resamples for "intervals", 0 for none; drawn from `seed`.
            group_of: the name of the group that a caption, a list of tokens, is in; or None.
        Returns:
            scores: METRIC_NAMES first, floats (METEOR may be None); then what `_caption_statistics`
                returns and, with `bootstrap`, "intervals": {metric: [low, high]}, 95 % percentile
                intervals over images, document frequencies held fixed; and with `group_of`,
                "groups": {name: {"images": their number, and METRIC_NAMES over them}}, with the
                document frequencies of all images.
            per_image: {image id: {"BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "WER"}}. Only here BLEU-4
                is a sentence BLEU, with 1 added to the 2..4-gram counts (Lin and Och 2004), as most
                captions match no reference's 4-grams.
        Raises: ValueError naming the first image that has a caption but no references, or
            references but no caption, or a damaged table of METEOR.
        """
        self._check_images(hypotheses)
        captions = [tokenize(hypotheses[image]) for image in self.references]
        statistics = self._statistics(captions, find_meteor_tables() if meteor else None)
        scores = corpus_scores(statistics)
        scores |= self._caption_statistics(captions)
        if bootstrap:
            scores["intervals"] = bootstrap_intervals(statistics, bootstrap, seed)
        if group_of:
            scores["groups"] = group_scores(statistics, list(map(group_of, captions)))
        return scores, self._per_image(statistics)

    def _check_images(self, hypotheses):
        for image in (*hypotheses, *self.references):
            if image not in self.references:
                reason = "has a caption but no references; both must name the same images"
                raise ValueError(f"image {image!r} {reason}")
            if image not in hypotheses:
                reason = "has references but no caption; both must name the same images"
                raise ValueError(f"image {image!r} {reason}")

    def _per_image(self, statistics):
        """Statistics (N, S) -> {image id: {metric: value}}, with a sentence BLEU."""
        rows = metrics_from_sums(statistics, smoothing=1)
        return {
            image: {name: as_plain(rows[name][i]) for name in METRIC_NAMES[3:]}
            for i, image in enumerate(self.references)
        }

    def _statistics(self, captions, meteor_tables):
        """Captions (N token lists, in the order of `references`) -> (N, S) float.

        Columns are those of `metrics_from_sums`; METEOR's are NaN without its tables.
        """
        # nltk takes a second to import
        from nltk.translate.bleu_score import closest_ref_length, modified_precision

        edits = word_edits(list(self.references.values()), captions)
        table = np.full((len(captions), 21), np.nan)
        images = zip(table, self.references.items(), captions, edits, strict=True)
        for row, (image, references), caption, nearest in images:
            row[0:4] = [modified_precision(references, caption, n).numerator for n in range(1, 5)]
            # not nltk's denominators, which are 1 where no n-gram fits
            row[4:8] = np.maximum(0, len(caption) - np.arange(4))
            row[8:10] = len(caption), closest_ref_length(references, len(caption))
            row[10:12] = nearest
            row[12:14] = rouge_l(references, caption), self._cider(image, caption)
            row[14] = 1
        if meteor_tables:
            table[:, 15:] = meteor_statistics(self.references.values(), captions, meteor_tables)
        return table

    def _cider_vectors(self, counts):
        """Counter of n-grams -> ([({n-gram: tf-idf}, its norm) for n 1..4], number of bigrams)."""
        vectors = [{}, {}, {}, {}]
        for ngram, count in counts.items():
            idf = math.log(len(self.references) / max(1, self.document_frequency[ngram]))
            vectors[len(ngram) - 1][ngram] = count * idf
        pairs = [(vector, math.sqrt(sum(x * x for x in vector.values()))) for vector in vectors]
        return pairs, sum(count for ngram, count in counts.items() if len(ngram) == 2)

    def _cider(self, image, caption):
        """CIDEr-D of one caption, 0..10 [3]: 10 x mean similarity over n 1..4 and references."""
        pairs, length = self._cider_vectors(count_ngrams(caption))
        score = 0.0
        for reference_pairs, reference_length in self.cider_vectors[image]:
            penalty = math.exp(-((length - reference_length) ** 2) / (2 * CIDER_SIGMA**2))
            for pair, reference_pair in zip(pairs, reference_pairs, strict=True):
                score += self._similarity(pair, reference_pair, penalty)
        return 10 * score / 4 / len(self.references[image])

    @staticmethod
    def _similarity(pair, reference_pair, penalty):
        """Clipped cosine of two tf-idf vectors, each with its norm, times the length penalty."""
        (vector, norm), (reference, reference_norm) = pair, reference_pair
        # in the caption's order: a set's differs from run to run, and with it the sum's last bit
        shared = sum(
            min(x, reference[n]) * reference[n] for n, x in vector.items() if n in reference
        )
        return penalty * shared / (norm * reference_norm) if shared else 0.0

    def _caption_statistics(self, captions):
        """Captions (N token lists) -> the scores that need no references.

        Returns: "caption_length" (mean words), "vocabulary_used" (distinct words), "share_unique"
            (distinct captions over captions) and "share_copied" (share of captions that stand
            verbatim in the training captions; None where none were given).
        """
        images = max(1, len(captions))
        return {
            "caption_length": sum(map(len, captions)) / images,
            "vocabulary_used": len(set().union(*captions)),
            "share_unique": len(set(map(tuple, captions))) / images,
            "share_copied": self._share_copied(captions),
        }

    def _share_copied(self, captions):
        if self.training is None:
            return None
        hashes, (known, _) = [hash(tuple(caption)) for caption in captions], self.training
        return int(np.isin(hashes, known).sum()) / max(1, len(captions))


def metrics_from_sums(sums, smoothing=0):
    """Every metric from sums of per-image statistics: of an image, a corpus or each of R resamples.

    Args:
        sums: (..., S) float: matching n-grams and all n-grams, n 1..4; words of captions and of the
            references closest in length; WER's edits and reference words; ROUGE-L and CIDEr;
            images; the columns of `meteor_from_sums` (NaN: not computed).
        smoothing: added to matches and totals for n 2..4.
    Returns: {metric: (...) float} as in METRIC_NAMES. BLEU is 0 where no n-gram matches [1].
    """
    matches, totals, rest = sums[..., 0:4], sums[..., 4:8], np.moveaxis(sums[..., 8:15], -1, 0)
    words, closest_words, edits, best_words, rouge, cider, images = rest
    meteor = meteor_from_sums(sums[..., 15:])
    added = smoothing * np.array([0, 1, 1, 1])
    with np.errstate(divide="ignore"):  # log 0 = -inf, and exp takes it back to BLEU 0
        log_precision = np.log((matches + added) / np.maximum(1, totals + added))
    brevity = np.minimum(0, 1 - closest_words / np.maximum(1, words))  # log of the brevity penalty
    bleu = np.exp(np.cumsum(log_precision, axis=-1) / np.arange(1, 5) + brevity[..., None])
    images = np.maximum(1, images)
    wer = edits / np.maximum(1, best_words)
    values = (*np.moveaxis(bleu, -1, 0), meteor, rouge / images, cider / images, wer)
    return dict(zip(METRIC_NAMES, values, strict=True))


def corpus_scores(statistics):
    """Per-image statistics (n, S) -> {metric: float, or None if not computed}, over these images."""
    metrics = metrics_from_sums(statistics.sum(axis=0))
    return {name: as_plain(value) for name, value in metrics.items()}


def group_scores(statistics, groups):
    """Statistics (N, S), each image's group -> {group: {"images": number, metric: value}}."""
    groups = np.array(groups)
    rows = {group: statistics[groups == group] for group in sorted(set(groups.tolist()))}
    return {group: {"images": len(each)} | corpus_scores(each) for group, each in rows.items()}


def bootstrap_intervals(statistics, resamples, seed):
    """Per-image statistics (N, S) -> {metric: [low, high]}.

    The limits are 2.5 and 97.5 percentiles over resamples of the N images.
    """
    images, rng = len(statistics), np.random.default_rng(seed)
    if not images:
        return {}
    draws = (rng.integers(images, size=images) for _ in range(resamples))
    counts = (np.bincount(draw, minlength=images) for draw in draws)  # (N,) each
    metrics = metrics_from_sums(np.stack([count @ statistics for count in counts]))  # of (R, S)
    limits = {name: np.percentile(values, (2.5, 97.5)).tolist() for name, values in metrics.items()}
    return {name: limit for name, limit in limits.items() if not math.isnan(limit[0])}


def paired_bootstrap(differences, resamples=1000, seed=0):
    """Two models' scores of the same images, subtracted (N,) -> their mean, low and high.

    The limits are 2.5 and 97.5 percentiles of the mean over resamples of the N images: a difference
    is within the noise where 0 lies between them. For scores whose corpus value is the mean over images.
    Source: Koehn 2004, Statistical Significance Tests for Machine Translation Evaluation.
    """
    images, rng = len(differences), np.random.default_rng(seed)
    draws = (rng.integers(images, size=images) for _ in range(resamples))
    low, high = np.percentile([differences[draw].mean() for draw in draws], (2.5, 97.5))
    return float(differences.mean()), float(low), float(high)


def as_plain(value):
    """A number as JSON holds it: float, or None for NaN, which marks a metric not computed."""
    return None if math.isnan(value) else float(value)


def count_ngrams(tokens):
    """List of tokens -> Counter of its n-grams as tuples, n 1..4."""
    return Counter(
        tuple(tokens[i : i + n]) for n in range(1, 5) for i in range(len(tokens) - n + 1)
    )


def rouge_l(references, caption):
    """ROUGE-L of one caption, 0..1 [2].

    It is the F measure of the best precision and the best recall over the references [4].
    """
    common = [longest_common_subsequence(reference, caption) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(caption)
    recall = max(c / len(r) for c, r in zip(common, references, strict=True) if r)
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def longest_common_subsequence(first, second):
    """Length of the longest common subsequence of two token lists."""
    row = [0] * (len(second) + 1)  # row[j]: longest for the tokens of `first` so far and second[:j]
    for token in first:
        diagonal = 0
        for j, other in enumerate(second, 1):
            diagonal, row[j] = row[j], diagonal + 1 if token == other else max(row[j], row[j - 1])
    return row[-1]


def word_edits(references, captions):
    """Each caption's edits to its nearest reference (fewest edits, then longest), and its words.

    references: N lists of token lists; captions: N token lists -> list of N pairs (edits, words).
    """
    edits = iter(_edits_of_pairs(references, captions))
    candidates = [[(next(edits), -len(r)) for r in refs] for refs in references]
    return [(fewest, -negative_words) for fewest, negative_words in map(min, candidates)]


def _edits_of_pairs(references, captions):
    """The edits between every reference and its image's caption, image after image."""
    import jiwer

    images = zip(references, captions, strict=True)
    pairs = [(" ".join(r), " ".join(caption)) for refs, caption in images for r in refs]
    if not pairs:
        return []
    alignments = jiwer.process_words(*map(list, zip(*pairs, strict=True))).alignments
    return [sum(map(edit_length, alignment)) for alignment in alignments]


def edit_length(chunk):
    """Edits that one chunk of a jiwer alignment stands for."""
    if chunk.type == "equal":
        return 0
    return max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)


def find_wordnet():
    """nltk's WordNet, or None where it is not installed."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        return None
    return wordnet


def find_meteor_tables():
    """The folder of METEOR's tables, or None; then stderr says in one line how to get them."""
    tables = find_tables()
    if tables is None:
        reason = "the package pycocoevalcap, which has its tables, is not installed"
        hint = "get it with `pip install pycocoevalcap`; Java is not needed"
        print(f"METEOR is not computed: {reason}; {hint}", file=sys.stderr)
    return tables


# ---------------------------------------------------------------------------------------- attention


def peak_in_box(records):
    """How often the attention peak of a noun falls on its object, and that of a colour before it.

    Args:
        records: tuples (words, maps, boxes), one per caption. words: T str; maps: (T, h, w)
            attention, one per word; boxes: list of {"names": [noun, ...], "box": [x0, y0, x1, y1]},
            fractions of the picture's width and height.
    Returns:
        {"peak_in_box": share of nouns whose peak's cell has its centre in a box of that name,
        "chance": mean share of the picture that the noun's boxes cover, "ratio": the first over the
        second, "nouns": words that name a box, "colour_peak_in_box": the first of the colours right
        before them, "colours": how many those are}. A share of no words is None.
    """
    hits, shares, colour_hits = [], [], []
    for words, maps, boxes in records:
        for place, word in enumerate(words):
            named = np.array([box["box"] for box in boxes if word in box["names"]])  # (M, 4)
            if not len(named):
                continue
            hits.append(is_covered(named, *_peak(maps[place])).item())
            shares.append(union_area(named))
            if place and words[place - 1] in COLOURS:
                colour_hits.append(is_covered(named, *_peak(maps[place - 1])).item())
    rate, chance = (float(np.mean(each)) if hits else None for each in (hits, shares))
    return {
        "peak_in_box": rate,
        "chance": chance,
        "ratio": rate / chance if chance else None,
        "nouns": len(hits),
        "colour_peak_in_box": float(np.mean(colour_hits)) if colour_hits else None,
        "colours": len(colour_hits),
    }


def _peak(attention):
    """Map (h, w) -> [x], [y]: the centre of its largest cell, as fractions of the picture."""
    height, width = attention.shape
    row, column = np.unravel_index(np.argmax(attention), attention.shape)
    return [(column + 0.5) / width], [(row + 0.5) / height]


def is_covered(boxes, x, y):
    """Whether any box covers the points of a grid: boxes (M, 4), x (X,), y (Y,) -> (Y, X) bool.

    A box is x0, y0, x1, y1.
    """
    x0, y0, x1, y1 = boxes.T[..., None, None]  # (M, 1, 1) each
    x, y = np.asarray(x), np.asarray(y)[:, None]
    return ((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)).any(axis=0)


def union_area(boxes):
    """Area that boxes (M, 4) cover together.

    Their edges cut the plane into a grid whose cells are covered or not.
    """
    x, y = np.unique(boxes[:, 0::2]), np.unique(boxes[:, 1::2])
    covered = is_covered(boxes, (x[1:] + x[:-1]) / 2, (y[1:] + y[:-1]) / 2)
    return float((covered * np.outer(np.diff(y), np.diff(x))).sum())


def scores_table(scores):
    """Scores from `CaptionScorer.score` with `bootstrap` as a console's lines, with intervals."""
    lines = ["0-1 scale, CIDEr 0-10; bootstrap 95 % intervals over images"]
    for name in METRIC_NAMES:
        low, high = scores["intervals"].get(name, (0.0, 0.0))
        value = "not computed"
        if scores[name] is not None:
            value = f"{scores[name]:.4f}  [{low:.4f}, {high:.4f}]"
        lines.append(f"  {name + ' 1.5' * (name == 'METEOR'):17}{value}")
    plain = ("CLIPScore", "RefCLIPScore", "caption_length", "vocabulary_used", "share_unique")
    plain += ("share_copied", "share_cut")
    lines += [f"  {name:17}{scores[name]:.4g}" for name in plain if scores.get(name) is not None]
    return "\n".join(lines + _attention_lines(scores.get("attention", {})))


def _attention_lines(attention):
    """What `peak_in_box` and `attention_measures.measure` found, as a console's lines."""
    lines, method = [], attention.get("method", "attention")
    if attention.get("ratio") is not None:
        share, ratio = attention["peak_in_box"], attention["ratio"]
        lines.append(f"  {method} peak in its noun's box: {share:.3f}, {ratio:.1f} times chance")
        if attention["colours"]:
            lines.append(f"    of the colour before it: {attention['colour_peak_in_box']:.3f}")
    if not attention.get("words"):
        return lines
    lines += [
        f"  {method} maps of {attention['images']} images: entropy as a share of uniform, and nats that a",
        "  word loses with its map's heaviest 20 % of cells, or with as many random ones",
        f"    {'':15}{'words':>7}{'entropy':>9}{'heaviest':>10}{'random':>8}",
    ]
    for kind, words in attention["words"].items():
        entropy, fall = attention["entropy_share"][kind], attention["deletion"]["0.2"][kind]
        numbers = f"{words:7}{entropy:9.3f}{fall['map']:10.3f}{fall['random']:8.3f}"
        lines.append(f"    {kind:15}{numbers}")
    if attention["map_distance"] is not None:
        lines.append(f"    two words' maps: {attention['map_distance']:.3f} apart, of 1 at most")
    if not attention["wordnet"]:
        lines.append("    nltk finds no WordNet: nouns and verbs are among the others")
    return lines


# ------------------------------------------------------------------------------------------ command


def read_json(path):
    """Parsed content of a JSON file. Raises ValueError with one line naming the file."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None


def read_captions(path, entries):
    """Yield (image id, caption) from COCO entries. Raises ValueError naming the first bad entry."""
    if not isinstance(entries, list):
        raise ValueError(f'{path}: expected a list of {{"image_id": 1, "caption": "..."}}')
    for number, entry in enumerate(entries, 1):
        values = entry if isinstance(entry, dict) else {}
        image, caption = values.get("image_id"), values.get("caption")
        if not isinstance(image, (int, str)) or not isinstance(caption, str):
            raise ValueError(
                f'{path}: entry {number} is not {{"image_id": number or text, "caption": text}}'
            )
        yield image, caption


def read_references(path):
    """COCO annotation file -> {image id: [caption, ...]}. Raises ValueError naming the file."""
    content = read_json(path)
    if not isinstance(content, dict) or "annotations" not in content:
        raise ValueError(
            f'{path}: not a COCO annotation file: expected an object with a list "annotations"'
        )
    references = {}
    for image, caption in read_captions(path, content["annotations"]):
        references.setdefault(image, []).append(caption)
    return references


def read_boxes(path, images):
    """Object boxes -> {image: boxes as `peak_in_box` takes them}.

    Raises ValueError, one line that names the file, if it holds anything else, or boxes of none of
    these images.
    """
    content = read_json(path)
    per_image = content.values() if isinstance(content, dict) else [None]
    if not all(isinstance(boxes, list) and all(map(_is_box, boxes)) for boxes in per_image):
        raise ValueError(
            f'{path}: expected {{"a.jpg": [{{"names": ["dog"], "box": [x0, y0, x1, y1]}}, ...]}}, '
            "fractions of the picture's width and height"
        )
    if not content.keys() & set(images):
        raise ValueError(f"{path}: it has boxes of none of the images that are scored")
    return content


def _is_box(entry):
    match entry:
        case {"names": list(names), "box": [x0, y0, x1, y1]}:
            numbers = all(isinstance(corner, int | float) for corner in (x0, y0, x1, y1))
            inside = numbers and 0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1  # NaN is not
            return inside and all(isinstance(name, str) for name in names)
    return False


def read_hypotheses(path):
    """COCO results file -> {image id: caption}.

    Raises ValueError naming the file, also if an image comes twice.
    """
    hypotheses = {}
    for image, caption in read_captions(path, read_json(path)):
        if image in hypotheses:
            raise ValueError(f"{path}: image {image!r} has two captions; expected one per image")
        hypotheses[image] = caption
    return hypotheses


def main(argv=None):
    """The command: one JSON object on stdout. A wrong file is one line on stderr and status 2."""
    parser = argparse.ArgumentParser(
        description="Score captions: BLEU, METEOR 1.5, ROUGE-L, CIDEr-D, WER; one JSON object on stdout.",
        usage="metrics_utils.py --references R.json --hypotheses H.json",
    )
    parser.add_argument("--references", metavar="FILE", required=True, help="COCO annotation file")
    parser.add_argument(
        "--hypotheses",
        metavar="FILE",
        required=True,
        help="COCO results file, one caption per image",
    )
    args = parser.parse_args(argv)
    try:
        references, hypotheses = read_references(args.references), read_hypotheses(args.hypotheses)
        scores, _ = CaptionScorer(references).score(hypotheses, meteor=True)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(json.dumps(scores | {"METEOR_variant": METEOR_VARIANT}, indent=1))


if __name__ == "__main__":
    main()
