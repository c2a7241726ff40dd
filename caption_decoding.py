"""Write captions with any decoder that has `start` and `step`: greedy decoding, beam search and sampling are one loop.

    hypotheses = generate(decoder, features, vocabulary, algorithm="beam", beam_size=5)   # best first, per image
    caption = vocabulary.decode(hypotheses[0][0].tokens)

Greedy decoding is a beam of one; sampling draws the next word where beam search ranks it. All images are searched
together and leave the batch when they are done; on CUDA they stay, so that nobody waits to hear which. An `Ensemble`
of decoders is one more decoder.
Axes: N images, K hypotheses per image, P grid cells, T steps, V words.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

ALGORITHMS = ("greedy", "beam", "sample")
LOOK_EVERY = (
    8  # steps between looks whether all are done, where images stay: each look waits for the device
)


class Hypothesis(NamedTuple):
    """One caption. `attention` is None for decoders without attention."""

    tokens: list[int]  # T word ids; <SOS> and <EOS> are not among them
    log_prob: float  # nats, the decoder's own, summed over the words and <EOS>
    score: float  # log_prob / (tokens counting <EOS>) ** length_penalty: what the search ranks by
    finished: bool  # False: cut at max_length before <EOS>
    attention: (
        torch.Tensor | None
    )  # (T, P): row t is where the decoder looked to write word t; each row sums to 1


def map_tensors(function, tree):
    """`function` applied to every tensor of nested tuples and dicts."""
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(map_tensors(function, value) for value in tree)
    return function(tree)


def select(tree, rows):
    """Keep the images in `rows`, a mask or an index over axis N of every tensor."""
    return map_tensors(lambda tensor: tensor[rows], tree)


def follow(tree, parents):
    """Give every hypothesis its parent's state: tensors (N, K, ...) and parents (N, W) -> tensors (N, W, ...)."""
    images = torch.arange(parents.size(0), device=parents.device).unsqueeze(1)
    return map_tensors(lambda tensor: tensor[images, parents], tree)


def forbid(logits, tokens, vocabulary, min_length, no_repeat_ngram_size):
    """Mask what may not be written next, in place: logits (N, K, V) float32, tokens (N, K, 1 + t) with <SOS> first.

    <PAD>, <SOS> and <UNK> are never written, <EOS> not before `min_length` words, and no word that would complete an
    n-gram a second time. A hypothesis with no word left may end.
    """
    end = logits[..., vocabulary.eos].clone()
    for never in {vocabulary.pad, vocabulary.sos, vocabulary.unk} - {None, vocabulary.eos}:
        logits[..., never] = -torch.inf  # one by one: a list would be sent to the device first
    written = tokens[:, :, 1:]
    if written.size(-1) < min_length:
        logits[..., vocabulary.eos] = -torch.inf
    n = no_repeat_ngram_size
    if n and written.size(-1) >= n:
        ngrams = written.unfold(-1, n, 1)  # (N, K, m, n)
        recent = written[..., written.size(-1) - n + 1 :].unsqueeze(2)  # (N, K, 1, n - 1)
        repeats = (ngrams[..., :-1] == recent).all(-1)  # (N, K, m)
        ceiling = torch.full_like(repeats, torch.inf, dtype=logits.dtype).masked_fill(
            repeats, -torch.inf
        )
        logits.scatter_reduce_(-1, ngrams[..., -1], ceiling, "amin")
    stuck = logits.amax(-1).isneginf()
    logits[..., vocabulary.eos] = torch.where(stuck, end, logits[..., vocabulary.eos])


def rank(log_prob, logits, log_norm, done, pad, width):
    """Beam search's choice: the `width` best continuations of each image -> parents, tokens, log_prob, each (N, W).

    log_prob (N, K) so far, logits (N, K, V) of the next word, their log_norm (N, K), done (N, K). The best `width` of
    every hypothesis suffice to find them. A finished hypothesis keeps its place in the beam at no cost, so the beam
    narrows as captions end and a beam of one stops at its first <EOS>.
    """
    best, words = logits.topk(min(width, logits.size(-1)))  # (N, K, C)
    totals = (log_prob.unsqueeze(-1) + (best - log_norm.unsqueeze(-1))).masked_fill(
        done.unsqueeze(-1), -torch.inf
    )
    order = totals.clone()
    order[..., 0].masked_fill_(done, torch.inf)
    index = order.flatten(1).topk(min(width, order[0].numel())).indices
    totals[..., 0] = torch.where(done, log_prob, totals[..., 0])
    words = words.masked_fill(done.unsqueeze(-1), pad)
    return (
        index // totals.size(-1),
        words.flatten(1).gather(1, index),
        totals.flatten(1).gather(1, index),
    )


def draw(log_prob, logits, log_norm, done, pad, temperature, top_k, top_p, generator):
    """Sampling's choice, one word per hypothesis; arguments and result as of `rank`, W = K.

    `top_k` keeps the k likeliest words (0: all); `top_p` the fewest that together reach that probability (nucleus
    sampling, Holtzman et al. 2020, section 3.1).
    """
    warm = logits / temperature
    if 0 < top_k < warm.size(-1):
        warm = warm.masked_fill(warm < warm.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        ordered, index = warm.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the likeliest word always stays
        warm = warm.masked_fill(beyond.gather(-1, index.argsort(-1)), -torch.inf)
    words = torch.multinomial(warm.softmax(-1).flatten(0, 1), 1, generator=generator).view(
        done.shape
    )
    gained = logits.gather(-1, words.unsqueeze(-1)).squeeze(-1) - log_norm
    parents = torch.arange(done.size(1), device=done.device).expand_as(done)
    return parents, words.masked_fill(done, pad), log_prob + gained.masked_fill(done, 0.0)


def settled(log_prob, lengths, done, most, length_penalty, count):
    """(N,) bool: images whose `count` best finished hypotheses no live one can beat, be it `most` tokens long.

    An image without a live hypothesis is settled.
    """
    reachable = log_prob.masked_fill(done, -torch.inf).amax(1) / most**length_penalty
    ended = (log_prob / lengths**length_penalty).masked_fill(~done, -torch.inf)
    return ended.topk(min(count, ended.size(1))).values[:, -1] >= reachable


def harvest(length_penalty, count, tokens, log_prob, lengths, done, attention=None):
    """The `count` best hypotheses of one image: finished ones first, then by score. Tensors on the CPU, no N axis."""
    scores = log_prob / lengths**length_penalty
    ranked = sorted(
        range(len(scores)), key=lambda k: (bool(done[k]), float(scores[k])), reverse=True
    )
    hypotheses = []
    for k in [k for k in ranked if not log_prob[k].isneginf()][:count]:
        finished, words = bool(done[k]), int(lengths[k]) - int(done[k])
        maps = None if attention is None else attention[k, :words].float().clone()
        hypotheses.append(
            Hypothesis(
                tokens[k, 1 : words + 1].tolist(),
                float(log_prob[k]),
                float(scores[k]),
                finished,
                maps,
            )
        )
    return hypotheses


@torch.inference_mode()
def generate(
    decoder, features, vocabulary, *, algorithm="beam", beam_size=5, max_length=40, min_length=0, length_penalty=0.0,
    no_repeat_ngram_size=0, temperature=1.0, top_k=0, top_p=1.0, num_captions=1, generator=None, fixed_shapes=None,
):  # fmt: skip
    """Caption N images.

    Args:
        decoder: has `start(features) -> state` and `step(tokens (N, K), state) -> logits (N, K, V), state, attention
            (N, K, P) or None`; state is (per_image, per_hypothesis), nested tuples or dicts of tensors.
        features: what `decoder.start` takes; the first axis is N.
        vocabulary: has ids `pad`, `sos`, `eos`, `unk` (`unk` may be None).
        max_length: most tokens written, <EOS> counted; a caption cut there is returned unfinished rather than lost.
        generator: torch.Generator for `sample`; None uses torch's global one.
        fixed_shapes: images that are done stay in the batch until all are; None: on CUDA only. Their captions are the
            same, but `sample` draws others.
    Returns: per image a list of at most `num_captions` Hypothesis, best first.
    Source: beam search as Vinyals et al. 2015, section 3.1.
    """
    width = {"greedy": 1, "beam": beam_size, "sample": num_captions}[algorithm]
    fixed_shapes = features.device.type == "cuda" if fixed_shapes is None else fixed_shapes
    images = torch.arange(
        len(features), device=features.device
    )  # which image each remaining row is
    results = [None] * len(features)
    state = decoder.start(features)
    first = images.new_zeros(
        len(images), width if algorithm == "sample" else 1
    )  # each hypothesis's parent
    state = (state[0], follow(state[1], first))
    tokens = first.unsqueeze(-1) + vocabulary.sos  # (N, K, 1 + t)
    log_prob, lengths, done = (
        first.float(),
        first.float(),
        first.bool(),
    )  # (N, K); lengths count <EOS>
    attention = ()  # one tensor (N, K, t, P), or none
    for step in range(1, max_length + 1):
        logits, state, alphas = decoder.step(tokens[..., -1], state)
        logits = logits.to(torch.float32, copy=True)  # (N, K, V)
        log_norm = logits.logsumexp(-1)
        forbid(logits, tokens, vocabulary, min_length, no_repeat_ngram_size)
        so_far = log_prob, logits, log_norm, done, vocabulary.pad
        if algorithm == "sample":
            parents, words, log_prob = draw(*so_far, temperature, top_k, top_p, generator)
        else:
            parents, words, log_prob = rank(*so_far, width)
        if alphas is not None:
            attention = (torch.cat([*attention, alphas.unsqueeze(2)], dim=2),)
        tokens, lengths, done, attention, own = follow(
            (tokens, lengths, done, attention, state[1]), parents
        )
        tokens, state = torch.cat([tokens, words.unsqueeze(-1)], dim=-1), (state[0], own)
        lengths, done = lengths + ~done, done | (words == vocabulary.eos)

        most = max_length if length_penalty > 0 else step
        bounds = log_prob, lengths, done, most, length_penalty, num_captions
        over = (done.all(1) if algorithm == "sample" else settled(*bounds)) | (step == max_length)
        if fixed_shapes and step < max_length and (step % LOOK_EVERY or not over.all()):
            continue
        if over.any():
            written = images, tokens, log_prob, lengths, done, *attention
            for image, *own in zip(*(part[over].cpu() for part in written), strict=True):
                results[image] = harvest(length_penalty, num_captions, *own)
            kept = select((images, tokens, log_prob, lengths, done, attention, state), ~over)
            images, tokens, log_prob, lengths, done, attention, state = kept
            if not len(images):
                break
    return results


class Ensemble(nn.Module):
    """Decoders of one vocabulary and encoder as one: the mean of their probabilities and attention.

    It only writes: members are trained one by one, so there is no `forward`.
    """

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.pooled = all(member.pooled for member in members)

    def start(self, features):
        """features (N, P, F) -> state: each member's."""
        return tuple(zip(*(member.start(features) for member in self.members), strict=True))

    def step(self, tokens, state):
        """tokens (N, K), state -> log-probabilities (N, K, V), state, alphas (N, K, P) or None."""
        members = zip(self.members, *state, strict=True)
        steps = [member.step(tokens, member_state) for member, *member_state in members]
        logits, states, alphas = zip(*steps, strict=True)
        log_probs = torch.stack([each.float().log_softmax(dim=-1) for each in logits])
        mean = log_probs.logsumexp(0) - math.log(len(logits))
        maps = [each for each in alphas if each is not None]
        attention = torch.stack(maps).mean(0) if maps else None
        return mean, tuple(zip(*states, strict=True)), attention
