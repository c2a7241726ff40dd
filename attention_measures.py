"""Whether attention maps tell where a caption's words came from, measured without object boxes.

    measures = measure(decoder, chunks, hypotheses, vocabulary, hardware)  # of test mode's captions
    share = mean_entropy_share(hypotheses, num_cells)  # of validation's, after each epoch

A map may look right and tell nothing: what counts is whether the decoder loses a word when the cells
under its map are taken away. The decoder is anything with `forward(features, batch)`, `feature_mean`
and `beside_cells`, as `flickr_image_caption.Decoder` says.

Shapes: N images, W words, P grid cells, F feature channels, R rows of a batch: copies of images,
each with one caption; V vocabulary.
[1] Petsiuk et al. 2018, RISE.
"""

import itertools
import math
from collections import Counter

import torch
from torch.nn.utils.rnn import pack_sequence

import metrics_utils
import process_group
from caption_batches import Batch, by_image
from runtime import to_device
from score_details import kind_of

MEASURED_IMAGES = 200  # the first of a split: a minute on two cores, with ResNet50's grids
CHUNK = 20  # images measured together: words of like lengths fill a batch
BATCH_BYTES = 2**26  # of altered features (R, P, F) computed at once
FRACTIONS = (0.1, 0.2, 0.5)  # of the cells, deleted or inserted
UNIFORM_SHARE, UNIFORM_EPOCH = 0.97, 2  # from that epoch on maps above that share are warned of


def by_kind(values, kinds):
    """Means of values (W,) over all words and over each kind that there is: {kind: float}."""
    groups = {"all": range(len(kinds))} if kinds else {}
    for kind in sorted(set(kinds)):
        groups[kind] = [row for row, each in enumerate(kinds) if each == kind]
    return {kind: float(values[list(rows)].double().mean()) for kind, rows in groups.items()}


# ---------------------------------------------------------------------------------------------- maps


def cell_maps(attention, num_cells):
    """Attention (W, P + what stands beside the cells) -> maps (W, P), each of which sums to 1.

    A word that looked at no cell prefers none: its map is uniform.
    """
    cells = attention[:, :num_cells]
    total = cells.sum(1, keepdim=True)
    return torch.where(total > 0, cells / total, 1 / num_cells)


def entropy_share(maps):
    """Entropy of maps (W, P) as a share of the uniform map's: (W,), 0 for one cell, 1 for uniform."""
    if maps.size(1) == 1:
        return maps.new_ones(len(maps))
    return torch.special.entr(maps).sum(1) / math.log(maps.size(1))


def pair_distances(hypothesis, num_cells):
    """Total variation, 0 (alike) to 1 (apart), between the maps of a caption's different words: (pairs,)."""
    maps, words = cell_maps(hypothesis.attention, num_cells), torch.tensor(hypothesis.tokens)
    distances = torch.cdist(maps, maps, p=1) / 2
    return distances[(words.unsqueeze(1) != words).triu()]


def mean_entropy_share(hypotheses, num_cells):
    """Mean entropy share over the words of all processes' captions; None where there are no maps."""
    maps = [h.attention for h in hypotheses if h.attention is not None]
    shares = entropy_share(cell_maps(torch.cat(maps), num_cells)).tolist() if maps else []
    total, words = process_group.all_reduce_sum([math.fsum(shares), len(shares)])
    return total / words if words else None


def newly_uniform(history):
    """Whether an epoch's row is the first, from UNIFORM_EPOCH on, whose maps are next to uniform."""
    uniform = [
        row["epoch"]
        for row in history
        if row["epoch"] >= UNIFORM_EPOCH and (row.get("attention_entropy") or 0) > UNIFORM_SHARE
    ]
    return len(uniform) == 1 and uniform[0] == history[-1]["epoch"]


# ---------------------------------------------------------------------------- deletion and insertion


@torch.inference_mode()
def measure(decoder, chunks, hypotheses, vocabulary, hardware, seed=0):
    """How much written captions owe to the cells that their maps show.

    A word's log-probability is the decoder's own, given the words before it and an image of its own,
    some of whose cells are replaced by the mean feature of the training images.

    Args:
        chunks: features (n, P, F) of the images, on the decoder's device.
        hypotheses: one of each image, with attention.
        hardware: has `autocast()`, in which the decoder computes.
        seed: of the random cells.
    Returns:
        {"images", "words": {kind: number}, "entropy_share": {kind: mean}, "map_distance": mean total
        variation between two words of a caption, "deletion": {fraction: {kind: {"map", "random"}}},
        nats that a word loses with its map's heaviest cells, or as many random ones; "insertion":
        the same of nats that it gains when they come back to an image of the mean alone,
        "noun_deletion_ratio": map over random for nouns at 0.2, or None, "wordnet": whether nouns
        and verbs could be told}; and "beside_cells": {name: {kind: mean share}}, if any. Kinds are
        "all" and those of `score_details.kind_of` that occur.
    Source: [1] section 4.2. Departures: three fractions instead of the area under the curve,
        log-probabilities, cells of the grid instead of pixels, and random cells beside them.
    """
    generator, remaining = torch.Generator().manual_seed(seed), iter(hypotheses)
    chunks_found, distances, images = [], [], 0
    for features in chunks:
        captions = list(itertools.islice(remaining, len(features)))
        images += len(captions)
        rows = [row for row, caption in enumerate(captions) if caption.tokens]
        rows.sort(key=lambda row: -len(captions[row].tokens))  # as packing wants them
        captions = [captions[row] for row in rows]
        distances += [pair_distances(caption, features.size(1)) for caption in captions]
        if captions:
            how = vocabulary.sos, hardware, generator
            chunks_found.append(measure_chunk(decoder, features[rows], captions, *how))
    if not chunks_found:
        return {"images": images, "words": {}}
    words, attention, lost, gained = map(torch.cat, zip(*chunks_found, strict=True))
    kinds = [kind_of(vocabulary.words[word].strip()) for word in words.tolist()]
    distances, num_cells = torch.cat(distances), features.size(1)
    deletion, insertion = falls_by_kind(lost, kinds), falls_by_kind(gained, kinds)
    names = decoder.beside_cells if attention.size(1) > num_cells else ()  # maps by gradients
    beside = zip(names, attention[:, num_cells:].T, strict=True)
    beside = {name: by_kind(shares, kinds) for name, shares in beside}
    return {
        "images": images,
        "words": {"all": len(kinds)} | dict(sorted(Counter(kinds).items())),
        "entropy_share": by_kind(entropy_share(cell_maps(attention, num_cells)), kinds),
        "map_distance": float(distances.mean()) if len(distances) else None,
        "deletion": deletion,
        "insertion": insertion,
        "noun_deletion_ratio": _ratio(deletion["0.2"].get("nouns")),
        "wordnet": metrics_utils.find_wordnet() is not None,
    } | ({"beside_cells": beside} if beside else {})


def _ratio(fall):
    """Map over random; None without words, or where random cells cost nothing."""
    return fall["map"] / fall["random"] if fall and fall["random"] > 0 else None


def falls_by_kind(values, kinds):
    """values (W, 2 orders, fractions), as `measure_chunk`'s -> {fraction: {kind: {"map", "random"}}}."""
    found = {}
    for column, fraction in enumerate(FRACTIONS):
        heaviest, random = (by_kind(each, kinds) for each in values[..., column].T)
        falls = {kind: {"map": heaviest[kind], "random": random[kind]} for kind in heaviest}
        found[str(fraction)] = falls
    return found


def measure_chunk(decoder, features, captions, sos, hardware, generator):
    """What each word of the captions owes to cells of its image.

    Args:
        features: (n, P, F) of the images, which fit into one batch.
        captions: a hypothesis of each image, the longest first, none of them empty.
    Returns: word ids (W,), packed; attention (W, P + ...); nats lost by deletion and nats gained by
        insertion, each (W, 2, fractions): of the map's cells, and of random ones.
    """
    batch = one_caption_each([caption.tokens for caption in captions], sos)
    attention = pack_sequence([caption.attention for caption in captions]).data
    kept = kept_cells(cell_maps(attention, features.size(1)), generator)
    mean, found = decoder.feature_mean.type_as(features), torch.empty(kept.shape[:-1])
    whole = word_log_probs(decoder, features, batch, hardware)
    nothing = word_log_probs(decoder, mean.expand_as(features), batch, hardware)
    steps = torch.arange(len(batch.batch_sizes)).repeat_interleave(batch.batch_sizes)
    copies = kept[0, ..., 0].numel()
    words_at_once = max(1, BATCH_BYTES // (copies * features[0].nbytes))
    for words in torch.arange(len(steps)).flip(0).split(words_at_once):  # the latest first
        images = batch.caption_index[words]
        ends = zip(images.tolist(), steps[words].tolist(), strict=True)
        prefixes = [captions[i].tokens[: step + 1] for i, step in ends for _ in range(copies)]
        stays = to_device(kept[words].flatten(1, -2).unsqueeze(-1), features.device)
        altered = torch.where(stays, features[images].unsqueeze(1), mean)  # (words, copies, P, F)
        prefixes = one_caption_each(prefixes, sos)
        last = word_log_probs(decoder, altered.flatten(0, 1), prefixes, hardware, last=True)
        found[words] = last.view(-1, *found.shape[1:])
    lost, gained = whole.view(-1, 1, 1) - found[:, 0], found[:, 1] - nothing.view(-1, 1, 1)
    return batch.targets, attention, lost, gained


def kept_cells(maps, generator):
    """Which cells of a word's image are left as they are, in each of its copies.

    Args: maps (W, P).
    Returns: (W, 2, 2, fractions, P) bool: without the first cells, or with them alone; first by
        weight, or at random. Equal weights come in the random order, so that of a uniform map both
        are the same cells.
    """
    num_cells = maps.size(1)
    random = torch.rand(maps.shape, generator=generator).argsort(1)
    by_weight = maps.gather(1, random).argsort(dim=1, descending=True, stable=True)
    ranks = torch.stack([random.gather(1, by_weight), random], dim=1).argsort(-1)  # (W, 2, P)
    counts = torch.tensor([max(1, round(share * num_cells)) for share in FRACTIONS])
    first = ranks.unsqueeze(2) < counts.unsqueeze(1)
    return torch.stack([~first, first], dim=1)


def one_caption_each(captions, sos):
    """R captions, lists of word ids, the longest first, as a Batch of as many images. No <EOS>."""
    rows = torch.arange(len(captions))
    words = [torch.tensor([sos, *caption]) for caption in captions]
    inputs = pack_sequence([each[:-1] for each in words])
    counted = (row.expand(len(caption)) for row, caption in zip(rows, captions, strict=True))
    caption_index = pack_sequence(list(counted)).data
    image_tokens, token_place = by_image(caption_index)
    return Batch(
        image_rows=rows,
        image_index=rows,
        caption_index=caption_index,
        image_tokens=image_tokens,
        token_place=token_place,
        inputs=inputs.data,
        targets=pack_sequence([each[1:] for each in words]).data,
        batch_sizes=inputs.batch_sizes,
        num_tokens=len(inputs.data),
        num_captions=len(captions),
        weight=1.0,
    )


def word_log_probs(decoder, features, batch, hardware, last=False):
    """Log-probabilities in nats of a batch's words, packed: (tokens,); or of each last word, (R,)."""
    sizes, batch = batch.batch_sizes, batch.to(features.device)
    with hardware.autocast():
        logits, _ = decoder(features, batch)
    targets = batch.targets
    if last:
        lengths = (sizes.unsqueeze(1) > torch.arange(int(sizes[0]))).sum(0)
        ends = (sizes.cumsum(0) - sizes)[lengths - 1] + torch.arange(len(lengths))
        ends = to_device(ends, features.device)
        logits, targets = logits[ends], targets[ends]
    log_probs = logits.float().log_softmax(-1)
    return log_probs.gather(1, targets.unsqueeze(1)).squeeze(1).cpu()
