"""What a rank sends in a layer's exchange, as far as it knows it by itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_moe.moe.dispatch import DispatchPlan, RowCounts, match_rows, plan_dispatch
from lightning_moe.moe.overlap.call import RowRoutes


@dataclass(frozen=True)
class RowsToSend:
    """The rows of one call. T tokens, K choices of each.

    Attributes:
        slots: Slot of each choice, int64 ``[T, K]``.
        sent: Bool ``[T, K]``: choices that are sent; None for all.
        sizes: Rows for each slot, int64 on the device.
        padded: Whether there are more rows for a slot than choices.
        matched: Choices matched with rows; None where the number of rows is not known without waiting for the device.
    """

    slots: Tensor
    sent: Tensor | None
    sizes: Tensor
    padded: bool
    matched: tuple[Tensor, Tensor] | None

    @staticmethod
    def of(slots: Tensor, sent: Tensor | None, sizes: Tensor, *, padded: bool) -> RowsToSend:
        """Match choices with rows at once where all are sent: the device does it while the host waits for counts."""
        matched = match_rows(slots, sizes, slots.numel()) if sent is None and not padded else None
        return RowsToSend(slots, sent, sizes, padded, matched)

    @property
    def count(self) -> int | None:
        """Number of rows, if it is known without waiting for the device."""
        return None if self.matched is None else self.slots.numel()

    def plan(self, counts: RowCounts, rank: int) -> DispatchPlan:
        """The plan of an all-to-all."""
        return plan_dispatch(self.slots, counts, rank, self.sent, padded=self.padded, matched=self.matched)

    def routes(self, count: int) -> RowRoutes:
        """Which of the rows each choice becomes."""
        row_of_choice, choice_of_row = self.matched or match_rows(
            self.slots, self.sizes, count, self.sent, padded=self.padded
        )
        return RowRoutes(
            self.slots.shape[1],
            row_of_choice,
            None if self.sent is None else self.sent.flatten(),
            choice_of_row.clamp(min=0) if self.padded else choice_of_row,
            choice_of_row >= 0 if self.padded else None,
        )
