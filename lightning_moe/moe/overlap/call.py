"""One call of an overlapped expert layer: what its autograd functions share, and what is under way between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_moe.moe.activation import Activation
from lightning_moe.moe.overlap.plan import ExchangePlan
from lightning_moe.moe.overlap.transport import ChunkExchange, Pending


@dataclass(frozen=True)
class RowRoutes:
    """Which row of the send buffer each choice becomes. T tokens, K choices of each, R rows.

    Attributes:
        top_k: ``K``.
        row_of_choice: int64 ``[T * K]``; 0 for choices that are not sent.
        choice_sent: Bool ``[T * K]``; None when every choice is sent.
        choice_of_row: int64 ``[R]``; 0 for padding.
        row_filled: Bool ``[R]``, False for padding; None when there is none.
    """

    top_k: int
    row_of_choice: Tensor
    choice_sent: Tensor | None
    choice_of_row: Tensor
    row_filled: Tensor | None


@dataclass(eq=False)
class OverlappedCall:
    """State of one call.

    Attributes:
        plan: The chunks.
        routes: Choices and rows.
        exchange: Posts messages.
        offsets: For each chunk the end of each slot's rows, int32 on the device.
        activation: Nonlinearity of the experts.
        grouped_gemm: Whether to use the grouped GEMM where it is available.
        save: What backward keeps; see :class:`~lightning_moe.config.OverlapConfig`.
        grad_groups: Parts that each weight's gradient is computed in.
        settle: Whether to wait for returned rows at once: a recomputation may stop before they are asked for.
        fill: Offers the idle time before a wait, by direction and position, to whoever has work to do.
        returning: Rows on their way back, in forward.
        returning_grads: Gradients on their way back, in backward.
    """

    plan: ExchangePlan
    routes: RowRoutes
    exchange: ChunkExchange
    offsets: tuple[Tensor, ...]
    activation: Activation
    grouped_gemm: bool
    save: str
    grad_groups: int
    settle: bool
    fill: Callable[[bool, int], None]
    returning: list[Pending] = field(default_factory=list)
    returning_grads: list[Pending] = field(default_factory=list)

    @property
    def own_rows(self) -> slice:
        """This rank's own rows in its send buffer."""
        return slice(self.plan.own_start, self.plan.own_start + self.plan.chunks[0].rows)

    def regions(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """The chunks' parts of a buffer ``[plan.num_computed, ...]``."""
        return torch.split(buffer, [chunk.rows for chunk in self.plan.chunks])

    def wait_for_rows(self) -> None:
        """Wait for the rows that come back in forward."""
        self._wait(self.returning, backward=False)

    def wait_for_grads(self) -> None:
        """Wait for the gradients that come back in backward."""
        self._wait(self.returning_grads, backward=True)

    def _wait(self, pending: list[Pending], *, backward: bool) -> None:
        if pending:
            self.fill(backward, len(self.plan.chunks) - 1)
        while pending:
            pending.pop(0).wait()


def chunk_offsets(plan: ExchangePlan, device: torch.device) -> tuple[Tensor, ...]:
    """For each chunk the end of each slot's rows, int32; one copy to the device, which the host does not wait for."""
    flat, lengths = [], []
    for chunk in plan.chunks:
        end = 0
        for count in chunk.counts:
            end += count
            flat.append(end)
        lengths.append(len(chunk.counts))
    ends = torch.tensor(flat, dtype=torch.int32, pin_memory=device.type == "cuda")
    return torch.split(ends.to(device, non_blocking=True), lengths)
