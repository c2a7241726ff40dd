"""Captions as the model wants them: words and their ids, and batches of them.

    vocabulary = Vocabulary.build(training_captions, 5)  # words seen at least five times
    vocabulary = SubwordVocabulary(tokenizer_json)       # parts of words, as GPT-2 reads them
    for batch in CaptionBatches(word_ids, 128, 50, seed=0).epoch(0): ...

Nothing here knows a model: ids mean words only. Axes: N images, B captions, T steps.
"""

import array
import functools
import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import regex
import torch

import process_group
from runtime import to_device

# a character of a script that puts no spaces between words, with its combining marks
UNSPACED = regex.compile(
    r"(?V1)[[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Thai}\p{scx=Laoo}\p{scx=Khmr}\p{scx=Mymr}]&&[\p{L}\p{N}]]\p{M}*"
)
# direction marks and the like; joiners belong to words
INVISIBLE = regex.compile(r"(?V1)[\p{Cf}--[\u200c\u200d]]")
BOUNDARY = "<|endoftext|>"  # GPT-2's only special token
CROP_AREA = 0.5  # least share of an image that a random crop shows
CROP_DRAWS = 2**40  # added to an epoch's number, so that crops do not depend on what is mirrored
WORD = re.compile(r"[^\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")  # what a stored vocabulary may hold


@functools.cache
def _spacy_tokenizer():
    """spaCy's English tokenizer, which splits other scripts well too; a hyphen inside a word no longer splits it."""
    import spacy  # takes seconds, and captioning a picture needs none of it
    from spacy.lang.char_classes import HYPHENS

    language = spacy.blank("en")
    infixes = [rule.replace(HYPHENS, "--+|–|—+|~") for rule in language.Defaults.infixes]  # noqa: RUF001
    language.tokenizer.infix_finditer = spacy.util.compile_infix_regex(infixes).finditer
    return language.tokenizer


def tokenize(text: str) -> list[str]:
    """Words of a caption: lower case, NFC, without punctuation and symbols; "A t-shirt!" -> ["a", "t-shirt"].

    In scripts without spaces (Han, Kana, Thai, Lao, Khmer, Burmese) every character with its marks is a word.
    """
    return [word for chunk in text.split() for word in _words(chunk)]


# captions repeat few chunks: spaCy would take ten times as long for all of them
@functools.lru_cache(2**15)
def _words(chunk: str) -> tuple[str, ...]:
    """Words of what stands between two spaces, which is how spaCy splits a text first."""
    chunk = INVISIBLE.sub("", unicodedata.normalize("NFC", chunk))
    chunk = UNSPACED.sub(r" \g<0> ", chunk)
    return tuple(
        word for token in _spacy_tokenizer()(chunk) if any(map(str.isalnum, word := token.lower_))
    )


class Vocabulary:
    """Words and their ids, the four specials first; a caption's words are lower case, so never one of these."""

    pad, sos, eos, unk = range(4)
    SPECIALS = ("<PAD>", "<SOS>", "<EOS>", "<UNK>")
    unit = "words"

    def __init__(self, words: Sequence[str]):
        """words: all of them in the order of their ids, specials included."""
        self.words = list(words)
        self.ids = {word: index for index, word in enumerate(self.words)}

    @classmethod
    def build(cls, captions: Iterable[str], freq_threshold: int = 5) -> "Vocabulary":
        """Words seen at least `freq_threshold` times in these (training) captions, the most frequent first."""
        counts = Counter(word for caption in captions for word in tokenize(caption))
        kept = [word for word, count in counts.items() if count >= freq_threshold]
        return cls([*cls.SPECIALS, *sorted(kept, key=lambda word: (-counts[word], word))])

    def __len__(self) -> int:
        return len(self.words)

    def size_text(self) -> str:
        """How many words there are, for the console."""
        return f"vocabulary: {len(self) - len(self.SPECIALS)} {self.unit}"

    @staticmethod
    def origin(freq_threshold: int, num_captions: int) -> str:
        """Where the words of a new one come from, for the console."""
        return f"seen {freq_threshold} times or more in {num_captions} training captions"

    def encode(self, text: str) -> list[int]:
        """Word ids of a caption, without <SOS> and <EOS>; unknown words are `unk`."""
        return [self.ids.get(word, self.unk) for word in tokenize(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The caption up to <EOS>, other specials dropped; no spaces beside characters of unspaced scripts."""
        words = []
        for index in map(int, ids):
            if index == self.eos:
                break
            if index >= len(self.SPECIALS):
                words.append(self.words[index])
        unspaced = [bool(UNSPACED.match(word)) for word in words]
        gaps = ["" if i == 0 or unspaced[i - 1] or unspaced[i] else " " for i in range(len(words))]
        return "".join(gap + word for gap, word in zip(gaps, words, strict=True))

    def to_plain(self) -> dict:
        """What a checkpoint stores."""
        return {"words": self.words}

    @classmethod
    def from_plain(cls, plain: dict) -> "Vocabulary":
        """The vocabulary a checkpoint stored. Raises: ValueError when it is damaged."""
        words = plain.get("words") if isinstance(plain, dict) else None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("vocabulary: expected {'words': [...]}, a list of words")
        if tuple(words[:4]) != cls.SPECIALS or len(set(words)) != len(words):
            raise ValueError(
                f"vocabulary: expected different words that begin with {' '.join(cls.SPECIALS)}"
            )
        if bad := [word for word in words if not WORD.fullmatch(word)]:
            raise ValueError(f"vocabulary: {bad[0][:40]!r} is not a word")
        return cls(words)


class SubwordVocabulary:
    """Parts of words and their ids, by a tokenizer of the `tokenizers` package such as GPT-2's.

    Captions are the words that a Vocabulary would see, with spaces between. One token begins, ends and
    pads: what stands behind a caption's end is known by length, never by an id.
    """

    SPECIALS = (BOUNDARY,)
    unit = "tokens"
    unk = None  # every text is made of bytes, and each byte is a token

    def __init__(self, tokenizer_json: str):
        """tokenizer_json: the text of a tokenizer.json. Raises: ValueError when it is none, or has no BOUNDARY."""
        self.tokenizer_json = tokenizer_json
        self.tokenizer = _read_tokenizer(tokenizer_json)
        self.pad = self.sos = self.eos = self.tokenizer.token_to_id(BOUNDARY)
        if self.eos is None:
            raise ValueError(f"tokenizer: has no token {BOUNDARY}, which begins and ends a caption")

    @functools.cached_property
    def words(self) -> list[str]:
        """Each token's text in the order of their ids, with the space before it; all differ.

        A token that is a part of a character is shown as the tokenizer's file has it, in < >.
        """
        texts = [self.tokenizer.decode([i], skip_special_tokens=False) for i in range(len(self))]
        return [
            f"<{self.tokenizer.id_to_token(index)}>" if "\ufffd" in text else text
            for index, text in enumerate(texts)
        ]

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    size_text = Vocabulary.size_text

    @staticmethod
    def origin(*_) -> str:
        """Where the tokens come from, for the console."""
        return "of the tokenizer"

    def encode(self, text: str) -> list[int]:
        """Token ids of a caption, without those that begin and end it."""
        return self.tokenizer.encode(" ".join(tokenize(text)), add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The caption up to the token that ends it."""
        written = itertools.takewhile(lambda index: index != self.eos, map(int, ids))
        return self.tokenizer.decode(list(written)).strip()

    def to_plain(self) -> dict:
        """What a checkpoint stores."""
        return {"tokenizer": self.tokenizer_json}


def _read_tokenizer(tokenizer_json):
    """The tokenizers.Tokenizer of a tokenizer.json's text. Raises: ValueError when it is none."""
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            "a tokenizer needs the package tokenizers: pip install -r requirements-hub.txt"
        ) from error
    try:
        return tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the package raises no other class
        raise ValueError(f"tokenizer: is none ({' '.join(str(error).split())[:200]})") from error


def vocabulary_from_plain(plain: dict) -> Vocabulary | SubwordVocabulary:
    """The vocabulary a checkpoint stored. Raises: ValueError when it is damaged."""
    tokenizer_json = plain.get("tokenizer") if isinstance(plain, dict) else None
    if isinstance(tokenizer_json, str):
        return SubwordVocabulary(tokenizer_json)
    return Vocabulary.from_plain(plain)


class Batch(NamedTuple):
    """B captions of N images as teacher forcing wants them: longest first, packed step by step.

    Packed as torch's PackedSequence: the tokens of step 0 of every caption, then those of step 1 of
    all that have one, and so on. Of several processes each has its own share of the captions.
    """

    image_rows: torch.Tensor  # (N,) int64: positions in the list of images
    image_index: torch.Tensor  # (B,) int64, 0..N-1: whose caption it is
    caption_index: torch.Tensor  # (tokens,) int64, 0..B-1: which caption a token belongs to
    inputs: torch.Tensor  # (tokens,) int64: <SOS> and the words
    targets: torch.Tensor  # (tokens,) int64: the words and <EOS>, each what follows its input
    image_tokens: torch.Tensor  # (N, L) int64: each image's tokens, filled up with 0
    token_place: torch.Tensor  # (tokens,) int64: a token's place in image_tokens, flattened
    batch_sizes: torch.Tensor  # (T,) int64, on the CPU: captions that have a step t
    num_tokens: int  # of all processes' shares together
    num_captions: int
    weight: float  # of the gradient; 0 where a process has no caption left and computes another's
    places: torch.Tensor | None = None  # (tokens,) int64, on the CPU: in all captions' tokens

    def to(self, device):
        """The batch with what a decoder indexes by on the device; sizes stay on the CPU."""
        moved = ("image_index", "caption_index", "inputs", "targets", "image_tokens", "token_place")
        return self._replace(**{name: to_device(getattr(self, name), device) for name in moved})

    def parts(self, number: int, features: torch.Tensor) -> "Iterator[tuple[Batch, torch.Tensor]]":
        """A batch on the CPU in at most `number` parts of like size, each with its images' features.

        Losses of the parts add up to the whole one's, because each is divided by all tokens' number.
        features: (N, ...), on any device.
        """
        number = min(number, len(self.image_index))
        if number == 1:
            yield self, features
            return
        steps = torch.arange(len(self.batch_sizes)).repeat_interleave(self.batch_sizes)
        for part in range(number):
            taken = self.caption_index % number == part  # (tokens,)
            images, image_index = self.image_index[part::number].unique(return_inverse=True)
            caption_index = self.caption_index[taken] // number
            image_tokens, token_place = by_image(image_index[caption_index])
            yield (
                self._replace(
                    image_rows=self.image_rows[images],
                    image_index=image_index,
                    caption_index=caption_index,
                    inputs=self.inputs[taken],
                    targets=self.targets[taken],
                    image_tokens=image_tokens,
                    token_place=token_place,
                    batch_sizes=steps[taken].bincount(),
                    places=None if self.places is None else self.places[taken],
                ),
                features[to_device(images, features.device)],
            )


def by_image(image_of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """image_of (tokens,) -> a Batch's image_tokens (N, L) and token_place (tokens,)."""
    counts = image_of.bincount()  # (N,)
    order = image_of.argsort(stable=True)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    within = torch.arange(len(order)) - first
    token_place = torch.empty_like(order)
    token_place[order] = image_of[order] * counts.max() + within
    image_tokens = torch.zeros(len(counts), int(counts.max()), dtype=torch.int64)
    image_tokens.view(-1)[token_place] = torch.arange(len(image_of))
    return image_tokens, token_place


class CaptionBatches:
    """Every caption once per epoch, `batch_size` at a time; captions of one image stay together.

    Args:
        captions: per image a list of captions, each a list of word ids without specials.
        batch_size: captions of all processes together.
        max_length: steps a caption may have, <EOS> among them; longer ones lose their last words.
        seed: with the epoch it alone decides the order of the images.
        sos, eos: ids that begin and end a caption.
    """

    def __init__(
        self,
        captions: Iterable[Sequence[Sequence[int]]],
        batch_size: int,
        max_length: int,
        seed: int,
        sos: int = Vocabulary.sos,
        eos: int = Vocabulary.eos,
    ):
        tokens, lengths, counts = array.array("i"), array.array("i"), array.array("i")
        for image in captions:
            counts.append(len(image))
            for words in image:
                tokens.extend((sos, *words[: max_length - 1], eos))
                lengths.append(min(len(words), max_length - 1) + 1)
        if not lengths:
            raise ValueError("no captions to make batches of")
        self.batch_size, self.seed = batch_size, seed
        self.tokens = torch.from_numpy(np.array(tokens))  # of all captions, one after the other
        self.lengths = torch.tensor(lengths)  # (captions,) words and <EOS>
        self.counts = torch.tensor(counts)  # (images,) captions of each
        self.start = (self.lengths + 1).cumsum(0) - (self.lengths + 1)  # each caption's first token
        self.first = self.counts.cumsum(0) - self.counts  # each image's first caption
        self.num_captions, self.num_batches = len(lengths), -(-len(lengths) // batch_size)

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)

    def mirrored(self, epoch: int) -> torch.Tensor:
        """(images,) bool: which are seen mirrored in an epoch, each with probability 1/2."""
        return torch.rand(len(self.counts), generator=self._generator(epoch)) < 0.5

    def crops(self, epoch: int) -> torch.Tensor:
        """(images, 4) left, top, width, height of the part that is seen in an epoch, as shares of the image.

        Its area is drawn between CROP_AREA and all, and its sides' ratio is changed by at most a third,
        as torchvision's RandomResizedCrop does, but by the epoch's generator: a resumed run sees the same.
        """
        generator = self._generator(epoch + CROP_DRAWS)
        draws = torch.rand(len(self.counts), 4, generator=generator)
        area = CROP_AREA + (1 - CROP_AREA) * draws[:, 0]
        ratio = torch.exp((2 * draws[:, 1] - 1) * math.log(4 / 3))
        sides = torch.stack([area * ratio, area / ratio], dim=1).sqrt().clamp(max=1)
        return torch.cat([draws[:, 2:] * (1 - sides), sides], dim=1)

    def num_left(self, start: int) -> int:
        """How many batches an epoch has from caption number `start` on."""
        return -(-(self.num_captions - start) // self.batch_size)

    def epoch(self, epoch: int, start: int = 0, shuffle: bool = True) -> Iterator[Batch]:
        """This process's batches of an epoch from caption number `start` on, in the same order whatever `start`."""
        images = torch.arange(len(self.counts))
        if shuffle:
            images = torch.randperm(len(images), generator=self._generator(epoch))
        counts = self.counts[images]
        image_of = images.repeat_interleave(counts)  # (captions,) in the order of this epoch
        within = torch.arange(len(image_of)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        captions = self.first[image_of] + within
        for begin in range(start, len(captions), self.batch_size):
            batch = slice(begin, begin + self.batch_size)
            yield self._batch(captions[batch], image_of[batch])

    def _batch(self, captions: torch.Tensor, image_of: torch.Tensor) -> Batch:
        """This process's share of a batch: captions (B,) and the image (B,) that each is of."""
        num_tokens, num_captions = int(self.lengths[captions].sum()), len(captions)
        share = process_group.shard(num_captions)
        weight = float(process_group.world_size())  # gradients are averaged, and their sum is meant
        if share.start == share.stop:
            share, weight = slice(0, 1), 0.0  # all processes must take part in every step
        return self._packed(captions[share], image_of[share], num_tokens, num_captions, weight)

    def whole(self) -> Batch:
        """All captions as one batch of this process alone, the images in their order."""
        captions = torch.arange(self.num_captions)
        image_of = torch.arange(len(self.counts)).repeat_interleave(self.counts)
        return self._packed(captions, image_of, int(self.lengths.sum()), self.num_captions, 1.0)

    def _packed(
        self,
        captions: torch.Tensor,
        image_of: torch.Tensor,
        num_tokens: int,
        num_captions: int,
        weight: float,
    ) -> Batch:
        """Captions (B,) and the image (B,) that each is of as a Batch, the longest caption first."""
        lengths, order = self.lengths[captions].sort(descending=True, stable=True)
        image_rows, image_index = image_of.unique_consecutive(return_inverse=True)
        steps = torch.arange(int(lengths[0])).unsqueeze(1)
        is_token = steps < lengths  # (T, B)
        places = (self.start[captions[order]] + steps)[is_token]  # (tokens,) in packed order
        image_index = image_index[order]
        caption_index = torch.arange(len(order)).expand_as(is_token)[is_token]
        image_tokens, token_place = by_image(image_index[caption_index])
        return Batch(
            image_rows=image_rows,
            image_index=image_index,
            caption_index=caption_index,
            image_tokens=image_tokens,
            token_place=token_place,
            inputs=self.tokens[places].long(),
            targets=self.tokens[places + 1].long(),
            batch_sizes=is_token.sum(1),
            num_tokens=num_tokens,
            num_captions=num_captions,
            weight=weight,
            places=places,
        )
