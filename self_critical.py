"""What a step of --scst_epochs minimises: captions that it draws itself should score better than each other.

    reward = Reward(tokens, num_captions, base=len(vocabulary))         # of the training captions, once
    objective = SelfCritical(reward, vocabulary, num_samples=5, max_length=40)
    loss, rewards = objective(model, features, batch)

Cross entropy asks for one person's next word; the reward asks for captions that people's agree with.
The decoder draws S captions of each image, each is scored against the image's own, and becomes likelier
as far as it beats the mean of the others: a baseline that needs no second search, and no bias.

The reward is CIDEr-D, with document frequencies of the training images and, as is customary, <EOS> as
a word: without it captions that break off, "a dog on a", lose nothing.
Axes: M training images, C captions of theirs, N images of a batch, S samples of each, T words,
Z entries of sparse vectors, J pairs of an entry of a sample and one of a reference.
Sources: Rennie et al. 2017, Self-critical Sequence Training for Image Captioning; Luo 2020, A Better
Variant of Self-Critical Sequence Training; Vedantam et al. 2015, CIDEr, section 3; Papineni et al.
2002, BLEU, smoothed as in Lin and Och 2004.
"""

from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from caption_batches import CaptionBatches
from caption_decoding import generate
from consensus import MAX_WORDS, NO_WORD, ORDERS, count_by_row, find, ngrams_of, padded
from metrics_utils import CIDER_SIGMA


class Matches(NamedTuple):
    """The n-grams of samples, for one n, and which of their images' references have them."""

    rows: torch.Tensor  # (Z,) int64: which sample
    counts: torch.Tensor  # (Z,) int64: how often it has the n-gram
    idf: torch.Tensor  # (Z,) float64
    entries: torch.Tensor  # (J,) int64, 0..Z-1: the sample's n-gram
    captions: torch.Tensor  # (J,) int64: the reference that has it, too
    caption_counts: torch.Tensor  # (J,) int64: and how often


class References:
    """The training captions' n-grams, for one n: to be looked up by image."""

    def __init__(self, tokens, image_of, n, base):
        """tokens: word ids (C, T) below `base`, NO_WORD at the end; image_of (C,): whose they are, in order."""
        self.n, self.base = n, base
        rows, ngrams, counts = count_by_row(*ngrams_of(tokens, n, base))
        self.known, columns = ngrams.unique(return_inverse=True)
        keys = self.keys_of(image_of[rows], columns)
        documents = (keys.unique() % (len(self.known) + 1)).bincount(minlength=len(self.known) + 1)
        # the last: of an n-gram that is new, as if one image had it
        self.idf = ((int(image_of[-1]) + 1) / documents.clamp_min(1).double()).log()
        self.norms = norms(rows, counts * self.idf[columns], len(tokens))  # (C,)
        order = keys.argsort()
        self.keys, self.captions, self.counts = keys[order], rows[order].int(), counts[order].int()

    def keys_of(self, images, columns):
        """One number for an image and the place of an n-gram in `known`."""
        return images * (len(self.known) + 1) + columns

    def match(self, tokens, image_of):
        """Samples' word ids (B, T) and images (B,) -> Matches."""
        rows, ngrams, counts = count_by_row(*ngrams_of(tokens, self.n, self.base))
        columns = find(ngrams, self.known)
        keys = self.keys_of(image_of[rows], columns)
        first, end = (torch.searchsorted(self.keys, keys, right=right) for right in (False, True))
        number = end - first  # (Z,) references that have it
        entries = torch.arange(len(keys)).repeat_interleave(number)
        within = torch.arange(len(entries)) - (number.cumsum(0) - number)[entries]
        places = first[entries] + within
        captions, caption_counts = self.captions[places].long(), self.counts[places].long()
        return Matches(rows, counts, self.idf[columns], entries, captions, caption_counts)


def norms(rows, weights, number):
    """Lengths (number,) of sparse vectors, never 0."""
    squares = weights.new_zeros(number).index_add(0, rows, weights.square())
    return squares.sqrt().clamp_min(1e-12)


class Reward:
    """CIDEr-D, 0..10, of captions against an image's own; a share of sentence BLEU-4, 0..1, if asked for.

    Of captions as they are given: as `metrics_utils.CaptionScorer` scores them, or with <EOS> for a word.
    """

    def __init__(self, tokens, num_captions, base, bleu_weight=0.0):
        """
        Args:
            tokens: the training captions' word ids (C, T), image by image, NO_WORD at the end.
            num_captions: (M,) of each image.
            base: all word ids are below it.
        Raises: ValueError when four words make no number of 63 bits.
        """
        if base > MAX_WORDS:
            raise ValueError(
                f"--scst_epochs: {base} words are too many, {MAX_WORDS} at most: give a larger --freq_threshold"
            )
        self.num_captions, self.bleu_weight = num_captions, bleu_weight
        image_of = torch.arange(len(num_captions)).repeat_interleave(num_captions)
        self.orders = [References(tokens, image_of, n, base) for n in ORDERS]
        self.lengths = num_words(tokens)  # (C,)
        of_image = self.lengths.split(num_captions.tolist())
        self.lengths_of = pad_sequence(of_image, batch_first=True, padding_value=2**20)  # (M, most)

    def __call__(self, images, samples):
        """images (N,) of the training images; samples: N lists of S lists of word ids -> (N, S) float64."""
        tokens = padded([caption for of_image in samples for caption in of_image])
        image_of = images.repeat_interleave(len(samples[0]))  # (B,), B = N S
        matches = [order.match(tokens, image_of) for order in self.orders]
        reward = self.cider(tokens, image_of, matches)
        if self.bleu_weight:
            bleu = self.bleu(tokens, image_of, matches)
            reward = (1 - self.bleu_weight) * reward + self.bleu_weight * bleu
        return reward.view(len(images), -1)

    def cider(self, tokens, image_of, matches):
        """CIDEr-D (B,): 10 x the mean over n and references of clipped cosines, less where lengths differ."""
        total = torch.zeros(len(tokens), dtype=torch.float64)
        lengths = num_words(tokens)
        for order, match in zip(self.orders, matches, strict=True):
            own = norms(match.rows, match.counts * match.idf, len(tokens))
            rows, counts, idf = (x[match.entries] for x in (match.rows, match.counts, match.idf))
            shared = torch.minimum(counts, match.caption_counts) * match.caption_counts * idf**2
            # of bigrams, as metrics_utils counts
            apart = (lengths[rows] - 1).clamp_min(0) - (self.lengths[match.captions] - 1).clamp_min(
                0
            )
            penalty = (apart.double() ** 2 / (-2 * CIDER_SIGMA**2)).exp()
            cosines = penalty * shared / (own[rows] * order.norms[match.captions])
            total.index_add_(0, rows, cosines)
        return 10 / len(ORDERS) * total / self.num_captions[image_of]

    def bleu(self, tokens, image_of, matches):
        """Sentence BLEU-4 (B,), with 1 added to the counts of n 2..4."""
        words = num_words(tokens)
        log_precision = torch.zeros(len(tokens), dtype=torch.float64)
        for n, match in zip(ORDERS, matches, strict=True):
            most = torch.zeros_like(match.counts)  # times that a single reference has it
            most.scatter_reduce_(0, match.entries, match.caption_counts, "amax")
            clipped = torch.minimum(match.counts, most)
            hits = torch.zeros_like(words).index_add(0, match.rows, clipped)
            added, written = n > 1, (words - n + 1).clamp_min(0)
            log_precision += ((hits + added) / (written + added).clamp_min(1).double()).log()
        references = self.lengths_of[image_of]  # (B, most)
        difference = (references - words.unsqueeze(1)).abs()
        nearest = (difference * 2**20 + references).argmin(1, keepdim=True)  # of two the shorter
        closest = references.gather(1, nearest).squeeze(1)
        brevity = (1 - closest / words.clamp_min(1).double()).clamp_max(0)
        return (log_precision / len(ORDERS) + brevity).exp()


def num_words(tokens):
    """Word ids (C, T), NO_WORD at the end -> (C,)."""
    return (tokens != NO_WORD).sum(1)


def training_references(batches):
    """The captions of a CaptionBatches, each with <EOS>, (C, T) and how many each image has (M,)."""
    steps = torch.arange(int(batches.lengths.max()))
    places = (batches.start + 1).unsqueeze(1) + steps  # from after <SOS> on
    outside = steps >= batches.lengths.unsqueeze(1)
    tokens = batches.tokens[places.clamp_max(len(batches.tokens) - 1)].long()
    return tokens.masked_fill(outside, NO_WORD), batches.counts.long()


class SelfCritical:
    """The expected reward of captions that the decoder draws, by REINFORCE, as a loss."""

    def __init__(self, reward, vocabulary, num_samples, max_length):
        """reward: (images (N,), N lists of S captions) -> (N, S). num_samples: S, at least 2."""
        self.reward, self.vocabulary = reward, vocabulary
        self.num_samples, self.max_length = num_samples, max_length

    def __call__(self, model, features, batch):
        """features (N, P, F), batch -> loss (), and the batch's mean reward, times its tokens ().

        Each image counts as often as it has captions in the batch, so that of several processes' shares
        the sum is meant, as of cross entropy's; the loss is a mean over captions, not over tokens: then
        it is the reward that is expected whose gradient this is. Nothing is dropped out.
        """
        model.eval()  # until the next epoch begins: what is drawn and what is learnt are the same
        hypotheses = self.draw(getattr(model, "module", model), features)
        captions = [[self.with_end(hypothesis) for hypothesis in image] for image in hypotheses]
        rewards = self.reward(batch.image_rows, captions).float()  # (N, S)
        share = batch.image_index.bincount().cpu() / batch.num_captions  # (N,)
        weights = advantages(rewards) * share.unsqueeze(1) / self.num_samples
        log_probs, weights = self.log_probs(model, features, hypotheses, weights)
        mean_reward = (share * rewards.mean(1)).sum()
        return -(weights * log_probs).sum(), (mean_reward * batch.num_tokens).to(features.device)

    def with_end(self, hypothesis):
        """Its words, and <EOS> if that was drawn."""
        return [*hypothesis.tokens, *[self.vocabulary.eos] * hypothesis.finished]

    def draw(self, decoder, features):
        """S captions of each image by the decoder's own probabilities: N lists of S Hypothesis.

        They are drawn by torch's global generator, whose state a checkpoint holds.
        Raises: FloatingPointError when they are no probabilities.
        """
        how = {"num_captions": self.num_samples, "max_length": self.max_length}
        try:
            hypotheses = generate(decoder, features, self.vocabulary, algorithm="sample", **how)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise FloatingPointError(
                "no caption can be drawn, the decoder's probabilities are not finite: lower "
                "--scst_learning_rate or --grad_clip; the last good checkpoint is kept"
            ) from error
        torch.clear_autocast_cache()  # weights that were cast without gradients
        return hypotheses

    def log_probs(self, model, features, hypotheses, weights):
        """Log-probability of each token drawn, and its caption's weight of (N, S): both (tokens,).

        Of the words that may be drawn, as `generate` has it: <PAD>, <SOS> and <UNK> are none. Where no
        <EOS> was drawn, its weight is 0.
        """
        captions = [[hypothesis.tokens for hypothesis in image] for image in hypotheses]
        finished = torch.tensor(
            [[hypothesis.finished for hypothesis in image] for image in hypotheses]
        )
        words = self.vocabulary
        # <EOS> makes a caption one token longer
        longest = self.max_length + 1
        samples = CaptionBatches(captions, finished.numel(), longest, 0, words.sos, words.eos)
        of_token = weights.flatten().repeat_interleave(samples.lengths + 1)
        of_token[(samples.start + samples.lengths - 1)[~finished.flatten()]] = 0.0
        batch = samples.whole().to(features.device)
        # cuDNN has no gradients of a recurrent layer in eval mode
        with torch.backends.cudnn.flags(enabled=False):
            logits, _ = model(features, batch)  # (tokens, V)
        never = torch.zeros(logits.size(1), dtype=torch.bool)
        never[list({words.pad, words.sos, words.unk} - {None, words.eos})] = True
        logits = logits.float().masked_fill(never.to(logits.device), -torch.inf)
        drawn = logits.gather(1, batch.targets.unsqueeze(1)).squeeze(1)
        return drawn - logits.logsumexp(1), of_token[batch.places].to(logits)


def advantages(rewards):
    """Rewards (N, S) -> each minus the mean of the image's others (N, S). Source: Luo 2020."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.size(1) - 1)
    return rewards - others


def self_critical(batches, vocabulary, options):
    """The SelfCritical that the options ask for. batches: the training captions, CaptionBatches."""
    training, max_length = options.training, options.decoding.max_length
    reward = Reward(*training_references(batches), len(vocabulary), training.scst_bleu_weight)
    return SelfCritical(reward, vocabulary, training.scst_samples, max_length)
