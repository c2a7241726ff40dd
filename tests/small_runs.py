"""Batches and training runs that several test files make by hand, of a few captions and no pictures."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import flickr_image_caption as program
from caption_batches import Batch, by_image
from runtime import Hardware

CPU = Hardware(torch.device("cpu"), "float32")


def make_batch(captions, lengths, image_index):
    """Captions in any order as a Batch, packed by torch itself.

    captions (B, 1 + T) <SOS>, words, <EOS>, then anything; lengths (B,) of words and <EOS>;
    image_index (B,).
    """
    order = packed_order(lengths)

    def packed(padded):
        return pack_padded_sequence(padded[order], lengths[order], batch_first=True)

    inputs = packed(captions[:, :-1])
    caption_index = packed(order.argsort().unsqueeze(1).expand(-1, captions.size(1) - 1)).data
    image_tokens, token_place = by_image(image_index[order][caption_index])
    return Batch(
        image_rows=torch.arange(int(image_index.max()) + 1),
        image_index=image_index[order],
        caption_index=caption_index,
        image_tokens=image_tokens,
        token_place=token_place,
        inputs=inputs.data,
        targets=packed(captions[:, 1:]).data,
        batch_sizes=inputs.batch_sizes,
        num_tokens=int(lengths.sum()),
        num_captions=len(lengths),
        weight=1.0,
    )


def packed_order(lengths):
    """(B,): longest first, those of one length in their order."""
    return lengths.argsort(descending=True, stable=True)


def unpack(packed, lengths):
    """Values (tokens, ...) of `make_batch`'s tokens as (B, T, ...), captions in its caller's order."""
    if packed is None:
        return None
    order = packed_order(lengths)
    sizes = (lengths.unsqueeze(1) > torch.arange(int(lengths.max()))).sum(0)
    padded, _ = pad_packed_sequence(PackedSequence(packed, sizes), batch_first=True)
    return padded[order.argsort()]


def one_caption_each(num_batches):
    """An epoch of so many batches, as far as plans ask for it."""
    epoch = SimpleNamespace(num_batches=num_batches, num_captions=num_batches)
    epoch.num_left = lambda start: num_batches - start
    return epoch


def make_run(decoder, options, hardware=CPU, num_batches=1, checkpoint=None):
    """What `train_step` needs of a run, in train mode, with a plan of `num_batches` per epoch."""
    key = {"name": "none", "weights_sha256": "", "image_size": 224, "channels": 1}
    encoder = SimpleNamespace(
        tail=nn.Identity(), trunk=nn.Identity(), key=lambda: key, from_checkpoint=False
    )
    vocabulary = SimpleNamespace(to_plain=dict)
    captioner = program.Captioner(encoder, decoder.train(), vocabulary, hardware)
    training = SimpleNamespace(batches=one_caption_each(num_batches), order="theirs")
    return SimpleNamespace(
        options=options,
        captioner=captioner,
        objective=program.CrossEntropyObjective(options.training),
        state=program.make_state(captioner, options, training, checkpoint),
        training=training,
        model=decoder,
        grids=encoder.tail,
        parameters=[*decoder.parameters()],
    )
