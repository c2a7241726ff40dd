"""Write captions with any decoder that has `start` and `step`, by greedy, beam or sampling search.

    hypotheses = generate(decoder, features, vocabulary, beam_size=5)  # per image, best first
    caption = vocabulary.decode(hypotheses[0][0].tokens)

The searches are one loop: greedy decoding is a beam of one, and sampling draws the next word
where beam search ranks it; `register_algorithm` adds another way to choose. All images are searched
together, and each leaves the batch when it is done. On CUDA they stay until all are done, because
asking which are would synchronise with the GPU. An `Ensemble` of decoders is one more decoder.
Axes: N images, K hypotheses per image, P grid cells, T steps, V words.
"""

import functools
import inspect
import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

SYNC_EVERY = 8  # steps, where images stay. Each read of what is done synchronises with the GPU
ALGORITHMS = {}  # by name: how the next words are chosen, as register_algorithm says
SETTINGS = (
    "beam_size", "length_penalty", "temperature", "top_k", "top_p", "num_captions", "generator", "eos",
)  # fmt: skip


class Hypothesis(NamedTuple):
    """One caption. `attention` is None for decoders without attention."""

    tokens: list[int]  # T word ids; <SOS> and <EOS> are not among them
    log_prob: float  # nats, the decoder's own, summed over the words and <EOS>
    # log_prob / (tokens counting <EOS>) ** length_penalty: what the search ranks by; reranking adds to it
    score: float
    finished: bool  # False: cut at max_length before <EOS>
    attention: torch.Tensor | None  # (T, P), row t for word t; each row sums to 1


class Beams(NamedTuple):
    """The hypotheses of the images that are not done; every search starts from one, K = 1."""

    tokens: torch.Tensor  # (N, K, 1 + t) int64: <SOS>, words, <EOS>, <PAD>
    log_prob: torch.Tensor  # (N, K) float32
    lengths: torch.Tensor  # (N, K) float32: tokens written, <EOS> counted
    finished: torch.Tensor  # (N, K) bool: <EOS> was written
    attention: torch.Tensor | None  # (N, K, t, P)


def map_tensors(function, tree):
    """`function` applied to every tensor of nested tuples, NamedTuples and dicts; None stays."""
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        values = [map_tensors(function, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return tree if tree is None else function(tree)


def select(tree, rows):
    """Index axis N of every tensor: `rows` is a slice, a number, or a tensor of numbers."""
    return map_tensors(lambda tensor: tensor[rows], tree)


def gather_beams(tree, parents):
    """Copy to each hypothesis what its parent has: (N, K, ...), parents (N, W) -> (N, W, ...)."""
    images = torch.arange(parents.size(0), device=parents.device).unsqueeze(1)
    return map_tensors(lambda tensor: tensor[images, parents], tree)


def start_beams(images, sos):
    """One hypothesis, of <SOS> alone, for every image of `images` (N,)."""
    zeros = images.new_zeros(len(images), 1)
    return Beams(zeros.unsqueeze(-1) + sos, zeros.float(), zeros.float(), zeros.bool(), None)


def extend(beams, words, log_prob, attention, vocabulary):
    """Append `words` (N, K) and where the decoder looked to write them, (N, K, P) or None.

    `log_prob` (N, K) counts the words. A hypothesis that was finished gets <PAD>.
    """
    words = words.masked_fill(beams.finished, vocabulary.pad)
    if attention is not None:
        earlier = [] if beams.attention is None else [beams.attention]
        attention = torch.cat([*earlier, attention.unsqueeze(2)], dim=2)
    return Beams(
        tokens=torch.cat([beams.tokens, words.unsqueeze(-1)], dim=-1),
        log_prob=log_prob,
        lengths=beams.lengths + ~beams.finished,
        finished=beams.finished | (words == vocabulary.eos),
        attention=attention,
    )


def forbid(logits, words, vocabulary, min_length, no_repeat_ngram_size):
    """Mask what may not come next, in place: logits (N, K, V) float32, words so far (N, K, t).

    <PAD>, <SOS> and <UNK> are never written, <EOS> not before `min_length` words, and no word that
    would complete an n-gram a second time. A hypothesis with no word left may end.
    """
    eos_logits = logits[..., vocabulary.eos].clone()
    for special in {vocabulary.pad, vocabulary.sos, vocabulary.unk} - {None, vocabulary.eos}:
        logits[..., special] = -torch.inf  # one by one: a list of ids would be copied to the GPU
    if words.size(-1) < min_length:
        logits[..., vocabulary.eos] = -torch.inf
    if 0 < no_repeat_ngram_size <= words.size(-1):
        forbid_repeats(logits, words, no_repeat_ngram_size)
    no_word_left = logits.amax(-1).isneginf()
    logits[..., vocabulary.eos] = torch.where(no_word_left, eos_logits, logits[..., vocabulary.eos])


def forbid_repeats(logits, words, n):
    """Mask the words that would complete an n-gram of `words` (N, K, t >= n) again, in place."""
    ngrams = words.unfold(-1, n, 1)  # (N, K, m, n)
    latest = words[..., words.size(-1) - n + 1 :].unsqueeze(2)  # (N, K, 1, n - 1)
    repeated = (ngrams[..., :-1] == latest).all(-1)  # (N, K, m)
    limit = torch.full_like(repeated, torch.inf, dtype=logits.dtype)
    limit = limit.masked_fill(repeated, -torch.inf)
    logits.scatter_reduce_(-1, ngrams[..., -1], limit, "amin")


def register_algorithm(name):
    """A decorator that lets --algorithm `name` choose the next words by the function below it.

    function(beams, logits, log_norm, ...) -> parents, words, log_prob, each (N, W)
        beams: Beams of what is written; before the first word one hypothesis per image, K = 1.
        logits: (N, K, V) float32 of the next word, -inf for what may not come.
        log_norm: (N, K), which subtracted from logits makes them the decoder's log-probabilities.
        parents: int64, which of the K each of the W new hypotheses goes on from; words: int64, its
        next word; log_prob: float32, its sum so far. A finished hypothesis keeps its own.
    Its further parameters are those of SETTINGS that it takes: their flags are accepted with it.
    Raises: ValueError when the name is taken, or a parameter is none of SETTINGS.
    """

    def register(function):
        if name in ALGORITHMS:
            raise ValueError(f"there is an algorithm {name!r} already: choose another name")
        if unknown := set(settings_of(function)) - set(SETTINGS):
            known = ", ".join(SETTINGS)
            raise ValueError(f"algorithm {name!r} takes {unknown.pop()}, which is none of {known}")
        ALGORITHMS[name] = function
        return function

    return register


def settings_of(function):
    """The names of the SETTINGS that an algorithm's function takes."""
    return [*inspect.signature(function).parameters][3:]


@register_algorithm("greedy")
def greedy_step(beams, logits, log_norm):
    """The likeliest word: a beam of one."""
    return beam_step(beams, logits, log_norm, 1)


@register_algorithm("beam")
def beam_step(beams, logits, log_norm, beam_size):
    """The `beam_size` best continuations of each image.

    The best `beam_size` words of every hypothesis suffice. A finished hypothesis keeps its place in
    the beam at no cost, so the beam narrows as captions end, and a beam of one stops at its first <EOS>.
    """
    best, words = logits.topk(min(beam_size, logits.size(-1)))  # (N, K, C)
    totals = beams.log_prob.unsqueeze(-1) + (best - log_norm.unsqueeze(-1))
    totals = totals.masked_fill(beams.finished.unsqueeze(-1), -torch.inf)
    ranking = totals.clone()
    ranking[..., 0].masked_fill_(beams.finished, torch.inf)
    totals[..., 0] = torch.where(beams.finished, beams.log_prob, totals[..., 0])
    ranking = ranking.flatten(1)  # (N, K C)
    index = ranking.topk(min(beam_size, ranking.size(1))).indices
    log_prob, words = (each.flatten(1).gather(1, index) for each in (totals, words))
    return index // best.size(-1), words, log_prob


@register_algorithm("full_beam")
def full_beam_step(beams, logits, log_norm, beam_size, length_penalty, eos):
    """The `beam_size` best live continuations of each image, and behind them as many finished ones.

    A caption that ends leaves its place to a live one, if it was among the best `beam_size` of all. As
    `beam_step` where none has ended; to the end as generate of transformers, with early_stopping="never",
    but that a caption cut at max_length comes after those that ended.
    """
    # twice as many as are wanted: each live hypothesis has one way to end, so half of them go on
    wide = 2 * beam_size
    live = beams.log_prob.masked_fill(beams.finished, -torch.inf)
    best, words = logits.topk(min(wide, logits.size(-1)))  # (N, K, C)
    totals = (live.unsqueeze(-1) + (best - log_norm.unsqueeze(-1))).flatten(1)  # (N, K C)
    totals, index = totals.topk(min(wide, totals.size(1)))  # (N, W), best first
    parents, words = index // best.size(-1), words.flatten(1).gather(1, index)
    ends = words == eos
    going = totals.masked_fill(ends, -torch.inf).topk(min(beam_size, totals.size(1)))

    # an end counts if it is among the best `beam_size`, and competes with those of earlier steps
    ending = totals.masked_fill(~ends, -torch.inf)
    ending[:, beam_size:] = -torch.inf
    ended = beams.log_prob.masked_fill(~beams.finished, -torch.inf)
    ended_scores = scores(beams, length_penalty).masked_fill(~beams.finished, -torch.inf)
    ending_scores = ending / beams.tokens.size(-1) ** length_penalty  # <EOS> for <SOS>
    rated = torch.cat([ended_scores, ending_scores], dim=1)
    places = rated.topk(min(beam_size, rated.size(1))).indices

    def chosen(of_ended, of_new, of_going):
        return torch.cat([of_going, torch.cat([of_ended, of_new], dim=1).gather(1, places)], dim=1)

    own = torch.arange(ended.size(1), device=ended.device).expand_as(ended)
    return (
        chosen(own, parents, parents.gather(1, going.indices)),
        chosen(torch.full_like(own, eos), words, words.gather(1, going.indices)),
        chosen(ended, ending, going.values),
    )


def truncate(logits, top_k, top_p):
    """Mask all but the `top_k` likeliest words (0: keep all), then all outside the nucleus `top_p`.

    The nucleus is the fewest words that together reach that probability.
    Source: Holtzman et al. 2020, section 3.1.
    """
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # never the likeliest word
        logits = logits.masked_fill(outside.gather(-1, index.argsort(-1)), -torch.inf)
    return logits


@register_algorithm("sample")
def sample_step(beams, logits, log_norm, num_captions, temperature, top_k, top_p, generator):
    """One word drawn for each of `num_captions` hypotheses, all from the one before the first word."""
    width = max(logits.size(1), num_captions)
    parents = torch.arange(width, device=logits.device).clamp(max=logits.size(1) - 1)
    logits, log_norm = logits.expand(-1, width, -1), log_norm.expand(-1, width)
    probabilities = truncate(logits / temperature, top_k, top_p).softmax(-1)
    words = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator)
    words = words.view_as(log_norm)
    word_log_prob = logits.gather(-1, words.unsqueeze(-1)).squeeze(-1) - log_norm
    log_prob = beams.log_prob + word_log_prob.masked_fill(beams.finished, 0.0)
    return parents.expand_as(words), words, log_prob


def step_function(algorithm, settings):
    """How next words are chosen: (beams, logits, log_norm) -> parents, words, log_prob.

    settings: {name: value} of SETTINGS.
    """
    function = ALGORITHMS[algorithm]
    return functools.partial(function, **{name: settings[name] for name in settings_of(function)})


def scores(beams, length_penalty):
    """What the search ranks by: (N, K), or (K,) of one image."""
    return beams.log_prob / beams.lengths**length_penalty


def is_done(beams, max_length, length_penalty, count):
    """(N,) bool: images whose `count` best finished hypotheses no live one can beat.

    An image without a live hypothesis is done, and at `max_length` every image.
    """
    step = beams.tokens.size(-1) - 1
    if step == max_length:
        return torch.ones_like(beams.finished[:, 0])
    longest = max_length if length_penalty > 0 else step  # where a live one's score is best
    live = beams.log_prob.masked_fill(beams.finished, -torch.inf).amax(1)
    finished = scores(beams, length_penalty).masked_fill(~beams.finished, -torch.inf)
    worst = finished.topk(min(count, finished.size(1))).values[:, -1]  # of the `count` best
    return worst >= live / longest**length_penalty


def finalize(images, beams, length_penalty, count):
    """{image: its `count` best hypotheses} of the images numbered `images` (N,)."""
    images, beams = map_tensors(lambda tensor: tensor.cpu(), (images, beams))
    return {
        image: best_hypotheses(select(beams, row), length_penalty, count)
        for row, image in enumerate(images.tolist())
    }


def best_hypotheses(beams, length_penalty, count):
    """Of one image, finished ones first, then by score. Its Beams, on the CPU, lack the axis N."""
    log_prob, finished = beams.log_prob.tolist(), beams.finished.tolist()
    score = scores(beams, length_penalty).tolist()
    possible = [k for k, value in enumerate(log_prob) if value != -math.inf]
    best = sorted(possible, key=lambda k: (finished[k], score[k]), reverse=True)[:count]
    hypotheses = []
    for k in best:
        words = int(beams.lengths[k]) - finished[k]  # without <EOS>
        tokens = beams.tokens[k, 1 : words + 1].tolist()
        attention = None
        if beams.attention is not None:
            attention = beams.attention[k, :words].float().clone()
        hypotheses.append(Hypothesis(tokens, log_prob[k], score[k], finished[k], attention))
    return hypotheses


def rescored(hypothesis, length_penalty):
    """A hypothesis with the score that another length penalty gives it."""
    written = len(hypothesis.tokens) + hypothesis.finished
    return hypothesis._replace(score=hypothesis.log_prob / max(1, written) ** length_penalty)


@torch.inference_mode()
def generate(
    decoder, features, vocabulary, *, algorithm="beam", beam_size=5, max_length=40, min_length=0,
    length_penalty=0.0, no_repeat_ngram_size=0, temperature=1.0, top_k=0, top_p=1.0, num_captions=1,
    generator=None, fixed_shapes=None, record=None,
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
        record: called at each step as the algorithm is, and with what it chose, a tuple of parents,
            words and log_prob; it changes nothing.
    Returns: per image a list of at most `num_captions` Hypothesis, best first.
    Source: beam search as Vinyals et al. 2015, section 3.1.
    """
    if not len(features):
        return []
    if fixed_shapes is None:
        fixed_shapes = features.device.type == "cuda"
    settings = (
        beam_size, length_penalty, temperature, top_k, top_p, num_captions, generator, vocabulary.eos,
    )  # fmt: skip
    next_words = step_function(algorithm, dict(zip(SETTINGS, settings, strict=True)))
    hypotheses = {}
    images = torch.arange(len(features), device=features.device)  # the numbers of those not done
    beams = start_beams(images, vocabulary.sos)
    per_image, per_hypothesis = decoder.start(features)
    state = per_image, per_hypothesis
    for step in range(1, max_length + 1):
        logits, state, attention = decoder.step(beams.tokens[..., -1], state)
        logits = logits.to(torch.float32, copy=True)  # (N, K, V)
        log_norm = logits.logsumexp(-1)  # of all words, so that log_prob stays the decoder's own
        forbid(logits, beams.tokens[..., 1:], vocabulary, min_length, no_repeat_ngram_size)
        parents, words, log_prob = next_words(beams, logits, log_norm)
        if record:
            record(beams, logits, log_norm, (parents, words, log_prob))
        beams, attention, per_hypothesis = gather_beams((beams, attention, state[1]), parents)
        beams = extend(beams, words, log_prob, attention, vocabulary)
        state = state[0], per_hypothesis

        if fixed_shapes and step % SYNC_EVERY and step < max_length:
            continue
        done = is_done(beams, max_length, length_penalty, num_captions)
        if done.all() if fixed_shapes else done.any():
            ended, remaining = done.nonzero().flatten(), (~done).nonzero().flatten()
            hypotheses |= finalize(*select((images, beams), ended), length_penalty, num_captions)
            images, beams, state = select((images, beams, state), remaining)
        if not len(images):
            break
    return [hypotheses[image] for image in range(len(features))]


class Ensemble(nn.Module):
    """Decoders of one vocabulary and encoder as one: the mean of their probabilities and attention.

    Members are trained one by one: `forward` is for what is asked of captions already written.
    """

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.reads_grid = any(member.reads_grid for member in members)

    @property
    def feature_mean(self):
        """(F,) of the training images, which members have in common."""
        return self.members[0].feature_mean

    @property
    def beside_cells(self):
        """Names of the attention's columns after the P cells: of the member that has most."""
        return max((member.beside_cells for member in self.members), key=len)

    def start(self, features):
        """features (N, P, F) -> state: each member's."""
        return tuple(zip(*(member.start(features) for member in self.members), strict=True))

    def step(self, tokens, state):
        """tokens (N, K), state -> log-probabilities (N, K, V), state, alphas (N, K, P) or None."""
        members = zip(self.members, *state, strict=True)
        steps = [member.step(tokens, member_state) for member, *member_state in members]
        logits, states, alphas = zip(*steps, strict=True)
        return mean_log_probs(logits), tuple(zip(*states, strict=True)), mean_attention(alphas)

    def forward(self, features, batch):
        """features (N, P, F), batch -> log-probabilities (tokens, V), alphas (tokens, P) or None."""
        logits, alphas = zip(*(member(features, batch) for member in self.members), strict=True)
        return mean_log_probs(logits), mean_attention(alphas)


def mean_log_probs(logits):
    """Logits (..., V) of several decoders -> the logarithm of the mean of their probabilities."""
    log_probs = torch.stack([each.float().log_softmax(dim=-1) for each in logits])
    return log_probs.logsumexp(0) - math.log(len(logits))


def mean_attention(alphas):
    """The mean over the decoders that attend; None where none does.

    One that has no columns beside the cells looked at none of them.
    """
    maps = [each for each in alphas if each is not None]
    columns = max((each.size(-1) for each in maps), default=0)
    maps = [F.pad(each, (0, columns - each.size(-1))) for each in maps]
    return torch.stack(maps).mean(0) if maps else None
