"""A linear layer for recurrent loops: one matrix product gives its gradient over all time steps.

    with summed_once(self.gate, self.project_query):
        for step in steps: ...  # uses the layers

It computes what nn.Linear does; only the backward pass is faster.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn


class RepeatedLinear(nn.Linear):
    """A linear layer used at every time step, to be used within `summed_once`.

    Autograd alone adds up T products of few rows, each as large as the weight; one product over all
    steps takes less time (Appleyard et al. 2016, section 3.3).
    """

    # Of one sequence: (input, gradient of the output) per step, filled during the backward pass.
    uses = None

    def forward(self, x):
        """(..., in) -> (..., out)."""
        if self.uses is None:
            return super().forward(x)
        return LinearUse.apply(x.to(self.shared[0].dtype), *self.shared, self.uses)


class LinearUse(torch.autograd.Function):
    """x (..., in) -> x weight^T + bias, at one time step.

    Its backward pass gives the gradient of x, and adds to `uses` what the weight's will need.
    """

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
    """The weight and bias that every LinearUse reads.

    Autograd runs its backward pass after those of all uses, when `uses` is complete.
    """

    @staticmethod
    def forward(ctx, weight, bias, uses):
        ctx.uses = uses
        ctx.set_materialize_grads(False)  # every use returns None for them: no zeros are made
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    def backward(ctx, *_):
        x, gradient = (torch.cat(part) for part in zip(*ctx.uses, strict=True))
        ctx.uses.clear()
        return gradient.t() @ x, gradient.sum(0) if ctx.needs_input_grad[1] else None, None


@contextlib.contextmanager
def summed_once(*layers):
    """Sum the gradients of RepeatedLinear `layers` once for the one sequence run in the block.

    Without gradients they are plain layers.
    """
    try:
        if torch.is_grad_enabled():
            for layer in layers:
                _share(layer)
        yield
    finally:
        for layer in layers:
            layer.uses = layer.shared = None


def _share(layer):
    """Cast the layer's weight and bias once, where autocast would at every step."""
    kind = layer.weight.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else layer.weight.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    layer.uses = []
    layer.shared = LinearUses.apply(layer.weight.to(dtype), bias, layer.uses)
