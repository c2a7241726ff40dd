"""METEOR 1.5 without Java: what `java -jar meteor-1.5.jar - - -stdio -l en -norm` scores [1].

A caption's words are aligned with a reference's: the same word, the same stem, a common synonym set
or a paraphrase. Weighted matches, function words counting less, give precision and recall; an
alignment in many chunks is penalised. A caption's score is that of its best reference, a corpus's
the same formula on sums over captions. What the paper leaves open (ties, rounding, tokens) is as in
the jar, slips included: they are marked "the jar".

The tables come with the package pycocoevalcap: function words, abbreviations and WordNet's synonym
sets in the jar; 5.3 million paraphrases in data/paraphrase-en.gz, which take seconds to read. Those
of the last set of references are kept, as text, in $XDG_CACHE_HOME/flickr_image_caption, or in
~/.cache/flickr_image_caption.

Shapes: N images; 6 statistics of a caption and its best reference.
[1] Denkowski and Lavie 2014, Meteor Universal: Language Specific Translation Evaluation.
"""

import contextlib
import functools
import gzip
import hashlib
import importlib.util
import itertools
import operator
import os
import re
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

import checkpoints

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75  # [1]: English, tuned to rankings
EXACT, STEM, SYNONYM, PARAPHRASE = range(4)
MODULE_WEIGHTS = (1.0, 0.6, 0.8, 0.6)  # [1]
BEAM_SIZE = 40
LONGEST_PHRASE = 7  # words, of the paraphrase table
CACHE_FORMAT = "1"  # to be raised when `_filtered` returns other text
JAR, PARAPHRASES = "meteor-1.5.jar", Path("data", "paraphrase-en.gz")

# -------------------------------------------------------------------------------------------- score


def meteor_from_sums(sums):
    """METEOR, 0..1, from the statistics of a caption or their sums over captions.

    Args:
        sums: (..., 6) float: weighted matches and weighted words of captions, both of references,
            matched words (mean of both sides), chunks.
    Returns: (...) float; 0 where nothing matches.
    """
    matched, words, reference_matched, reference_words, matches, chunks = np.moveaxis(sums, -1, 0)
    precision = matched / np.maximum(words, 1e-9)
    recall = reference_matched / np.maximum(reference_words, 1e-9)
    mean = precision * recall / np.maximum(ALPHA * precision + (1 - ALPHA) * recall, 1e-9)
    return mean * (1 - GAMMA * (chunks / np.maximum(matches, 1e-9)) ** BETA)


def meteor_statistics(references, captions, tables):
    """Statistics of each caption and its best reference.

    Args:
        references: N lists of token lists; captions: N token lists; both from the COCO toolkit's
            tokenizer, or `metrics_utils.tokenize`.
        tables: the folder that `find_tables` returns.
    Returns: (N, 6) float, columns as in `meteor_from_sums`.
    Raises: ValueError naming a table that cannot be read.
    """
    lexicon = read_lexicon(tables / JAR)
    references = [[normalize(r, lexicon.abbreviations) for r in each] for each in references]
    captions = [normalize(caption, lexicon.abbreviations) for caption in captions]
    phrases = {phrase for each in references for text in each for _, phrase in phrases_of(text)}
    caption_phrases = {phrase for text in captions for _, phrase in phrases_of(text)}
    paraphrases = read_paraphrases(tables / PARAPHRASES, phrases, caption_phrases)
    aligner = Aligner(lexicon, paraphrases)
    rows = map(aligner.best_statistics, captions, references)
    return np.array(list(rows)).reshape(-1, 6)


# -------------------------------------------------------------------------------------------- words

_LETTER = (  # the jar's; letters of other scripts are set apart as punctuation is
    "A-Za-z\u0160\u017d\u0161\u017e\u0178\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017e\u0400-\u0527"
    "\ua640-\ua66e\ua67e-\ua697\u1d00-\u1d7f"
)
_NORMALIZATION = [  # -norm, in the jar's order; patterns take the neighbours they look at, as there
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf"[^0-9{_LETTER}\s.'`,\-\u2018\u2019]", r" \g<0> "),
        (r"\.\.+", r" \g<0> "),
        (r"(?<![0-9]),|,(?![0-9])", " , "),
        ("[`\u2018\u2019]", "'"),
        ("[\u201c\u201d]|''", ' " '),
        ("\u2013|--", "-"),
        (rf"([0-9{_LETTER}.])-([0-9{_LETTER}])", r"\1 \2"),
        (rf"([^{_LETTER}])'([^{_LETTER}])", r"\1 ' \2"),
        (rf"([^0-9{_LETTER}])'([{_LETTER}])", r"\1 ' \2"),
        (rf"([{_LETTER}])'([^{_LETTER}])", r"\1 ' \2"),
        (rf"([{_LETTER}])'([{_LETTER}])", r"\1 '\2"),
        (r"([0-9])'s", r"\1 's"),
    )
]


def normalize(tokens, abbreviations):
    """Tokens -> list of words as the jar's -norm makes them: "t-shirt" is two, "u.s." is "us".

    abbreviations: {word before a full stop: whether it is one only before a number}.
    """
    line = f" {' '.join(tokens)} "
    for pattern, replacement in _NORMALIZATION:
        line = pattern.sub(replacement, line)
    tokens, words = line.split(), []
    for token, following in itertools.zip_longest(tokens, tokens[1:], fillvalue=""):
        words += _without_full_stop(token, following, abbreviations)
    return [word.lower() for word in words]


def _without_full_stop(token, following, abbreviations):
    """A token -> [token], or [word, "."] if it ends in a full stop that does not belong to it."""
    word = token[:-1]
    if not token.endswith(".") or not token.strip("."):
        return [token]
    if "." in word and re.search(f"[{_LETTER}]", word):
        return [token.replace(".", "")]
    goes_on = "[a-z0-9]" if abbreviations.get(word) else "[a-z]"
    if abbreviations.get(word) is False or re.match(goes_on, following):
        return [token]
    return [word, "."]


def phrases_of(words):
    """Yield (start, phrase) of up to LONGEST_PHRASE words: left to right, short ones first."""
    for start in range(len(words)):
        for end in range(start + 1, min(start + LONGEST_PHRASE, len(words)) + 1):
            yield start, " ".join(words[start:end])


# ------------------------------------------------------------------------------------------- search


class Match(NamedTuple):
    """Words of a reference and of a caption that mean the same."""

    module: int
    start: int  # in the reference
    length: int
    caption_start: int
    caption_length: int
    words: int  # it takes, as bits: 2 i for word i of the reference, 2 i + 1 of the caption
    gain: int
    distance: int  # that the words move


@functools.lru_cache(maxsize=10_000)
def new_match(module, start, length, caption_start, caption_length):
    """Match. The jar's search counts other modules by half, and rounds down: 1 to 1 gains 0."""
    words = 4**length // 3 << 2 * start | 4**caption_length // 3 << 2 * caption_start + 1
    gain = length + caption_length if module == EXACT else length // 2 + caption_length // 2
    distance = abs(start - caption_start)
    return Match(module, start, length, caption_start, caption_length, words, gain, distance)


class Alignment(NamedTuple):
    """Matches up to some word of the reference. The search wants the first three fields small."""

    loss: int = 0  # minus the gain of its matches
    chunks: int = 0  # that have ended; a chunk is matches side by side in both texts
    distance: int = 0
    words: int = 0  # taken, as bits
    end: int = 0  # of the last match, in the reference
    caption_end: int | None = None  # of the chunk that goes on, in the caption
    matches: tuple = ()

    def with_match(self, match, distance):
        ends_chunk = self.caption_end is not None and self.caption_end != match.caption_start
        return Alignment(
            self.loss - match.gain,
            self.chunks + ends_chunk,
            distance,
            self.words | match.words,
            match.start + match.length,
            match.caption_start + match.caption_length,
            (*self.matches, match),
        )

    def without_match(self, distance):
        if (self.distance, self.caption_end) == (distance, None):
            return self
        chunks = self.chunks + (self.caption_end is not None)
        return Alignment(self.loss, chunks, distance, self.words, self.end, None, self.matches)

    def extensions(self, start, matches, certain):
        """The alignments that take each of the matches at `start`, and none of them, in this order."""
        if start < self.end:
            return [self]
        distance, longer = self.distance, []
        if start in certain:
            return [self.with_match(certain[start], distance + certain[start].distance)]
        for match in matches:
            if not self.words & match.words:
                longer.append(self.with_match(match, distance))
                distance += match.distance  # the jar: the alignments after it pay
        return [*longer, self.without_match(distance)]


def best_alignment(candidates):
    """Beam search over the reference's words.

    Args:
        candidates: for each word of the reference, the list of matches that start there.
    Returns: Alignment of the most words, then the fewest chunks, then the least distance.
    """
    certain = certain_matches(candidates)
    alignments = [Alignment(words=sum(match.words for match in certain.values()))]
    for start, matches in enumerate(candidates):
        beam = best_first(alignments)
        alignments = [longer for a in beam for longer in a.extensions(start, matches, certain)]
    ended = [alignment.without_match(alignment.distance) for alignment in best_first(alignments)]
    return best_first(ended)[0]


def best_first(alignments):
    """At most BEAM_SIZE alignments, sorted; equals keep their order, as in the jar."""
    return sorted(alignments, key=operator.itemgetter(0, 1, 2))[:BEAM_SIZE]


def certain_matches(candidates):
    """{start: match} of the matches whose words, on both sides, no other match takes."""
    once = twice = 0
    for match in itertools.chain.from_iterable(candidates):
        twice |= once & match.words
        once |= match.words
    alone = {start: each[0] for start, each in enumerate(candidates) if len(each) == 1}
    return {start: match for start, match in alone.items() if not match.words & twice}


# ----------------------------------------------------------------------------------------- matchers


class Text:
    """The words of a caption or reference, their weights, and the table's phrases among them."""

    def __init__(self, words, lexicon, phrases):
        self.words = words
        self.weights = [1 - DELTA if word in lexicon.function_words else DELTA for word in words]
        self.phrases = [(start, phrase) for start, phrase in phrases_of(words) if phrase in phrases]
        self.starts = {}  # {phrase: [start, ...]}
        for start, phrase in self.phrases:
            self.starts.setdefault(phrase, []).append(start)


class Aligner:
    """Align captions with references by a Lexicon and paraphrases {phrase: {paraphrase: rank}}."""

    def __init__(self, lexicon, paraphrases):
        from nltk.stem.snowball import EnglishStemmer  # nltk takes a second to import

        self.lexicon, self.paraphrases = lexicon, paraphrases
        self.phrases = set(paraphrases).union(*paraphrases.values())
        self.stem = functools.cache(EnglishStemmer().stem)
        self.synsets = functools.cache(lexicon.synsets_of)
        self.modules = functools.cache(self._modules)

    def best_statistics(self, caption, references):
        """Word lists -> (6,) float as in `meteor_from_sums`, of the reference that scores best."""
        caption = Text(caption, self.lexicon, self.phrases)
        texts = (Text(reference, self.lexicon, self.phrases) for reference in references)
        rows = np.array([self.statistics(caption, reference) for reference in texts])
        return rows[np.argmax(meteor_from_sums(rows))]  # the first of equals

    def statistics(self, caption, reference):
        """Texts -> the columns of `meteor_from_sums`."""
        alignment = best_alignment(self.candidates(caption, reference))
        matched = reference_matched = covered = reference_covered = 0
        for module, start, length, caption_start, caption_length, *_ in alignment.matches:
            weight = MODULE_WEIGHTS[module]
            end, caption_end = start + length, caption_start + caption_length
            matched += weight * sum(caption.weights[caption_start:caption_end])
            reference_matched += weight * sum(reference.weights[start:end])
            covered, reference_covered = covered + caption_length, reference_covered + length
        whole = len(caption.words), len(reference.words)
        is_whole = (covered, reference_covered, alignment.chunks) == (*whole, 1)
        chunks = 0 if is_whole else alignment.chunks  # one chunk of all words has no penalty
        words, reference_words = sum(caption.weights), sum(reference.weights)
        matches = (covered + reference_covered) / 2
        return matched, words, reference_matched, reference_words, matches, chunks

    def candidates(self, caption, reference):
        """Texts -> for each word of the reference, the matches that start there, in the jar's order."""
        words = enumerate(reference.words)
        found = [self._word_matches(start, word, caption.words) for start, word in words]
        if caption.words == reference.words:
            return [[match for match in matches if match.module == EXACT] for matches in found]
        for start, length, other, other_length in self._paraphrases(reference, caption):
            found[start].append(new_match(PARAPHRASE, start, length, other, other_length))
        for other, other_length, start, length in self._paraphrases(caption, reference):
            found[start].append(new_match(PARAPHRASE, start, length, other, other_length))
        return found

    def _word_matches(self, start, word, caption_words):
        """Matches of a reference's word with single words, module by module."""
        pairs = [(m, i) for i, other in enumerate(caption_words) for m in self.modules(other, word)]
        return [new_match(module, start, 1, i, 1) for module, i in sorted(pairs)]

    def _modules(self, word, other):
        """The modules by which two words match; equal words match by no other."""
        if word == other:
            return (EXACT,)
        stem = (STEM,) if self.stem(word) == self.stem(other) else ()
        return stem if self.synsets(word).isdisjoint(self.synsets(other)) else (*stem, SYNONYM)

    def _paraphrases(self, text, other):
        """Yield start and length of each phrase in a text, and of its paraphrase in the other."""
        for start, phrase in text.phrases:
            ranks = self.paraphrases.get(phrase, {})
            for paraphrase in sorted(ranks.keys() & other.starts.keys(), key=ranks.get):
                for other_start in other.starts[paraphrase]:
                    yield start, phrase.count(" ") + 1, other_start, paraphrase.count(" ") + 1


# ------------------------------------------------------------------------------------------- tables

_ENDINGS = (  # of inflected words and of their base forms, in the jar's order
    ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
    ("men", "man"), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"),
    ("ing", ""), ("er", ""), ("est", ""), ("er", "e"), ("est", "e"),
)  # fmt: skip


class Lexicon(NamedTuple):
    """The jar's English tables."""

    abbreviations: dict  # {word before a full stop: whether it is one only before a number}
    function_words: frozenset
    synsets: dict  # {word: the numbers of its synonym sets, as text}
    bases: dict  # {irregular form: [base form, ...]}

    def synsets_of(self, word):
        """The synonym sets of a word and of its base forms."""
        forms = [word, *self.bases.get(word, [self._base(word)])]
        return {number for form in forms for number in self.synsets.get(form, "").split()}

    def _base(self, word):
        if word.endswith("ss") or len(word) <= 2:
            return word
        bases = (word.removesuffix(end) + base for end, base in _ENDINGS if word.endswith(end))
        return next((base for base in bases if base in self.synsets), "")


def find_tables():
    """The folder of METEOR's tables in the installed package pycocoevalcap, or None."""
    package = importlib.util.find_spec("pycocoevalcap")
    places = getattr(package, "submodule_search_locations", None) or []
    folders = [Path(place, "meteor") for place in places]
    complete = (f for f in folders if (f / JAR).is_file() and (f / PARAPHRASES).is_file())
    return next(complete, None)


def read_lexicon(path):
    """The jar, a zip -> Lexicon. Raises ValueError if it is damaged."""
    names = ("nonbreaking/english.prefixes", "function/english.words")
    names += ("synonym/english.synsets", "synonym/english.exceptions")
    try:
        with zipfile.ZipFile(path) as jar:
            prefixes, words, synsets, forms = (
                jar.read(name).decode().split("\n") for name in names
            )
    except (OSError, KeyError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(path, error) from None
    abbreviations = (line.split() for line in prefixes if line.strip() and line[0] != "#")
    bases = {}
    for base, inflected in zip(forms[0::2], forms[1::2], strict=False):
        for form in inflected.split():
            bases.setdefault(form, []).append(base)
    return Lexicon(
        {word: "#NUMERIC_ONLY#" in notes for word, *notes in abbreviations},
        frozenset(words),
        dict(zip(synsets[0::2], synsets[1::2], strict=False)),
        bases,
    )


def _unreadable(path, error):
    return ValueError(f"{path}: cannot be read ({error}); install pycocoevalcap again")


def read_paraphrases(path, phrases, caption_phrases):
    """The paraphrases among phrases of the references and of the captions.

    Args:
        path: paraphrase-en.gz: line triples of a probability, a phrase and its paraphrase.
        phrases, caption_phrases: sets of phrases.
    Returns: {phrase: {paraphrase: rank in the table}}.
    Raises: ValueError if the file is damaged.
    """
    try:
        with path.open("rb") as file:
            file.seek(-8, os.SEEK_END)
            contents = file.read().hex()  # gzip ends in its contents' checksum and size
        asked = _sha256("\n".join([CACHE_FORMAT, contents, *sorted(phrases)]))
        text = _cached(asked)
        if text is None:
            text = _filtered(path, phrases)
            _write_cache(asked, text)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise _unreadable(path, error) from None
    lines, known, table = text.split("\n"), phrases | caption_phrases, {}
    for rank, (phrase, paraphrase) in enumerate(zip(lines[0::2], lines[1::2], strict=False)):
        if phrase in known and paraphrase in known:
            table.setdefault(phrase, {})[paraphrase] = rank
    return table


def _filtered(path, phrases):
    """The table's pairs with one of these phrases, as text of two lines each."""
    wanted, rest, kept = {phrase.encode() for phrase in phrases}, b"", []
    with gzip.open(path) as file:
        while block := file.read(1 << 18):  # lines one by one would take five times as long
            lines = (rest + block).split(b"\n")
            whole = (len(lines) - 1) // 3 * 3
            pairs = zip(lines[1:whole:3], lines[2:whole:3], strict=True)
            kept += [b"%b\n%b\n" % (a, b) for a, b in pairs if a in wanted or b in wanted]
            rest = b"\n".join(lines[whole:])
    return b"".join(kept).decode()


def _sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def cache_file():
    """Where the paraphrases of the last set of references are kept.

    Its first line has the SHA-256 of what was asked for, and of the lines that follow.
    """
    folder = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(folder, "flickr_image_caption", "meteor_paraphrases.txt")


def _cached(asked):
    """The cache's text, or None if it is missing, damaged or of other references."""
    try:
        header, _, text = cache_file().read_bytes().decode().partition("\n")
    except (OSError, RuntimeError, UnicodeDecodeError):  # RuntimeError: no home folder
        return None
    return text if header == f"{asked} {_sha256(text)}" else None


def _write_cache(asked, text):
    """Replace the cache in one rename. Where none can be written, the next run reads the table."""
    with contextlib.suppress(OSError, RuntimeError):
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with checkpoints.replace_file(path) as file:
            file.write(f"{asked} {_sha256(text)}\n{text}".encode())
