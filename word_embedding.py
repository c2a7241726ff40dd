"""A decoder's word embedding that begins with word vectors, which may stay as they are.

    decoder.embed = partly_frozen(decoder.embed)  # if what the file knows is not to learn
    note = begin_with_vectors(decoder.embed, "glove.6B.300d.txt", vocabulary, tokens)

Axes: V words, E numbers of a word's vector.
"""

import torch
from torch import nn

from word_vectors import read_vectors


class PartlyFrozenEmbedding(nn.Embedding):
    """An embedding of which the rows in `frozen` (V,) do not learn; checkpoints hold which they are."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("frozen", torch.zeros(self.num_embeddings, dtype=torch.bool))

    def forward(self, tokens):
        """tokens (...) -> (..., E)."""
        rows = super().forward(tokens)
        return torch.where(self.frozen[tokens].unsqueeze(-1), rows.detach(), rows)


def partly_frozen(embed):
    """An nn.Embedding as a PartlyFrozenEmbedding, all of whose rows learn yet."""
    return PartlyFrozenEmbedding.from_pretrained(embed.weight.detach(), freeze=False)


def begin_with_vectors(embed, path, vocabulary, tokens):
    """Give words that a file has its vectors, as they are; the others keep their rows.

    embed: nn.Embedding, a PartlyFrozenEmbedding if these rows are not to learn; tokens: ids of all
    training captions, to say how many the file knows. Returns: what it knows, in words.
    Raises: FileNotFoundError or ValueError naming file and line, or if it has none of the words.
    """
    words = vocabulary.words[len(vocabulary.SPECIALS) :]
    vectors = read_vectors(path, words, embed.embedding_dim)
    if not vectors:
        raise ValueError(
            f"--glove_path {path}: has none of the {len(words)} words, such as {words[:3]}"
        )
    ids = torch.tensor([vocabulary.ids[word] for word in vectors])
    rows = torch.frombuffer(bytearray().join(vectors.values()), dtype=torch.float32)
    with torch.no_grad():
        embed.weight[ids] = rows.view(len(ids), -1).to(embed.weight)
    frozen = isinstance(embed, PartlyFrozenEmbedding)
    if frozen:
        embed.frozen[ids] = True
    counts = tokens.bincount(minlength=len(vocabulary))
    counts[[vocabulary.pad, vocabulary.sos, vocabulary.eos]] = 0
    share = float(counts[ids].sum() / counts.sum())
    return (
        f"word vectors: {len(ids)} of {len(words)} words ({len(ids) / len(words):.1%}), {share:.1%} of "
        f"the words in training captions, begin as in {path}{' and stay so' * frozen}"
    )
