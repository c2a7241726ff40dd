"""torch's LSTM over captions of unequal lengths on a CPU: the same numbers, a quicker backward pass.

    output, state = packed_lstm.run(lstm, PackedSequence(inputs, batch_sizes))

torch's own takes each step's gates out of those of all steps, and autograd answers each time with
zeros as large as all of them. Here one function has all steps of a layer, and the gradient of the
recurrent weight is one product over them (Appleyard et al. 2016, section 3.3).

Axes: B captions, longest first; tokens: their steps, packed; E inputs, H units.
"""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import PackedSequence


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
    last = []
    for layer, (hidden, cell) in enumerate(zip(*state, strict=True)):
        if layer:
            data = F.dropout(data, lstm.dropout, lstm.training)
        input_weight, weight, input_bias, bias = lstm.all_weights[layer]
        gates = F.linear(data, input_weight, input_bias + bias)  # (tokens, 4H)
        weight = weight.to(gates.dtype)  # what autocast computes in
        data, *ends = LayerSteps.apply(gates, weight, hidden, cell, sizes)
        last.append(ends)
    hidden, cell = (torch.stack(part) for part in zip(*last, strict=True))
    return PackedSequence(data, inputs.batch_sizes), (hidden, cell)


class LayerSteps(torch.autograd.Function):
    """All steps of one layer. Source: Gers et al. 2000, section 3; gates i, f, g, o as torch has them.

    gates (tokens, 4H): the inputs' part of them, with biases; weight (4H, H); hidden, cell (B, H)
    before the first step; sizes: how many captions each step has.
    -> output (tokens, H) and the last hidden state and cell of each caption, (B, H) each.
    """

    @staticmethod
    def forward(ctx, gates, weight, hidden, cell, sizes):
        exact = torch.promote_types(gates.dtype, torch.float32)
        dtype = gates.dtype
        gates = gates.to(exact, copy=True)  # becomes what each gate lets through
        first_hidden, first_cell = hidden.to(dtype), cell.to(exact)
        hidden, cell = first_hidden.clone(), first_cell.clone()
        outputs, cells = [], []
        for step in gates.split(sizes):
            alive = slice(len(step))  # captions that have ended keep their last state
            step += hidden[alive] @ weight.t()
            i, f, g, o = step.chunk(4, dim=-1)
            for gate in (i, f, o):
                gate.sigmoid_()
            g.tanh_()
            cell[alive] = f * cell[alive] + i * g
            cells.append(cell[alive].clone())
            hidden[alive] = o * cells[-1].tanh()
            outputs.append(hidden[alive].clone())
        output, cells = torch.cat(outputs), torch.cat(cells)
        ctx.save_for_backward(weight, gates, cells, output, first_hidden, first_cell)
        ctx.sizes = sizes
        return output, hidden, cell

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_output, d_hidden, d_cell):
        weight, gates, cells, output, first_hidden, first_cell = ctx.saved_tensors
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
            d_hidden[alive] = (d_gate.to(dtype) @ weight).to(exact)
        d_gates, d_weight = d_gates.to(dtype), None
        if ctx.needs_input_grad[1]:
            steps = zip([first_hidden, *output.split(ctx.sizes)], ctx.sizes, strict=False)
            d_weight = d_gates.t() @ torch.cat([hidden[:size] for hidden, size in steps])
        return d_gates, d_weight, d_hidden, d_cell, None
