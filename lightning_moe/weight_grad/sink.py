"""Where weight gradients go: to autograd, or to a sink that accumulates them.

[Note: why weight gradients do not pass through autograd]
Autograd would materialise each weight gradient in the dtype of the weight, sum the contributions of micro-batches in
that dtype, and want all of them before backward ends. A layer instead describes its weight gradient as a
:class:`WeightGrad`, the operands of one matrix product, and delivers it. A sink may add the product to a float32
buffer at once, in one kernel where the hardware has it, or keep the operands and do so later, when the device has
nothing better to do. Without a sink the product is computed at once and returned to autograd.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_weight_grad_sink"


class WeightGrad(Protocol):
    """The gradient of one use of one weight, not computed yet. Holds detached tensors only."""

    def compute(self) -> Tensor:
        """The gradient, in the shape of the weight and the dtype of the operands."""
        ...

    def add_to(self, main_grad: Tensor, *, accumulate: bool) -> None:
        """Write the gradient into ``main_grad`` (shape of the weight), or add it to what is there."""
        ...


class WeightGradSink(Protocol):
    """What collects the gradients of one weight."""

    def take(self, grad: WeightGrad) -> bool:
        """Accept a gradient.

        False while nothing is collected (a backward pass that is not the strategy's), and where the weight has hooks,
        which want to see a gradient.
        """
        ...


def attach_sink(weight: nn.Parameter, sink: WeightGradSink) -> None:
    """Let ``sink`` collect the gradients of ``weight``.

    The sink is an attribute of the parameter object, so copies of the parameter have none, as they should.
    """
    setattr(weight, _ATTRIBUTE, sink)


def detach_sink(weight: nn.Parameter) -> None:
    """Give the gradients of ``weight`` back to autograd."""
    weight.__dict__.pop(_ATTRIBUTE, None)


def sink_of(weight: Tensor) -> WeightGradSink | None:
    """The sink of ``weight``, if it has one."""
    sink: WeightGradSink | None = getattr(weight, _ATTRIBUTE, None)
    return sink


def deliver(grad: WeightGrad, sink: WeightGradSink | None, dtype: torch.dtype) -> Tensor | None:
    """Hand a weight gradient over.

    Args:
        grad: The gradient.
        sink: The sink of its weight, as it was in forward.
        dtype: Dtype of the weight.

    Returns:
        None when the sink took it, else the gradient in the weight's dtype, for autograd.
    """
    if sink is not None and sink.take(grad):
        return None
    return grad.compute().to(dtype)
