"""How a captioner comes by its consensus.Reranker: from the index beside its checkpoint, or a new one.

    captioner.reranker = open_reranker(options, checkpoint, build)     # or None
    index = build_index(captioner, table, features)                    # of the training images

What a vote of similar pictures is, `consensus` knows; here are files, options and the captioner.
Axes: M images, F feature channels.
"""

import hashlib
import json

import torch

import consensus
from caption_options import BEAMS
from runtime import warn
from trained_models import in_common

MEANS_CHUNK = 16  # images read together, which bounds the memory that it takes


def open_reranker(options, checkpoint, build=None):
    """The consensus.Reranker that --rerank asks for, or None; `build` as of `open_index`.

    A checkpoint that is alone still captions, with a warning. Raises: ValueError if it was typed.
    """
    if options.rerank.rerank == "none" or options.decoding.algorithm not in BEAMS:
        return None
    path = options.run.model_path
    index = open_index(path, checkpoint, build)
    if index:
        return make_reranker(options, index)
    lacks = (
        f"no {consensus.FILE_NAME} of it beside {path}: --mode test on its training data makes it"
    )
    if "rerank" in options.typed:
        raise ValueError(f"--rerank consensus: {lacks}")
    warn(f"captions are not reranked, as the checkpoint has it: {lacks}")
    return None


def open_index(path, checkpoint, build=None):
    """The consensus.ConsensusIndex beside a checkpoint at `path`; `build` as of `consensus.open_index`."""
    return consensus.open_index(path, index_owner(path, checkpoint), build)


def make_reranker(options, index):
    """The consensus.Reranker of this run's options."""
    return consensus.Reranker(index, options.rerank.neighbours, options.rerank.rerank_weight)


def index_owner(path, checkpoint):
    """What an index of neighbours must have in common with a checkpoint, as a hash."""
    common = json.dumps(in_common(path, checkpoint))
    return hashlib.sha256(common.encode()).hexdigest()


def build_index(captioner, table, features):
    """The consensus.ConsensusIndex of the training images: their table and FeatureSource."""
    encode = captioner.vocabulary.encode
    captions = [[*map(encode, texts)] for texts in table.captions]
    return consensus.build_index(mean_features(captioner, features), captions)


def mean_features(captioner, features):
    """The mean over the grid of each image of a FeatureSource: (M, F) on the CPU."""
    number = len(features.paths)
    means = torch.empty(number, captioner.encoder.channels)
    chunks = features.stream(torch.arange(number).split(MEANS_CHUNK))
    for place, chunk in zip(means.split(MEANS_CHUNK), chunks, strict=True):
        place.copy_(captioner.grids(chunk).mean(1))
    return means
