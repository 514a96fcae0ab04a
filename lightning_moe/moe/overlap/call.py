"""One call of an overlapped expert layer: what its autograd functions share, and what is under way between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from lightning_moe.moe.activation import Activation
from lightning_moe.moe.overlap.plan import ExchangePlan, Piece
from lightning_moe.moe.overlap.transport import ChunkExchange, Pending, wait_for_all


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
        offsets: For pieces of several slots the end of each slot's rows, int32 on the device.
        activation: Nonlinearity of the experts.
        grouped_gemm: Whether to use the grouped GEMM where it is available.
        save: What backward keeps; see :class:`~lightning_moe.config.OverlapConfig`.
        grad_groups: Parts that each weight's gradient is computed in.
        sm_margin: Multiprocessors that products of rows leave to messages.
        fill: Offers the idle time before a wait, by direction and position, to whoever has work to do.
        returning: Rows on their way back, in forward.
        returning_grads: Gradients on their way back, in backward.
    """

    plan: ExchangePlan
    routes: RowRoutes
    exchange: ChunkExchange
    offsets: dict[Piece, Tensor]
    activation: Activation
    grouped_gemm: bool
    save: str
    grad_groups: int
    sm_margin: int
    fill: Callable[[bool, int], None]
    returning: list[Pending] = field(default_factory=list)
    returning_grads: list[Pending] = field(default_factory=list)

    def own_pieces(self, sent: Tensor) -> list[tuple[Piece, Tensor]]:
        """This rank's own pieces, each with its rows of a tensor that lies like the send buffer."""
        found, start = [], self.plan.own_start
        for piece in self.plan.chunks[0].pieces:
            stop = start + sum(piece.counts)
            found.append((piece, sent[start:stop]))
            start = stop
        return found

    def wait_for_rows(self) -> None:
        """Wait for the rows that come back in forward."""
        self._wait(self.returning, backward=False)

    def wait_for_grads(self) -> None:
        """Wait for the gradients that come back in backward."""
        self._wait(self.returning_grads, backward=True)

    def _wait(self, pending: list[Pending], *, backward: bool) -> None:
        if pending:
            self.fill(backward, len(self.plan.chunks) - 1)
        wait_for_all(pending)


def piece_offsets(plan: ExchangePlan, device: torch.device) -> dict[Piece, Tensor]:
    """For pieces of several slots the end of each slot's rows, int32; one copy to the device, not waited for."""
    pieces = [piece for chunk in plan.chunks for piece in chunk.pieces if len(piece.counts) > 1]
    if not pieces:
        return {}
    ends = [end for piece in pieces for end in accumulate(piece.counts)]
    flat = torch.tensor(ends, dtype=torch.int32, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return dict(zip(pieces, torch.split(flat, [len(piece.counts) for piece in pieces]), strict=True))
