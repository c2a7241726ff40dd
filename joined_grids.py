"""Several grids of features of the same pictures as one: looks of several sizes, encoders side by side.

    features = side_by_side([fine, coarse])                   # (N, F, h, w) each -> (N, P, 2 F)
    encoder = SideBySideEncoder([resnet50, mobilenet_v2])     # answers what each of them does

Shapes: N images, P grid cells, F feature channels, (h, w) of a grid.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import nn


def side_by_side(grids):
    """Grids (N, F, h, w) of looks at the same images, the finest first -> (N, P, all F)."""
    finest, *coarser = grids
    stretched = [F.interpolate(grid, size=finest.shape[2:], mode="bilinear") for grid in coarser]
    return torch.cat([finest, *stretched], dim=1).flatten(2).transpose(1, 2)


class SideBySideEncoder(nn.Module):
    """Several encoders that see the same picture: each cell has the channels of all.

    It answers what an Encoder of flickr_image_caption does. Grids of fewer cells are stretched to the
    largest.
    """

    def __init__(self, encoders):
        super().__init__()
        self.parts = nn.ModuleList(encoders)
        self.trunk = nn.ModuleList(encoder.trunk for encoder in encoders)
        self.tail, self.from_checkpoint = nn.Identity(), False
        self.name = "+".join(encoder.name for encoder in encoders)
        self.image_size, self.batch_size = encoders[0].image_size, encoders[0].batch_size
        self.interpolation = encoders[0].interpolation
        self.channels = sum(encoder.channels for encoder in encoders)
        self.grid = max((encoder.grid for encoder in encoders), key=math.prod)
        self.num_cells, self.beside_cells = math.prod(self.grid), ()

    @property
    def stem(self):
        """What the feature cache keeps the output of: itself."""
        return self

    def forward(self, images):
        """images (N, 3, S, S) uint8 RGB -> features (N, P, F) float32, cells in reading order."""
        return self.join([encoder(images) for encoder in self.parts])

    def join(self, features):
        """Each encoder's features (N, P', F') -> side by side (N, P, F); means (N, 1, F') stay means."""
        if all(x.size(1) == 1 for x in features):
            return torch.cat(features, dim=-1)
        pairs = zip(self.parts, features, strict=True)
        return torch.cat([stretch(x, encoder.grid, self.grid) for encoder, x in pairs], dim=-1)

    def key(self):
        """As an Encoder's: the first one's geometry, a hash over all weights, and each one's own key."""
        keys = [encoder.key() for encoder in self.parts]
        hashes = "".join(key["weights_sha256"] for key in keys)
        return keys[0] | {
            "name": self.name,
            "weights_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
            "grid": list(self.grid),
            "channels": self.channels,
            "parts": keys,
        }


def stretch(features, grid, size):
    """Features (N, P, F) of a grid (h, w) -> of a grid of another size."""
    if list(grid) == list(size):
        return features
    maps = features.transpose(1, 2).unflatten(2, tuple(grid))  # (N, F, h, w)
    return F.interpolate(maps, size=tuple(size), mode="bilinear").flatten(2).transpose(1, 2)
