"""Runs the experts of a call in several ways, to see which is the fastest.

A cost model knows what products and messages take the device. Where the link is fast, what decides may be something
else: how long the host takes to launch and to post, or how well products of fewer rows fill the device. So a call is
run in each way, forward and backward, with its own rows and weights; what that gives is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from lightning_moe.moe.overlap.stopwatch import Stopwatch, Work
from lightning_moe.weight_grad.sink import WeightGrad, attach_sink, sink_of

Way = Callable[[Tensor, Tensor, nn.Parameter, nn.Parameter], Tensor]
"""From tokens ``[T, D]``, weights ``[T, K]`` and the experts' two projections to their output ``[T, D]``."""


def seconds_of(
    ways: Sequence[Way],
    tokens: Tensor,
    weights: Tensor,
    projections: Sequence[nn.Parameter],
    group: dist.ProcessGroup | None,
    *,
    deferred: bool,
) -> list[float]:
    """Seconds of a forward and a backward pass in each way: those of the slowest rank, the same on all of them.

    A collective call on the group. It leaves gradients, sinks and random generators as they are, and needs memory for
    one layer's activations and float32 sums of its experts' gradients.

    Args:
        ways: What is compared.
        tokens: ``[T, D]`` in the dtype of the computation.
        weights: ``[T, K]``.
        projections: The experts' weights. Where they have a sink their gradients are added to float32, as there.
        group: The expert group.
        deferred: Whether weight gradients are left for later, and do not count.
    """
    copies = [nn.Parameter(weight.detach(), weight.requires_grad) for weight in projections]
    inputs = [each.detach().requires_grad_(each.requires_grad) for each in (tokens, weights)]
    wanted = [each for each in (*inputs, *copies) if each.requires_grad]

    def both_passes(way: Way) -> Work:
        for weight, copy in zip(projections, copies, strict=True):
            if deferred or sink_of(weight) is not None:
                attach_sink(copy, _Scratch(copy, defers=deferred))

        def run() -> None:
            out = way(inputs[0], inputs[1], copies[0], copies[1])
            # Any gradient will do; a sink takes those of its weight.
            torch.autograd.grad(out, wanted, tokens.detach().to(out.dtype), allow_unused=True)

        return run

    stopwatch = Stopwatch(tokens.device, group)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(tokens.device.type, enabled=False))
        # Checkpointing around the call counts what is saved, or keeps results by their order, and must not see this.
        stack.enter_context(saved_tensors_hooks(_same, _same))
        stack.enter_context(_disable_current_modes())
        return stopwatch.agree([stopwatch.seconds(both_passes(way)) for way in ways])


class _Scratch:
    """Stands in for a weight's sink: adds gradients up where nobody looks."""

    def __init__(self, weight: nn.Parameter, *, defers: bool) -> None:
        self._shape, self._device = weight.shape, weight.device
        self._dtype = torch.promote_types(weight.dtype, torch.float32)
        self._total: Tensor | None = None
        self.defers = defers

    def take(self, grad: WeightGrad, *, deferrable: bool = True) -> bool:
        """Add a gradient, or forget what would be left for later."""
        if not self.defers:
            if self._total is None:
                self._total = torch.zeros(self._shape, dtype=self._dtype, device=self._device)
            grad.add_to(self._total, accumulate=True)
        return True


def _same(tensor: Tensor) -> Tensor:
    return tensor
