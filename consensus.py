"""Choose among captions by what the captions of similar training pictures say.

    index = build_index(features, captions)                       # of the training images
    hypotheses = Reranker(index, neighbours=60, weight=2.0)(features, hypotheses)

A decoder often ranks a fluent caption of the wrong things first. What pictures like this one were
called votes against it: each candidate's mean CIDEr against the captions of the nearest training
images is added to its score. CIDEr is that of equation 3, without CIDEr-D's clipping and length
penalty, because it is linear: the mean over all captions is one product with their sum.

Nothing here knows a decoder: a feature is a picture's mean over the grid, words are ids.
Axes: M training images, C captions of theirs, N images to caption, K candidates of one, F feature
channels, T words, Z entries of sparse vectors.
Sources: Devlin et al. 2015, Exploring Nearest Neighbor Approaches for Image Captioning, section 3;
Mao et al. 2015, m-RNN, section 8; Vedantam et al. 2015, CIDEr, section 3.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import checkpoints

FILE_NAME = "neighbours.pt"  # beside the checkpoints it belongs to
ORDERS = range(1, 5)  # n of the n-grams
NO_WORD = -1  # fills up short captions
MAX_WORDS = 55_000  # four of them, as digits, make a number of 63 bits


class Vectors(NamedTuple):
    """Sparse rows of unit length, one for each caption, in the order of `rows`."""

    rows: torch.Tensor  # (Z,) int64, which caption
    ngrams: torch.Tensor  # (Z,) int64, which n-gram
    weights: torch.Tensor  # (Z,) float32


def ngrams_of(tokens, n, base):
    """Word ids (C, T), below `base`, NO_WORD at the end -> rows (Z,) and n-grams (Z,) as numbers."""
    if tokens.size(1) < n:
        return tokens.new_zeros(2, 0).unbind()
    windows = tokens.unfold(1, n, 1)  # (C, T - n + 1, n)
    rows, places = (windows[..., -1] != NO_WORD).nonzero(as_tuple=True)
    ngrams = torch.zeros_like(rows)
    for word in windows[rows, places].unbind(1):
        ngrams = ngrams * base + word
    return rows, ngrams


def count_by_row(rows, ngrams):
    """Each row's n-grams once, in order of rows: rows, n-grams and how often, (Z,) each."""
    distinct, inverse = ngrams.unique(return_inverse=True)
    pairs, counts = (rows * len(distinct) + inverse).unique(return_counts=True)
    number = max(1, len(distinct))
    return pairs // number, distinct[pairs % number], counts


def find(values, known):
    """Where each value stands in `known`, sorted; len(known) where it does not."""
    places = torch.searchsorted(known, values)
    found = F.pad(known, (0, 1), value=-1)[places] == values
    return places.masked_fill(~found, len(known))


class NgramIndex:
    """tf-idf vectors of captions for one n; document frequencies are of the training images."""

    def __init__(self, tokens, image_of, n, base):
        """tokens: the training captions' (C, T), image by image; image_of (C,): whose they are."""
        self.n, self.base, self.num_images = n, base, int(image_of[-1]) + 1
        rows, ngrams = ngrams_of(tokens, n, base)
        _, by_image, _ = count_by_row(image_of[rows], ngrams)
        self.known, documents = by_image.unique(return_counts=True)
        self.documents = F.pad(documents, (0, 1), value=1)  # the last: of an n-gram that is new
        vectors = self.vectors(tokens)
        self.ngrams, self.weights = vectors.ngrams, vectors.weights
        images = torch.arange(self.num_images + 1)
        self.starts = torch.searchsorted(image_of[vectors.rows], images)  # image m: starts[m:m + 2]

    def vectors(self, tokens):
        """Word ids (C, T) -> Vectors. N-grams of no training caption count in the length alone."""
        rows, ngrams, counts = count_by_row(*ngrams_of(tokens, self.n, self.base))
        documents = self.documents[find(ngrams, self.known)]
        weights = counts * (self.num_images / documents).log()
        squares = weights.new_zeros(len(tokens)).index_add(0, rows, weights.square())
        return Vectors(rows, ngrams, weights / squares.sqrt().clamp_min(1e-12)[rows])

    def similarity(self, tokens, images):
        """Sum of each candidate's cosines with all captions of these images: word ids (K, T) -> (K,)."""
        candidates = self.vectors(tokens)
        starts, ends = self.starts[images].tolist(), self.starts[images + 1].tolist()
        places = torch.cat([torch.arange(*span) for span in zip(starts, ends, strict=True)])
        wanted, columns = candidates.ngrams.unique(return_inverse=True)
        total = torch.zeros(len(wanted) + 1)  # of the captions' vectors; the last: what none wants
        total.index_add_(0, find(self.ngrams[places], wanted), self.weights[places])
        products = candidates.weights * total[columns]
        return products.new_zeros(len(tokens)).index_add(0, candidates.rows, products)


class ConsensusIndex:
    """The training images' mean features and captions, to look up what similar pictures are called."""

    def __init__(self, features, tokens, num_captions):
        """features (M, F); tokens (C, T) word ids, NO_WORD at the end; num_captions (M,) of each image."""
        self.plain = {
            "features": features.half(),
            "tokens": tokens.int(),
            "num_captions": num_captions.int(),
        }
        features, tokens = self.plain["features"].float(), tokens.long()
        self.mean, self.std = features.mean(0), features.std(0, correction=0)
        self.features = self.directions(features)
        self.num_captions = num_captions.long()
        images = torch.arange(len(features)).repeat_interleave(self.num_captions)
        self.base = int(tokens.max()) + 2  # one more for all words of no training caption
        self.orders = [NgramIndex(tokens, images, n, self.base) for n in ORDERS]

    def directions(self, features):
        """Mean features (N, F) -> standardised by the training images', of unit length."""
        return F.normalize((features - self.mean) / (self.std + 1e-6), dim=1)

    def nearest(self, features, neighbours):
        """Mean features (N, F) on any device -> the training images most like each, (N, neighbours) by cosine."""
        similar = self.directions(features.float().cpu()) @ self.features.T
        return similar.topk(min(neighbours, len(self.features))).indices

    def agreement(self, nearest, hypotheses):
        """Mean CIDEr, 0..10, of each image's candidates against all captions of its neighbours.

        nearest: as `nearest` returns them; hypotheses: N lists of K Hypothesis -> N lists of K floats.
        """
        return [self._of_image(*each) for each in zip(nearest, hypotheses, strict=True)]

    def _of_image(self, images, candidates):
        tokens = padded([h.tokens for h in candidates]).clamp_max(self.base - 1)
        sums = sum(order.similarity(tokens, images) for order in self.orders)
        return (10 / len(ORDERS) * sums / self.num_captions[images].sum()).tolist()


class Reranker(NamedTuple):
    """What orders each image's captions anew: by score + weight * agreement with its neighbours."""

    index: ConsensusIndex
    neighbours: int
    weight: float

    def __call__(self, features, hypotheses):
        """Mean features (N, F), N lists of Hypothesis -> the lists, best first, finished ones before others."""
        nearest = self.index.nearest(features, self.neighbours)
        agreement = self.index.agreement(nearest, hypotheses)
        return [ordered(*image, self.weight) for image in zip(hypotheses, agreement, strict=True)]


def ordered(hypotheses, agreement, weight):
    """One image's hypotheses by score + weight * agreement, best first, finished ones before others."""
    scored = [
        hypothesis._replace(score=hypothesis.score + weight * value)
        for hypothesis, value in zip(hypotheses, agreement, strict=True)
    ]
    return sorted(scored, key=lambda h: (h.finished, h.score), reverse=True)


def padded(captions):
    """Lists of word ids -> (C, T) int64, T at least 1."""
    rows = [torch.tensor(caption or [NO_WORD]) for caption in captions]
    return pad_sequence(rows, batch_first=True, padding_value=NO_WORD)


def build_index(features, captions):
    """Mean features (M, F) of the training images and, for each, its captions as lists of word ids."""
    tokens = padded([caption for of_image in captions for caption in of_image])
    return ConsensusIndex(features.cpu(), tokens, torch.tensor([*map(len, captions)]))


# ------------------------------------------------------------------------------------- on the disk


def open_index(checkpoint, owner, build=None):
    """The ConsensusIndex beside a checkpoint's file; None where there is none and nothing to make it from.

    build: makes one where there is none of this owner; it is kept there if it can be.
    """
    file = Path(checkpoint).with_name(FILE_NAME)
    index = load_index(file, owner)
    if index is None and build is not None:
        index = build()
        try:
            save_index(index, file, owner)
        except OSError as error:
            print(f"{file}: not kept ({error.strerror})", file=sys.stderr)
    return index


def save_index(index, path, owner):
    """Write an index whole or not at all. `owner`: what it was made for, a string."""
    checkpoints.save_tensors(path, index.plain | {"owner": owner})


def load_index(path, owner):
    """What `save_index` wrote; None where there is none, or one that was made for another owner.

    Raises: ValueError when the file is damaged.
    """
    if not Path(path).is_file():
        return None
    try:
        plain = checkpoints.load_tensors(path)
        return _checked_index(plain) if plain["owner"] == owner else None
    except checkpoints.BrokenSeal:
        raise
    except (ValueError, TypeError, LookupError):
        raise ValueError(
            f"{path}: damaged: delete it, --mode test on the training data makes it again"
        ) from None


def _checked_index(plain):
    """Raises: ValueError where the parts do not fit each other."""
    parts = [plain[name] for name in ("features", "tokens", "num_captions")]
    features, tokens, num_captions = parts
    fits = (
        all(isinstance(part, torch.Tensor) for part in parts)
        and features.dtype == torch.float16
        and tokens.dtype == num_captions.dtype == torch.int32
        and (features.ndim, tokens.ndim, num_captions.shape) == (2, 2, features.shape[:1])
        and num_captions.min() >= 1
        and int(num_captions.long().sum()) == len(tokens)
        and NO_WORD <= int(tokens.min()) <= int(tokens.max()) < MAX_WORDS
    )
    if not fits:
        raise ValueError("its parts do not fit")
    return ConsensusIndex(features, tokens, num_captions)
