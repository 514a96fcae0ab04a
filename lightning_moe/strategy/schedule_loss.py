"""The loss of a pipeline step, whose backward hands out gradients that are there already.

[Note: a schedule is one autograd node]
Lightning calls ``training_step``, then ``zero_grad``, then ``loss.backward()``. The schedule has to run in the first of
them, since the loss is known at its end only; gradients that it left in the parameters would be erased by the second.
So they stay in the buckets, and the loss that is returned is the output of one autograd node, whose backward hands them
out. Hooks, accumulation, clipping and loss scaling see what they see without a pipeline. The gradient that Lightning
will send to that node (the loss scale over the number of accumulated batches) is known beforehand, and the schedule
starts its backward passes with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_moe.errors import ConfigError
from lightning_moe.parallel.host_read import HostRead


def loss_that_delivers(loss: Tensor, deliver: Callable[[Tensor], None]) -> Tensor:
    """A copy of a loss whose backward calls ``deliver`` with the gradient that has reached it."""
    anchor = torch.zeros((), device=loss.device, requires_grad=True)
    node: Tensor = _ScheduleNode.apply(anchor, loss, deliver)  # type: ignore[no-untyped-call]
    return node


class _ScheduleNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loss: Tensor, deliver: Any) -> Tensor:
        ctx.deliver = deliver
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.deliver(grad)
        return None, None, None


class ScaleCheck:
    """Checks that the gradient which reaches the schedule's loss is the one that its backward passes began with.

    Reading it makes the host wait for the device, so only the first step waits; later ones are checked a step late.
    """

    def __init__(self) -> None:
        self._under_way: HostRead | None = None
        self._first = True

    def take(self, grad: Tensor, expected: Tensor) -> None:
        """Compare; raise now if that costs nothing or nothing has been compared yet."""
        ratio = (grad / expected).reshape(1)
        self._under_way = HostRead(ratio)
        if self._first or grad.device.type == "cpu":
            self._first = False
            self.read()

    def read(self) -> None:
        """Wait for what is under way, and raise if it is wrong."""
        if self._under_way is None:
            return
        (ratio,), self._under_way = self._under_way.wait(), None
        if abs(ratio - 1.0) > 1e-5:
            raise ConfigError(
                "training_step",
                f"a loss that is {ratio:g} times that of run_schedule",
                "the loss that run_schedule returns",
                "weigh losses in the pipeline's parts: the schedule has already computed the gradients",
            )
