"""Features on a scale that suits a decoder, whatever encoder they come from.

    class Decoder(StandardisedFeatures): ...
    decoder.calibrate(chunks)               # of training images, before the first step
    features = decoder.standardise(features)

Shapes: N images, P grid cells, F feature channels.
"""

import torch
from torch import nn


class StandardisedFeatures(nn.Module):
    """A module that knows each channel's mean and deviation over the training images."""

    def __init__(self, feature_dim):
        super().__init__()
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_std", torch.ones(feature_dim))

    def calibrate(self, chunks):
        """Take each channel's mean and deviation from training images, in chunks (n, P, F)."""
        moments = [(*torch.var_mean(x, dim=(0, 1), correction=0), len(x)) for x in chunks]
        total = sum(count for *_, count in moments)
        mean = sum(mean * (count / total) for _, mean, count in moments)
        # the variance within the chunks, and that between them
        var = sum((v + (m - mean).square()) * (count / total) for v, m, count in moments)
        std = var.sqrt()
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std.clamp_min(1e-3 * std.max() + 1e-12))  # a constant channel: ~0

    def standardise(self, features):
        """(N, P, F) -> (N, P, F), so that any encoder's scale suits the decoder."""
        return (features - self.feature_mean) / self.feature_std
