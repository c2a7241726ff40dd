"""Maps for every decoder, with or without attention: which cells a written word's probability rose by.

    hypotheses = gradient_maps(decoder, features, hypotheses, vocabulary, hardware)

The decoder is anything with `forward(features, batch)` and `feature_mean`, in eval mode, as
`flickr_image_caption.Decoder` says. One that sees the cells' mean alone, as lstm, has the same
gradient in each: its maps differ from cell to cell by the feature only, so they show which cells
look like what the word was chosen for, not where the decoder looked.

Shapes: N images, W words of a batch, P grid cells, F feature channels, T words of a caption.
[1] Selvaraju et al. 2017, Grad-CAM.  [2] Draelos and Carin 2020, HiResCAM.
"""

import torch

from attention_measures import cell_maps, one_caption_each, word_log_probs

BATCH_BYTES = 2**27  # of features (P, F), one for each step of each word's copy of its image


def gradient_maps(decoder, features, hypotheses, vocabulary, hardware):
    """The hypotheses with maps (T, P) as their attention, each of which sums to 1.

    A word's map is the positive part of gradient times (feature minus the training images' mean),
    summed over channels: to first order, the nats that the word loses with the cell. The gradient
    is that of the word's log-probability, given the words before it. A word that no cell speaks for
    has a uniform map.

    Args:
        features: (N, P, F) of the images, on the decoder's device.
        hypotheses: one of each image.
        hardware: has `autocast()`, in which the decoder computes.
    Source: [1] section 3. Departures: gradients of each cell, not their mean, as [2]; the grid that
        the decoder is given, channels minus their mean; a log-probability for a class's score.
    """
    captions = [hypothesis.tokens for hypothesis in hypotheses]
    tokens_at_once = BATCH_BYTES // features[0].nbytes if captions else 0
    # gradients whatever the caller's mode; cuDNN has none of a recurrent layer in eval mode
    with torch.inference_mode(False), torch.backends.cudnn.flags(enabled=False):
        maps = [torch.empty(len(caption), features.size(1)) for caption in captions]
        for words in word_batches(captions, tokens_at_once):
            images = features[[image for image, _ in words]]
            prefixes = [captions[image][:end] for image, end in words]
            found = last_word_maps(decoder, images, prefixes, vocabulary.sos, hardware)
            for (image, end), word_map in zip(words, found, strict=True):
                maps[image][end - 1] = word_map
    pairs = zip(hypotheses, maps, strict=True)
    return [hypothesis._replace(attention=found) for hypothesis, found in pairs]


def word_batches(captions, tokens_at_once):
    """Every word as (caption, words up to it), the latest first, in lists.

    A list's words and those before them are at most so many together, unless it has one word only.
    """
    ends = ((row, end) for row, words in enumerate(captions) for end in range(1, len(words) + 1))
    words = sorted(ends, key=lambda word: -word[1])
    while words:
        size = max(1, tokens_at_once // words[0][1])
        yield words[:size]
        words = words[size:]


def last_word_maps(decoder, images, prefixes, sos, hardware):
    """Maps of each prefix's last word, by one backward pass: each has an image of its own.

    Args: images (W, P, F); prefixes: lists of word ids, the longest first, none of them empty.
    Returns: (W, P) on the CPU.
    """
    images = images.requires_grad_()
    batch = one_caption_each(prefixes, sos)
    log_probs = word_log_probs(decoder, images, batch, hardware, last=True)
    (gradient,) = torch.autograd.grad(log_probs.sum(), images)
    gains = (gradient * (images.detach() - decoder.feature_mean)).sum(-1)
    return cell_maps(gains.clamp_min(0), images.size(1)).cpu()
