"""A decoder that begins with a trained one's weights, where they mean the same: other words, another encoder.

    note = take_over(checkpoint, build, decoder, words, encoder_key)
    merged, anew = merge_states(build, (2048, 500), fresh, words, trained, trained_words, same_features=True)

Nothing here knows a decoder. Which tensors have a row per word, and which read features, is seen by
building it once more with other sizes, on the meta device, where that costs nothing.
"""

import torch

from caption_batches import vocabulary_from_plain
from runtime import counted

# what of an encoder's key decides which features a decoder knows; precision is but rounding
ENCODER_IDENTITY = ("name", "weights_sha256", "image_size", "coarse_size", "channels")


def take_over(initial, build, decoder, words, encoder):
    """Give a new decoder what a checkpoint's has learnt, as far as words and encoder are the same.

    initial: the checkpoint; build: as of `merge_states`; words: the new decoder's, specials included;
    encoder: the key of the encoder whose features it is given. Returns: what was known, in words.
    """
    trained = vocabulary_from_plain(initial["vocabulary"])
    same_encoder = all(initial["encoder"].get(n) == encoder.get(n) for n in ENCODER_IDENTITY)
    state, anew = merge_states(
        build,
        (encoder["channels"], len(words)),
        decoder.state_dict(),
        words,
        initial["model"],
        trained.words,
        same_features=same_encoder,
    )
    decoder.load_state_dict(state)
    unknown = len({*words} - {*trained.words})
    known = len(words) - len(trained.SPECIALS) - unknown
    others = f", and for another encoder {', '.join(anew)}" if anew else ""
    return f"which knows {known} of these words; anew: {counted(unknown, 'word')}{others}"


def merge_states(build, sizes, fresh, words, trained, trained_words, *, same_features):
    """A new decoder's state with what a trained one has learnt.

    Words that both know keep their rows, the others have the new decoder's. With other features
    every module that reads them is the new decoder's, as a whole.

    Args:
        build: (feature_dim, vocab_size) -> decoder; `sizes` are the new one's.
        fresh, trained: state dicts of decoders that `build` made.
        words, trained_words: their words in the order of their ids.
        same_features: whether both are given the features of one encoder.
    Returns: (state dict, names of the modules and buffers that are the new decoder's).
    """
    feature_dim, vocab_size = sizes
    shapes = shapes_of(build, feature_dim, vocab_size)
    word_axes = differing_axes(shapes, shapes_of(build, feature_dim, 2 * vocab_size))
    readers = differing_axes(shapes, shapes_of(build, 2 * feature_dim, vocab_size))
    anew = set() if same_features else {owner(name) for name in readers}
    rows, trained_rows = common_rows(words, trained_words)
    merged = {}
    for name, tensor in fresh.items():
        taken = trained[name].to(tensor.device)
        if owner(name) in anew:
            merged[name] = tensor
        elif name in word_axes:
            axis = word_axes[name]
            known = taken.index_select(axis, trained_rows.to(tensor.device))
            merged[name] = tensor.index_copy(axis, rows.to(tensor.device), known)
        else:
            merged[name] = taken
    return merged, sorted(anew)


def shapes_of(build, feature_dim, vocab_size):
    """{name: shape} of a decoder's tensors; takes no memory."""
    with torch.device("meta"):
        state = build(feature_dim, vocab_size).state_dict()
    return {name: tensor.shape for name, tensor in state.items()}


def differing_axes(shapes, others):
    """{name: axis} of the tensors that have another size in `others`."""
    return {
        name: axis
        for name, shape in shapes.items()
        for axis, size in enumerate(shape)
        if others[name][axis] != size
    }


def owner(name):
    """The module that a tensor belongs to; a tensor of the decoder itself stands alone."""
    return name.rpartition(".")[0] or name


def common_rows(words, trained_words):
    """Ids of the words in both lists: in the first, and in the second."""
    ids = {word: index for index, word in enumerate(trained_words)}
    pairs = [(index, ids[word]) for index, word in enumerate(words) if word in ids]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
