"""Caption photographs: frozen image encoder -> LSTM, with or without attention -> beam search.

    python flickr_image_caption.py --dataset_type flickr8k --decoder attention --epochs 15
    python flickr_image_caption.py --mode test --model_path saved_models/flickr8k/resnet_attention
    python flickr_image_caption.py --mode caption --model_path best.pt --images dog.jpg holiday_folder

Pictures are encoded once into a feature cache; training then reads features only. Every run writes
its own folder below --model_save_dir. Read this file from top to bottom: it is the whole method.

Shapes: N images, B captions, K hypotheses per image, P grid cells (7 * 7), F feature channels
(2048), E embedding, H hidden and A attention units, L layers, T steps, V words.
[1] Vinyals et al. 2015, Show and Tell.   [2] Xu et al. 2015, Show, Attend and Tell.
[3] Bahdanau et al. 2015, Neural Machine Translation by Jointly Learning to Align and Translate.
[4] Vaswani et al. 2017, Attention Is All You Need.   [5] Lu et al. 2017, Knowing When to Look.
[6] Anderson et al. 2018, Bottom-Up and Top-Down Attention.   [7] Henry et al. 2020, Query-Key
Normalization for Transformers.   [8] Kobayashi et al. 2020, Attention is Not Only a Weight.
"""

from caption_options import (
    BEAMS,
    COMPARE,
    ENCODERS,
    SCHEDULES,
    Options,
    check_files,
    each_alone,
    encoder_parts,
    parse_args,
    settle,
)

if __name__ == "__main__":  # before torch: --help and mistakes answer at once
    OPTIONS = check_files(parse_args(description=__doc__))
    if OPTIONS.run.mode == COMPARE:
        import run_comparison

        raise SystemExit(run_comparison.main(OPTIONS.output))

import contextlib
import functools
import itertools
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.optim import lr_scheduler

import attention_measures
import caption_pictures
import caption_splits
import checkpoints
import decoding_tuning
import evaluation
import experiment_utils
import gradient_maps
import hub_encoders
import hub_models
import image_loading
import metrics_utils
import model_selection
import packed_lstm
import process_group
import run_folder
import run_output
import warm_start
from caption_batches import SubwordVocabulary, Vocabulary, vocabulary_from_plain
from caption_decoding import Ensemble, generate, map_tensors, select
from caption_objectives import Distillation, ask_teacher, kept_in, targets_file
from clip_gpt2 import GPT2Decoder, PrefixGPT2Decoder
from download_datasets import load_encoder_weights
from encoder_models import empty_trunk, fill_buffers, find_model, grid_shape
from encoder_trunks import fold, load_trunk, sha256_of, split_blocks, split_weights
from feature_scale import StandardisedFeatures
from joined_grids import SideBySideEncoder, side_by_side
from model_versions import resolve_model_path, results_folder
from packed_lstm import run_lstm, step_lstm
from progress import Progress
from repeated_linear import RepeatedLinear, summed_once
from reranking import build_index, make_reranker, open_index, open_reranker
from runtime import (
    Stopped,
    arithmetic,
    counted,
    leave_broken_pipe,
    listen_for_stop,
    memory_shortage,
    printable,
    resolve_hardware,
    return_freed_memory,
    set_threads,
    to_device,
    until_stopped,
    warn,
)
from self_critical import self_critical
from split_data import (
    DECODE_CHUNK,
    Split,
    check_cache_dir,
    decode_chunks,
    make_batches,
    needs_grid,
    open_dataset,
    open_features,
)
from train_state import TrainState, change_course, last_on_captions, make_plan
from trained_models import (
    compare_seed,
    described,
    in_common,
    load_member,
    load_model,
    open_checkpoint,
    warn_of_seen_images,
)
from word_embedding import begin_with_vectors, partly_frozen

CALIBRATION_IMAGES = 512  # training images whose features standardise all others
MANY_WORDS = 20_000  # in a vocabulary: the logits of a batch or a beam are large blocks of memory
ENCODE_BATCH_SIZES = {"cpu": 8, "cuda": 32, "mps": 32}  # measured, but for mps: docs/PERFORMANCE.md
READ_LOSS_EVERY = 50  # steps: each read synchronises with the GPU
ROW_TILE = 16  # rows that a matrix unit multiplies at once: products of other heights are slower

# --------------------------------------------------------------------------------------- the encoder


class Encoder(nn.Module):
    """A frozen trunk: pictures to the grid of features before pooling.

    `trunk` holds the weights as published; what computes is a copy with BatchNorm folded into the
    convolutions. `stem` is what the feature cache keeps the output of, all of it; `tail` is what
    turns that into the grid, and may learn: nothing here.
    """

    def __init__(
        self,
        name,
        state,
        source,
        precision="float32",
        image_size=None,
        coarse_size=None,
        batch_size=ENCODE_BATCH_SIZES["cpu"],
        interpolation=None,
        model=None,
    ):
        """
        Args:
            name: what --encoder calls it.
            state: the model's state dict; the classifier is ignored.
            source: where `state` comes from, for messages.
            precision: float32, bfloat16 or float16, in which it computes.
            image_size: pixels a side; None: what the published weights were tested with.
            coarse_size: pixels a side of a second look at the same picture, or None.
            batch_size: most images computed together, which bounds the memory it takes.
            interpolation: by which pictures are scaled; None: as the model's were.
            model: its EncoderModel; None: torchvision's or a plugin's of this name.
        Raises: ValueError when `state` is of another architecture, or the second look no smaller.
        """
        super().__init__()
        self.model = model or find_model(name)
        self.trunk, model_state = empty_trunk(name, ENCODERS.get(name), self.model)
        load_trunk(self.trunk, state, model_state, f"--encoder_weights {source}", name)
        fill_buffers(self.trunk, self.model.build)
        self.tail = nn.Identity()
        self.from_checkpoint = False  # then a run's checkpoints all hold it: nothing else may
        self.name, self.precision, self.batch_size = name, precision, batch_size
        self.image_size, self.coarse_size = image_size or self.model.image_size, coarse_size
        self.interpolation = interpolation or self.model.interpolation
        if coarse_size and coarse_size >= self.image_size:
            raise ValueError(
                f"--coarse_size {coarse_size} must be below the image size, "
                f"{self.image_size} (--image_size)"
            )
        for each in ("mean", "std"):
            of_rgb = torch.tensor(getattr(self.model, each)).view(1, 3, 1, 1)
            self.register_buffer(each, of_rgb, persistent=False)
        self.requires_grad_(False).eval()
        self.folded = fold(self.trunk, precision, self.model.folds)
        for size in filter(None, (coarse_size, self.image_size)):
            self.channels, *self.grid = grid_shape(self.trunk, size, name)  # F, [h, w]
        self.channels *= 2 if coarse_size else 1
        self.num_cells, self.beside_cells = math.prod(self.grid), self.model.beside_cells
        if self.beside_cells:  # one row of a square picture's cells, and these behind
            self.grid = [math.isqrt(self.num_cells - len(self.beside_cells))] * 2

    @property
    def parts(self):
        """The encoders whose features lie side by side: itself."""
        return [self]

    @property
    def stem(self):
        """What the feature cache keeps the output of: itself."""
        return self

    def blank(self, size=None):
        """A picture (1, 3, S, S), to see the shape of what comes of it."""
        return torch.zeros(1, 3, size or self.image_size, size or self.image_size)

    def train(self, mode=True):
        """Stays in eval mode whatever `mode`: frozen BatchNorm must not drift."""
        return super().train(False)

    def forward(self, images):
        """images (N, 3, S, S) uint8 RGB -> features (N, P, F) float32, cells in reading order."""
        return torch.cat([self.encode(part) for part in images.split(self.batch_size)])

    def encode(self, images):
        """As `forward`, of images that are computed together."""
        images = to_device(images, self.mean.device).contiguous(memory_format=torch.channels_last)
        images = (images / 255 - self.mean) / self.std
        looks = [images]
        if self.coarse_size:
            size = (self.coarse_size, self.coarse_size)
            looks.append(F.interpolate(images, size=size, mode="bilinear", antialias=True))
        return self.join_looks([self.grid_of(look) for look in looks])

    def grid_of(self, images):
        """Normalised images (N, 3, S, S) -> (N, F, h, w) float32."""
        return self.folded(images.to(getattr(torch, self.precision))).float()

    def join_looks(self, grids):
        """What `grid_of` gave for each look at the same images -> features (N, P, F)."""
        return side_by_side(grids)

    @functools.cached_property
    def weights_sha256(self):
        """Of the trunk, which is frozen: computed once."""
        return sha256_of(self.trunk)

    def key(self):
        """What decides the features: the cache's key, and a checkpoint's record of its encoder."""
        coarse = {"coarse_size": self.coarse_size} if self.coarse_size else {}
        computed_by = arithmetic(self.mean.device, self.precision)
        elsewhere = {"computed_by": computed_by} if computed_by != "cpu" else {}
        scaled = {"interpolation": self.interpolation} if self.interpolation != "bilinear" else {}
        return {
            "name": self.name,
            "weights_sha256": self.weights_sha256,
            "image_size": self.image_size,
            "grid": list(self.grid),
            "channels": self.channels,
            **self.model.key(),
            "precision": self.precision,
            **coarse,
            **scaled,
            **elsewhere,
        }


class FineTunedEncoder(Encoder):
    """An Encoder whose last blocks go on learning; the frozen ones before them are its stem.

    BatchNorm's statistics stay as published: an epoch of a few thousand pictures has no better ones.
    It hands on what the stem gives of each look, flattened (N, 1, D); the tail makes the grid of it.
    """

    def __init__(self, name, state, *how, trained_blocks, model=None):
        """As Encoder; trained_blocks: how many of the last blocks learn.

        Raises: ValueError when it has no more than that.
        """
        own = {key: tensor.clone() for key, tensor in state.items()}  # theirs are changed in place
        super().__init__(name, own, *how, model=model)
        frozen, trained = split_blocks(self.trunk, trained_blocks, self.name)
        self.frozen = nn.Sequential(*frozen)
        self.folded = fold(self.frozen, self.precision, self.model.folds)
        sizes = [size for size in (self.image_size, self.coarse_size) if size]
        with torch.inference_mode():
            shapes = [self.grid_of(self.blank(size)).shape[1:] for size in sizes]
        self.tail = Tail(trained, shapes)
        self.from_checkpoint = True

    @property
    def stem(self):
        """What the feature cache keeps the output of."""
        return Stem(self)

    def join_looks(self, grids):
        """What the stem gave for each look at the same images -> (N, 1, D)."""
        return torch.cat([grid.flatten(1) for grid in grids], dim=1).unsqueeze(1)

    @property
    def weights_sha256(self):
        """Of the trunk as it is by now."""
        return sha256_of(self.trunk)


class Tail(nn.Module):
    """The blocks of an encoder that learn: from a stem's output of each look to the grid."""

    def __init__(self, blocks, shapes):
        """shapes: of the stem's output for each look, without N."""
        super().__init__()
        self.blocks, self.shapes = nn.Sequential(*blocks), shapes
        self.requires_grad_(True)

    def forward(self, features):
        """features (N, 1, D) -> (N, P, F), cells in reading order."""
        looks = features.squeeze(1).split([math.prod(shape) for shape in self.shapes], dim=1)
        pairs = zip(looks, self.shapes, strict=True)
        grids = (look.unflatten(1, shape) for look, shape in pairs)
        return side_by_side([self.blocks(channels_last(grid)) for grid in grids])


def channels_last(features):
    """A grid (N, F, h, w) laid out as it is computed fastest; tokens (N, L, F) as they are."""
    four_axes = features.ndim == 4
    return features.contiguous(memory_format=torch.channels_last) if four_axes else features


class Stem:
    """The frozen part of a FineTunedEncoder as the feature cache sees an encoder: one cell of D channels."""

    def __init__(self, encoder):
        self.encoder, self.grid, self.num_cells, self.parts = encoder, [1, 1], 1, [self]
        self.name, self.image_size = encoder.name, encoder.image_size
        self.interpolation = encoder.interpolation
        self.batch_size = encoder.batch_size
        self.channels = sum(map(math.prod, encoder.tail.shapes))  # D

    def __call__(self, images):
        """images (N, 3, S, S) uint8 RGB -> (N, 1, D) float32."""
        return self.encoder(images)

    def key(self):
        """As an Encoder's, of the frozen weights alone."""
        own = {"weights_sha256": sha256_of(self.encoder.frozen), "channels": self.channels}
        return self.encoder.key() | own | {"grid": self.grid}


def open_encoder(options, hardware, checkpoint=None, initial=None):
    """The encoder of this run, on its device: with the checkpoint's own weights where it has them.

    initial: --init_from's checkpoint, whose weights are taken, too, if it names the same encoder.
    Raises: ValueError when the weights differ from those the checkpoint was trained with.
    """
    wanted, path = options.features, options.run.model_path
    stored = checkpoint["encoder"] if checkpoint else {}
    if initial and initial["encoder"]["name"] == wanted.encoder:
        stored, path = initial["encoder"], options.training.init_from
    typed = {"encoder_weights", "clip_model"} & options.typed
    from_checkpoint = stored.get("weights") is not None and not typed
    states = split_weights(stored["weights"], wanted.encoder) if from_checkpoint else None
    encoder = build_encoder(options, hardware, states, path, {} if typed else stored)
    encoder.from_checkpoint |= from_checkpoint
    key = encoder.key()
    if from_checkpoint and key["weights_sha256"] != stored["weights_sha256"]:
        raise ValueError(
            f"{path}: its encoder has other weights than it says: give another checkpoint"
        )
    for name in ("channels", "image_size", "coarse_size") if checkpoint else ():
        if stored.get(name) != key.get(name):
            raise ValueError(
                f"{path}: its encoder has other {name} than it says: give another checkpoint"
            )
    if checkpoint and key["weights_sha256"] != stored.get("weights_sha256"):
        raise ValueError(
            f"--encoder_weights {wanted.encoder_weights}: other weights than {path} was trained "
            "with: give the same ones, or leave the option out and use best.pt, which holds them"
        )
    return encoder.to(hardware.device)


def encoder_rows(options, stored):
    """The EncoderModel of each encoder that --encoder joins. stored: a checkpoint's record of them, or {}."""
    names, _ = encoder_parts(options.features)
    records = stored.get("parts", [stored])
    if len(records) != len(names):  # then it is not a record of these, as their hash will show
        records = [{}] * len(names)
    decoder = decoder_class(options.as_dict())
    one_look = len(names) == 1 and not options.features.coarse_size
    how = {"pooled": not decoder.reads_grid, "class_token": decoder.reads_class_token and one_look}
    return [
        hub_encoders.find_model(
            name, options.features.clip_model, stored=record.get("configuration"), **how
        )
        for name, record in zip(names, records, strict=True)
    ]


def build_encoder(options, hardware, stored=None, path=None, record=MappingProxyType({})):
    """The encoder that --encoder names, on the CPU.

    stored: each one's state dict, from the checkpoint at `path`; record: what it says of its encoder.
    """
    wanted, seed = options.features, options.run.seed
    names, sources = encoder_parts(wanted)
    models = encoder_rows(options, record)
    seeds = itertools.repeat(seed)
    states = stored or map(load_encoder_weights, names, sources, seeds, models)
    sources = [path] * len(names) if stored else sources
    size = wanted.image_size or max(model.image_size for model in models)
    batch_size = wanted.encode_batch_size or ENCODE_BATCH_SIZES[hardware.device.type]
    scaled_by = models[0].interpolation  # all see the same pixels
    settings = (hardware.precision, size, wanted.coarse_size, batch_size, scaled_by)
    kind = Encoder
    if trained_blocks := options.training.fine_tune_encoder:
        kind = functools.partial(FineTunedEncoder, trained_blocks=trained_blocks)
    parts = zip(names, states, sources, models, strict=True)
    encoders = [kind(*part, *settings, model=model) for *part, model in parts]
    return SideBySideEncoder(encoders) if len(encoders) > 1 else encoders[0]


# ----------------------------------------------------------------------------------------- attention


class AdditiveAttention(nn.Module):
    """Scores of a small network over query and key. Source: [3] section 3.1; [2] section 4.2.

    tanh x is computed as 2 sigmoid(2 x) - 1, which takes a CPU 0.87 of a training step's time;
    softmax ignores the 1. Another attention is another class with `keys` and `forward`.
    """

    def __init__(self, feature_dim, query_dim, attention_dim):
        super().__init__()
        self.project_keys = nn.Linear(feature_dim, attention_dim)
        self.project_query = RepeatedLinear(query_dim, attention_dim, bias=False)  # keys have one
        self.score = nn.Linear(attention_dim, 1, bias=False)  # softmax ignores a shared constant

    def keys(self, features):
        """features (N, P, F) -> twice the keys (N, P, A), once per image."""
        return 2 * self.project_keys(features)

    def forward(self, query, keys, values):
        """query (N, K, H), keys (N, P, A), values (N, P, E) -> context (N, K, E), alphas (N, K, P).

        Each row of alphas sums to 1.
        """
        query = 2 * self.project_query(query)
        energy = (keys.unsqueeze(1) + query.unsqueeze(2)).sigmoid()  # (N, K, P, A)
        alphas = (2 * self.score(energy).squeeze(-1).float()).softmax(dim=-1)
        return alphas.type_as(values) @ values, alphas


class MultiHeadAttention(nn.Module):
    """Scaled dot products, several heads. Source: [4] section 3.2.

    Departures: no layer mixes the heads; those that read the context do. Queries and keys are
    normalised, so that weight decay does not shrink the scores: as [7] section 3, but with a learned
    gain for each unit. A key is of what sets a cell apart from its picture's mean.
    """

    def __init__(self, feature_dim, query_dim, attention_dim, attention_heads):
        super().__init__()
        self.heads = attention_heads
        self.project_keys = nn.Linear(feature_dim, attention_dim, bias=False)  # softmax ignores one
        self.project_query = RepeatedLinear(query_dim, attention_dim)
        self.norm_query = nn.RMSNorm(attention_dim // attention_heads)
        # where a cell is all but the mean, what sets it apart is rounding: eps keeps that small
        self.norm_key = nn.RMSNorm(attention_dim // attention_heads, eps=1e-2)

    def split(self, x):
        """(N, L, D) -> (N, heads, L, D / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys(self, features):
        """features (N, P, F) -> keys (N, heads, P, A / heads), once per image."""
        keys = self.project_keys(features)
        return self.norm_key(self.split(keys - keys.mean(1, keepdim=True)).float())

    def queries(self, query):
        """query (N, L, E) -> queries (N, heads, L, A / heads)."""
        return self.norm_query(self.split(self.project_query(query)).float())

    def forward(self, query, keys, values):
        """query (N, K, H), keys, values (N, P, E) -> context (N, K, E), alphas (N, K, P).

        Each row of alphas sums to 1: the mean of the heads' weights.
        """
        scores = self.queries(query) @ keys.transpose(-1, -2)
        weights = (scores.float() / math.sqrt(keys.size(-1))).softmax(dim=-1)  # (N, heads, K, P)
        context = weights.type_as(values) @ self.split(values)  # (N, heads, K, E / heads)
        return context.transpose(1, 2).flatten(2), weights.mean(1)


class AdaptiveAttention(MultiHeadAttention):
    """Scaled dot products, but a word may look at no cell. Sources: [4] section 3.2; [5] section 3.2.

    What a word does not look for in the picture, it has from the words before it: one more thing to
    look at, the sentinel, which is made from the LSTM's output; [5] makes it from the memory.
    """

    def __init__(self, feature_dim, query_dim, attention_dim, attention_heads):
        super().__init__(feature_dim, query_dim, attention_dim, attention_heads)
        self.sentinel_key = nn.Linear(query_dim, attention_dim)
        self.sentinel_value = nn.Linear(query_dim, query_dim)

    def forward(self, query, keys, values):
        """query (N, L, E), keys and values (N, heads, P, ...) -> context (N, L, E), shares (N, L, P + 1).

        Each row of shares sums to 1: how much of the context each cell, and last the sentinel, accounts
        for; training asks for none. That is its weighted value along the context: the weight alone says
        where a word looked, also where nothing was to be seen. After [8] section 3, where it is the
        value's length.
        """
        query_of_heads = self.queries(query)
        own_key = self.norm_key(self.split(self.sentinel_key(query)).float())
        own_value = self.split(self.sentinel_value(query))
        own_score = (query_of_heads * own_key).sum(-1, keepdim=True)
        scores = torch.cat([query_of_heads @ keys.transpose(-1, -2), own_score], dim=-1)
        weights = (scores.float() / math.sqrt(keys.size(-1))).softmax(dim=-1)
        of_cells, own = weights.type_as(values).split([keys.size(2), 1], dim=-1)
        of_heads = of_cells @ values + own * own_value  # (N, heads, L, E / heads)
        context = of_heads.transpose(1, 2).flatten(2)
        if self.training:
            return context, None
        own_along = (of_heads * own_value).sum(-1, keepdim=True)
        along = torch.cat([of_heads @ values.transpose(-1, -2), own_along], dim=-1)
        return context, F.normalize((weights * along).sum(1).clamp_min(0), p=1, dim=-1)


# -------------------------------------------------------------------------------------- the decoders


def drop_patches(features, share):
    """A random choice of each image's cells: (N, P, F) -> (N, P', F), without that share of them.

    Source: Liu et al. 2023, PatchDropout, section 3.
    """
    kept = max(1, round(features.size(1) * (1 - share)))
    cells = torch.rand(features.shape[:2], device=features.device).topk(kept).indices  # (N, P')
    images = torch.arange(len(features), device=features.device).unsqueeze(1)
    return features[images, cells]


class Decoder(StandardisedFeatures):
    """What writes a caption from features (N, P, F); the loop and the search ask for this alone.

    options: names of the options that its constructor takes.
    reads_grid: False where the mean over the cells is enough.
    reads_class_token: whether it wants an encoder's class token, where there is one, behind the cells.
    beside_cells: what a word may look at instead of a cell; a row of `step`'s alphas ends with them.
    forward(features, batch): teacher forcing, step t is given reference token t and predicts the
        next -> logits (tokens, V), packed as the batch is, and alphas (tokens, P), or None where
        nothing is asked of them.
    settle(values), new_vocabulary(values, captions), begin(values): what of a new run's options, words
        and weights is the decoder's to say, as some are trained elsewhere.
    start(features) -> state; step(tokens (N, K), state) -> logits (N, K, V), state, alphas
        (N, K, P + beside_cells) or None. State is (per_image, per_hypothesis), tensors of axes N,
        and N and K.
    """

    options = ()
    reads_grid = True
    reads_class_token = False
    beside_cells = ()

    def __init__(self, feature_dim, vocab_size, embed_size, output_size, drop_prob):
        super().__init__(feature_dim)
        self.embed = nn.Embedding(vocab_size, embed_size)
        self.dropout = nn.Dropout(drop_prob)
        self.head = nn.Linear(output_size, vocab_size)

    @staticmethod
    def settle(values):
        """The values of all options of a new run by name, those that the decoder decides among them."""
        return values

    @staticmethod
    def new_vocabulary(values, captions):
        """The vocabulary of a new run's training captions."""
        return Vocabulary.build(captions, values["freq_threshold"])

    def begin(self, values):
        """Take the weights that a new run's options name: none."""

    def param_groups(self, weight_decay):
        """For the optimizer. Biases do not decay, nor do embeddings: rare words' would fade."""
        decays = {p: p.ndim > 1 and p is not self.embed.weight for p in self.parameters()}
        return [
            {"params": [p for p in decays if decays[p]], "weight_decay": weight_decay},
            {"params": [p for p in decays if not decays[p]], "weight_decay": 0.0},
        ]

    def locked_dropout(self, x, caption_index, num_captions):
        """Dropout with one mask per caption: x (tokens, D), caption_index (tokens,).

        Source: Gal and Ghahramani 2016, section 4.
        """
        if not self.training:
            return x
        masks = self.dropout(torch.ones_like(x[:num_captions]))  # (B, D)
        return x * masks.index_select(0, caption_index)


class LSTMDecoder(Decoder):
    """LSTM that is given the image once, then the words. Source: [1] section 3.1, equations 10-12.

    Departure: the image also reaches every output directly, or it is forgotten on the way.
    """

    options = ("embed_size", "hidden_size", "num_layers", "drop_prob", "recurrent_dropout")
    reads_grid = False

    def __init__(
        self,
        feature_dim,
        vocab_size,
        embed_size,
        hidden_size,
        num_layers,
        drop_prob,
        recurrent_dropout=0.0,
    ):
        super().__init__(feature_dim, vocab_size, embed_size, hidden_size, drop_prob)
        self.project_image = nn.Linear(feature_dim, embed_size)
        self.image_skip = nn.Linear(embed_size, hidden_size, bias=False)
        self.lstm = packed_lstm.LSTM(
            embed_size, hidden_size, num_layers, drop_prob, recurrent_dropout
        )

    def embed_image(self, features):
        """(N, P, F) -> the image as the LSTM's first input (N, E)."""
        return self.project_image(self.dropout(self.standardise(features).mean(1)))

    def forward(self, features, batch):
        """features (N, P, F), batch -> logits (tokens, V), None."""
        image = self.embed_image(features).index_select(0, batch.image_index)  # (B, E)
        num_captions = len(image)
        inputs = torch.cat([image, self.embed(batch.inputs)])  # the image is one step more
        index = torch.cat([batch.caption_index[:num_captions], batch.caption_index])
        sizes = torch.cat([batch.batch_sizes[:1], batch.batch_sizes])
        inputs = PackedSequence(self.locked_dropout(inputs, index, num_captions), sizes)
        hidden = run_lstm(self.lstm, inputs)[0].data[num_captions:]  # the image's output is no word
        skipped = self.image_skip(self.dropout(image)).index_select(0, batch.caption_index)
        hidden = self.locked_dropout(hidden + skipped, batch.caption_index, num_captions)
        return self.head(hidden), None

    def start(self, features):
        """features (N, P, F) -> state after the image, one hypothesis per image."""
        image = self.embed_image(features).unsqueeze(1)  # (N, 1, E)
        _, layers = run_lstm(self.lstm, image)
        layers = tuple(part.transpose(0, 1).unsqueeze(1) for part in layers)  # (N, 1, L, H) each
        return self.image_skip(image), layers

    def step(self, tokens, state):
        """tokens (N, K), state -> logits (N, K, V), state, None."""
        skipped, layers = state
        output, layers = step_lstm(self.lstm, self.embed(tokens), layers)
        return self.head(output + skipped), (skipped, layers), None


class GridDecoder(Decoder):
    """A decoder whose words look at cells, some of which training hides."""

    def __init__(self, sizes, drop_prob, patch_dropout, *, output_size, value_bias):
        feature_dim, vocab_size, embed_size, hidden_size, num_layers = sizes
        super().__init__(feature_dim, vocab_size, embed_size, output_size, drop_prob)
        self.patch_dropout, self.num_layers = patch_dropout, num_layers
        self.project_values = nn.Linear(feature_dim, embed_size, bias=value_bias)
        self.init_hidden = nn.Linear(feature_dim, num_layers * hidden_size)
        self.init_cell = nn.Linear(feature_dim, num_layers * hidden_size)

    def visible(self, features):
        """In training without a share of the cells: (N, P, F) -> (N, P', F)."""
        dropping = self.training and self.patch_dropout
        return drop_patches(features, self.patch_dropout) if dropping else features

    def values(self, features):
        """Standardised features (N, P, F) -> (N, P, E), what a context is a mean of."""
        values = self.project_values(features)
        if self.training:  # one mask for all cells of an image
            values = values * self.dropout(values.new_ones(values.size(0), 1, values.size(-1)))
        return values

    def first_state(self, features):
        """Standardised features (N, P, F) -> hidden state and cell, (N, 1, L, H) each, from their mean.

        Source: [2] section 3.1.2, with one layer for each.
        """
        mean = self.dropout(features.mean(1, keepdim=True))  # (N, 1, F)
        states = self.init_hidden(mean), self.init_cell(mean)
        return tuple(
            x.type_as(features).tanh().unflatten(-1, (self.num_layers, -1)) for x in states
        )


class AttentionDecoder(GridDecoder):
    """LSTM that attends to the grid before each word. Source: [2] sections 3.1.2 and 4.2.

    Departures: the context is a mean of projected cells, gated unit by unit; the deep output layer
    (equation 7) adds the LSTM's output as it is.
    """

    options = (
        "embed_size", "hidden_size", "num_layers", "drop_prob", "attention_dim", "patch_dropout", "recurrent_dropout",
    )  # fmt: skip
    kind_of_attention = AdditiveAttention

    def __init__(
        self,
        feature_dim,
        vocab_size,
        embed_size,
        hidden_size,
        num_layers,
        drop_prob,
        attention_dim,
        patch_dropout=0.0,
        recurrent_dropout=0.0,
        **heads,
    ):
        sizes = feature_dim, vocab_size, embed_size, hidden_size, num_layers
        super().__init__(sizes, drop_prob, patch_dropout, output_size=hidden_size, value_bias=True)
        self.recurrent_dropout = recurrent_dropout
        self.attention = self.kind_of_attention(feature_dim, hidden_size, attention_dim, **heads)
        self.gate = RepeatedLinear(hidden_size, embed_size)
        self.word_gates = nn.Linear(embed_size, 4 * hidden_size)  # the first layer's, for words
        below = [embed_size] + [hidden_size] * (num_layers - 1)
        self.layers = nn.ModuleList(
            RepeatedLinear(size + hidden_size, 4 * hidden_size) for size in below
        )
        self.deep_output = nn.Linear(2 * embed_size, hidden_size)  # of word and context

    def forward(self, features, batch):
        """features (N, P, F), batch -> logits (tokens, V), alphas (tokens, P).

        With --patch_dropout alphas are over the cells that were kept, fewer than P.
        """
        num_captions = len(batch.image_index)
        state = self.start(self.visible(features))  # once per image
        state = map_tensors(lambda part: part.index_select(0, batch.image_index), state)  # (B, ...)
        if self.training and self.recurrent_dropout:
            state = packed_lstm.with_masks(state, self.recurrent_dropout)
        words = self.embed(batch.inputs)  # (tokens, E)
        word_gates = self.word_gates(self.locked_dropout(words, batch.caption_index, num_captions))
        outputs, contexts, alphas = [], [], []
        with summed_once(self.attention.project_query, self.gate, *self.layers):
            for gates in word_gates.unsqueeze(1).split(batch.batch_sizes.tolist()):
                size = len(gates)
                rows = min(num_captions, size + -size % ROW_TILE)  # finished captions leave
                gates = F.pad(gates, (0, 0, 0, 0, 0, rows - size))
                output, context, state, attended = self.lstm_step(gates, select(state, slice(rows)))
                outputs.append(output[:size])
                contexts.append(context[:size])
                alphas.append(attended[:size])
        output, context, alphas = (
            torch.cat(steps).squeeze(1) for steps in (outputs, contexts, alphas)
        )
        output = output + self.deep_output(torch.cat([words, context], dim=-1))  # (tokens, H)
        return self.head(self.locked_dropout(output, batch.caption_index, num_captions)), alphas

    def start(self, features):
        """features (N, P, F) -> state: keys and values, and LSTM layers from the mean feature."""
        features = self.standardise(features)
        per_image = self.attention.keys(features), self.values(features)
        hidden, cell = (state.unbind(2) for state in self.first_state(features))
        return per_image, tuple(zip(hidden, cell, strict=True))

    def attend(self, query, keys, values):
        """query (N, K, H) -> gated context (N, K, E), alphas (N, K, P). Source: [2] section 4.2.1."""
        context, alphas = self.attention(query, keys, values)
        return context * self.gate(query).sigmoid(), alphas

    def lstm_step(self, word_gates, state):
        """word_gates (N, K, 4H), state -> output (N, K, H), context (N, K, E), state, alphas."""
        per_image, layers = state
        context, alphas = self.attend(layers[-1][0], *per_image)  # query: the last step's output
        output, new_layers = context, []
        for layer, (hidden, cell, *mask) in zip(self.layers, layers, strict=True):
            first = not new_layers
            below = output if first else self.dropout(output)
            heard = hidden * mask[0] if mask else hidden
            gates = layer(torch.cat([below, heard], dim=-1))
            gates = gates + word_gates if first else gates
            i, f, g, o = gates.float().chunk(4, dim=-1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            output = o.sigmoid() * cell.tanh()
            new_layers.append((output, cell, *mask))
        return output, context, (per_image, tuple(new_layers)), alphas

    def step(self, tokens, state):
        """tokens (N, K), state -> logits (N, K, V), state, alphas (N, K, P)."""
        words = self.embed(tokens)
        output, context, state, alphas = self.lstm_step(self.word_gates(words), state)
        output = output + self.deep_output(torch.cat([words, context], dim=-1))
        return self.head(output), state, alphas


class MultiHeadDecoder(AttentionDecoder):
    """The same with dot products of several heads. Source: [4] section 3.2."""

    options = (*AttentionDecoder.options, "attention_heads")
    kind_of_attention = MultiHeadAttention


class AdaptiveDecoder(GridDecoder):
    """One LSTM reads the words, each of them then looks at the grid, a second LSTM writes. Source: [5] section 3.

    Departures: the second LSTM (as in [6]) remembers what was seen, and begins with the mean feature.
    Nothing that was seen goes back to the reader, which does not know the picture, so in training each
    part is one call for all steps. What is read, seen and written has the size of a word's embedding,
    and the words are chosen there ([2] equation 7).
    """

    options = (
        "embed_size", "hidden_size", "num_layers", "drop_prob", "attention_dim", "attention_heads", "patch_dropout",
        "recurrent_dropout",
    )  # fmt: skip
    beside_cells = ("language",)

    def __init__(
        self,
        feature_dim,
        vocab_size,
        embed_size,
        hidden_size,
        num_layers,
        drop_prob,
        attention_dim,
        attention_heads,
        patch_dropout=0.0,
        recurrent_dropout=0.0,
    ):
        sizes = feature_dim, vocab_size, embed_size, hidden_size, num_layers
        super().__init__(  # a cell that is like the mean of all pictures gives nothing
            sizes, drop_prob, patch_dropout, output_size=embed_size, value_bias=False
        )
        self.reader = packed_lstm.LSTM(embed_size, embed_size, 1, 0.0, recurrent_dropout)
        self.attention = AdaptiveAttention(feature_dim, embed_size, attention_dim, attention_heads)
        self.writer = packed_lstm.LSTM(
            embed_size, hidden_size, num_layers, drop_prob, recurrent_dropout
        )
        self.project_output = nn.Linear(hidden_size, embed_size)

    def forward(self, features, batch):
        """features (N, P, F), batch -> logits (tokens, V), None."""
        num_captions, sizes = len(batch.image_index), batch.batch_sizes
        per_image, (_, first) = self.start(self.visible(features))
        first = (x.index_select(0, batch.image_index).squeeze(1) for x in first)  # (B, L, H) each
        first = tuple(x.transpose(0, 1).contiguous() for x in first)
        words = self.embed(batch.inputs)  # (tokens, E)
        inputs = self.locked_dropout(words, batch.caption_index, num_captions)
        read = run_lstm(self.reader, PackedSequence(inputs, sizes))[0].data  # (tokens, E)
        context, _ = self.attention(read[batch.image_tokens], *per_image)  # (N, L, E)
        context = context.flatten(0, 1).index_select(0, batch.token_place)  # (tokens, E)
        seen = self.locked_dropout(read + context, batch.caption_index, num_captions)
        output = run_lstm(self.writer, PackedSequence(seen, sizes), first)[0].data  # (tokens, H)
        output = self.project_output(output) + words + context
        return self.head(self.locked_dropout(output, batch.caption_index, num_captions)), None

    def start(self, features):
        """features (N, P, F) -> state: keys and values (N, heads, P, ...), and the LSTMs before any word."""
        features = self.standardise(features)
        keys, values = self.attention.keys(features), self.attention.split(self.values(features))
        unread = features.new_zeros(len(features), 1, 1, self.reader.hidden_size)
        return (keys, values), ((unread, unread), self.first_state(features))

    def step(self, tokens, state):
        """tokens (N, K), state -> logits (N, K, V), state, shares (N, K, P + 1)."""
        per_image, (reader, writer) = state
        words = self.embed(tokens)
        read, reader = step_lstm(self.reader, words, reader)
        context, shares = self.attention(read, *per_image)
        output, writer = step_lstm(self.writer, read + context, writer)
        logits = self.head(self.project_output(output) + words + context)
        return logits, (per_image, (reader, writer)), shares


DECODERS = {
    "lstm": LSTMDecoder, "additive": AttentionDecoder, "multi_head": MultiHeadDecoder,
    "adaptive": AdaptiveDecoder, "gpt2": GPT2Decoder, "prefix": PrefixGPT2Decoder,
}  # fmt: skip


def decoder_class(values):
    """The class that --decoder names, for attention --attention, and for gpt2 --prefix_length."""
    kind = values["decoder"]
    if kind == "attention":
        kind = values["attention"]
    elif kind == "gpt2" and values["prefix_length"]:
        kind = "prefix"
    return DECODERS[kind]


def build_decoder(values, feature_dim, vocab_size):
    """An untrained decoder from the values of all options by name."""
    if vocab_size > MANY_WORDS:  # training, testing and serving all come by here
        return_freed_memory()
    kind = decoder_class(values)
    decoder = kind(feature_dim, vocab_size, **{name: values[name] for name in kind.options})
    if values["freeze_embeddings"]:
        decoder.embed = partly_frozen(decoder.embed)
    return decoder


# ------------------------------------------------------------------------------------- the captioner


class Captioner:
    """Encoder, decoder and vocabulary: what turns pictures into captions.

    captioner = load_captioner("best.pt")
    for (best, *others) in captioner.caption([Path("dog.jpg")], options.decoding):
        print(captioner.vocabulary.decode(best.tokens))
    """

    def __init__(self, encoder, decoder, vocabulary, hardware):
        self.encoder, self.decoder, self.vocabulary = encoder, decoder, vocabulary
        self.hardware = hardware
        self.reranker = None  # or what orders a beam's captions anew: a consensus.Reranker

    def caption(self, images, decoding, seed=0):
        """The hypotheses of each image, best first.

        Args:
            images: (N, 3, S, S) uint8 RGB, S = encoder.image_size; or a list of Paths.
            decoding: named tuple of `generate`'s options, such as `options.decoding`.
            seed: of --algorithm sample.
        Raises: ValueError naming the first file that is not a readable image.
        """
        return list(self.caption_features([self.encode(images)], decoding, seed))

    def encode(self, images):
        """Features of images as `caption` takes them, as the stem gives them."""
        if not isinstance(images, torch.Tensor):
            every, encoder = [range(len(images))], self.encoder
            (images,) = image_loading.load_batches(
                images, encoder.image_size, every, interpolation=encoder.interpolation
            )
        with torch.inference_mode():
            return self.encoder(images)

    @torch.no_grad()
    def grids(self, features):
        """What the encoder's stem gave -> features (N, P, F), as the decoder takes them."""
        return self.encoder.tail(features)

    def caption_features(self, chunks, decoding, seed=0, **how):
        """Yield each image's hypotheses from chunks of what the encoder's stem gave. how: more of `generate`'s."""
        generator = torch.Generator(self.hardware.device).manual_seed(seed)
        self.decoder.eval()
        reranker = self.reranker if decoding.algorithm in BEAMS else None
        # it chooses among all that the beam holds
        number = decoding.beam_size if reranker else decoding.num_captions
        search = decoding._replace(num_captions=number)._asdict()
        for features in chunks:
            features = self.grids(features)
            with self.hardware.autocast():  # left before a caption is handed on
                hypotheses = generate(
                    self.decoder, features, self.vocabulary, generator=generator, **search, **how
                )
            if reranker:
                hypotheses = reranker(features.mean(1), hypotheses)
            yield from (image[: decoding.num_captions] for image in hypotheses)

    def with_maps(self, method, chunks, best):
        """The best hypothesis of each image of the chunks, with --viz_method's maps."""
        if method == "attention":
            return best
        mapped, remaining, how = [], iter(best), (self.vocabulary, self.hardware)
        for features in map(self.grids, chunks):
            captions = list(itertools.islice(remaining, len(features)))
            mapped += gradient_maps.gradient_maps(self.decoder, features, captions, *how)
        return mapped

    def words(self, hypothesis):
        """A hypothesis as a list of words, one for each row of its attention."""
        return [self.vocabulary.words[token].strip() for token in hypothesis.tokens]

    def attention_grid(self, hypothesis):
        """Where its words looked, as an array (T, h, w): each map sums to 1 over the cells."""
        maps = attention_measures.cell_maps(hypothesis.attention, math.prod(self.encoder.grid))
        return maps.unflatten(1, self.encoder.grid).numpy()

    def attention_beside(self, hypothesis):
        """The shares of each word's attention that no cell got: arrays (T,) by name."""
        columns = hypothesis.attention[:, math.prod(self.encoder.grid) :].T.numpy()
        names = (*self.encoder.beside_cells, *self.decoder.beside_cells)
        names = names if len(columns) else ()  # maps by gradients have none
        return dict(zip(names, columns, strict=True))


def load_captioner(path, device="auto", precision="auto"):
    """The Captioner of a checkpoint, or of the best one in a folder of runs, and its options.

    Raises: FileNotFoundError or ValueError that name the file.
    """
    typed = {"mode": "caption", "model_path": path, "device": device, "precision": precision}
    options, checkpoint = open_checkpoint(settle(typed, {}))
    hardware = resolve_hardware(options.run.device, options.run.precision)
    captioner = open_captioner(options, hardware, checkpoint)
    captioner.reranker = open_reranker(options, checkpoint)
    return captioner, options


def from_pretrained(name, device="auto", precision="auto"):
    """As `load_captioner`, of a folder that hub_models saved, or a name on the hub."""
    return load_captioner(hub_models.find_folder(name), device, precision)


def open_captioner(options, hardware, checkpoint):
    """What test and caption mode write with: the checkpoint's decoder, or its --ensemble."""
    path = options.run.model_path
    encoder = open_encoder(options, hardware, checkpoint)
    decoder, vocabulary = restore_decoder(path, options.as_dict(), checkpoint)
    expected = in_common(path, checkpoint)
    others = [
        open_member(options, "ensemble", member, expected) for member in options.output.ensemble
    ]
    decoder = Ensemble([decoder, *others]) if others else decoder
    return Captioner(encoder, decoder.to(hardware.device), vocabulary, hardware)


def restore_decoder(path, values, checkpoint):
    """The checkpoint's decoder, on the CPU, and vocabulary.

    Raises: ValueError when they do not fit each other; no memory is taken before that is known.
    """
    try:
        vocabulary = vocabulary_from_plain(checkpoint["vocabulary"])
    except ValueError as error:
        raise checkpoints.unusable(path, error) from error
    shape = checkpoint["encoder"]["channels"], len(vocabulary)
    with torch.device("meta"):
        expected = build_decoder(values, *shape).state_dict()
    stored = checkpoint["model"]
    kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()}
    if kinds != {name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}:
        raise ValueError(
            f"{path}: its decoder's weights do not fit its configuration: give another checkpoint"
        )
    decoder = build_decoder(values, *shape)
    decoder.load_state_dict(stored)
    return decoder, vocabulary


def open_member(options, flag, path, expected):
    """The decoder of another checkpoint, of an --ensemble or a teacher's. expected: as `in_common`.

    Raises: ValueError when it has other words, pictures or splits (whose test images it may know).
    """
    member, config = load_member(options, flag, path, expected)
    return restore_decoder(path, config, member)[0]


# -------------------------------------------------------------------------------------------- losses


def doubly_stochastic_penalty(alphas, batch):
    """Penalise grid cells that receive more or less than one unit of attention over a caption.

    Args: alphas (tokens, P), each row sums to 1; batch: whose token each row is.
    Returns: () float, dimensionless: (1 - attention received) ** 2, the mean over cells, summed
        over this process's captions, divided by the number of all processes' captions.
    Source: [2] section 4.2.1, which sums over cells; the mean keeps alpha_c independent of them.
    """
    received = alphas.new_zeros(len(batch.image_index), alphas.size(1))  # (B, P)
    received = received.index_add(0, batch.caption_index, alphas)
    return (1 - received).square().mean(dim=1).sum() / batch.num_captions


def cross_entropy(logits, batch, label_smoothing=0.0):
    """logits (tokens, V) -> smoothed loss and plain loss, both () in nats.

    The smoothed one is this process's part of the mean over all tokens of the batch, the plain one
    the sum over this process's. Label smoothing spreads that share of the target evenly over the
    vocabulary (Szegedy et al. 2016, section 7).
    """
    log_probs = logits.float().log_softmax(dim=-1)  # (tokens, V)
    plain = F.nll_loss(log_probs, batch.targets, reduction="sum")
    loss = (1 - label_smoothing) * plain
    if label_smoothing:
        loss = loss - label_smoothing * log_probs.mean(dim=-1).sum()
    return loss / batch.num_tokens, plain


class CrossEntropyObjective:
    """What a training step minimises: smoothed cross entropy, and the penalty on attention."""

    def __init__(self, training):
        self.label_smoothing, self.alpha_c = training.label_smoothing, training.alpha_c

    def __call__(self, model, features, batch):
        """features (N, P, F), batch -> loss to minimise () and plain nats (), as `cross_entropy`."""
        return self.loss(*model(features, batch), batch)

    def loss(self, logits, alphas, batch):
        """What a decoder's `forward` returned, batch -> the same."""
        loss, nats = cross_entropy(logits, batch, self.label_smoothing)
        if alphas is not None and self.alpha_c:
            loss = loss + self.alpha_c * doubly_stochastic_penalty(alphas.float(), batch)
        return loss, nats


# ------------------------------------------------------------------------------ learning rate schedules


def build_scheduler(optimizer, options, plan):
    """The torch scheduler that a run's plan names, or None; SCHEDULES says which options it takes."""
    if plan["schedule"] is None:
        return None
    schedule = SCHEDULES[plan["schedule"]]
    values = options.as_dict()
    arguments = {name: values[option] for name, option in schedule.arguments.items()}
    if plan["schedule"] == "one_cycle":
        rising = arguments.pop("warmup_epochs") / values["epochs"]
        arguments["pct_start"] = min(1.0, rising + 1e-9)  # torch divides 0 by 0 for one step
        arguments["total_steps"] = plan["steps"]
        arguments["max_lr"] = [group["lr"] for group in optimizer.param_groups]
    return getattr(lr_scheduler, schedule.torch_name)(optimizer, **arguments)


def warn_about_schedule(schedule, plan):
    """Warn of a rate that climbs again or all but vanishes."""
    epochs = last_on_captions(plan)
    if plan["schedule"] == "cosine" and epochs > schedule.scheduler_t_max:
        warn(
            f"--epochs {epochs} is more than --scheduler_t_max "
            f"{schedule.scheduler_t_max}: the cosine's rate climbs again after its minimum"
        )
    if plan["schedule"] == "exponential" and schedule.scheduler_gamma <= 0.5:
        left = schedule.scheduler_gamma**3
        warn(
            f"--scheduler_gamma {schedule.scheduler_gamma} multiplies the rate every "
            f"epoch: after 3 epochs {left:.2g} of it is left"
        )


# ------------------------------------------------------------------------------------------- training


@dataclass
class Run:
    """Everything that a training run holds."""

    options: Options
    captioner: Captioner
    splits: dict  # of the dataset, as best.pt holds them
    training: Split
    validation: Split
    scorer: metrics_utils.CaptionScorer  # of the validation captions
    objectives: dict  # by stage: CrossEntropyObjective or what extends it, and SelfCritical
    state: TrainState
    model: nn.Module  # the decoder, as several processes train it
    tail: nn.Module  # the encoder's, likewise
    config: dict  # every option's value, as run_config.json and checkpoints hold it
    folder: Path | None = None
    tracker: experiment_utils.ExperimentTracker | None = None
    samples: list[experiment_utils.Sample] | None = None  # validation images, latest captions

    @property
    def objective(self):
        """What a step of this epoch minimises."""
        return self.objectives[self.state.stage]

    @property
    def parameters(self):
        """Of all that learns: a list."""
        return [*self.captioner.decoder.parameters(), *self.captioner.encoder.tail.parameters()]

    def grids(self, features):
        """As Captioner.grids, through an encoder's tail that learns from --fine_tune_after on.

        On the reward, whose rate is the decoder's, it rests.
        """
        begun = self.state.loop["epoch"] >= self.options.training.fine_tune_after
        learns = begun and self.state.stage == "loss"
        with torch.set_grad_enabled(learns):
            return self.tail(features)


@process_group.lost_peers()
def train_step(run, features, batch):
    """One update from one batch. Returns () float on the device: nats, or reward, summed over its tokens."""
    state, captioner, nats = run.state, run.captioner, 0.0
    state.optimizer.zero_grad(set_to_none=True)
    number = run.options.training.gradient_accumulation_steps
    for part, of_part in batch.parts(number, features):
        part = part.to(captioner.hardware.device)
        with captioner.hardware.autocast():
            loss, nats_of_part = run.objective(run.model, run.grids(of_part), part)
        state.scaler.scale(batch.weight * loss).backward()
        nats = nats + nats_of_part.detach()
    state.scaler.unscale_(state.optimizer)
    if run.options.training.grad_clip:
        nn.utils.clip_grad_norm_(run.parameters, run.options.training.grad_clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step_finished()
    return nats if batch.weight else 0 * nats


def train(options, hardware, checkpoint):
    """Train until the plan's last epoch, early stopping or a signal. Returns the exit status."""
    run = start_run(options, hardware, checkpoint)
    loop, patience = run.state.loop, options.training.early_stopping_patience
    unread = []  # nats and tokens of steps whose loss is still on the device
    with listen_for_stop() as received, run.tracker or contextlib.nullcontext():
        while loop["epoch"] < run.state.plan["epochs"]:
            started, stage = time.perf_counter() - loop["seconds"], run.state.stage
            try:
                bar = begin_epoch(run)
                for batch, features in until_stopped(received, bar):
                    unread.append((train_step(run, features, batch), batch.num_tokens))
                    loop["captions"] += batch.num_captions
                    loop["step"] += 1
                    if len(unread) == READ_LOSS_EVERY:
                        latest = read_losses(loop, unread)
                        bar.set_postfix({stage: f"{latest:.3f}"}, refresh=False)
                read_losses(loop, unread)
                mean = loop["loss_sum"] / loop["tokens"]
                row = {"epoch": loop["epoch"] + 1, f"train_{stage}": mean}
                row |= {"learning_rate": loop["rate"], "val_loss": validation_loss(run, received)}
                row |= validation_scores(run, received)
            except Stopped as stop:  # by all processes together, so all read their losses here
                read_losses(loop, unread)
                loop["seconds"] = time.perf_counter() - started
                return run_output.save_stopped(run, stop.args[0])
            row["epoch_time_seconds"] = time.perf_counter() - started
            best_files = run.state.epoch_finished(row)
            if process_group.rank() == 0:
                run_output.record_epoch(run, row, best_files)
            if 0 < patience <= loop["epochs_without_improvement"]:
                stale = loop["epochs_without_improvement"]
                title = model_selection.RULES[options.training.select_by].title
                print(f"stopped early: no better {title} for {counted(stale, 'epoch')}")
                break
    if process_group.rank() == 0:
        run_output.finish_run(run)
        run_output.push_best(run)
    return 0


def begin_epoch(run):
    """The epoch's (batch, features) from where the loop stands, behind a progress bar."""
    loop = run.state.loop
    run.state.begin_epoch(run.options.training.scst_learning_rate)
    run.captioner.decoder.train()
    training, batches = run.options.training, run.training.batches
    learns = loop["epoch"] >= training.fine_tune_after
    how = {"mirror": training.horizontal_flip, "crop": training.random_crop and learns}
    steps = run.training.epoch(loop["epoch"], start=loop["captions"], **how)
    left = batches.num_left(loop["captions"])
    return run_output.epoch_progress(run, "", steps, left, "captions", batches.batch_size)


def read_losses(loop, unread):
    """Add losses to the epoch's sum; returns the last. Raises: FloatingPointError with its step."""
    if not unread:
        return math.nan
    nats = process_group.all_reduce_sum(torch.stack([nats for nats, _ in unread]).tolist())
    tokens = [tokens for _, tokens in unread]
    unread.clear()
    for number, (total, count) in enumerate(zip(nats, tokens, strict=True), start=1 - len(nats)):
        if not math.isfinite(total):
            raise FloatingPointError(
                f"the loss became {total} at step {loop['step'] + number} (epoch "
                f"{loop['epoch'] + 1}): lower --learning_rate or --grad_clip; "
                "the last good checkpoint is kept"
            )
        loop["loss_sum"] += total
        loop["tokens"] += count
    return nats[-1] / tokens[-1]


def validation_loss(run, received):
    """Plain cross entropy of the validation captions, in nats per token."""
    captioner, nats, tokens = run.captioner, 0.0, 0
    captioner.decoder.eval()
    num_batches, batch_size = run.validation.batches.num_batches, run.validation.batches.batch_size
    batches = run.validation.epoch(0, shuffle=False)
    bar = run_output.epoch_progress(
        run, "validation loss", batches, num_batches, "captions", batch_size
    )
    for batch, features in until_stopped(received, bar):
        batch = batch.to(captioner.hardware.device)
        with torch.inference_mode(), captioner.hardware.autocast():
            logits, _ = captioner.decoder(captioner.grids(features), batch)
            nats += float(cross_entropy(logits, batch)[1]) if batch.weight else 0.0
        tokens += batch.num_tokens
    (nats,) = process_group.all_reduce_sum([nats])
    if not math.isfinite(nats):
        raise FloatingPointError(
            f"the validation loss of epoch {run.state.loop['epoch'] + 1} is {nats}: "
            "lower --learning_rate"
        )
    return nats / tokens


def validation_scores(run, received):
    """Scores of the validation captions, decoded without reference tokens as in test mode."""
    captioner, table, options = run.captioner, run.validation.table, run.options
    share = torch.arange(len(table))[process_group.shard(len(table))]
    chunks = decode_chunks(run.validation.features, share)
    beam = options.training.val_beam_size
    decoding = options.decoding._replace(algorithm="beam", beam_size=beam, num_captions=1)
    hypotheses = captioner.caption_features(chunks, decoding, options.run.seed)
    most = -(-len(table) // process_group.world_size())  # images of the largest share
    bar = run_output.epoch_progress(run, "validation captions", hypotheses, len(share), "images")
    best = own = [image[0] for image in until_stopped(received, bar, most)]
    entropy = attention_measures.mean_entropy_share(best, math.prod(captioner.encoder.grid))
    shares = process_group.all_gather([hypothesis._replace(attention=None) for hypothesis in best])
    best = list(itertools.chain.from_iterable(shares))
    scores = None
    if process_group.rank() == 0:
        meteor = model_selection.needs_meteor(options.training.select_by)
        _, scores, _ = evaluation.score_captions(
            captioner, run.scorer, table.image, best, meteor=meteor
        )
        run.samples = run_folder.take_samples(run, own or best)
        if not meteor:  # it takes seconds
            del scores["METEOR"]
        scores |= {} if entropy is None else {"attention_entropy": entropy}
    return process_group.broadcast(scores)


# ------------------------------------------------------------------------------- how a run begins


def start_run(options, hardware, checkpoint):
    """A run before its next step, its folder made: new, or as the checkpoint left it."""
    run_folder.check_needs(options)
    run = set_up(options, hardware, checkpoint)
    loop, plan = run.state.loop, run.state.plan
    if process_group.rank() == 0:
        run_folder.open_folder(run)
    loop["bests"] = process_group.broadcast(loop["bests"])
    warn_about_schedule(options.schedule, plan)
    if checkpoint:
        num_captions = run.training.batches.num_captions
        seen = f", {loop['captions']} of {num_captions} captions seen" if loop["captions"] else ""
        print(
            f"resumed from {options.run.model_path}: epoch {loop['epoch'] + 1}{seen}; "
            f"{counted(plan['epochs'] - loop['epoch'], 'epoch')} to go"
        )
    return run


def set_up(options, hardware, checkpoint=None):
    """The parts of a run. Reads and encodes data; writes no file of the run."""
    initial = open_initial(options)
    decoder_type = decoder_class(options.as_dict())
    values = options.as_dict()
    if not (checkpoint or initial):  # whose decoder is settled
        values = decoder_type.settle(values)
    dataset = open_dataset(options, checkpoint)
    print(*map(printable, dataset.notes), sep="\n")
    if initial:
        warn_of_seen_images(initial, dataset, options)
    encoder = open_encoder(options, hardware, checkpoint, initial)
    open_split = functools.partial(open_features, options, hardware, encoder, dataset)
    wanted = options.training
    cropped = wanted.random_crop and not wanted.fine_tune_after  # in every epoch
    flip = wanted.horizontal_flip and not cropped
    table, features = open_split("train", decoder_type.reads_grid, mirrored=flip)
    val_table, val_features = open_split("val", needs_grid(decoder_type, options))
    texts = list(itertools.chain.from_iterable(table.captions))
    experiment_utils.set_global_seed(options.run.seed)
    if checkpoint:
        decoder, vocabulary = restore_decoder(options.run.model_path, values, checkpoint)
        print(f"{vocabulary.size_text()}, those of {options.run.model_path}")
    else:
        decoder, vocabulary = begin_decoder(options, values, encoder, texts, features, initial)
    decoder.to(hardware.device)
    training = Split(table, features, make_batches(table, vocabulary, options))
    validation = Split(val_table, val_features, make_batches(val_table, vocabulary, options))
    if path := options.training.glove_path:
        note = begin_with_vectors(decoder.embed, path, vocabulary, training.batches.tokens)
        print(printable(note))
    captioner = Captioner(encoder, decoder, vocabulary, hardware)
    if options.rerank.rerank != "none":  # epochs are chosen by captions as they will be tested
        captioner.reranker = make_reranker(options, build_index(captioner, table, features))
    splits = dataset.splits(checkpoint and checkpoint["splits"])
    objectives = make_objectives(options, captioner, training, splits)
    # last, because a checkpoint's random state is the one that training goes on with
    state = make_state(captioner, options, training, checkpoint)
    resolved = {
        "device": str(hardware.device),
        "precision": hardware.precision,
        "threads": torch.get_num_threads(),
        "image_size": encoder.image_size,
        "epochs": state.plan["epochs"],
    }
    return Run(
        options=options,
        captioner=captioner,
        splits=splits,
        training=training,
        validation=validation,
        scorer=evaluation.make_scorer(val_table, texts),
        objectives=objectives,
        state=state,
        model=process_group.data_parallel(decoder, options.run.seed + state.loop["step"]),
        tail=process_group.data_parallel(encoder.tail, options.run.seed + state.loop["step"]),
        config=values | resolved,
    )


def make_objectives(options, captioner, training, splits):
    """What a step minimises, by stage: how unlikely the captions are, and with --scst_epochs the reward."""
    objectives = {"loss": on_captions(options, captioner, training, splits)}
    if options.training.scst_epochs:
        objectives["reward"] = self_critical(training.batches, captioner.vocabulary, options)
    return objectives


def on_captions(options, captioner, training, splits):
    """The captions' cross entropy, with --distill_from mixed with its teachers'."""
    references, wanted = CrossEntropyObjective(options.training), options.training
    if not wanted.distill_from:
        return references
    own = described(captioner, splits)
    paths = [resolve_model_path(path) for path in wanted.distill_from]
    teachers = [open_member(options, "distill_from", path, in_common("", own)) for path in paths]
    if process_group.rank() == 0:
        print(printable(f"teachers: {', '.join(map(str, paths))}"))
    cache = None if options.features.no_feature_cache else Path(options.features.cache_dir)
    file = targets_file(cache, paths, training.batches.tokens, own["encoder"])
    teacher, hardware = Ensemble(teachers), captioner.hardware
    targets = kept_in(file, lambda: ask_teacher(teacher, training, hardware))
    return Distillation(references, targets, wanted.distill_weight)


def begin_decoder(options, values, encoder, texts, features, initial):
    """(decoder, vocabulary) of a new run: --init_from's, if it has one, or what its options name.

    texts, features: of the training images; initial: the checkpoint of --init_from, or None.
    """
    vocabulary = vocabulary_from_plain(initial["vocabulary"]) if initial else None
    if not isinstance(vocabulary, SubwordVocabulary):  # words are those of the new captions
        vocabulary = decoder_class(values).new_vocabulary(values, texts)
    decoder = new_decoder(values, encoder, vocabulary, features)
    origin = vocabulary.origin(values["freq_threshold"], len(texts))
    print(f"{vocabulary.size_text()}, {origin}")
    if not initial:
        decoder.begin(values)
        return decoder, vocabulary
    build = functools.partial(build_decoder, values)
    note = warm_start.take_over(initial, build, decoder, vocabulary.words, encoder.key())
    print(f"decoder: begins as {printable(options.training.init_from)}, {note}")
    return decoder, vocabulary


def new_decoder(values, encoder, vocabulary, features):
    """An untrained decoder which knows the scale of the training features."""
    decoder = build_decoder(values, encoder.channels, len(vocabulary))
    num_images = len(features.paths)
    sample = torch.linspace(0, num_images - 1, min(num_images, CALIBRATION_IMAGES)).long()
    with torch.no_grad():
        chunks = map(encoder.tail, decode_chunks(features, sample))
        decoder.to(features.device).calibrate(chunks)
    return decoder


def open_initial(options):
    """The checkpoint of --init_from, or None. Raises: ValueError when its parts do not fit."""
    path = options.training.init_from
    if path is None:
        return None
    initial = load_model(path)
    restore_decoder(path, options.as_dict(), initial)  # of the same options, as `adopt` saw to
    splits = caption_splits.named_splits(path, caption_splits.stored_splits(path, initial))
    return initial | {"splits": splits}


def make_state(captioner, options, training, checkpoint):
    """The state of a new run, or the checkpoint's. `training`: the Split that it goes through."""
    batches = training.batches
    if not checkpoint:
        return new_state(captioner, options, make_plan(options, batches), training.order)
    with checkpoints.checkpoint_errors(options.run.model_path):
        plan = make_plan(options, batches, checkpoint)
        # a schedule that begins now has these; on the reward there is none
        epochs = last_on_captions(plan) - checkpoint["epoch"]
        options = options._replace(training=options.training._replace(epochs=max(1, epochs)))
        state = new_state(captioner, options, plan, training.order)
        state.load_state_dict(checkpoint)
        change_course(state, options, checkpoint)
        seen = state.loop["captions"]
        if not 0 <= seen <= batches.num_captions:
            raise ValueError(f"{seen} of {batches.num_captions} captions seen")
    left = batches.num_left(seen) + (epochs - 1) * batches.num_batches
    scheduler, rounding = state.scheduler, plan["steps"] != checkpoint["plan"]["steps"]
    if plan["schedule"] == "one_cycle" and (
        scheduler.last_epoch + left > scheduler.total_steps + rounding
    ):
        warn(f"one_cycle was planned for {plan['steps']} steps: past them the rate stays as it is")
    return state


def new_state(captioner, options, plan, order):
    """The TrainState before the first step; plan and order as there."""
    groups = captioner.decoder.param_groups(options.training.weight_decay)
    if tuned := list(captioner.encoder.tail.parameters()):
        rate = options.training.encoder_learning_rate
        groups.append({"params": tuned, "lr": rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=options.training.learning_rate, fused=True)
    scheduler = build_scheduler(optimizer, options, plan)
    hardware = captioner.hardware
    scales = hardware.precision == "float16"
    scaler = torch.amp.GradScaler(hardware.device.type, enabled=scales)
    return TrainState(optimizer, scheduler, scaler, plan, order, options.training.select_by)


# ------------------------------------------------------------------------ test and caption new images


def given_pictures(options):
    """Paths of --images, whose folders stand for the pictures in them."""
    return [p for given in options.output.images for p in image_loading.pictures_in(Path(given))]


def output_folder(options):
    """Where files go: --output_dir, not yet made, or beside the checkpoint. Raises: ValueError."""
    folder = Path(options.output.output_dir or results_folder(options.run.model_path))
    checkpoints.check_writable_dir(folder, "--output_dir")
    return folder


def test(options, hardware, checkpoint):
    """Test the checkpoint, and each of --seeds as if alone. Returns the exit status."""
    folder, (first, *others) = output_folder(options), each_alone(options)
    notes = [compare_seed(options, checkpoint, other.run.model_path) for other in others]
    for note in filter(None, notes):
        warn(note)
    tests = [test_checkpoint(first, hardware, checkpoint)]
    for own_options, own_checkpoint in map(open_checkpoint, others):
        tests.append(test_checkpoint(own_options, hardware, own_checkpoint))
    if others:
        evaluation.write_seeds(folder, first.output.split, tests)
    return 0


def test_checkpoint(options, hardware, checkpoint):
    """Caption a whole split without reference tokens and score it. Returns the scores as written."""
    started, folder = time.perf_counter(), output_folder(options)
    check_cache_dir(options.features)
    judge = evaluation.open_judge(options, hardware)
    dataset = open_dataset(options, checkpoint)
    captioner = open_captioner(options, hardware, checkpoint)
    print(*map(printable, dataset.notes), sep="\n")
    if dataset.foreign:
        warn(dataset.foreign)
    open_split = functools.partial(open_features, options, hardware, captioner.encoder, dataset)
    build = None if dataset.foreign else lambda: build_index(captioner, *open_split("train", False))
    captioner.reranker = open_reranker(options, checkpoint, build)
    reads_grid = needs_grid(captioner.decoder, options)
    table, features = open_split(options.output.split, reads_grid)
    boxes = evaluation.open_boxes(dataset, table) if reads_grid else None
    chunks = decode_chunks(features)
    hypotheses = captioner.caption_features(chunks, options.decoding, options.run.seed)
    hypotheses = list(Progress(hypotheses, "testing", len(table), "images"))
    best = [image[0] for image in hypotheses]
    best = evaluation.map_first(captioner, features, best, options.pictures, boxes)
    split = evaluation.CaptionedSplit(options, captioner, dataset, table, features, best, boxes)
    scores, rows = evaluation.score(split, judge)
    return evaluation.write(split, scores, rows, folder, started)


def tune(options, hardware, checkpoint):
    """Choose by validation CIDEr how captions are searched for: the checkpoint's defaults from now on."""
    folder, path = output_folder(options), options.run.model_path
    checkpoints.check_writable_dir(Path(path).parent, "--model_path")
    check_cache_dir(options.features)
    dataset = open_dataset(options, checkpoint)
    if dataset.foreign:
        raise ValueError(
            f"--mode tune needs the data that {path} was trained on, not {dataset.captions_file}"
        )
    captioner = open_captioner(options, hardware, checkpoint)
    print(*map(printable, dataset.notes), sep="\n")
    open_split = functools.partial(open_features, options, hardware, captioner.encoder, dataset)
    build = functools.partial(build_index, captioner)
    index = open_index(path, checkpoint, lambda: build(*open_split("train", False)))
    table, features = open_split("val", captioner.decoder.reads_grid)
    scorer = evaluation.make_scorer(table, None)
    tried = decoding_tuning.try_searches(
        captioner,
        features,
        index,
        options,
        lambda best: evaluation.score_captions(captioner, scorer, table.image, best)[1],
    )
    decoding_tuning.keep_best(tried, options, folder)
    return 0


def caption(options, hardware, checkpoint):
    """Print captions of pictures, past files that are none. Returns the status, 1 if there were."""
    paths, folder, names = given_pictures(options), None, ()
    if options.pictures.save_attention_viz:
        from attention_visualization import picture_names

        folder, names = output_folder(options), picture_names(paths)
    captioner = open_captioner(options, hardware, checkpoint)
    captioner.reranker = open_reranker(options, checkpoint)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names may be any bytes
    workers = options.run.num_workers if len(paths) > DECODE_CHUNK else 0
    encoder = captioner.encoder
    chunks = image_loading.decode_images(
        paths, encoder.image_size, DECODE_CHUNK, workers, encoder.interpolation
    )
    status, drawn = 0, 0
    for positions, pixels, reasons in chunks:
        for position, reason in reasons.items():
            fault = printable(f"{paths[position]}: {reason}")
            print(f"flickr_image_caption.py: {fault}", file=sys.stderr)
            status = 1
        if not positions:
            continue
        readable = [paths[position] for position in positions]
        features = [captioner.encode(torch.from_numpy(pixels))]
        hypotheses = captioner.caption_features(features, options.decoding, options.run.seed)
        hypotheses = list(hypotheses)
        for path, image in zip(readable, hypotheses, strict=True):
            print_captions(captioner, path, image, options.output.json)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            best = [image[0] for image in hypotheses]
            best = captioner.with_maps(options.pictures.viz_method, features, best)
            chosen = [names[position] for position in positions]
            caption_pictures.draw_attention(folder, captioner, readable, best, options, chosen)
            drawn += len(chosen)
    if drawn:  # stdout has captions alone
        print(caption_pictures.pictures_note(folder, options), file=sys.stderr)
    return status


def print_captions(captioner, path, hypotheses, as_json):
    """An image's captions: a line each, or one JSON object."""
    decode, shown = captioner.vocabulary.decode, printable if sys.stdout.isatty() else str
    captions = [{"caption": decode(h.tokens), "log_prob": h.log_prob} for h in hypotheses]
    if as_json:
        line = {"image": str(path), "captions": captions}
        print(shown(json.dumps(line, ensure_ascii=False)), flush=True)
    else:
        print(*(f"{shown(path)}\t{c['caption']}" for c in captions), sep="\n", flush=True)


def debug(options, hardware, checkpoint):
    """Print how each algorithm searches for a picture's caption, and draw the beam's tree. Returns the status."""
    paths, folder = given_pictures(options), output_folder(options)
    captioner = open_captioner(options, hardware, checkpoint)
    if options.rerank.rerank != "none":
        print("of a beam's captions caption mode takes another one, by --rerank consensus")
    return caption_pictures.draw_searches(folder, captioner, paths, options)


# --------------------------------------------------------------------------------------------- main

MODES = {"train": train, "test": test, "caption": caption, "debug": debug, "tune": tune}


def main(options):
    """Run the mode. Returns the status: 0 done, 1 stopped by a failure, 2 misuse, 128 + signal."""
    try:
        options, checkpoint = open_checkpoint(options)
        hardware = resolve_hardware(options.run.device, options.run.precision)
        mode = options.run.mode
        if process_group.world_size() > 1 and mode != "train":
            raise ValueError(f"--mode {mode} runs in one process: start it without torchrun")
        with process_group.joined(hardware.device):
            typed = "threads" in options.typed
            chosen = set_threads(options.run.threads, hardware.device, typed)
            if chosen and mode != "caption":
                print(chosen)
            status = MODES[mode](options, hardware, checkpoint)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return leave_broken_pipe()
    except (ValueError, FileNotFoundError) as error:
        fault, status = error, 2
    except (OSError, FloatingPointError) as error:
        fault, status = error, 1
    except (MemoryError, RuntimeError) as error:
        fault, status = memory_shortage(error), 1
        if not fault:
            raise
    line = printable(" ".join(str(fault).split()))
    print(f"flickr_image_caption.py: error: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
