"""An all-to-all that is under way while other things are computed, in the forward pass and in the backward pass.

[Note: tickets]
An exchange is two nodes of autograd's graph: one posts it and one waits for it. In the backward pass the second posts
the way back, and the first waits for it. Autograd runs what was recorded last first; so where several exchanges have
been posted before the first of them was waited for, the backward pass, too, posts before it waits, and whatever was
computed in between is differentiated in between.

What goes from one node to the other is a *ticket*, a tensor without elements. A tensor that is still being received
would do as well, until somebody reads it: autograd, when it adds up gradients, or its check for NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.parallel.collectives import PendingTensor


class PendingExchange:
    """Sends block ``i`` of ``[C, ...]`` to rank ``i`` of ``C``, and back again in the backward pass.

    Every rank posts the same exchanges in the same order. One object serves one exchange of one forward pass, and any
    number of backward passes through it, one at a time.

    Args:
        group: The ranks.
        wait_at_once: Whether to wait where it is posted: the same computation without overlap.
    """

    def __init__(self, group: dist.ProcessGroup, *, wait_at_once: bool = False) -> None:
        self._group = group
        self._wait_at_once = wait_at_once
        self._sent: Tensor | None = None
        self._pending: PendingTensor | None = None
        self._arrived: Tensor | None = None

    def start(self, blocks: Tensor) -> Tensor:
        """Post the exchange; gives the ticket for :meth:`finish`."""
        ticket: Tensor = _Start.apply(blocks, self)  # type: ignore[no-untyped-call]
        return ticket

    def finish(self, ticket: Tensor) -> Tensor:
        """Wait for it: ``[C, ...]``, block ``j`` from rank ``j``. Once for each ticket."""
        received: Tensor = _Finish.apply(ticket, self)  # type: ignore[no-untyped-call]
        return received

    def post(self, blocks: Tensor) -> None:
        """Begin to exchange blocks, without a gradient."""
        if self._pending is not None:  # a backward pass has stopped in between; what it sends must not be freed
            self._wait()
        blocks = blocks.contiguous()
        received = torch.empty_like(blocks)
        work = dist.all_to_all_single(received, blocks, group=self._group, async_op=True)
        self._sent, self._pending = blocks, PendingTensor(received, work)  # what is sent must not be freed before
        if self._wait_at_once:
            self._wait()

    def collect(self) -> Tensor:
        """What was received for the last :meth:`post`; once for each."""
        if self._pending is not None:
            self._wait()
        received, self._arrived = self._arrived, None
        assert received is not None, "nothing was posted, or it has been collected"
        return received

    def _wait(self) -> None:
        assert self._pending is not None
        self._arrived = self._pending.wait()
        self._sent = self._pending = None


def refuse_second_derivatives() -> None:
    """Raise in a backward pass that is to be differentiated, which asynchronous work cannot be.

    Raises:
        RuntimeError: ``create_graph=True``.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "attention that overlaps its exchanges has no second derivative; do not use create_graph=True, "
            "or exchange all heads at once (overlap.attention_chunks: 1)"
        )


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Tensor, exchange: PendingExchange) -> Tensor:
        ctx.exchange = exchange
        exchange.post(blocks)
        return blocks.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivatives()
        return ctx.exchange.collect(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, exchange: PendingExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.collect()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivatives()
        ctx.exchange.post(grad)
        return grad.new_empty(0), None
