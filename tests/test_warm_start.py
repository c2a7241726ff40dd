"""warm_start.py: which of a new decoder's weights are a trained one's, for each of our decoders."""

import functools

import pytest
import torch

import flickr_image_caption as program
import warm_start
from caption_batches import Vocabulary

VALUES = {"embed_size": 6, "hidden_size": 8, "num_layers": 2, "attention_dim": 4, "attention_heads": 2,
          "drop_prob": 0.0, "patch_dropout": 0.0, "recurrent_dropout": 0.0, "freeze_embeddings": False}  # fmt: skip
KINDS = {
    "lstm": {"decoder": "lstm"},
    "additive": {"decoder": "attention", "attention": "additive"},
    "multi_head": {"decoder": "attention", "attention": "multi_head"},
    "adaptive": {"decoder": "attention", "attention": "adaptive"},
}
GRID_READERS = ["attention.project_keys", "feature_mean", "feature_std", "init_cell", "init_hidden",
                "project_values"]  # fmt: skip
READERS = {
    "lstm": ["feature_mean", "feature_std", "project_image"],
    "additive": GRID_READERS,
    "multi_head": GRID_READERS,
    "adaptive": GRID_READERS,
}
BY_WORD = {"embed.weight", "head.weight", "head.bias"}
TRAINED_WORDS = [*Vocabulary.SPECIALS, "a", "dog", "cat", "red"]
WORDS = [*Vocabulary.SPECIALS, "red", "horse", "a", "dog", "green", "blue"]
KNOWN = {0: 0, 1: 1, 2: 2, 3: 3, 4: 7, 6: 4, 7: 5}  # id of a word: its id in the trained decoder
every_decoder = pytest.mark.parametrize("kind", KINDS)


def build(kind, channels, words, seed):
    """An untrained decoder, no two of whose tensors are alike."""
    torch.manual_seed(seed)
    decoder = program.build_decoder(VALUES | KINDS[kind], channels, words).eval()
    decoder.feature_mean.uniform_()
    decoder.feature_std.uniform_(0.5, 1)
    return decoder


def begun(kind, words, trained_channels=5, channels=5, same_features=True):
    """(decoder that began as another one, names that begin anew, it before that, the other one)."""
    trained = build(kind, trained_channels, len(TRAINED_WORDS), 1)
    fresh, decoder = (build(kind, channels, len(words), 2) for _ in range(2))
    state, anew = warm_start.merge_states(
        functools.partial(program.build_decoder, VALUES | KINDS[kind]),
        (channels, len(words)),
        fresh.state_dict(),
        words,
        trained.state_dict(),
        TRAINED_WORDS,
        same_features=same_features,
    )
    decoder.load_state_dict(state)
    return decoder, anew, fresh, trained


@every_decoder
def test_words_in_both_keep_their_rows_and_the_others_start_as_a_new_decoders(kind):
    decoder, anew, fresh, trained = begun(kind, WORDS)
    fresh, trained, state = fresh.state_dict(), trained.state_dict(), decoder.state_dict()
    assert anew == [] and state.keys() >= BY_WORD
    for name in BY_WORD:
        for row in range(len(WORDS)):
            source = trained[name][KNOWN[row]] if row in KNOWN else fresh[name][row]
            assert torch.equal(state[name][row], source), (name, WORDS[row])
    assert all(torch.equal(state[name], trained[name]) for name in state.keys() - BY_WORD)


@every_decoder
def test_in_another_order_of_the_same_words_it_is_the_trained_decoder(kind):
    """Word by word, of captions that it reads: whatever has a row per word was moved."""
    words = TRAINED_WORDS[:4] + TRAINED_WORDS[:3:-1]
    decoder, _, _, trained = begun(kind, words)
    theirs = torch.tensor([TRAINED_WORDS.index(word) for word in words])
    features, states = torch.rand(2, 9, 5), []
    for model in (decoder, trained):
        states.append(model.start(features))
    for tokens in torch.tensor([[[1], [1]], [[4], [6]], [[7], [5]]]):
        logits, states[0], _ = decoder.step(tokens, states[0])
        expected, states[1], _ = trained.step(theirs[tokens], states[1])
        torch.testing.assert_close(logits, expected[..., theirs])


@every_decoder
@pytest.mark.parametrize("channels", [5, 7])
def test_with_another_encoder_exactly_what_reads_features_is_the_new_decoders(kind, channels):
    decoder, anew, fresh, trained = begun(kind, TRAINED_WORDS, 5, channels, same_features=False)
    fresh, trained, state = fresh.state_dict(), trained.state_dict(), decoder.state_dict()
    assert anew == READERS[kind]
    for name, tensor in state.items():
        reads = any(name == part or name.startswith(f"{part}.") for part in anew)
        assert torch.equal(tensor, (fresh if reads else trained)[name]), name


def test_without_a_common_word_the_specials_alone_keep_their_rows():
    decoder, _, fresh, trained = begun("lstm", [*Vocabulary.SPECIALS, "un", "chien"])
    assert torch.equal(decoder.embed.weight[:4], trained.embed.weight[:4])
    assert torch.equal(decoder.embed.weight[4:], fresh.embed.weight[4:])
    assert [rows.tolist() for rows in warm_start.common_rows(["a"], ["b"])] == [[], []]
