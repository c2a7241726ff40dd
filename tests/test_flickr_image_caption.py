"""flickr_image_caption.py: the encoder, the decoders and the losses. Schedules are in test_lr_scheduling.py."""

import contextlib
import hashlib
import os
import pickle
import re
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import flickr_image_caption as program
from caption_decoding import generate
from flickr_image_caption import (
    ENCODERS,
    AttentionDecoder,
    Encoder,
    LSTMDecoder,
    cross_entropy,
    doubly_stochastic_penalty,
    load_encoder_weights,
)
from repeated_linear import RepeatedLinear

VOCAB_SIZE, CHANNELS, CELLS = 13, 6, 9
EMBED, HIDDEN, COMPARE = 5, 7, 4  # --embed_size --hidden_size --attention_dim
LENGTHS = torch.tensor([5, 2, 6, 1, 3, 6, 4])
IMAGE_INDEX = torch.tensor([2, 0, 3, 0, 2, 2, 1])  # several captions per image, in no order
VOCABULARY = SimpleNamespace(pad=0, sos=1, eos=2, unk=3)
KINDS = [(kind, layers) for kind in ("lstm", "attention") for layers in (1, 3)]
every_decoder = pytest.mark.parametrize(("kind", "num_layers"), KINDS)


pytestmark = pytest.mark.usefixtures("one_thread")


# --------------------------------------------------------------------------------------------------------- the decoders


def make_decoder(kind, num_layers, drop_prob=0.0, seed=0, scale=3.0):
    """A decoder in eval mode; `scale` makes its random weights large enough for captions to differ."""
    torch.manual_seed(seed)
    sizes = (VOCAB_SIZE, CHANNELS, EMBED, HIDDEN, num_layers, drop_prob)
    decoder = LSTMDecoder(*sizes) if kind == "lstm" else AttentionDecoder(*sizes, COMPARE)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(scale)
    return decoder.eval()


def make_batch(extra_padding=0):
    """features (4, P, F), captions (7, 1 + T): <SOS>, words, <EOS>, <PAD>."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(4, CELLS, CHANNELS, generator=generator)
    captions = torch.zeros(len(LENGTHS), 1 + int(LENGTHS.max()), dtype=torch.int64)
    for caption, length in zip(captions, LENGTHS.tolist(), strict=True):
        words = torch.randint(4, VOCAB_SIZE, (length - 1,), generator=generator)
        caption[: length + 1] = torch.cat([torch.tensor([1]), words, torch.tensor([2])])
    return features, F.pad(captions, (0, extra_padding))


def run_decoder(decoder, features, captions, lengths=LENGTHS, image_index=IMAGE_INDEX):
    """Logits and alphas under teacher forcing."""
    return decoder(features, captions[:, :-1], lengths, image_index)


def steps(decoder, features, tokens):
    """What `start` and `step` say of one image's tokens, one after another: logits (T, V), alphas (T, P) or None."""
    state, logits, alphas = decoder.start(features.unsqueeze(0)), [], []
    for token in tokens:
        written, state, looked = decoder.step(token.view(1, 1), state)
        logits.append(written[0, 0])
        alphas.append(None if looked is None else looked[0, 0])
    return torch.stack(logits), None if alphas[0] is None else torch.stack(alphas)


@every_decoder
def test_defect_5_step_by_step_is_teacher_forcing(kind, num_layers):
    decoder, (features, captions) = make_decoder(kind, num_layers), make_batch()
    logits, alphas = run_decoder(decoder, features, captions)
    assert logits.shape == (7, 6, VOCAB_SIZE)
    for row, (image, length) in enumerate(zip(IMAGE_INDEX, LENGTHS, strict=True)):
        expected, looked = steps(decoder, features[image], captions[row, :length])
        torch.testing.assert_close(logits[row, :length], expected, atol=1e-5, rtol=0)
        if kind == "attention":
            torch.testing.assert_close(alphas[row, :length], looked, atol=1e-5, rtol=0)
    assert (alphas is None) == (kind == "lstm")


def check_against_teacher_forcing(decoder, features, image, hypothesis):
    """Its log_prob and attention are those of the teacher-forced pass on its own tokens. Returns that pass's argmax."""
    written = torch.tensor([[1, *hypothesis.tokens, *[2] * hypothesis.finished]])
    length = written.size(1) - 1
    with torch.no_grad():
        logits, alphas = run_decoder(
            decoder, features, written, torch.tensor([length]), torch.tensor([image])
        )
    own = logits[0].log_softmax(-1).gather(1, written[0, 1:, None]).sum()
    assert hypothesis.log_prob == pytest.approx(float(own), abs=1e-4)
    if alphas is not None:
        torch.testing.assert_close(
            hypothesis.attention, alphas[0, : len(hypothesis.tokens)], atol=1e-5, rtol=0
        )
    return logits[0].argmax(-1).tolist()


@every_decoder
def test_defect_5_greedy_decoding_is_the_argmax_of_teacher_forcing_on_its_own_output(
    kind, num_layers
):
    lengths = set()
    features = torch.randn(6, CELLS, CHANNELS, generator=torch.Generator().manual_seed(2)) * 2
    for seed in range(8):
        decoder = make_decoder(kind, num_layers, seed=seed, scale=4.0)
        with torch.no_grad():
            decoder.head.bias[
                [0, 1, 3]
            ] = -50.0  # search never writes these; here teacher forcing does not, either
            decoder.head.bias[2] += 4 * (seed % 4)  # some captions end, some are cut
        for image, (best,) in enumerate(
            generate(decoder, features, VOCABULARY, algorithm="greedy", max_length=8)
        ):
            written = best.tokens + [2] * best.finished
            assert check_against_teacher_forcing(decoder, features, image, best) == written
            lengths.add(len(written))
    assert lengths > {1, 8}


@every_decoder
def test_beam_search_agrees_with_teacher_forcing_after_reordering(kind, num_layers):
    decoder = make_decoder(kind, num_layers)
    features = torch.randn(3, CELLS, CHANNELS, generator=torch.Generator().manual_seed(3))
    found = generate(
        decoder, features, VOCABULARY, beam_size=4, num_captions=4, max_length=6, min_length=2
    )
    for image, hypotheses in enumerate(found):
        assert len(hypotheses) == 4
        for hypothesis in hypotheses:
            check_against_teacher_forcing(decoder, features, image, hypothesis)


def test_the_lstm_decoder_is_a_torch_lstm_that_sees_the_image_first_and_again_beside_every_output():
    decoder, (features, captions) = make_decoder("lstm", 3), make_batch()
    logits, _ = run_decoder(decoder, features, captions)
    for row, (image, length) in enumerate(zip(IMAGE_INDEX, LENGTHS, strict=True)):
        mean = features[image].mean(0) @ decoder.project_image.weight.T + decoder.project_image.bias
        inputs = torch.stack([mean, *decoder.embed.weight[captions[row, :length]]])
        hidden = decoder.lstm(inputs)[0][1:] + mean @ decoder.remind.weight.T
        torch.testing.assert_close(logits[row, :length], decoder.head(hidden), atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_attention_decoder_is_additive_attention_written_out_plainly(num_layers):
    decoder, (features, _) = make_decoder("attention", num_layers), make_batch()
    grid, token = features[1], torch.tensor([[7]])
    state = decoder.start(features[1:2])
    hidden = [
        torch.tanh(decoder.start_hidden(grid.mean(0)))[i * HIDDEN : (i + 1) * HIDDEN]
        for i in range(num_layers)
    ]
    cell = [
        torch.tanh(decoder.start_cell(grid.mean(0)))[i * HIDDEN : (i + 1) * HIDDEN]
        for i in range(num_layers)
    ]
    for _ in range(2):  # from the image alone, then from a state with a word in it
        query, energies = hidden[-1], []
        for vector in grid:  # Bahdanau et al. 2015, section 3.1: v . tanh(W q + U x)
            summed = decoder.project_keys(vector) + decoder.project_query.weight @ query
            energies.append(decoder.score.weight[0] @ torch.tanh(summed))
        weights = torch.stack(energies).exp() / sum(energy.exp() for energy in energies)
        context = sum(
            weight * decoder.project_features(vector)
            for weight, vector in zip(weights, grid, strict=True)
        )
        inputs = context = torch.sigmoid(decoder.gate(query)) * context
        for number, layer in enumerate(decoder.layers):
            reference = nn.LSTMCell(len(inputs) + (0 if number else EMBED), HIDDEN)
            below, own = layer.weight.split([len(inputs), HIDDEN], dim=1)
            words = [] if number else [decoder.word_gates.weight]
            biases = layer.bias, torch.zeros_like(layer.bias) if number else decoder.word_gates.bias
            named = {"weight_ih": torch.cat([*words, below], dim=1), "weight_hh": own}
            named |= dict(zip(("bias_ih", "bias_hh"), biases, strict=True))
            inputs = inputs if number else torch.cat([decoder.embed.weight[7], inputs])
            hidden[number], cell[number] = torch.func.functional_call(
                reference, named, (inputs, (hidden[number], cell[number]))
            )
            inputs = hidden[number]
        logits, state, alphas = decoder.step(token, state)
        torch.testing.assert_close(alphas[0, 0], weights, atol=1e-5, rtol=0)
        deep = inputs + decoder.deepen(
            torch.cat([decoder.embed.weight[7], context])
        )  # Xu et al. 2015, equation 7
        torch.testing.assert_close(logits[0, 0], decoder.head(deep), atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_defect_1_attention_sums_to_1_and_varies_by_word_and_by_image(num_layers):
    decoder, (features, captions) = make_decoder("attention", num_layers, scale=5.0), make_batch()
    _, alphas = run_decoder(decoder, features, captions)
    is_token = torch.arange(6) < LENGTHS.unsqueeze(1)
    torch.testing.assert_close(alphas[is_token].sum(-1), torch.ones(int(LENGTHS.sum())))
    assert alphas[is_token].min() >= 0
    assert (alphas[2, 1:] - alphas[2, :-1]).abs().amax(-1).min() > 0.01  # word by word
    copies = captions[2:3].expand(4, -1)
    _, alphas = run_decoder(decoder, features, copies, LENGTHS[2].expand(4), torch.arange(4))
    assert torch.pdist(alphas[:, 0]).min() > 0.01  # the same words, image by image
    assert alphas.std(dim=-1).min() > 0.01  # no map is flat


@every_decoder
def test_padding_and_company_change_nothing(kind, num_layers):
    decoder, (features, captions) = make_decoder(kind, num_layers), make_batch()
    logits, alphas = run_decoder(decoder, features, captions)
    is_token = torch.arange(6) < LENGTHS.unsqueeze(1)

    def same(found, looked, rows=slice(None)):
        torch.testing.assert_close(
            found[:, :6][is_token[rows]], logits[rows][is_token[rows]], atol=1e-5, rtol=0
        )
        if kind == "attention":
            torch.testing.assert_close(
                looked[:, :6][is_token[rows]], alphas[rows][is_token[rows]], atol=1e-5, rtol=0
            )

    same(*run_decoder(decoder, *make_batch(extra_padding=4)))
    other = captions.masked_fill(
        F.pad(~is_token, (1, 0)), 11
    )  # beyond its length, a caption may hold any id
    same(*run_decoder(decoder, features, other))
    for rows in (torch.tensor([3, 6, 0, 5, 2, 4, 1]), torch.tensor([4]), torch.tensor([3, 1])):
        same(
            *run_decoder(decoder, features, captions[rows], LENGTHS[rows], IMAGE_INDEX[rows]), rows
        )
    shuffled = torch.tensor([3, 1, 0, 2])  # the images in another order
    same(
        *run_decoder(
            decoder, features[shuffled], captions, image_index=shuffled.argsort()[IMAGE_INDEX]
        )
    )


@every_decoder
@torch.inference_mode()
def test_padding_changes_neither_loss_nor_penalty(kind, num_layers):
    decoder, found = make_decoder(kind, num_layers), []
    for padding in (0, 4):
        features, captions = make_batch(padding)
        logits, alphas = run_decoder(decoder, features, captions)
        found.append([float(loss) for loss in cross_entropy(logits, captions, LENGTHS, 0.1)])
        if kind == "attention":
            found[-1].append(float(doubly_stochastic_penalty(alphas, LENGTHS)))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


@every_decoder
def test_captions_of_one_image_share_its_work_without_a_trace(kind, num_layers):
    decoder, (features, captions) = make_decoder(kind, num_layers), make_batch()
    shared = run_decoder(
        decoder, features[:1], captions, LENGTHS, torch.zeros(7, dtype=torch.int64)
    )
    copied = run_decoder(
        decoder, features[:1].expand(7, -1, -1), captions, LENGTHS, torch.arange(7)
    )
    torch.testing.assert_close(shared[0], copied[0], atol=1e-5, rtol=0)


@every_decoder
def test_defect_15_every_size_counts(kind, num_layers):
    upper = 2 if kind == "lstm" else 1  # biases of a layer above the first: torch's LSTM has two
    lstm = {  # weights and two biases for each of four gates
        "lstm": 4 * HIDDEN * (EMBED + HIDDEN + 2), "attention": 4 * HIDDEN * (2 * EMBED + HIDDEN + 2)
    }[kind] + (num_layers - 1) * 4 * HIDDEN * (2 * HIDDEN + upper)  # fmt: skip
    image = {
        "lstm": CHANNELS * EMBED + EMBED + EMBED * HIDDEN,
        "attention": (CHANNELS * EMBED + EMBED) + (CHANNELS * COMPARE + COMPARE) + HIDDEN * COMPARE + COMPARE
        + (HIDDEN * EMBED + EMBED) + 2 * num_layers * HIDDEN * (CHANNELS + 1) + (2 * EMBED + 1) * HIDDEN,
    }[kind]  # fmt: skip
    words = VOCAB_SIZE * EMBED + (HIDDEN + 1) * VOCAB_SIZE
    decoder = make_decoder(kind, num_layers)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == lstm + image + words


@every_decoder
def test_defect_15_dropout_acts_on_every_layers_input_in_training_only(kind, num_layers):
    decoder, (features, captions) = make_decoder(kind, num_layers, drop_prob=0.5), make_batch()
    inputs = {}  # of each layer, in training: half of what goes in is 0
    modules = {"head": decoder.head} | (
        {"lstm": decoder.lstm, "image": decoder.project_image, "remind": decoder.remind}
        if kind == "lstm"
        else {
            "mean": decoder.start_cell,
            "words": decoder.word_gates,
            **{f"layer {n}": m for n, m in enumerate(decoder.layers) if n},
        }
    )
    for name, module in modules.items():
        module.register_forward_pre_hook(
            lambda _module, given, name=name: inputs.setdefault(name, []).append(
                given[0].data if isinstance(given[0], nn.utils.rnn.PackedSequence) else given[0]
            )
        )
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
    if kind == "lstm" and num_layers > 1:
        assert decoder.lstm.dropout == 0.5  # between its layers, where no hook reaches
    decoder.eval()
    first, second = (run_decoder(decoder, features, captions)[0] for _ in range(2))
    assert torch.equal(first, second)


@every_decoder
def test_without_dropout_training_and_evaluation_agree(kind, num_layers):
    decoder, (features, captions) = make_decoder(kind, num_layers), make_batch()
    evaluated = run_decoder(decoder, features, captions)[0]
    decoder.train()
    torch.testing.assert_close(run_decoder(decoder, features, captions)[0], evaluated)


@every_decoder
def test_gradients_reach_every_parameter(kind, num_layers):
    decoder, (features, captions) = make_decoder(kind, num_layers, scale=1.0), make_batch()
    logits, alphas = run_decoder(decoder, features, captions)
    loss = cross_entropy(logits, captions, LENGTHS)[0]
    if alphas is not None:
        loss = loss + doubly_stochastic_penalty(alphas, LENGTHS)
    loss.backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    used = set(captions[:, :-1][torch.arange(6) < LENGTHS.unsqueeze(1)].tolist())
    assert set(decoder.embed.weight.grad.abs().sum(1).nonzero().flatten().tolist()) == used


@pytest.mark.parametrize("num_layers", [1, 3])
def test_gradients_summed_once_are_those_summed_step_by_step(num_layers, monkeypatch):
    decoder, (features, captions) = (
        make_decoder("attention", num_layers, scale=1.0).double(),
        make_batch(),
    )
    gradients = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(program, "summed_once", lambda *_layers: contextlib.nullcontext())
        decoder.zero_grad()
        logits, alphas = run_decoder(decoder, features.double(), captions)
        (
            cross_entropy(logits, captions, LENGTHS)[0] + doubly_stochastic_penalty(alphas, LENGTHS)
        ).backward()
        gradients.append(
            {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}
        )
    assert all(
        layer.uses is None for layer in decoder.modules() if isinstance(layer, RepeatedLinear)
    )
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_packed_logits_are_the_padded_ones(kind):
    decoder, (features, captions) = make_decoder(kind, 1), make_batch()
    padded, _ = run_decoder(decoder, features, captions)
    packed, _ = decoder(features, captions[:, :-1], LENGTHS, IMAGE_INDEX, packed=True)
    assert torch.equal(program.unpack(packed, 6), padded)
    assert cross_entropy(packed, captions, LENGTHS, 0.1) == cross_entropy(
        padded, captions, LENGTHS, 0.1
    )


@every_decoder
def test_dropout_leaves_the_same_units_out_at_every_step_of_a_caption(kind, num_layers):
    decoder = make_decoder(kind, num_layers, drop_prob=0.5).train()
    owner = torch.tensor([0, 1, 2, 0, 1, 0])
    kept = decoder.drop(torch.ones(6, 200), owner, 3)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert (
        torch.equal(kept[0], kept[3])
        and torch.equal(kept[0], kept[5])
        and torch.equal(kept[1], kept[4])
    )
    assert not torch.equal(kept[0], kept[1])
    cells = decoder.drop(torch.ones(2, CELLS, 200))
    assert torch.equal(cells[:, 0], cells[:, 1]) and not torch.equal(cells[0], cells[1])


@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_five_images_are_overfitted(kind):
    torch.manual_seed(0)
    features = torch.randn(5, CELLS, CHANNELS)
    texts = [
        [4, 5, 6],
        [4, 5, 7, 8],
        [9],
        [4, 10, 4, 11, 12],
        [6, 5, 4],
    ]  # shared beginnings: the image must tell
    lengths = torch.tensor([len(text) + 1 for text in texts])
    captions = torch.tensor([[1, *text, 2] + [0] * (5 - len(text)) for text in texts])
    args = program.parse_args(["--decoder", kind, "--embed_size", "16", "--hidden_size", "32", "--num_layers", "1",
                               "--attention_dim", "16", "--drop_prob", "0", "--alpha_c", "0.1"])  # fmt: skip
    args.device, args.precision = torch.device("cpu"), "float32"
    decoder = program.build_decoder(args, CHANNELS, VOCAB_SIZE).train()
    run = SimpleNamespace(
        args=args, decoder=decoder, model=decoder, per_step=False,
        optimizer=torch.optim.Adam(decoder.parameters(), lr=0.02),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )  # fmt: skip
    batch = (torch.arange(5), captions, lengths, torch.arange(5))
    losses = [float(program.train_step(run, features, batch)) for _ in range(150)]
    assert losses[0] > 2 > 0.05 > losses[-1]  # from about log(13) nats per token
    found = generate(decoder.eval(), features, VOCABULARY, algorithm="greedy")
    assert [best.tokens for (best,) in found] == texts
    assert all(best.finished for (best,) in found)


# ----------------------------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_cross_entropy_is_torchs_over_what_lies_within_the_lengths(smoothing):
    _, captions = make_batch()
    captions[0, 2] = VOCABULARY.pad  # a padding id within the caption is a word like any other
    logits = torch.randn(
        7, 6, VOCAB_SIZE, generator=torch.Generator().manual_seed(4), requires_grad=True
    )
    targets = captions[:, 1:].masked_fill(torch.arange(6) >= LENGTHS.unsqueeze(1), -100)
    smooth, plain = cross_entropy(logits, captions, LENGTHS, smoothing)
    expected = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100, label_smoothing=smoothing
    )
    torch.testing.assert_close(smooth, expected)
    torch.testing.assert_close(
        plain, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    )
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (smooth, expected))
    )


def test_cross_entropy_of_a_caption_worked_by_hand():
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.9, 0.05, 0.05]]]).log()
    captions, lengths = torch.tensor([[1, 0, 1, 2]]), torch.tensor([2])
    _, plain = cross_entropy(logits, captions, lengths, 0.3)
    assert float(plain) == pytest.approx(
        -float(torch.tensor(0.5 * 0.8).log()) / 2
    )  # the third word is none


def test_the_penalty_of_a_caption_worked_by_hand():
    alphas = torch.tensor(
        [[[0.5, 0.5], [1.0, 0.0], [0.7, 0.3]], [[0.2, 0.8], [0.9, 0.1], [0.0, 1.0]]]
    )
    # two of three words of the first caption: cells get 1.5 and 0.5, so 0.25 each; one of the second: 0.2 and 0.8
    assert float(doubly_stochastic_penalty(alphas, torch.tensor([2, 1]))) == pytest.approx(
        (0.25 + 0.25 + 0.64 + 0.04) / 4
    )


def test_a_caption_that_looks_at_every_cell_alike_has_no_penalty_at_its_grids_length():
    for cells in (4, 49):
        alphas = torch.full((3, cells + 5, cells), 1 / cells)
        assert float(doubly_stochastic_penalty(alphas, torch.full((3,), cells))) == pytest.approx(
            0, abs=1e-10
        )


# ---------------------------------------------------------------------------------------------------------- the encoder


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
}


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


@pytest.mark.parametrize("name", TAILS)
@torch.inference_mode()
def test_features_are_the_grid_that_torchvision_pools(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
    for module in model.modules():  # untrained networks fade out: keep the signal up
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.1)
    encoder = Encoder(
        name, model.state_dict(), "random", "float64"
    )  # untrained networks magnify float32's rounding
    images = some_images(2, encoder.image_size)
    features = encoder(images)
    assert features.dtype == torch.float32
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
    assert (tuple(preset.mean), tuple(preset.std)) == (program.IMAGENET_MEAN, program.IMAGENET_STD)
    assert len(preset.crop_size) == 1  # square
    assert re.fullmatch(
        r".+-[0-9a-f]{8,}\.pth", Path(weights.url).name
    )  # the hash that a file is checked against


def test_resnet50_has_a_grid_of_7_by_7_cells_of_2048_channels():
    encoder = Encoder("resnet50", load_encoder_weights("resnet50", "random", 0), "random")
    assert (encoder.grid, encoder.channels, encoder.image_size) == ([7, 7], 2048, 224)
    assert encoder(some_images(1, 224)).shape == (1, 49, 2048)


def test_defect_6_images_are_normalized_as_torchvision_does(small):
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
    images = some_images(2, 224)
    exact = Encoder(name, state, "random")
    plain = exact.trunk(normalize(images)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(
        exact(images), plain, atol=1e-5 * float(plain.abs().max()), rtol=1e-4
    )
    assert sum(isinstance(module, nn.BatchNorm2d) for module in exact.folded.modules()) == 0
    half = Encoder(name, state, "random", "bfloat16")
    assert (
        half.key() != exact.key() and half.key()["weights_sha256"] == exact.key()["weights_sha256"]
    )
    found = half(images)
    assert found.dtype == torch.float32
    assert float((found - plain).norm() / plain.norm()) < 0.03


def test_defect_7_the_encoder_stays_in_eval_mode(small):
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


def test_an_encoder_outside_the_table_is_refused_by_name(capsys):
    with pytest.raises(SystemExit) as stop:
        program.parse_args(["--encoder", "vit_b_16"])
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
    """torchvision's older files, document A's resnet50-19c8e357.pth among them, have no num_batches_tracked."""
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


# Where weights come from


def refusal(kind, source, name="squeezenet1_1"):
    """The one line with which a source of weights is refused."""
    with pytest.raises(kind) as error:
        load_encoder_weights(name, source, seed=0)
    assert "\n" not in str(error.value)
    return str(error.value)


class Bomb:
    """Pickles as a command that makes the file it is given."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_defect_14_unusable_weight_files_are_refused_by_name(tmp_path):
    missing, bomb, text, listing, empty = (
        tmp_path / name for name in ("missing.pth", "bomb.pth", "text.pth", "list.pth", "empty.pth")
    )
    bomb.write_bytes(pickle.dumps({"conv1.weight": Bomb(tmp_path / "exploded")}, protocol=2))
    text.write_text("these are no weights")
    torch.save([torch.zeros(2)], listing)
    empty.touch()
    assert str(missing) in refusal(FileNotFoundError, str(missing))
    assert str(tmp_path) in refusal(FileNotFoundError, str(tmp_path))  # a folder
    for file in (bomb, text, listing, empty):
        message = refusal(ValueError, str(file))
        assert str(file) in message and "state dict" in message
    assert "list" in refusal(ValueError, str(listing))
    assert not (tmp_path / "exploded").exists()


def test_a_weight_file_that_was_cut_short_is_refused(tmp_path, small):
    file = tmp_path / "short.pth"
    torch.save(small, file)
    whole = file.read_bytes()
    for share in (0.1, 0.5, 0.99):
        file.write_bytes(whole[: int(len(whole) * share)])
        assert str(file) in refusal(ValueError, str(file))


def test_a_file_of_weights_is_read_as_it_is(tmp_path, small):
    torch.save(small, tmp_path / "weights.pth")
    state = load_encoder_weights("mobilenet_v3_small", str(tmp_path / "weights.pth"), seed=5)
    assert state.keys() == small.keys()
    assert all(torch.equal(state[name], small[name]) for name in small)


def no_network(url, **_options):
    """Stands in for torch.hub's download on a machine without a network."""
    raise urllib.error.URLError("Name or service not known")


def publish(monkeypatch, folder, digest, name="squeezenet1_1"):
    """As if torchvision's weights were a file with this SHA-256, and there were no network. Returns its local place."""
    weights = SimpleNamespace(
        IMAGENET1K_V1=SimpleNamespace(url=f"https://nowhere/{name}-{digest[:8]}.pth")
    )
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda _name: weights)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr(program, "WEIGHTS_DIR", folder)
    return folder / f"{name}-{digest[:8]}.pth"


def sha256(file):
    """The file's SHA-256 in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_imagenet_weights_are_looked_for_in_the_documented_folder_first(tmp_path, monkeypatch):
    assert Path("../../resources/models") == program.WEIGHTS_DIR
    state = load_encoder_weights("squeezenet1_1", "random", seed=3)
    torch.save(state, tmp_path / "weights.pth")
    placed = publish(monkeypatch, tmp_path, sha256(tmp_path / "weights.pth"))
    (tmp_path / "weights.pth").rename(placed)
    found = load_encoder_weights("squeezenet1_1", "imagenet", seed=0)
    assert all(torch.equal(found[name], state[name]) for name in state)

    with placed.open("ab") as file:
        file.write(b"\0")
    message = refusal(ValueError, "imagenet")
    assert str(placed) in message and "SHA-256" in message


@pytest.mark.parametrize(
    "name", ["resnet50-19c8e357.pth", "resnet50-0676ba61.pth"]
)  # document A's and torchvision's
def test_resnet50_may_be_placed_under_either_name_but_not_with_other_contents(
    tmp_path, monkeypatch, name
):
    monkeypatch.setattr(program, "WEIGHTS_DIR", tmp_path)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded"), protocol=2))
    message = refusal(ValueError, "imagenet", "resnet50")
    assert str(tmp_path / name) in message and "SHA-256" in message
    assert not (tmp_path / "exploded").exists()


def test_a_file_whose_hash_merely_begins_as_its_name_says_runs_no_code(tmp_path, monkeypatch):
    (tmp_path / "bomb").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded"), protocol=2))
    placed = publish(monkeypatch, tmp_path, sha256(tmp_path / "bomb"))
    (tmp_path / "bomb").rename(placed)
    assert str(placed) in refusal(ValueError, "imagenet")
    assert not (tmp_path / "exploded").exists()


def test_a_broken_file_in_torchs_own_download_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "WEIGHTS_DIR", tmp_path / "models")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth").write_text(
        "half a page of some proxy's error message"
    )
    assert "squeezenet1_1-b8a52dc0.pth" in refusal((ValueError, FileNotFoundError), "imagenet")


@pytest.mark.parametrize(
    "fault", [urllib.error.URLError("no route"), TimeoutError("timed out"), ConnectionResetError("reset"),
              RuntimeError('invalid hash value (expected "b8a52dc0", got "0")')]
)  # fmt: skip
def test_defect_14_weights_that_cannot_be_downloaded_are_an_error_never_random(
    tmp_path, monkeypatch, fault
):
    asked = {}

    def fail(url, **options):
        asked.update(options)
        raise fault

    monkeypatch.setattr(program, "WEIGHTS_DIR", tmp_path / "models")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    message = refusal(FileNotFoundError, "imagenet")
    assert "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth" in message
    assert f"{tmp_path / 'models'}" in message and "--encoder_weights" in message
    assert asked["check_hash"] and asked["weights_only"]


def test_random_weights_are_drawn_from_the_seed_alone():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, second, other = (
        load_encoder_weights("squeezenet1_1", "random", seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    third = load_encoder_weights("squeezenet1_1", "random", 1)
    name = "features.0.weight"
    assert all(torch.equal(first[k], second[k]) and torch.equal(first[k], third[k]) for k in first)
    assert not torch.equal(first[name], other[name])


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


def test_a_checkpoint_brings_its_encoder_and_refuses_another(tmp_path, small):
    def args(*typed):
        options = program.parse_args(["--encoder", "mobilenet_v3_small", *typed])
        options.device, options.precision, options.model_path = (
            torch.device("cpu"),
            "float32",
            "run/best.pt",
        )
        return options

    encoder = Encoder("mobilenet_v3_small", small, "random")
    torch.save(small, tmp_path / "same.pth")
    weights = {"weights": encoder.trunk.state_dict()}
    opened = program.open_encoder(
        args(), {"encoder": encoder.key() | weights}
    )  # no file, no download
    assert opened.key() == encoder.key()
    same = args("--encoder_weights", str(tmp_path / "same.pth"))
    assert (
        program.open_encoder(same, {"encoder": encoder.key() | {"weights": None}}).key()
        == encoder.key()
    )
    with pytest.raises(
        ValueError, match=r"--encoder_weights random: other weights than run/best\.pt"
    ):
        program.open_encoder(
            args("--encoder_weights", "random", "--seed", "1"), {"encoder": encoder.key() | weights}
        )
