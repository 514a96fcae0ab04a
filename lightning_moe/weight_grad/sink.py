"""Where weight gradients go: to autograd, or to a sink that accumulates them.

[Note: why weight gradients do not pass through autograd]
Autograd would materialise each weight gradient in the dtype of the weight, sum the contributions of micro-batches in
that dtype, and want all of them before backward ends. A layer instead describes its weight gradient as a
:class:`WeightGrad`, the operands of one matrix product, and delivers it. A sink may add the product to a float32
buffer at once, in one kernel where the hardware has it, or put it into a
:class:`~lightning_moe.weight_grad.WeightGradQueue`, which keeps the operands until the device has nothing better to do.
Without a sink the product is computed at once and returned to autograd.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from lightning_moe.weight_grad.memory import storages

_ATTRIBUTE = "_weight_grad_sink"


class WeightGrad(Protocol):
    """The gradient of one use of one weight, not computed yet. Holds detached tensors only.

    Derive from this class: what is not abstract then has an implementation.
    """

    @abstractmethod
    def compute(self) -> Tensor:
        """The gradient, in the shape of the weight and the dtype of the operands."""
        ...

    @abstractmethod
    def add_to(self, main_grad: Tensor, *, accumulate: bool) -> None:
        """Write the gradient into ``main_grad`` (shape of the weight), or add it to what is there."""
        ...

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are kept until the gradient is computed."""
        ...

    @property
    @abstractmethod
    def flops(self) -> float:
        """Floating-point operations of the product: two for each multiplication and addition."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that :attr:`tensors` keep alive: their whole storages, each counted once."""
        return sum(storages(self.tensors).values())

    @property
    def has_collective(self) -> bool:
        """Whether the ranks of a group must compute it together."""
        return False

    def prefetch(self) -> None:
        """Begin to communicate what :meth:`compute` and :meth:`add_to` will need; on all ranks of the group."""
        return

    def compact(self) -> Self:
        """The same gradient, bit for bit, without holding on to tensors that its operands are small views of."""
        return self


class WeightGradSink(Protocol):
    """What collects the gradients of one weight."""

    @property
    def defers(self) -> bool:
        """Whether gradients of this moment's backward pass are computed after it.

        Layers whose weight gradient needs communication then leave that for later, too.
        """
        ...

    def take(self, grad: WeightGrad, *, deferrable: bool = True) -> bool:
        """Accept a gradient: add it, or put it into a queue that hands it back when it is to be added.

        False while nothing is collected (a backward pass that is not the strategy's), and where the weight has hooks,
        which want to see a gradient.

        Args:
            grad: The gradient.
            deferrable: False if it must be added at once, because its operands are too large to be kept.
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


def deliver(
    grad: WeightGrad, sink: WeightGradSink | None, dtype: torch.dtype, *, deferrable: bool = True
) -> Tensor | None:
    """Hand a weight gradient over.

    Args:
        grad: The gradient.
        sink: The sink of its weight, as it was in forward.
        dtype: Dtype of the weight.
        deferrable: False if the sink must not keep it for later.

    Returns:
        None when the sink took it, else the gradient in the weight's dtype, for autograd.
    """
    if sink is not None and sink.take(grad, deferrable=deferrable):
        return None
    return grad.compute().to(dtype)
