"""A linear layer for recurrent loops, whose gradient is summed over the time steps in one matrix product.

    with summed_once(self.gate, self.project_query):
        for step in steps: ...  # uses the layers

What it computes is nn.Linear's; what changes is how long the way back takes.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn


class RepeatedLinear(nn.Linear):
    """A linear layer used at every time step. Within `summed_once` its gradient is one matrix product over all steps.

    Autograd alone adds up T products of few rows, each of the weight's size (Appleyard et al. 2016, section 3.3).
    """

    uses = None  # of one sequence: (input, gradient of the output) per step, filled as the gradient comes by

    def forward(self, x):
        """(..., in) -> (..., out)."""
        if self.uses is None:
            return super().forward(x)
        return LinearUse.apply(x.to(self.shared[0].dtype), *self.shared, self.uses)


class LinearUse(torch.autograd.Function):
    """x (..., in) -> x weight^T + bias. Its gradient goes to x; what the weight's needs is put into `uses`."""

    @staticmethod
    def forward(ctx, x, weight, bias, uses):
        ctx.save_for_backward(x, weight)
        ctx.uses = uses
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        ctx.uses.append((x.flatten(0, -2), gradient.flatten(0, -2)))
        return gradient @ weight, None, None, None


class LinearUses(torch.autograd.Function):
    """The weight and bias that every LinearUse reads: autograd comes back here once it has been through all of them."""

    @staticmethod
    def forward(ctx, weight, bias, uses):
        ctx.uses = uses
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    def backward(ctx, *_):
        x, gradient = (torch.cat(part) for part in zip(*ctx.uses, strict=True))
        ctx.uses.clear()
        return gradient.t() @ x, gradient.sum(0) if ctx.needs_input_grad[1] else None, None


@contextlib.contextmanager
def summed_once(*layers):
    """While one sequence runs through RepeatedLinear `layers`: their gradients are summed over its steps at once.

    Within torch.compile they are plain layers: it cannot trace a gradient that is put aside.
    """
    try:
        for layer in (
            layers if torch.is_grad_enabled() and not torch.compiler.is_compiling() else ()
        ):
            kind, layer.uses = layer.weight.device.type, []
            dtype = (
                torch.get_autocast_dtype(kind)
                if torch.is_autocast_enabled(kind)
                else layer.weight.dtype
            )
            bias = None if layer.bias is None else layer.bias.to(dtype)
            layer.shared = LinearUses.apply(layer.weight.to(dtype), bias, layer.uses)
        yield
    finally:
        for layer in layers:
            layer.uses = layer.shared = None
