"""repeated_linear.py: within `summed_once` values and gradients are still nn.Linear's.

The attention decoder's use of it is tested in test_flickr_image_caption.py.
"""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from repeated_linear import RepeatedLinear, summed_once


def run(layer, start, steps=4, context=summed_once, bfloat16=False):
    """A loop of `steps` time steps: its outputs, and the gradients of the start and the layer."""
    layer.zero_grad()
    hidden = start.clone().requires_grad_()
    x, outputs = hidden, []
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16), context(layer):
        for step in range(steps):
            x = layer(x[: len(x) - step]).tanh()  # captions longest first: fewer rows each step
            outputs.append(x)
    sum((output.float() ** 2).sum() for output in outputs).backward()  # as in training, outside
    gradients = [hidden.grad, *(parameter.grad.clone() for parameter in layer.parameters())]
    return [output.detach() for output in outputs], gradients


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8, 5), (8, 3, 5)])
def test_values_and_gradients_are_those_of_a_plain_layer(bias, shape):
    torch.manual_seed(0)
    layer, start = RepeatedLinear(5, 5, bias=bias).double(), torch.randn(shape).double()
    torch.testing.assert_close(run(layer, start), run(layer, start, context=nullcontext))


def test_autocast_casts_as_in_a_plain_layer():
    torch.manual_seed(0)
    layer, start = RepeatedLinear(5, 5), torch.randn(8, 5)
    outputs, gradients = run(layer, start, bfloat16=True)
    plain_outputs, plain_gradients = run(layer, start, context=nullcontext, bfloat16=True)
    assert all(output.dtype == torch.bfloat16 for output in outputs)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    torch.testing.assert_close(outputs, plain_outputs)
    torch.testing.assert_close(gradients, plain_gradients, rtol=0.05, atol=0.05)


def test_without_gradients_and_after_an_error_the_layer_is_plain():
    layer = RepeatedLinear(2, 2)
    with torch.no_grad(), summed_once(layer):
        assert layer.uses is None
    with pytest.raises(ValueError, match="stop"), summed_once(layer):
        assert layer.uses == []
        raise ValueError("stop")
    assert layer.uses is None and layer.shared is None  # its weight in another precision is let go


class OfWeightSize(TorchDispatchMode):
    """Counts what an operation makes of the weight's size, (5, 5)."""

    def __init__(self, operation):
        super().__init__()
        self.operation, self.count = operation, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.count += function is self.operation and result.shape == (5, 5)
        return result


@pytest.mark.parametrize(("context", "products"), [(summed_once, 1), (nullcontext, 4)])
def test_the_weights_gradient_is_one_product_for_all_steps(context, products):
    with OfWeightSize(torch.ops.aten.mm.default) as weight_products:
        run(RepeatedLinear(5, 5), torch.randn(9, 5), context=context)
    assert weight_products.count == products


def test_a_second_backward_pass_adds_its_own_gradients_alone():
    layer, x = RepeatedLinear(5, 5).double(), torch.randn(8, 5).double()
    with summed_once(layer):
        loss = layer(layer(x)).square().sum()
        loss.backward(retain_graph=True)
        first = [parameter.grad.clone() for parameter in layer.parameters()]
        loss.backward()
    for parameter, gradient in zip(layer.parameters(), first, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


def test_no_zeros_stand_for_gradients_that_no_use_gives():
    """Autograd made a zero weight and a zero bias for every layer at every training step."""
    with OfWeightSize(torch.ops.aten.zeros.default) as zeros:
        run(RepeatedLinear(5, 5), torch.randn(9, 5))
    assert zeros.count == 0
