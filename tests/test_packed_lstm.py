"""packed_lstm.py: values and gradients are torch's own LSTM's."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import packed_lstm

SIZES = torch.tensor([5, 5, 3, 1])  # captions at each step: lengths 4, 3, 3, 2, 2
STATE = (torch.ones(3, 5, 6).double() / 3, torch.linspace(-1, 1, 90).view(3, 5, 6).double())


def run(function, lstm, state):
    """Output, last states, and the gradients of a loss that asks for all three."""
    torch.manual_seed(1)
    data = torch.randn(int(SIZES.sum()), 4).double().requires_grad_()
    state = state and [part[: lstm.num_layers].clone().requires_grad_() for part in state]
    output, last = function(PackedSequence(data, SIZES), state)
    weights = [torch.linspace(1, 2, x.numel()).view_as(x) for x in (output.data, *last)]
    loss = sum((x.square() * w).sum() for x, w in zip((output.data, *last), weights, strict=True))
    asked = [data, *lstm.parameters(), *(state or ())]
    return [output.data, *last, *torch.autograd.grad(loss, asked)]


@pytest.mark.parametrize("state", [None, STATE], ids=["zeros", "given"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_values_and_gradients_are_those_of_torchs_lstm(num_layers, state):
    lstm = nn.LSTM(4, 6, num_layers).double()
    expected = run(lstm, lstm, state)
    found = run(lambda *given: packed_lstm.run(lstm, *given), lstm, state)
    assert len(found) == len(expected) == 4 + 4 * num_layers + (0 if state is None else 2)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_dropout_lies_between_layers_in_training_only():
    lstm, data = nn.LSTM(4, 6, 2, dropout=0.5), torch.randn(int(SIZES.sum()), 4)
    first, second = (packed_lstm.run(lstm, PackedSequence(data, SIZES))[0].data for _ in range(2))
    assert not torch.allclose(first, second)
    lstm.eval()
    found = packed_lstm.run(lstm, PackedSequence(data, SIZES))[0].data
    torch.testing.assert_close(found, lstm(PackedSequence(data, SIZES))[0].data)
    lstm.train().dropout = 1.0  # of the second layer nothing but its biases is left
    silent, _ = packed_lstm.run(lstm, PackedSequence(data, SIZES))
    other, _ = packed_lstm.run(lstm, PackedSequence(torch.randn_like(data), SIZES))
    torch.testing.assert_close(silent.data, other.data)


def by_hand(lstm, masks):
    """A function like `lstm` that multiplies each layer's hidden state by a mask before every step."""

    def run_cells(inputs, state):
        padded, lengths = pad_packed_sequence(inputs)
        if state is None:
            state = [torch.zeros(lstm.num_layers, 5, 6).double()] * 2
        last = []
        for weights, mask, hidden, cell in zip(lstm.all_weights, masks, *state, strict=True):
            outputs = []
            for step, x in enumerate(padded):
                given = x, (hidden * mask, cell)
                new = torch._VF.lstm_cell(*given, *weights)
                alive = (lengths > step).unsqueeze(1)
                hidden, cell = (
                    torch.where(alive, *pair) for pair in zip(new, (hidden, cell), strict=True)
                )
                outputs.append(hidden)
            padded = torch.stack(outputs)
            last.append((hidden, cell))
        output = pack_padded_sequence(padded, lengths)
        return output, tuple(torch.stack(part) for part in zip(*last, strict=True))

    return run_cells


@pytest.mark.parametrize("state", [None, STATE], ids=["zeros", "given"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_recurrent_dropout_has_one_mask_for_all_steps_of_a_caption(num_layers, state, monkeypatch):
    masks = (torch.arange(num_layers * 30).view(num_layers, 5, 6) % 3).double()
    monkeypatch.setattr(packed_lstm, "recurrent_masks", lambda hidden, share: masks)
    lstm = packed_lstm.LSTM(4, 6, num_layers, 0.0, recurrent_dropout=0.5).double()
    expected = run(by_hand(lstm, masks), lstm, state)
    found = run(lambda *given: packed_lstm.run(lstm, *given), lstm, state)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    plain = run(by_hand(lstm, torch.ones_like(masks)), lstm, state)
    assert not torch.allclose(plain[0], found[0])
    evaluated = run(lambda *given: packed_lstm.run(lstm.eval(), *given), lstm, state)
    torch.testing.assert_close(evaluated[0], plain[0], rtol=1e-10, atol=1e-12)


def test_masks_hide_their_share_and_scale_the_others_up():
    masks = packed_lstm.recurrent_masks(torch.zeros(2, 500, 100), 0.2)
    assert masks.unique().tolist() == [0, 1.25]
    assert float((masks == 0).float().mean()) == pytest.approx(0.2, abs=0.01)


def test_other_devices_have_it_where_units_are_hidden_in_training():
    inputs = PackedSequence(torch.zeros(int(SIZES.sum()), 4, device="meta"), SIZES)
    lstm = packed_lstm.LSTM(4, 6, 1, 0.0, recurrent_dropout=0.5)
    assert packed_lstm.suits(lstm, inputs) and not packed_lstm.suits(lstm.eval(), inputs)
    assert not packed_lstm.suits(packed_lstm.LSTM(4, 6, 1, 0.0, recurrent_dropout=0.0), inputs)


def test_products_are_in_bfloat16_under_autocast_and_cells_are_not():
    lstm, data = nn.LSTM(4, 6), torch.randn(int(SIZES.sum()), 4)
    with torch.autocast("cpu", torch.bfloat16):
        output, (_, cell) = packed_lstm.run(lstm, PackedSequence(data, SIZES))
        output.data.float().sum().backward()
    assert output.data.dtype == torch.bfloat16 and cell.dtype == torch.float32
    assert lstm.weight_hh_l0.grad.dtype == torch.float32
    exact, _ = lstm(PackedSequence(data, SIZES))
    torch.testing.assert_close(output.data.float(), exact.data, rtol=0, atol=0.02)
    assert not torch.equal(output.data.float(), exact.data)


def test_the_recurrent_weights_gradient_is_one_product():
    lstm, data = nn.LSTM(4, 6), torch.randn(int(SIZES.sum()), 4)
    output, _ = packed_lstm.run(lstm, PackedSequence(data, SIZES))
    with torch.profiler.profile() as profile:
        output.data.sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::mm"] == len(SIZES) + 2  # each step's hidden state; both weights
    assert calls["aten::zeros"] == 2  # for the last states, which the loss does not ask for
