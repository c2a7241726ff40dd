"""torch's LSTM over captions of unequal lengths on a CPU: the same numbers, a quicker backward pass.

    lstm = packed_lstm.LSTM(300, 512, num_layers=1, dropout=0.4, recurrent_dropout=0.2)
    output, state = run_lstm(lstm, PackedSequence(inputs, batch_sizes))   # all steps of captions
    output, state = step_lstm(lstm, inputs, state)                        # one step of hypotheses

torch's own takes each step's gates out of those of all steps, and autograd answers each time with
zeros as large as all of them. Here one function has all steps of a layer, and the gradient of the
recurrent weight is one product over them (Appleyard et al. 2016, section 3.3). It also hides units
from the next step, which torch's own cannot; then it is for GPUs, too.

Axes: B captions, longest first; tokens: their steps, packed; N images, K hypotheses of each; E inputs,
H units, L layers.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence


class LSTM(nn.LSTM):
    """torch's LSTM with dropout between its layers and on what a step hears of the one before."""

    def __init__(self, input_size, hidden_size, num_layers, dropout, recurrent_dropout):
        between_layers = dropout if num_layers > 1 else 0.0
        super().__init__(
            input_size, hidden_size, num_layers, batch_first=True, dropout=between_layers
        )
        self.recurrent_dropout = recurrent_dropout


def recurrent_masks(hidden, share):
    """What to multiply hidden states with before they go into the next step, the same one at each.

    hidden: the first ones, of any shape; masks have it, too. Source: Gal and Ghahramani 2016,
    section 4; the cell is left alone, so that what it remembers does not fade (Semeniuta et al. 2016).
    """
    return F.dropout(torch.ones_like(hidden), share)


def with_masks(state, share):
    """A decoder's state, whose LSTM layers are (hidden, cell), with a third of each: recurrent_masks."""
    per_image, layers = state
    return per_image, tuple((*layer, recurrent_masks(layer[0], share)) for layer in layers)


def run_lstm(lstm, inputs, state=None):
    """What `lstm` returns, computed as the rest is, and on a CPU with a quicker backward pass.

    But for CUDA under bfloat16: torch's autocast has cuDNN's LSTM compute in float16 there, where
    small gradients vanish because nothing scales them. It computes in TF32 instead.
    """
    if isinstance(inputs, PackedSequence) and suits(lstm, inputs):
        return run(lstm, inputs, state)
    if not (inputs.is_cuda and torch.get_autocast_dtype("cuda") == torch.bfloat16):
        return lstm(inputs, state)
    with torch.autocast("cuda", enabled=False):
        return lstm(inputs.float(), state)


def step_lstm(lstm, inputs, state):
    """One step of every hypothesis: inputs (N, K, E), state two of (N, K, L, H) -> output (N, K, H), state."""
    shape = inputs.shape[:2]
    state = tuple(part.flatten(0, 1).transpose(0, 1).contiguous() for part in state)
    output, state = run_lstm(lstm, inputs.flatten(0, 1).unsqueeze(1), state)
    state = tuple(part.transpose(0, 1).unflatten(0, shape) for part in state)
    return output.view(*shape, -1), state


def suits(lstm, inputs):
    """Whether `run` is quicker than torch's LSTM, or alone does what is asked, on any device."""
    return inputs.data.device.type == "cpu" or has_masks(lstm)


def has_masks(lstm):
    """Whether units are hidden from the next step."""
    return lstm.training and getattr(lstm, "recurrent_dropout", 0.0) > 0


def run(lstm, inputs, state=None):
    """What `lstm(inputs, state)` returns, of one direction and without projections.

    Args:
        inputs: PackedSequence of (tokens, E), sorted.
        state: hidden state and cell before the first step, (layers, B, H) each; zeros without.
    Returns: PackedSequence of (tokens, H), and the last hidden state and cell, (layers, B, H) each.
    """
    data, sizes = inputs.data, inputs.batch_sizes.tolist()
    if state is None:
        zeros = data.new_zeros(lstm.num_layers, sizes[0], lstm.hidden_size)
        state = zeros, zeros
    masks = recurrent_masks(state[0], lstm.recurrent_dropout) if has_masks(lstm) else None
    last = []
    for layer, (hidden, cell) in enumerate(zip(*state, strict=True)):
        if layer:
            data = F.dropout(data, lstm.dropout, lstm.training)
        input_weight, weight, input_bias, bias = lstm.all_weights[layer]
        gates = F.linear(data, input_weight, input_bias + bias)  # (tokens, 4H)
        weight = weight.to(gates.dtype)  # what autocast computes in
        mask = None if masks is None else masks[layer].to(gates.dtype)
        data, *ends = LayerSteps.apply(gates, weight, hidden, cell, mask, sizes)
        last.append(ends)
    hidden, cell = (torch.stack(part) for part in zip(*last, strict=True))
    return PackedSequence(data, inputs.batch_sizes), (hidden, cell)


class LayerSteps(torch.autograd.Function):
    """All steps of one layer. Source: Gers et al. 2000, section 3; gates i, f, g, o as torch has them.

    gates (tokens, 4H): the inputs' part of them, with biases; weight (4H, H); hidden, cell (B, H)
    before the first step; mask (B, H) what each step hears of the hidden state, None: all; sizes:
    how many captions each step has.
    -> output (tokens, H) and the last hidden state and cell of each caption, (B, H) each.
    """

    @staticmethod
    def forward(ctx, gates, weight, hidden, cell, mask, sizes):
        exact = torch.promote_types(gates.dtype, torch.float32)
        dtype = gates.dtype
        gates = gates.to(exact, copy=True)  # becomes what each gate lets through
        first_hidden, first_cell = hidden.to(dtype), cell.to(exact)
        hidden, cell = first_hidden.clone(), first_cell.clone()
        outputs, cells = [], []
        for step in gates.split(sizes):
            alive = slice(len(step))  # captions that have ended keep their last state
            step += masked(hidden[alive], mask) @ weight.t()
            i, f, g, o = step.chunk(4, dim=-1)
            for gate in (i, f, o):
                gate.sigmoid_()
            g.tanh_()
            cell[alive] = f * cell[alive] + i * g
            cells.append(cell[alive].clone())
            hidden[alive] = o * cells[-1].tanh()
            outputs.append(hidden[alive].clone())
        output, cells = torch.cat(outputs), torch.cat(cells)
        ctx.save_for_backward(weight, gates, cells, output, first_hidden, first_cell, mask)
        ctx.sizes = sizes
        return output, hidden, cell

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_output, d_hidden, d_cell):
        weight, gates, cells, output, first_hidden, first_cell, mask = ctx.saved_tensors
        exact, dtype = gates.dtype, output.dtype
        d_hidden, d_cell = d_hidden.to(exact, copy=True), d_cell.clone()
        d_gates = torch.empty_like(gates)
        before = [first_cell, *cells.split(ctx.sizes)]
        parts = (gates, cells, d_output, d_gates)
        steps = zip(*(part.split(ctx.sizes) for part in parts), before, strict=False)
        for gate, cell, d_out, d_gate, before_cell in reversed(list(steps)):
            alive = slice(len(cell))
            i, f, g, o = gate.chunk(4, dim=-1)
            squashed = cell.tanh()
            d_out = d_out + d_hidden[alive]
            d_inner = d_cell[alive] + d_out * o * (1 - squashed.square())
            of_i, of_f, of_g, of_o = d_gate.chunk(4, dim=-1)
            of_i.copy_(d_inner * g * i * (1 - i))
            of_f.copy_(d_inner * before_cell[alive] * f * (1 - f))
            of_g.copy_(d_inner * i * (1 - g.square()))
            of_o.copy_(d_out * squashed * o * (1 - o))
            d_cell[alive] = d_inner * f
            d_hidden[alive] = masked(d_gate.to(dtype) @ weight, mask).to(exact)
        d_gates, d_weight = d_gates.to(dtype), None
        if ctx.needs_input_grad[1]:
            steps = zip([first_hidden, *output.split(ctx.sizes)], ctx.sizes, strict=False)
            heard = [masked(hidden[:size], mask) for hidden, size in steps]
            d_weight = d_gates.t() @ torch.cat(heard)
        return d_gates, d_weight, d_hidden, d_cell, None, None


def masked(hidden, mask):
    """The first rows of (B, H) that are there, multiplied by their rows of the mask."""
    return hidden if mask is None else hidden * mask[: len(hidden)]
