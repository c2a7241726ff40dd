"""Write captions with any decoder that has `start` and `step`, by greedy, beam or sampling search.

    hypotheses = generate(decoder, features, vocabulary, beam_size=5)  # per image, best first
    caption = vocabulary.decode(hypotheses[0][0].tokens)

The three searches are one loop: greedy decoding is a beam of one, and sampling draws the next word
where beam search ranks it. All images are searched together, and each leaves the batch when it is
done. On CUDA they stay until all are done, because asking which are would synchronise with the GPU.
An `Ensemble` of decoders is one more decoder.
Axes: N images, K hypotheses per image, P grid cells, T steps, V words.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

ALGORITHMS = ("greedy", "beam", "sample")
SYNC_EVERY = 8  # steps, where images stay. Each read of what is done synchronises with the GPU


class Hypothesis(NamedTuple):
    """One caption. `attention` is None for decoders without attention."""

    tokens: list[int]  # T word ids; <SOS> and <EOS> are not among them
    log_prob: float  # nats, the decoder's own, summed over the words and <EOS>
    score: float  # log_prob / (tokens counting <EOS>) ** length_penalty: what the search ranks by
    finished: bool  # False: cut at max_length before <EOS>
    attention: torch.Tensor | None  # (T, P), row t for word t; each row sums to 1


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


def gather_beams(tree, parents):
    """Copy to each hypothesis what its parent has: (N, K, ...), parents (N, W) -> (N, W, ...)."""
    images = torch.arange(parents.size(0), device=parents.device).unsqueeze(1)
    return map_tensors(lambda tensor: tensor[images, parents], tree)


def forbid(logits, tokens, vocabulary, min_length, no_repeat_ngram_size):
    """Mask what may not come next, in place: logits (N, K, V) float32, tokens (N, K, 1 + t).

    <PAD>, <SOS> and <UNK> are never written, <EOS> not before `min_length` words, and no word that
    would complete an n-gram a second time. A hypothesis with no word left may end.
    """
    eos_logits = logits[..., vocabulary.eos].clone()
    for special in {vocabulary.pad, vocabulary.sos, vocabulary.unk} - {None, vocabulary.eos}:
        logits[..., special] = -torch.inf  # one by one: a list of ids would be copied to the GPU
    words = tokens[:, :, 1:]
    if words.size(-1) < min_length:
        logits[..., vocabulary.eos] = -torch.inf
    n = no_repeat_ngram_size
    if n and words.size(-1) >= n:
        ngrams = words.unfold(-1, n, 1)  # (N, K, m, n)
        latest = words[..., words.size(-1) - n + 1 :].unsqueeze(2)  # (N, K, 1, n - 1)
        repeated = (ngrams[..., :-1] == latest).all(-1)  # (N, K, m)
        limit = torch.full_like(repeated, torch.inf, dtype=logits.dtype)
        limit = limit.masked_fill(repeated, -torch.inf)
        logits.scatter_reduce_(-1, ngrams[..., -1], limit, "amin")
    no_word_left = logits.amax(-1).isneginf()
    logits[..., vocabulary.eos] = torch.where(no_word_left, eos_logits, logits[..., vocabulary.eos])


def beam_step(log_prob, logits, log_norm, finished, pad, width):
    """The `width` best continuations of each image -> parents, words, log_prob, each (N, W).

    log_prob (N, K) so far, logits (N, K, V) of the next word, log_norm (N, K) to normalise them,
    finished (N, K). The best `width` words of every hypothesis suffice. A finished hypothesis keeps
    its place in the beam at no cost, so the beam narrows as captions end, and a beam of one stops
    at its first <EOS>.
    """
    best, words = logits.topk(min(width, logits.size(-1)))  # (N, K, C)
    totals = log_prob.unsqueeze(-1) + (best - log_norm.unsqueeze(-1))
    totals = totals.masked_fill(finished.unsqueeze(-1), -torch.inf)
    ranking = totals.clone()
    ranking[..., 0].masked_fill_(finished, torch.inf)
    index = ranking.flatten(1).topk(min(width, ranking[0].numel())).indices
    totals[..., 0] = torch.where(finished, log_prob, totals[..., 0])
    words = words.masked_fill(finished.unsqueeze(-1), pad)
    parents = index // totals.size(-1)
    return parents, words.flatten(1).gather(1, index), totals.flatten(1).gather(1, index)


def sample_step(log_prob, logits, log_norm, finished, pad, temperature, top_k, top_p, generator):
    """One word drawn for each hypothesis; arguments and result as of `beam_step`, W = K.

    `top_k` keeps the k likeliest words (0: all); `top_p` the fewest that together reach that
    probability (nucleus sampling, Holtzman et al. 2020, section 3.1).
    """
    scaled = logits / temperature
    if 0 < top_k < scaled.size(-1):
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        ordered, index = scaled.softmax(-1).sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # never the likeliest word
        scaled = scaled.masked_fill(outside.gather(-1, index.argsort(-1)), -torch.inf)
    words = torch.multinomial(scaled.softmax(-1).flatten(0, 1), 1, generator=generator)
    words = words.view(finished.shape)
    word_log_prob = logits.gather(-1, words.unsqueeze(-1)).squeeze(-1) - log_norm
    parents = torch.arange(finished.size(1), device=finished.device).expand_as(finished)
    log_prob = log_prob + word_log_prob.masked_fill(finished, 0.0)
    return parents, words.masked_fill(finished, pad), log_prob


def is_done(log_prob, lengths, finished, longest, length_penalty, count):
    """(N,) bool: images whose `count` best finished hypotheses no live one can beat.

    A live hypothesis may become `longest` tokens long. An image without one is done.
    """
    reachable = log_prob.masked_fill(finished, -torch.inf).amax(1) / longest**length_penalty
    scores = (log_prob / lengths**length_penalty).masked_fill(~finished, -torch.inf)
    return scores.topk(min(count, scores.size(1))).values[:, -1] >= reachable


def finalize(length_penalty, count, tokens, log_prob, lengths, finished, attention=None):
    """The `count` best hypotheses of one image: finished ones first, then by score.

    Tensors on the CPU, without the axis N.
    """
    scores = log_prob / lengths**length_penalty
    possible = [k for k in range(len(scores)) if not log_prob[k].isneginf()]
    best = sorted(possible, key=lambda k: (bool(finished[k]), float(scores[k])), reverse=True)
    hypotheses = []
    for k in best[:count]:
        words = int(lengths[k]) - int(finished[k])
        hypothesis = Hypothesis(
            tokens=tokens[k, 1 : words + 1].tolist(),
            log_prob=float(log_prob[k]),
            score=float(scores[k]),
            finished=bool(finished[k]),
            attention=None if attention is None else attention[k, :words].float().clone(),
        )
        hypotheses.append(hypothesis)
    return hypotheses


@torch.inference_mode()
def generate(
    decoder, features, vocabulary, *, algorithm="beam", beam_size=5, max_length=40, min_length=0,
    length_penalty=0.0, no_repeat_ngram_size=0, temperature=1.0, top_k=0, top_p=1.0, num_captions=1,
    generator=None, fixed_shapes=None,
):  # fmt: skip
    """Caption N images.

    Args:
        decoder: has `start(features) -> state` and `step(tokens (N, K), state) -> logits (N, K, V),
            state, attention (N, K, P) or None`; state is (per_image, per_hypothesis), nested tuples
            or dicts of tensors.
        features: what `decoder.start` takes; the first axis is N.
        vocabulary: has ids `pad`, `sos`, `eos`, `unk` (`unk` may be None).
        max_length: most tokens written, <EOS> counted; a caption cut there is returned unfinished.
        generator: torch.Generator for `sample`; None uses torch's global one.
        fixed_shapes: images that are done stay in the batch until all are; None: on CUDA only.
            Their captions are the same, but `sample` draws others.
    Returns: per image a list of at most `num_captions` Hypothesis, best first.
    Source: beam search as Vinyals et al. 2015, section 3.1.
    """
    width = {"greedy": 1, "beam": beam_size, "sample": num_captions}[algorithm]
    fixed_shapes = features.device.type == "cuda" if fixed_shapes is None else fixed_shapes
    images = torch.arange(len(features), device=features.device)  # each remaining row's image
    results = [None] * len(features)
    state = decoder.start(features)
    parents = images.new_zeros(len(images), width if algorithm == "sample" else 1)
    state = (state[0], gather_beams(state[1], parents))
    tokens = parents.unsqueeze(-1) + vocabulary.sos  # (N, K, 1 + t)
    log_prob, lengths = parents.float(), parents.float()  # (N, K); lengths count <EOS>
    finished = parents.bool()  # (N, K)
    attention = ()  # one tensor (N, K, t, P), or none
    for step in range(1, max_length + 1):
        logits, state, alphas = decoder.step(tokens[..., -1], state)
        logits = logits.to(torch.float32, copy=True)  # (N, K, V)
        log_norm = logits.logsumexp(-1)
        forbid(logits, tokens, vocabulary, min_length, no_repeat_ngram_size)
        so_far = log_prob, logits, log_norm, finished, vocabulary.pad
        if algorithm == "sample":
            parents, words, log_prob = sample_step(*so_far, temperature, top_k, top_p, generator)
        else:
            parents, words, log_prob = beam_step(*so_far, width)
        if alphas is not None:
            attention = (torch.cat([*attention, alphas.unsqueeze(2)], dim=2),)
        tokens, lengths, finished, attention, per_hypothesis = gather_beams(
            (tokens, lengths, finished, attention, state[1]), parents
        )
        tokens, state = torch.cat([tokens, words.unsqueeze(-1)], dim=-1), (state[0], per_hypothesis)
        lengths, finished = lengths + ~finished, finished | (words == vocabulary.eos)

        longest = max_length if length_penalty > 0 else step
        bounds = log_prob, lengths, finished, longest, length_penalty, num_captions
        done = (finished.all(1) if algorithm == "sample" else is_done(*bounds)) | (
            step == max_length
        )
        if fixed_shapes and step < max_length and (step % SYNC_EVERY or not done.all()):
            continue
        if done.any():
            beams = images, tokens, log_prob, lengths, finished, *attention
            for image, *local in zip(*(part[done].cpu() for part in beams), strict=True):
                results[image] = finalize(length_penalty, num_captions, *local)
            remaining = select(
                (images, tokens, log_prob, lengths, finished, attention, state), ~done
            )
            images, tokens, log_prob, lengths, finished, attention, state = remaining
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
