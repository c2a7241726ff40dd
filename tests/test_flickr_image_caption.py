"""flickr_image_caption.py: decoders, losses, training step and encoder.

Schedules and what a resumed run takes over are in test_lr_scheduling.py.
"""

import contextlib
import copy
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from small_runs import CPU, make_batch, make_run, packed_order, unpack
from torch import nn

import flickr_image_caption as program
import packed_lstm
from caption_batches import CaptionBatches
from caption_decoding import Hypothesis, generate
from caption_options import parse_args
from download_datasets import load_encoder_weights
from encoder_models import find_model
from encoder_trunks import split_weights
from flickr_image_caption import (
    ENCODERS,
    Encoder,
    FineTunedEncoder,
    cross_entropy,
    doubly_stochastic_penalty,
)
from joined_grids import SideBySideEncoder
from repeated_linear import RepeatedLinear

VOCAB_SIZE, CHANNELS, CELLS = 13, 6, 9
EMBED, HIDDEN, COMPARE = 5, 8, 4  # --embed_size --hidden_size --attention_dim
EVEN = 6  # --embed_size of decoders whose two heads share it
LENGTHS = torch.tensor([5, 2, 6, 1, 3, 6, 4])
IMAGE_INDEX = torch.tensor([2, 0, 3, 0, 2, 2, 1])  # several captions per image, in no order
VOCABULARY = SimpleNamespace(pad=0, sos=1, eos=2, unk=3)
BEFORE_EACH_WORD = ("attention", "multi_head")  # looked at
WITH_HEADS = ("multi_head", "adaptive")
DECODERS = ("lstm", "attention", *WITH_HEADS)
KINDS = [(kind, layers) for kind in DECODERS for layers in (1, 3)]
every_decoder = pytest.mark.parametrize(("kind", "num_layers"), KINDS)


pytestmark = pytest.mark.usefixtures("one_thread")


# -------------------------------------------------------------------------------------- the decoders


def make_decoder(kind, num_layers, drop_prob=0.0, seed=0, scale=3.0, **more):
    """A decoder in eval mode; `scale` makes its random weights large enough for captions to differ."""
    torch.manual_seed(seed)
    embed_size = EVEN if kind in WITH_HEADS else EMBED
    sizes = {"embed_size": embed_size, "hidden_size": HIDDEN, "num_layers": num_layers}
    sizes |= {"attention_dim": COMPARE, "patch_dropout": 0.0, "drop_prob": drop_prob}
    sizes |= {"recurrent_dropout": 0.0, "freeze_embeddings": False, **more}
    named = {"decoder": "lstm"} if kind == "lstm" else {"decoder": "attention"}
    named |= {"attention": kind if kind in WITH_HEADS else "additive", "attention_heads": 2}
    decoder = program.build_decoder(named | sizes, CHANNELS, VOCAB_SIZE)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(scale)
    return decoder.eval()


def make_data(lengths=LENGTHS, images=4):
    """features (images, P, F), captions (B, 1 + T): <SOS>, words, <EOS>, <PAD>."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(images, CELLS, CHANNELS, generator=generator)
    captions = torch.zeros(len(lengths), 1 + int(lengths.max()), dtype=torch.int64)
    for caption, length in zip(captions, lengths.tolist(), strict=True):
        words = torch.randint(4, VOCAB_SIZE, (length - 1,), generator=generator)
        caption[: length + 1] = torch.cat([torch.tensor([1]), words, torch.tensor([2])])
    return features, captions


def run_decoder(decoder, features, captions, lengths=LENGTHS, image_index=IMAGE_INDEX):
    """Logits (B, T, V) and alphas (B, T, P) under teacher forcing, in the order of the captions."""
    batch = make_batch(captions, lengths, image_index)
    logits, alphas = decoder(features[batch.image_rows], batch)
    return unpack(logits, lengths), unpack(alphas, lengths)


def run_steps(decoder, features, tokens):
    """What `start` and `step` give for one image's tokens: logits (T, V), alphas (T, P) or None."""
    state, logits, alphas = decoder.start(features.unsqueeze(0)), [], []
    for token in tokens:
        step_logits, state, step_alphas = decoder.step(token.view(1, 1), state)
        logits.append(step_logits[0, 0])
        alphas.append(None if step_alphas is None else step_alphas[0, 0])
    return torch.stack(logits), None if alphas[0] is None else torch.stack(alphas)


def run_steps_packed(decoder, features, captions, lengths, image_index):
    """As the decoder's forward on `make_batch`'s batch, but each caption on its own, step by step."""
    rows = zip(captions, lengths.tolist(), image_index, strict=True)
    each = [run_steps(decoder, features[image], tokens[:length]) for tokens, length, image in rows]
    order = packed_order(lengths).tolist()
    places = [(b, t) for t in range(int(lengths.max())) for b in order if t < lengths[b]]
    logits = torch.stack([each[b][0][t] for b, t in places])
    if not isinstance(decoder, program.AttentionDecoder):
        return logits, None
    return logits, torch.stack([each[b][1][t] for b, t in places])


def total_loss(logits, alphas, batch):
    """Cross entropy, and the penalty where there is attention."""
    loss = cross_entropy(logits, batch)[0]
    return loss if alphas is None else loss + doubly_stochastic_penalty(alphas, batch)


def gradients(decoder, loss):
    """{name: gradient of the loss}."""
    decoder.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}


@every_decoder
def test_step_by_step_is_teacher_forcing(kind, num_layers):
    decoder, (features, captions) = make_decoder(kind, num_layers), make_data()
    logits, alphas = run_decoder(decoder, features, captions)
    assert logits.shape == (7, 6, VOCAB_SIZE)
    for row, (image, length) in enumerate(zip(IMAGE_INDEX, LENGTHS, strict=True)):
        expected, expected_alphas = run_steps(decoder, features[image], captions[row, :length])
        torch.testing.assert_close(logits[row, :length], expected, atol=1e-5, rtol=0)
        if kind in BEFORE_EACH_WORD:
            torch.testing.assert_close(alphas[row, :length], expected_alphas, atol=1e-5, rtol=0)
    assert (alphas is None) == (kind not in BEFORE_EACH_WORD)


@every_decoder
def test_many_captions_of_very_different_lengths_are_those_of_step_by_step(kind, num_layers):
    """More than ROW_TILE captions: the attention decoder pads each step's rows up to a multiple."""
    lengths = torch.tensor([1, 25, 3, 2, 19, 1, 7, 2, 12, 1, 30, 4, 2, 1, 9, 5, 2, 16] * 2 + [28])
    image_index = torch.arange(len(lengths)) * 5 % 8
    decoder, (features, captions) = make_decoder(kind, num_layers, scale=1.5), make_data(lengths, 8)
    batch = make_batch(captions, lengths, image_index)
    heights = []
    if kind in BEFORE_EACH_WORD:
        decoder.layers[0].register_forward_pre_hook(lambda _layer, x: heights.append(len(x[0])))
    logits, alphas = decoder(features, batch)
    if kind in BEFORE_EACH_WORD:
        sizes = batch.batch_sizes.tolist()
        assert heights == [37 if size > 32 else 32 if size > 16 else 16 for size in sizes]
        assert set(heights) == {16, 32, 37}
    steps = run_steps_packed(decoder, features, captions, lengths, image_index)
    torch.testing.assert_close(logits, steps[0], atol=1e-5, rtol=0)
    if kind in BEFORE_EACH_WORD:
        torch.testing.assert_close(alphas, steps[1], atol=1e-5, rtol=0)
    expected = gradients(decoder, total_loss(*steps, batch))
    for name, gradient in gradients(decoder, total_loss(logits, alphas, batch)).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], atol=1e-5 * scale, rtol=1e-4, msg=name)


def check_against_teacher_forcing(decoder, features, image, hypothesis):
    """Its log_prob and attention are the teacher-forced pass's on its own tokens. Returns the argmax."""
    tokens = torch.tensor([[1, *hypothesis.tokens, *[2] * hypothesis.finished]])
    length = tokens.size(1) - 1
    with torch.no_grad():
        logits, alphas = run_decoder(
            decoder, features, tokens, torch.tensor([length]), torch.tensor([image])
        )
    expected = logits[0].log_softmax(-1).gather(1, tokens[0, 1:, None]).sum()
    assert hypothesis.log_prob == pytest.approx(float(expected), abs=1e-4)
    if alphas is not None:
        torch.testing.assert_close(
            hypothesis.attention, alphas[0, : len(hypothesis.tokens)], atol=1e-4, rtol=0
        )
    return logits[0].argmax(-1).tolist()


@every_decoder
def test_greedy_decoding_is_the_argmax_of_teacher_forcing_on_its_own_output(kind, num_layers):
    lengths = set()
    features = torch.randn(6, CELLS, CHANNELS, generator=torch.Generator().manual_seed(2)) * 2
    for seed in range(12):
        decoder = make_decoder(kind, num_layers, seed=seed, scale=4.0)
        with torch.no_grad():
            decoder.head.bias[[0, 1, 3]] = -50.0  # search never writes these: the argmax must not
            decoder.head.bias[2] += 4 * (seed % 4)  # some captions end, some are cut
        hypotheses = generate(decoder, features, VOCABULARY, algorithm="greedy", max_length=8)
        for image, (best,) in enumerate(hypotheses):
            tokens = best.tokens + [2] * best.finished
            assert check_against_teacher_forcing(decoder, features, image, best) == tokens
            lengths.add(len(tokens))
    assert lengths > {1, 8}


@every_decoder
def test_beam_search_agrees_with_teacher_forcing_after_reordering(kind, num_layers):
    decoder = make_decoder(kind, num_layers)
    features = torch.randn(3, CELLS, CHANNELS, generator=torch.Generator().manual_seed(3))
    search = {"beam_size": 4, "num_captions": 4, "max_length": 6, "min_length": 2}
    for image, hypotheses in enumerate(generate(decoder, features, VOCABULARY, **search)):
        assert len(hypotheses) == 4
        for hypothesis in hypotheses:
            check_against_teacher_forcing(decoder, features, image, hypothesis)


def test_the_lstm_decoder_is_a_torch_lstm_that_sees_the_image_first_and_again_beside_every_output():
    decoder, (features, captions) = make_decoder("lstm", 3), make_data()
    logits, _ = run_decoder(decoder, features, captions)
    for row, (image, length) in enumerate(zip(IMAGE_INDEX, LENGTHS, strict=True)):
        mean = features[image].mean(0) @ decoder.project_image.weight.T + decoder.project_image.bias
        inputs = torch.stack([mean, *decoder.embed.weight[captions[row, :length]]])
        hidden = decoder.lstm(inputs)[0][1:] + mean @ decoder.image_skip.weight.T
        torch.testing.assert_close(logits[row, :length], decoder.head(hidden), atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_attention_decoder_is_additive_attention_written_out_plainly(num_layers):
    decoder, (features, _) = make_decoder("attention", num_layers), make_data()
    grid, token, attention = features[1], torch.tensor([[7]]), decoder.attention
    state = decoder.start(features[1:2])
    hidden = list(torch.tanh(decoder.init_hidden(grid.mean(0))).split(HIDDEN))
    cell = list(torch.tanh(decoder.init_cell(grid.mean(0))).split(HIDDEN))
    for _ in range(2):  # from the image alone, then from a state with a word in it
        query, energies = hidden[-1], []
        for vector in grid:  # Bahdanau et al. 2015, section 3.1: v . tanh(W q + U x)
            summed = attention.project_keys(vector) + attention.project_query.weight @ query
            energies.append(attention.score.weight[0] @ torch.tanh(summed))
        weights = torch.stack(energies).exp() / sum(energy.exp() for energy in energies)
        cells = zip(weights, grid, strict=True)
        context = sum(weight * decoder.project_values(vector) for weight, vector in cells)
        inputs = context = torch.sigmoid(decoder.gate(query)) * context
        for number, layer in enumerate(decoder.layers):
            reference = nn.LSTMCell(len(inputs) + (0 if number else EMBED), HIDDEN)
            below, recurrent = layer.weight.split([len(inputs), HIDDEN], dim=1)
            words = [] if number else [decoder.word_gates.weight]
            biases = layer.bias, torch.zeros_like(layer.bias) if number else decoder.word_gates.bias
            named = {"weight_ih": torch.cat([*words, below], dim=1), "weight_hh": recurrent}
            named |= dict(zip(("bias_ih", "bias_hh"), biases, strict=True))
            inputs = inputs if number else torch.cat([decoder.embed.weight[7], inputs])
            hidden[number], cell[number] = torch.func.functional_call(
                reference, named, (inputs, (hidden[number], cell[number]))
            )
            inputs = hidden[number]
        logits, state, alphas = decoder.step(token, state)
        torch.testing.assert_close(alphas[0, 0], weights, atol=1e-5, rtol=0)
        # Xu et al. 2015, equation 7
        deep = inputs + decoder.deep_output(torch.cat([decoder.embed.weight[7], context]))
        torch.testing.assert_close(logits[0, 0], decoder.head(deep), atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_multi_head_attention_is_torchs_own(heads):
    """nn.MultiheadAttention's, where its last layer gives what it gets; and scaled_dot_product_attention's."""
    torch.manual_seed(0)
    attention = program.MultiHeadAttention(CHANNELS, HIDDEN, COMPARE, heads)
    query, grid = torch.randn(3, 2, HIDDEN), torch.randn(3, CELLS, CHANNELS)
    values = torch.randn(3, CELLS, COMPARE)
    keys = attention.keys(grid)
    context, alphas = attention(query, keys, values)
    queries = attention.queries(query)
    of_heads = F.scaled_dot_product_attention(queries, keys, attention.split(values))
    queries, keys, expected = (x.transpose(1, 2).flatten(2) for x in (queries, keys, of_heads))
    torch.testing.assert_close(context, expected, atol=1e-5, rtol=0)
    torchs = nn.MultiheadAttention(COMPARE, heads, batch_first=True)
    with torch.no_grad():
        torchs.in_proj_weight.copy_(torch.eye(COMPARE).repeat(3, 1))
        torchs.out_proj.weight.copy_(torch.eye(COMPARE))
    expected = torchs(queries, keys, values)
    torch.testing.assert_close((context, alphas), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(alphas.sum(-1), torch.ones(3, 2))
    shifted = attention.keys(grid + torch.randn(CHANNELS))  # what all cells have tells none apart
    torch.testing.assert_close(attention.keys(grid), shifted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_multi_head_decoder_is_the_additive_one_with_another_attention(num_layers):
    """Where every cell is the same one it does not matter how they are compared."""
    multi_head = make_decoder("multi_head", num_layers)
    additive = make_decoder("attention", num_layers, embed_size=EVEN)
    weights = multi_head.state_dict()
    shared = {name: weights[name] for name in weights if not name.startswith("attention.")}
    assert additive.load_state_dict(shared, strict=False).unexpected_keys == []
    features, captions = make_data()
    logits = [run_steps(decoder, features[1], captions[2])[0] for decoder in (multi_head, additive)]
    assert not torch.allclose(*logits, atol=0.01)
    alike = features[1, :1].expand(CELLS, -1)
    logits = [run_steps(decoder, alike, captions[2])[0] for decoder in (multi_head, additive)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_adaptive_decoder_is_scaled_dot_products_and_a_sentinel_written_out_plainly(num_layers):
    decoder, (features, captions) = make_decoder("adaptive", num_layers), make_data()
    grid, tokens, attention = features[1], captions[2, :6], decoder.attention
    logits, shares = run_steps(decoder, grid, tokens)
    words = decoder.embed.weight[tokens]
    read = decoder.reader(words)[0]  # (T, E)
    keys = [attention.project_keys(cell) for cell in grid]
    keys = [key - sum(keys) / CELLS for key in keys]  # what sets a cell apart

    def normed(norm, vector):  # Henry et al. 2020, section 3, with a gain for each unit
        return norm.weight * vector / (vector.square().mean() + (norm.eps or 0)).sqrt()

    contexts = []
    for step, query in enumerate(read):
        parts, heads, width = torch.zeros(CELLS + 1), [], EVEN // 2
        for head in range(2):  # Vaswani et al. 2017, section 3.2: softmax(q k / sqrt(d)) v
            keyed, valued = slice(2 * head, 2 * head + 2), slice(width * head, width * (head + 1))
            looked = normed(attention.norm_query, attention.project_query(query)[keyed])
            compared = [*keys, attention.sentinel_key(query)]
            compared = [normed(attention.norm_key, key[keyed]) for key in compared]
            values = [decoder.project_values(cell)[valued] for cell in grid]
            values.append(attention.sentinel_value(query)[valued])
            energies = torch.stack([looked @ key / 2**0.5 for key in compared])
            weights = energies.exp() / energies.exp().sum()
            taken = [weight * value for weight, value in zip(weights, values, strict=True)]
            heads.append(sum(taken))
            parts += torch.stack([each @ heads[-1] for each in taken])
        context = torch.cat(heads)
        torch.testing.assert_close(parts.sum(), context @ context)  # shares of the context's square
        parts = parts.clamp_min(0)
        torch.testing.assert_close(shares[step], parts / parts.sum(), atol=1e-5, rtol=0)
        contexts.append(context)
    contexts = torch.stack(contexts)
    mean = grid.mean(0)  # Xu et al. 2015, section 3.1.2, each layer's rows of it
    first = [
        torch.stack(layer(mean).tanh().split(HIDDEN))
        for layer in (decoder.init_hidden, decoder.init_cell)
    ]
    written = decoder.writer(read + contexts, tuple(first))[0]
    # Xu et al. 2015, equation 7
    deep = decoder.project_output(written) + words + contexts
    torch.testing.assert_close(logits, decoder.head(deep), atol=1e-5, rtol=1e-4)


def test_adaptive_attention_sums_to_1_with_the_sentinel_and_words_differ_in_what_they_look_at():
    decoder, (features, captions) = make_decoder("adaptive", 1, scale=2.0), make_data()
    assert decoder.beside_cells == ("language",)
    alphas = torch.stack([run_steps(decoder, image, captions[2])[1] for image in features])
    assert alphas.shape == (4, 7, CELLS + 1)
    torch.testing.assert_close(alphas.sum(-1), torch.ones(4, 7))
    assert alphas.min() >= 0
    assert torch.pdist(alphas[0]).min() > 0.01  # word by word
    assert torch.pdist(alphas[:, 3]).min() > 0.01  # the same words, image by image
    assert alphas[..., -1].std() > 0.01  # some words need the picture more than others


def test_the_adaptive_decoder_knows_the_picture_by_looking_and_from_its_mean_only():
    """Where all heads look at the sentinel alone and no state begins, another picture is the same to it."""
    decoder, (features, captions) = make_decoder("adaptive", 1), make_data()
    with torch.no_grad():
        for projection in (decoder.attention.project_query, decoder.attention.sentinel_key):
            projection.weight.zero_()
            projection.bias.fill_(1.0)
        decoder.attention.norm_query.weight.fill_(100.0)
        decoder.attention.project_keys.weight.zero_()
    logits = [run_steps(decoder, image, captions[2])[0] for image in features]
    assert not torch.allclose(logits[0], logits[1])
    with torch.no_grad():
        decoder.init_hidden.weight.zero_()
        decoder.init_cell.weight.zero_()
    logits = [run_steps(decoder, image, captions[2])[0] for image in features]
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(logits[0], logits[3])


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("kind", BEFORE_EACH_WORD)
def test_attention_sums_to_1_and_varies_by_word_and_by_image(kind, num_layers):
    decoder, (features, captions) = make_decoder(kind, num_layers, scale=5.0), make_data()
    _, alphas = run_decoder(decoder, features, captions)
    is_token = torch.arange(6) < LENGTHS.unsqueeze(1)
    torch.testing.assert_close(alphas[is_token].sum(-1), torch.ones(int(LENGTHS.sum())))
    assert alphas[is_token].min() >= 0
    assert (alphas[2, 1:] - alphas[2, :-1]).abs().amax(-1).min() > 0.001  # word by word
    copies = captions[2:3].expand(4, -1)
    _, alphas = run_decoder(decoder, features, copies, LENGTHS[2].expand(4), torch.arange(4))
    assert torch.pdist(alphas[:, 0]).min() > 0.01  # the same words, image by image
    assert alphas.std(dim=-1).min() > 0.01  # no map is flat


@every_decoder
def test_order_and_company_change_nothing(kind, num_layers):
    decoder, (features, captions) = make_decoder(kind, num_layers), make_data()
    logits, alphas = run_decoder(decoder, features, captions)
    is_token = torch.arange(6) < LENGTHS.unsqueeze(1)

    def check(other_logits, other_alphas, rows=slice(None)):
        within = is_token[rows][:, : other_logits.size(1)]
        for other, reference in ((other_logits, logits), (other_alphas, alphas)):
            if reference is not None:
                expected = reference[rows][:, : within.size(1)][within]
                torch.testing.assert_close(other[within], expected, atol=1e-5, rtol=1e-5)

    for rows in ([3, 6, 0, 5, 2, 4, 1], [4], [3, 1]):
        some = captions[rows], LENGTHS[rows], IMAGE_INDEX[rows]
        check(*run_decoder(decoder, features, *some), rows)
    shuffled = torch.tensor([3, 1, 0, 2])  # the images in another order
    positions = shuffled.argsort()[IMAGE_INDEX]
    check(*run_decoder(decoder, features[shuffled], captions, image_index=positions))


@every_decoder
def test_captions_of_one_image_share_its_work_without_a_trace(kind, num_layers):
    decoder, (features, captions) = make_decoder(kind, num_layers), make_data()
    first = torch.zeros(7, dtype=torch.int64)
    shared = run_decoder(decoder, features[:1], captions, image_index=first)
    copies = features[:1].expand(7, -1, -1)
    copied = run_decoder(decoder, copies, captions, image_index=torch.arange(7))
    torch.testing.assert_close(shared[0], copied[0], atol=1e-5, rtol=0)


@every_decoder
def test_every_size_counts(kind, num_layers):
    # biases of a layer above the first: torch's LSTM has two
    upper = 1 if kind in BEFORE_EACH_WORD else 2
    lstm = {  # weights and two biases for each of four gates
        "lstm": 4 * HIDDEN * (EMBED + HIDDEN + 2), "attention": 4 * HIDDEN * (2 * EMBED + HIDDEN + 2),
        "multi_head": 4 * HIDDEN * (2 * EVEN + HIDDEN + 2),
        "adaptive": 4 * EVEN * (2 * EVEN + 2) + 4 * HIDDEN * (EVEN + HIDDEN + 2),
    }[kind] + (num_layers - 1) * 4 * HIDDEN * (2 * HIDDEN + upper)  # fmt: skip
    image = {
        "lstm": CHANNELS * EMBED + EMBED + EMBED * HIDDEN,
        "attention": (CHANNELS * EMBED + EMBED) + (CHANNELS * COMPARE + COMPARE) + HIDDEN * COMPARE + COMPARE
        + (HIDDEN * EMBED + EMBED) + 2 * num_layers * HIDDEN * (CHANNELS + 1) + (2 * EMBED + 1) * HIDDEN,
        "multi_head": (CHANNELS + 1) * EVEN + (CHANNELS + HIDDEN + 1) * COMPARE
        + COMPARE + (HIDDEN + 1) * EVEN + 2 * num_layers * HIDDEN * (CHANNELS + 1) + (2 * EVEN + 1) * HIDDEN,
        "adaptive": CHANNELS * (EVEN + COMPARE) + 2 * (EVEN + 1) * COMPARE + (EVEN + 1) * EVEN
        + COMPARE + (HIDDEN + 1) * EVEN  # COMPARE gains: 2 of each head's 2 units
        + 2 * num_layers * HIDDEN * (CHANNELS + 1),
    }[kind]  # fmt: skip
    decoder = make_decoder(kind, num_layers)
    embed_size = EVEN if kind in WITH_HEADS else EMBED
    written = EVEN if kind == "adaptive" else HIDDEN  # what words are chosen from
    words = VOCAB_SIZE * (embed_size + written + 1)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == lstm + image + words


@every_decoder
def test_dropout_acts_on_every_layers_input_in_training_only(kind, num_layers, monkeypatch):
    decoder, (features, captions) = make_decoder(kind, num_layers, drop_prob=0.5), make_data()
    inputs = {}  # of each layer, in training: half of what goes in is 0
    modules = {"head": decoder.head}
    if kind == "lstm":
        modules |= {
            "lstm": decoder.lstm,
            "image": decoder.project_image,
            "skip": decoder.image_skip,
        }
    elif kind == "adaptive":
        modules |= {"mean": decoder.init_cell, "reader": decoder.reader, "writer": decoder.writer}
    else:
        modules |= {"mean": decoder.init_cell, "words": decoder.word_gates}
        modules |= {f"layer {n}": layer for n, layer in enumerate(decoder.layers) if n}
    for name, module in modules.items():
        module.register_forward_pre_hook(
            lambda _module, given, name=name: inputs.setdefault(name, []).append(given[0])
        )
    names, run_lstm = {module: name for name, module in modules.items()}, program.run_lstm

    def seen_by_lstm(lstm, given, state=None):  # on a CPU hooks do not see it
        inputs.setdefault(names[lstm], []).append(given.data)
        return run_lstm(lstm, given, state)

    monkeypatch.setattr(program, "run_lstm", seen_by_lstm)
    decoder.train()
    first, second = (run_decoder(decoder, features, captions)[0] for _ in range(2))
    assert not torch.allclose(first, second)
    for _ in range(20):
        run_decoder(decoder, features, captions)
    dropped = {
        name: float((torch.cat([t.flatten() for t in seen]) == 0).float().mean())
        for name, seen in inputs.items()
    }
    for name in dropped:
        if name.startswith("layer"):
            dropped[name] *= 2  # its other half is its own output one step ago
    assert dropped == pytest.approx(dict.fromkeys(modules, 0.5), abs=0.05)
    if kind not in BEFORE_EACH_WORD and num_layers > 1:  # between its layers, where no hook reaches
        assert (decoder.lstm if kind == "lstm" else decoder.writer).dropout == 0.5
    decoder.eval()
    first, second = (run_decoder(decoder, features, captions)[0] for _ in range(2))
    assert torch.equal(first, second)


@every_decoder
def test_recurrent_dropout_hides_all_that_steps_hear_of_each_other_and_nothing_else(
    kind, num_layers, monkeypatch
):
    """With nothing heard, a decoder is one whose recurrent weights are 0; units of each layer are drawn once."""
    decoder, (features, captions) = make_decoder(kind, num_layers, scale=1.0), make_data()
    dropping = make_decoder(kind, num_layers, scale=1.0, recurrent_dropout=0.5)
    dropping.load_state_dict(decoder.state_dict())
    plain = run_decoder(decoder, features, captions)[0]
    assert torch.equal(run_decoder(dropping, features, captions)[0], plain)  # eval mode
    first, second = (run_decoder(dropping.train(), features, captions)[0] for _ in range(2))
    assert not torch.allclose(first, second) and not torch.allclose(first, plain)
    drawn = []

    def hear_nothing(hidden, share):
        drawn.append((hidden.numel(), share))
        return torch.zeros_like(hidden)

    monkeypatch.setattr(packed_lstm, "recurrent_masks", hear_nothing)
    found = run_decoder(dropping, features, captions)[0]
    units = len(LENGTHS) * (HIDDEN * num_layers + (EVEN if kind == "adaptive" else 0))
    assert sum(number for number, _ in drawn) == units and {share for _, share in drawn} == {0.5}
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if "weight_hh" in name:
                weight.zero_()
            elif re.fullmatch(r"layers\.\d+\.weight", name):
                weight[:, -HIDDEN:] = 0
    torch.testing.assert_close(found, run_decoder(decoder, features, captions)[0])


@every_decoder
def test_without_dropout_training_and_evaluation_agree(kind, num_layers):
    decoder, (features, captions) = make_decoder(kind, num_layers), make_data()
    evaluated = run_decoder(decoder, features, captions)[0]
    decoder.train()
    torch.testing.assert_close(run_decoder(decoder, features, captions)[0], evaluated)


@every_decoder
def test_gradients_reach_every_parameter(kind, num_layers):
    decoder, (features, captions) = make_decoder(kind, num_layers, scale=1.0), make_data()
    batch = make_batch(captions, LENGTHS, IMAGE_INDEX)
    found = gradients(decoder, total_loss(*decoder(features, batch), batch))
    for name, gradient in found.items():
        assert gradient.abs().sum() > 0, name
    used = set(captions[:, :-1][torch.arange(6) < LENGTHS.unsqueeze(1)].tolist())
    assert set(found["embed.weight"].abs().sum(1).nonzero().flatten().tolist()) == used


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("kind", BEFORE_EACH_WORD)
def test_gradients_summed_once_are_those_summed_step_by_step(kind, num_layers, monkeypatch):
    decoder = make_decoder(kind, num_layers, scale=1.0).double()
    features, captions = make_data()
    batch, found = make_batch(captions, LENGTHS, IMAGE_INDEX), []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(program, "summed_once", lambda *_layers: contextlib.nullcontext())
        loss = total_loss(*decoder(features.double(), batch), batch)
        found.append(gradients(decoder, loss))
    assert all(
        layer.uses is None for layer in decoder.modules() if isinstance(layer, RepeatedLinear)
    )
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, atol=1e-6, rtol=1e-6, msg=name)


@every_decoder
def test_dropout_leaves_the_same_units_out_at_every_step_of_a_caption(kind, num_layers):
    decoder = make_decoder(kind, num_layers, drop_prob=0.5).train()
    caption_index = torch.tensor([0, 1, 2, 0, 1, 0])
    kept = decoder.locked_dropout(torch.ones(6, 200), caption_index, 3)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    for one, other in ((0, 3), (0, 5), (1, 4)):
        assert torch.equal(kept[one], kept[other])
    assert not torch.equal(kept[0], kept[1])


def test_dropout_leaves_the_same_units_out_of_all_cells_of_an_image():
    decoder = make_decoder("attention", 1, drop_prob=0.5, embed_size=200).train()
    with torch.no_grad():
        decoder.project_values.weight.zero_()
        decoder.project_values.bias.fill_(1.0)
    (_, values), _ = decoder.start(make_data()[0])  # (N, P, E)
    assert set(values.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(values[:, 0], values[:, 1]) and not torch.equal(values[0], values[1])


@pytest.mark.parametrize("kind", DECODERS[1:])
def test_patch_dropout_hides_cells_in_training_only(kind):
    (features, captions), looked = make_data(), []
    decoder = make_decoder(kind, 1, patch_dropout=0.4)
    decoder.project_values.register_forward_pre_hook(lambda _, given: looked.append(given[0]))
    run_decoder(decoder, features, captions)
    run_decoder(decoder.train(), features, captions)
    assert [tuple(part.shape) for part in looked] == [(4, 9, CHANNELS), (4, 5, CHANNELS)]


def test_patches_are_dropped_by_a_random_choice_for_each_image():
    features = make_data()[0]
    kept = [program.drop_patches(features, 0.4) for _ in range(20)]
    assert {part.shape for part in kept} == {(4, 5, CHANNELS)}  # 9 * 0.6 = 5.4 cells
    choices = set()
    for part in kept:
        is_kept = (part.unsqueeze(2) == features.unsqueeze(1)).all(-1)  # (N, P', P)
        assert (is_kept.sum(2) == 1).all() and is_kept.sum(1).max() == 1  # five different cells
        choices |= {tuple(image.tolist()) for image in is_kept.any(1)}
    assert len(choices) > 40  # of 20 * 4: by image, and anew each time


@pytest.mark.parametrize("chunk", [4, 3])
def test_features_are_standardised_by_the_sample_that_calibrated_the_decoder(chunk):
    """In chunks of any size: the moments are those of all four images together."""
    decoder, features = make_decoder("attention", 1), 50 * make_data()[0] + 7
    features[..., 2] = 3.0  # a channel that is constant in the sample
    decoder.calibrate(features.split(chunk))
    whole = torch.std_mean(features, dim=(0, 1), correction=0)
    torch.testing.assert_close(decoder.feature_mean, whole[1])
    torch.testing.assert_close(decoder.feature_std[:2], whole[0][:2])
    standardised = decoder.standardise(features)
    others = [channel for channel in range(CHANNELS) if channel != 2]
    std, mean = torch.std_mean(standardised, dim=(0, 1), correction=0)
    torch.testing.assert_close(mean, torch.zeros(CHANNELS), atol=1e-5, rtol=0)
    torch.testing.assert_close(std[others], torch.ones(CHANNELS - 1))
    features[..., 2] += 0.01  # what it may do elsewhere is not blown up
    assert decoder.standardise(features)[..., 2].abs().max() < 1


@every_decoder
def test_weight_matrices_decay_and_embeddings_and_biases_do_not(kind, num_layers):
    decoder = make_decoder(kind, num_layers)
    decaying, others = decoder.param_groups(0.25)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.25, 0.0)
    grouped = [id(parameter) for group in (decaying, others) for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, decoder.parameters()))
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    undecayed = {names[id(parameter)] for parameter in others["params"]}
    assert undecayed == {"embed.weight"} | {n for n in names.values() if "bias" in n or "norm" in n}


# ---------------------------------------------------------------------------------- the training step


def run_options(*typed):
    """Options of a small run."""
    sizes = "--embed_size 16 --hidden_size 32 --num_layers 1 --drop_prob 0"
    return parse_args([*sizes.split(), *typed])


@pytest.mark.parametrize("kind", DECODERS)
def test_five_images_are_overfitted(kind):
    torch.manual_seed(0)
    features = torch.randn(5, CELLS, CHANNELS)
    # shared beginnings: the image must tell
    texts = [[4, 5, 6], [4, 5, 7, 8], [9], [4, 10, 4, 11, 12], [6, 5, 4]]
    attention = ["--attention_dim", "16", "--alpha_c", "0.1"] if kind in BEFORE_EACH_WORD else []
    attention += ["--attention", kind] if kind in WITH_HEADS else []
    decoder = "lstm" if kind == "lstm" else "attention"
    options = run_options("--decoder", decoder, "--learning_rate", "0.02", *attention)
    decoder = program.build_decoder(options.as_dict(), CHANNELS, VOCAB_SIZE)
    run = make_run(decoder, options)
    (batch,) = CaptionBatches([[text] for text in texts], 5, 9, seed=0).epoch(0, shuffle=False)
    losses = [float(program.train_step(run, features, batch)) for _ in range(150)]
    losses = [nats / batch.num_tokens for nats in losses]
    assert losses[0] > 2 > 0.05 > losses[-1]  # from about log(13) nats per token
    hypotheses = generate(decoder.eval(), features, VOCABULARY, algorithm="greedy")
    assert [best.tokens for (best,) in hypotheses] == texts
    assert all(best.finished for (best,) in hypotheses)


@pytest.mark.parametrize("loss_scale", [None, 1024.0])
def test_a_training_step_is_one_of_torchs_optimizer_on_the_clipped_gradient(loss_scale):
    """Written out plainly: tail, loss, gradient, clipping, AdamW."""
    options = run_options("--decoder", "attention", "--grad_clip", "0.01", "--label_smoothing", "0.1",
                          "--weight_decay", "0.2", "--alpha_c", "0.7", "--learning_rate", "0.03")  # fmt: skip
    features, captions = make_data()
    batch = make_batch(captions, LENGTHS, IMAGE_INDEX)
    decoder, reference = (make_decoder("attention", 1, scale=1.0) for _ in range(2))
    run, optimizer = (
        make_run(decoder, options),
        torch.optim.AdamW(reference.param_groups(0.2), 0.03),
    )
    run.grids = lambda features: 2 * features
    if loss_scale:  # as of float16: the gradient is clipped without it
        run.state.scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale)
    for _ in range(2):
        nats = program.train_step(run, features, batch)

        logits, alphas = reference(2 * features, batch)
        loss, plain = cross_entropy(logits, batch, 0.1)
        loss = loss + 0.7 * doubly_stochastic_penalty(alphas, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm()
        assert norm > 0.01
        for parameter in reference.parameters():
            parameter.grad *= 0.01 / norm
        optimizer.step()
        torch.testing.assert_close(nats, plain.detach())
        pairs = zip(decoder.parameters(), reference.parameters(), strict=True)
        for parameter, expected in pairs:
            torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-7, rtol=1e-3)
            torch.testing.assert_close(parameter, expected, atol=1e-5, rtol=1e-3)


def shares_of(captions, world_size, monkeypatch):
    """The batch of all these captions as each of so many processes has it."""
    batches = []
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        batches += CaptionBatches(captions, 99, 20, seed=0).epoch(0)
    return batches


@pytest.mark.parametrize("kind", ["lstm", "attention"])
@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_the_shares_of_several_processes_are_together_one_batch(kind, world_size, monkeypatch):
    """The mean of the processes' gradients, which DistributedDataParallel takes, is the batch's."""
    captions = [[[4, 5, 6], [7]], [[8, 9, 10, 11, 12]], [[5, 4, 6, 6], [6], [9, 9]], [[12, 4]]]
    decoder, features = make_decoder(kind, 1, scale=1.0), make_data()[0]
    options = run_options("--decoder", kind, "--label_smoothing", "0.1", "--grad_clip", "0")

    def nats_and_gradients(world_size):
        total, means = 0.0, {name: 0.0 for name, _ in decoder.named_parameters()}
        for batch in shares_of(captions, world_size, monkeypatch):
            run = make_run(copy.deepcopy(decoder), options)
            nats = program.train_step(run, features[batch.image_rows], batch)
            total += float(nats)
            for name, parameter in run.model.named_parameters():
                means[name] = means[name] + parameter.grad / world_size
        return total, means

    nats, expected = nats_and_gradients(1)
    shared_nats, means = nats_and_gradients(world_size)
    assert shared_nats == pytest.approx(nats, rel=1e-6)
    for name, mean in means.items():
        torch.testing.assert_close(mean, expected[name], atol=1e-6, rtol=1e-4, msg=name)


# ---------------------------------------------------------------------------------------- the losses


def as_batch(captions, lengths):
    """The batch of captions that are each of another image."""
    return make_batch(captions, lengths, torch.arange(len(lengths)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_cross_entropy_is_torchs_over_the_tokens_of_the_captions(smoothing):
    _, captions = make_data()
    captions[0, 2] = VOCABULARY.pad  # a padding id within the caption is a word like any other
    batch = as_batch(captions, LENGTHS)
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(27, VOCAB_SIZE, generator=generator, requires_grad=True)
    padded = unpack(logits, LENGTHS).flatten(0, 1)
    targets = captions[:, 1:].masked_fill(torch.arange(6) >= LENGTHS.unsqueeze(1), -100).flatten()
    smoothed, nats = cross_entropy(logits, batch, smoothing)
    expected = F.cross_entropy(padded, targets, ignore_index=-100, label_smoothing=smoothing)
    torch.testing.assert_close(smoothed, expected)
    torch.testing.assert_close(
        nats, F.cross_entropy(padded, targets, ignore_index=-100, reduction="sum")
    )
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (smoothed, expected))
    )


def test_cross_entropy_of_a_caption_worked_by_hand():
    batch = as_batch(torch.tensor([[1, 0, 1]]), torch.tensor([2]))
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
    loss, nats = cross_entropy(logits, batch)
    expected = -float(torch.tensor(0.5 * 0.8).log())
    assert float(nats) == pytest.approx(expected) and float(loss) == pytest.approx(expected / 2)
    loss, nats = cross_entropy(logits, batch._replace(num_tokens=8), 0.3)  # a share of 8 tokens
    spread = -float(torch.tensor(0.5 * 0.25 * 0.25 * 0.1 * 0.8 * 0.1).log()) / 3
    assert float(nats) == pytest.approx(expected)  # which are reported are never smoothed
    assert float(loss) == pytest.approx((0.7 * expected + 0.3 * spread) / 8)


def test_the_penalty_of_captions_worked_by_hand():
    captions, lengths = torch.tensor([[1, 4, 2], [1, 2, 0]]), torch.tensor([2, 1])
    batch = as_batch(captions, lengths)
    alphas = torch.tensor([[0.5, 0.5], [0.2, 0.8], [1.0, 0.0]])  # first words, then the second
    # the first caption's cells receive 1.5 and 0.5, so 0.25 each; the second's 0.2 and 0.8
    expected = (0.25 + 0.25 + 0.64 + 0.04) / 4
    assert float(doubly_stochastic_penalty(alphas, batch)) == pytest.approx(expected)
    watched = alphas.clone().requires_grad_()
    doubly_stochastic_penalty(watched, batch).backward()
    # -2 (1 - received), over two cells and two captions
    expected_gradient = torch.tensor([[0.25, -0.25], [-0.4, -0.1], [0.25, -0.25]])
    torch.testing.assert_close(watched.grad, expected_gradient)
    share = batch._replace(num_captions=10)  # of a batch of ten captions
    assert float(doubly_stochastic_penalty(alphas, share)) == pytest.approx(expected * 2 / 10)


def test_a_caption_that_looks_at_every_cell_alike_has_no_penalty_at_its_grids_length():
    for cells in (4, 49):
        captions = torch.full((3, cells + 1), 5)
        batch = as_batch(captions, torch.full((3,), cells))
        alphas = torch.full((3 * cells, cells), 1 / cells)
        assert float(doubly_stochastic_penalty(alphas, batch)) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("alpha_c", [0.0, 0.7])
def test_the_objective_adds_the_penalty_times_alpha_c(alpha_c):
    decoder, (features, captions) = make_decoder("attention", 1), make_data()
    batch = make_batch(captions, LENGTHS, IMAGE_INDEX)
    options = run_options("--decoder", "attention", "--label_smoothing", "0.2", "--alpha_c", str(alpha_c))  # fmt: skip
    loss, nats = program.CrossEntropyObjective(options.training)(decoder, features, batch)
    logits, alphas = decoder(features, batch)
    smoothed, plain = cross_entropy(logits, batch, 0.2)
    torch.testing.assert_close(loss, smoothed + alpha_c * doubly_stochastic_penalty(alphas, batch))
    torch.testing.assert_close(nats, plain)


# --------------------------------------------------------------------------------------- the encoder


def through_pool(model, grid):
    """The rest of most torchvision models: mean over the grid, then the classifier."""
    head = getattr(model, "fc", None) or getattr(model, "head", None) or model.classifier
    return head(grid.mean((2, 3)))


TAILS = {  # one member of each torchvision family, and what its model does with the grid
    "resnet18": through_pool,
    "mobilenet_v2": through_pool,
    "mobilenet_v3_small": through_pool,
    "efficientnet_b0": through_pool,
    "vgg11": lambda model, grid: model.classifier(model.avgpool(grid).flatten(1)),
    "convnext_tiny": lambda model, grid: model.classifier(grid.mean((2, 3), keepdim=True)),
    "squeezenet1_1": lambda model, grid: model.classifier(grid).flatten(1),
    "shufflenet_v2_x0_5": through_pool,
    "mnasnet0_5": through_pool,
    "swin_t": through_pool,
    "inception_v3": through_pool,
}
HOW = {
    "inception_v3": {"init_weights": False, "transform_input": True}
}  # as published weights have it
SLOW = ("vgg11", "convnext_tiny")
SMALL = 96  # pixels a side: a grid of 3 x 3 cells takes a fifth of the published size's time
SMALLEST = {"inception_v3": 139}  # where that is too small for such a grid


def normalize(images):
    """uint8 images as torchvision's own transforms hand them to a model."""
    return torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(
        images / 255
    )


def some_images(count, size):
    """Random uint8 pictures (count, 3, size, size) with structure: every one of other colours."""
    generator = torch.Generator().manual_seed(6)
    blocks = torch.randint(0, 256, (count, 3, 7, 7), generator=generator, dtype=torch.uint8)
    return F.interpolate(blocks.float(), size=size).to(torch.uint8)


@pytest.fixture(scope="module")
def small():
    """The state dict of a small encoder with random weights and BatchNorm statistics of its own."""
    return load_encoder_weights("mobilenet_v3_small", "random", seed=0)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TAILS]
)
@torch.inference_mode()
def test_features_are_the_grid_that_torchvision_pools(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None, **HOW.get(name, {})).eval()
    for module in model.modules():  # untrained networks fade out: keep the signal up
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.1)
    # untrained networks magnify float32's rounding
    size = SMALLEST.get(name, SMALL)
    encoder = Encoder(name, model.state_dict(), "random", "float64", size)
    images = some_images(2, size)
    features = encoder(images)
    assert features.dtype == torch.float32
    assert min(encoder.grid) >= 3
    assert features.shape == (2, encoder.grid[0] * encoder.grid[1], encoder.channels)
    grid = features.transpose(1, 2).unflatten(2, encoder.grid)  # cells are in reading order
    expected = model.double()(normalize(images).double())
    found = TAILS[name](model, grid.double())
    spread = float(
        (expected[0] - expected[1]).abs().max()
    )  # what the picture contributes, besides the biases
    assert spread > 1e-4
    torch.testing.assert_close(found, expected, atol=spread * 1e-3, rtol=0)


def test_every_family_of_the_table_is_compared_with_torchvision():
    def family(name):
        return torchvision.models.get_model_builder(name).__module__

    assert {family(name) for name in ENCODERS} == {family(name) for name in TAILS}


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_has_imagenet_weights_made_for_our_preprocessing(name):
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    preset = weights.transforms()
    published, picture = find_model(name), torch.rand(1, 3, 2, 2)
    expected = torchvision.transforms.Normalize(preset.mean, preset.std)(picture)
    if name == "inception_v3":  # which with these weights transforms its input once more
        with torch.device("meta"):
            model = torchvision.models.get_model(name, weights=None, **HOW[name])
        expected = model._transform_input(expected)
    found = torchvision.transforms.Normalize(published.mean, published.std)(picture)
    torch.testing.assert_close(found, expected)
    assert published.image_size == preset.crop_size[0]
    assert len(preset.crop_size) == 1  # square
    assert re.fullmatch(
        r".+-[0-9a-f]{8,}\.pth", Path(weights.url).name
    )  # the hash that a file is checked against


def test_resnet50_has_a_grid_of_7_by_7_cells_of_2048_channels():
    encoder = Encoder("resnet50", load_encoder_weights("resnet50", "random", 0), "random")
    assert (encoder.grid, encoder.channels, encoder.image_size) == ([7, 7], 2048, 224)
    assert encoder(some_images(1, 224)).shape == (1, 49, 2048)


def test_inception_v3_has_8_by_8_cells_of_2048_channels_and_its_last_blocks_can_learn():
    state = load_encoder_weights("inception_v3", "random", 0)
    assert {key.partition(".")[0] for key in state} >= {"AuxLogits", "fc"}  # which are not ours
    encoder = FineTunedEncoder("inception_v3", state, "random", "float32", trained_blocks=2)
    assert (encoder.grid, encoder.channels, encoder.image_size) == ([8, 8], 2048, 299)
    images = some_images(1, 299)
    grid = encoder.tail(encoder(images))
    assert grid.shape == (1, 64, 2048)
    plain = Encoder("inception_v3", state, "random")(images)
    torch.testing.assert_close(grid, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))
    assert len(encoder.tail.blocks) == 2  # Mixed_7b and Mixed_7c


def test_pictures_too_small_for_the_encoder_are_refused_by_its_name():
    state = load_encoder_weights("inception_v3", "random", 0)
    for sizes in ({"image_size": 64}, {"coarse_size": 64}):
        with pytest.raises(
            ValueError,
            match=r"^--encoder inception_v3 makes no grid of pictures of 64 pixels a side",
        ):
            Encoder("inception_v3", state, "random", **sizes)


def test_images_are_normalized_as_torchvision_does(small):
    encoder = Encoder("mobilenet_v3_small", small, "random")
    encoder.folded = nn.Identity()
    images = some_images(2, 16)
    expected = normalize(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder(images), expected)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "swin_t"])
@torch.inference_mode()
def test_folded_batchnorm_and_bfloat16_compute_the_same_features(name):
    state = load_encoder_weights(name, "random", 0)
    for key, tensor in state.items():  # BatchNorm statistics as of a trained network
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif key.endswith("running_mean"):
            tensor.uniform_(-0.5, 0.5)
    images = some_images(2, SMALL)
    exact = Encoder(name, state, "random", image_size=SMALL)
    plain = exact.trunk(normalize(images)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(
        exact(images), plain, atol=1e-5 * float(plain.abs().max()), rtol=1e-4
    )
    assert sum(isinstance(module, nn.BatchNorm2d) for module in exact.folded.modules()) == 0
    half = Encoder(name, state, "random", "bfloat16", SMALL)
    assert (
        half.key() != exact.key() and half.key()["weights_sha256"] == exact.key()["weights_sha256"]
    )
    found = half(images)
    assert found.dtype == torch.float32
    assert float((found - plain).norm() / plain.norm()) < 0.03


def test_the_encoder_stays_in_eval_mode(small):
    encoder = Encoder("mobilenet_v3_small", small, "random")
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    images = some_images(3, encoder.image_size)
    first, key = encoder(images), encoder.key()
    whole = nn.ModuleDict({"encoder": encoder, "decoder": nn.Dropout()})
    for pin in (encoder.train, whole.train):
        pin()
        assert not any(module.training for module in encoder.modules())
        torch.testing.assert_close(encoder(images), first, rtol=0, atol=0)
    assert whole["decoder"].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert any("running_mean" in name for name in before)
    assert (
        Encoder("mobilenet_v3_small", encoder.trunk.state_dict(), "random").key() == key
    )  # hashed anew
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.fixture(scope="module")
def side_by_side():
    """Encoders of 7 x 7 and of 4 x 4 cells, at 100 pixels, joined."""
    parts = [
        Encoder(name, load_encoder_weights(name, "random", 0), "random", image_size=100)
        for name in ("mobilenet_v3_small", "squeezenet1_1")
    ]
    assert [part.grid for part in parts] == [[4, 4], [6, 6]]
    return SideBySideEncoder(parts)


def test_encoders_side_by_side_give_each_cell_the_channels_of_all(side_by_side):
    images = some_images(2, 100)
    coarse, fine = (part(images) for part in side_by_side.parts)
    features = side_by_side(images)
    channels = [part.channels for part in side_by_side.parts]
    assert features.shape == (2, 36, sum(channels)) and side_by_side.channels == sum(channels)
    assert side_by_side.grid == [6, 6] and side_by_side.image_size == 100
    assert torch.equal(features[..., channels[0] :], fine)
    maps = coarse.transpose(1, 2).unflatten(2, (4, 4))
    stretched = nn.functional.interpolate(maps, size=(6, 6), mode="bilinear")
    expected = stretched.flatten(2).transpose(1, 2)
    torch.testing.assert_close(features[..., : channels[0]], expected)
    means = [x.mean(1, keepdim=True) for x in (coarse, fine)]
    assert torch.equal(side_by_side.join(means), torch.cat(means, dim=-1))


def test_encoders_side_by_side_have_a_key_of_their_own(side_by_side):
    key, parts = side_by_side.key(), [part.key() for part in side_by_side.parts]
    assert key["name"] == "mobilenet_v3_small+squeezenet1_1" and key["parts"] == parts
    assert key["channels"] == sum(part["channels"] for part in parts) and key["grid"] == [6, 6]
    swapped = SideBySideEncoder(list(side_by_side.parts)[::-1])
    hashes = {k["weights_sha256"] for k in (key, swapped.key(), *parts)}
    assert len(hashes) == 4


def test_weights_in_a_checkpoint_find_their_encoder_again(side_by_side):
    stored = side_by_side.trunk.state_dict()
    states = split_weights(stored, side_by_side.name)
    for part, state in zip(side_by_side.parts, states, strict=True):
        again = Encoder(part.name, state, "best.pt", image_size=100)
        assert again.weights_sha256 == part.weights_sha256
    alone = side_by_side.parts[0].trunk.state_dict()
    assert split_weights(alone, "mobilenet_v3_small") == [alone]
    foreign = {"7.conv": torch.ones(1), "conv": torch.ones(1)}
    assert split_weights(foreign, side_by_side.name) == [{}, {}]


def test_an_encoder_outside_the_table_is_refused_by_name(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--encoder", "vit_b_16"])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert (
        message.count("\n") == 1
        and "--encoder" in message
        and "vit_b_16" in message
        and "resnet50" in message
    )


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("resnet18", "squeezenet1_1"),  # other layers
        ("shufflenet_v2_x0_5", "shufflenet_v2_x1_0"),  # the same layers of another width
        ("resnet34", "resnet18"),  # fewer layers
        ("resnet18", "resnet34"),  # more layers, all of resnet18's among them
    ],
)
def test_weights_of_another_architecture_are_refused(name, other):
    state = load_encoder_weights(other, "random", 0)
    with pytest.raises(
        ValueError, match=rf"--encoder_weights other\.pth.*--encoder {name}\b"
    ) as error:
        Encoder(name, state, "other.pth")
    assert "\n" not in str(error.value)


def test_weights_saved_before_batch_norm_counted_its_batches_are_taken(small):
    """torchvision's older files, such as resnet50-19c8e357.pth, have no num_batches_tracked."""
    old = {
        name: tensor for name, tensor in small.items() if not name.endswith("num_batches_tracked")
    }
    assert len(old) < len(small)
    images = some_images(1, 224)
    torch.testing.assert_close(
        Encoder("mobilenet_v3_small", old, "old.pth")(images),
        Encoder("mobilenet_v3_small", small, "new.pth")(images),
    )


def test_a_state_dict_may_lack_the_classifier_and_be_of_half_precision(small):
    halved = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in small.items()
    }
    trunk = {name: tensor for name, tensor in halved.items() if not name.startswith("classifier")}
    encoder = Encoder("mobilenet_v3_small", trunk, "half.pth")
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    whole = Encoder("mobilenet_v3_small", small, "whole.pth")
    images = some_images(1, 224)
    torch.testing.assert_close(encoder(images), whole(images), atol=0.02, rtol=0.05)


def test_the_key_tells_apart_what_computes_the_features(small):
    """On a CPU it says nothing of that, so that caches made before it did stay valid."""
    encoder = Encoder("mobilenet_v3_small", small, "a.pth")
    on_cpu = encoder.key()
    assert "computed_by" not in on_cpu
    assert encoder.to("meta").key() == {**on_cpu, "computed_by": "meta"}


def test_the_key_tells_apart_one_changed_weight(small):
    key = Encoder("mobilenet_v3_small", small, "a.pth").key()
    assert key == Encoder("mobilenet_v3_small", small, "b.pth").key()  # whatever the file is called
    last = [
        name for name in small if name.startswith("features") and small[name].is_floating_point()
    ][-1]
    changed = dict(small) | {last: small[last].clone()}
    changed[last].view(-1)[-1] += 1e-3
    other = Encoder("mobilenet_v3_small", changed, "a.pth").key()
    assert {name for name in key if key[name] != other[name]} == {"weights_sha256"}
    head = dict(small) | {
        "classifier.0.bias": small["classifier.0.bias"] + 1
    }  # what no feature depends on
    assert Encoder("mobilenet_v3_small", head, "a.pth").key() == key
    assert len(key["weights_sha256"]) == 64
    assert (key["name"], key["grid"], key["channels"], key["image_size"]) == (
        "mobilenet_v3_small",
        [7, 7],
        576,
        224,
    )


def open_encoder(stored, *typed):
    """The encoder of a run that goes on from run/best.pt, which stores this of its own."""
    options = parse_args(["--encoder", "mobilenet_v3_small", *typed])
    options = options._replace(run=options.run._replace(model_path="run/best.pt"))
    return program.open_encoder(options, CPU, {"encoder": stored})


def test_a_checkpoint_brings_its_encoder_and_refuses_another(tmp_path, small):
    encoder = Encoder("mobilenet_v3_small", small, "random")
    key, weights = encoder.key(), encoder.trunk.state_dict()
    torch.save(small, tmp_path / "same.pth")
    opened = open_encoder({**key, "weights": weights})  # no file, no download
    assert opened.key() == key
    same = ["--encoder_weights", str(tmp_path / "same.pth")]
    assert open_encoder({**key, "weights": None}, *same).key() == key
    refusal = r"--encoder_weights random: other weights than run/best\.pt"
    with pytest.raises(ValueError, match=refusal):
        open_encoder({**key, "weights": weights}, "--encoder_weights", "random", "--seed", "1")


@pytest.mark.parametrize(
    "change", [{"channels": 5}, {"image_size": 200}, {"coarse_size": 64}], ids=str
)
def test_a_checkpoint_whose_encoder_is_not_what_it_says_is_refused(small, change):
    encoder = Encoder("mobilenet_v3_small", small, "random")
    stored = {**encoder.key(), "weights": encoder.trunk.state_dict(), **change}
    with pytest.raises(
        ValueError, match=rf"^run/best\.pt: its encoder has other {next(iter(change))}"
    ):
        open_encoder(stored)


def test_training_changes_nothing_of_an_encoder_that_is_not_fine_tuned(small):
    encoder, features = Encoder("mobilenet_v3_small", small, "random"), torch.randn(2, 49, 576)
    assert encoder.tail(features) is features and encoder.stem is encoder
    assert not list(encoder.tail.parameters())


@pytest.mark.parametrize(
    "name, blocks",
    [("mobilenet_v2", 5), ("resnet18", 2), ("swin_t", 3), ("vgg11", 2), ("convnext_tiny", 1)],
)
def test_stem_and_tail_are_the_whole_encoder(name, blocks):
    """Of two looks, wherever it is cut; swin's blocks have the channels last."""
    how = name, load_encoder_weights(name, "random", 0), "random", "float32", 96, 64
    whole, cut = Encoder(*how), FineTunedEncoder(*how, trained_blocks=blocks)
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    with torch.no_grad():
        features, stem = whole(images), cut.stem(images)
        rebuilt = cut.tail(stem)
    assert stem.shape == (2, 1, cut.stem.channels)
    assert (rebuilt - features).abs().max() <= 1e-4 * features.abs().max()
    assert cut.key() == whole.key()
    assert cut.stem.key()["weights_sha256"] != whole.key()["weights_sha256"]


def test_a_stems_key_knows_where_it_ends_and_what_is_frozen_but_not_what_is_trained(small):
    def cut(blocks):
        return FineTunedEncoder("mobilenet_v3_small", small, "random", trained_blocks=blocks)

    encoder = cut(2)
    stem, whole = encoder.stem.key(), encoder.key()
    assert cut(3).stem.key()["weights_sha256"] != stem["weights_sha256"]
    with torch.no_grad():
        next(encoder.tail.parameters()).add_(1)
    assert encoder.stem.key() == stem and encoder.key() != whole
    with torch.no_grad():
        next(encoder.trunk.parameters()).add_(1)
    assert encoder.stem.key() != stem


def test_an_encoder_keeps_a_frozen_block(small):
    message = (
        "^--fine_tune_encoder 13: mobilenet_v3_small has 13 blocks, of which the first stays frozen"
    )
    with pytest.raises(ValueError, match=message):
        FineTunedEncoder("mobilenet_v3_small", small, "random", trained_blocks=13)


def test_columns_beside_the_cells_are_shares_and_the_map_sums_to_1_without_them():
    """Two words over 1 x 2 cells; the second one looked at no cell at all."""
    attention = torch.tensor([[0.3, 0.1, 0.2, 0.4], [0.0, 0.0, 0.0, 1.0]])
    hypothesis = Hypothesis([4, 5], -1.0, -1.0, True, attention)
    decoder = SimpleNamespace(beside_cells=("picture", "language"))
    encoder = SimpleNamespace(grid=[1, 2], beside_cells=())
    captioner = SimpleNamespace(encoder=encoder, decoder=decoder)
    grid = program.Captioner.attention_grid(captioner, hypothesis)
    assert grid.tolist() == [[pytest.approx([0.75, 0.25])], [[0.5, 0.5]]]
    beside = program.Captioner.attention_beside(captioner, hypothesis)
    assert {name: shares.tolist() for name, shares in beside.items()} == {
        "picture": pytest.approx([0.2, 0]),
        "language": pytest.approx([0.4, 1]),
    }
