"""The images of a split as training and testing read them: a table, their features, captions in batches.

    dataset = open_dataset(options)                                    # caption_data.Dataset
    table, features = open_features(options, hardware, encoder, dataset, "train", True)
    split = Split(table, features, make_batches(table, vocabulary, options))
    for batch, grids in split.epoch(0): ...

Axes: N images, P grid cells, F feature channels.
"""

import functools
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import pandas
import torch

import caption_data
import checkpoints
import image_loading
from caption_batches import CaptionBatches
from feature_cache import FeatureSource, open_source
from runtime import large_blocks_returned, printable

DECODE_CHUNK = 100  # images decoded together


def open_dataset(options, checkpoint=None):
    """The dataset, split as the checkpoint's was; in test mode a foreign one is scored whole."""
    data = options.data
    try:
        return caption_data.load_dataset(
            data.dataset_type,
            data.image_dir,
            data.captions_file,
            data_dir=data.data_dir,
            split_seed=data.split_seed,
            splits=checkpoint["splits"] if checkpoint else None,
            typed=bool({"dataset_type", "captions_file"} & options.typed),
            scored={"test": options.output.split, "tune": "val"}.get(options.run.mode),
            max_bad_fraction=data.max_bad_fraction,
            max_train_images=data.max_train_images,
            max_val_images=data.max_val_images,
            remote_shards="image_dir" in options.by_hand,
            split_ratios=data.split_ratios,
        )
    except ValueError as error:
        inherited = data.captions_file and "captions_file" not in options.typed
        if not (inherited and str(error).startswith(str(Path(data.captions_file)))):
            raise
        raise ValueError(  # whose message may quote a file that the checkpoint chose
            f"--captions_file {data.captions_file}, from the checkpoint, cannot be used: "
            "type it to see why"
        ) from error


def check_cache_dir(cache):
    """Raises: ValueError when features are to be stored where they cannot be."""
    if not cache.no_feature_cache:
        checkpoints.check_writable_dir(cache.cache_dir, "--cache_dir")


def open_features(options, hardware, encoder, dataset, split, reads_grid, mirrored=False):
    """(table of the images in `split`, their features); unreadable images leave the dataset."""
    cache = options.features
    table = dataset.table[dataset.table.split == split].reset_index(drop=True)
    paths = image_loading.ImagePaths(dataset.image_dir, table.image.tolist())
    features = open_source(
        encoder.stem,
        paths,
        pooled=not (reads_grid or options.training.fine_tune_encoder),
        mirrored=mirrored,
        cache_dir=None if cache.no_feature_cache else cache.cache_dir,
        dtype=getattr(torch, cache.cache_dtype),
        num_workers=options.run.num_workers,
        device=hardware.device,
        what=f"{split} images",
    )
    if not features.unreadable:
        return table, features
    names = zip(table.image, paths, strict=True)
    unreadable = features.unreadable
    reasons = {name: unreadable[path] for name, path in names if path in unreadable}
    print(printable(dataset.drop_unreadable(reasons)))
    return table[~table.image.isin(list(reasons))].reset_index(drop=True), features


@dataclass
class Split:
    """The training or validation images: their table, their features, their captions in batches."""

    table: pandas.DataFrame  # as caption_data.Dataset.table
    features: FeatureSource
    batches: CaptionBatches

    @functools.cached_property
    def order(self):
        """SHA-256 of what decides the order of an epoch's captions: images, captions each, seed."""
        decisive = [self.batches.seed, self.table.image.tolist(), self.batches.counts.tolist()]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()

    def epoch(self, epoch, start=0, shuffle=True, mirror=False, crop=False):
        """Yield (batch, features (N, P, F)) of an epoch from caption number `start` on."""
        batches, ahead = itertools.tee(self.batches.epoch(epoch, start, shuffle))
        mirrored = self.batches.mirrored(epoch) if mirror else None
        crops = {"crops": self.batches.crops(epoch)} if crop else {}
        rows = (batch.image_rows for batch in ahead)
        features = self.features.stream(rows, mirrored, **crops)
        return zip(batches, features, strict=True)


def decode_chunks(features, rows=None):
    """Yield what a FeatureSource has of its images, in chunks that are decoded together: (n, P, F) each.

    rows: (N,) positions of the wanted ones; None: all.
    """
    rows = torch.arange(len(features.paths)) if rows is None else rows
    with large_blocks_returned():
        yield from features.stream(rows.split(DECODE_CHUNK) if len(rows) else [])


def make_batches(table, vocabulary, options):
    """A table's captions as batches of word ids."""
    ids = ([vocabulary.encode(text) for text in captions] for captions in table.captions)
    batch_size, max_length = options.training.batch_size, options.decoding.max_length
    ends = vocabulary.sos, vocabulary.eos
    return CaptionBatches(ids, batch_size, max_length, options.run.seed, *ends)


def needs_grid(decoder, options):
    """Whether the decoder or its maps are made of grids; says so if it is the maps alone."""
    maps_alone = options.pictures.viz_method == "gradient" and not decoder.reads_grid
    if maps_alone:
        print("--viz_method gradient reads grids, of which the decoder needs the means only")
    return maps_alone or decoder.reads_grid
