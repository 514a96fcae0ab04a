"""Triton kernels that match routing choices with rows of the send buffer, for CUDA.

N choices, S slots, R rows. Sorting does the same, in a dozen launches around it; in the time that these take the host,
the device has little else to do. Two launches count the choices of each slot block by block, and then place them: after
all choices of lower slots and all earlier ones of their own. Whole numbers alone, so every run gives the same.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_SLOTS = 256
"""Each program holds a table of some choices by all slots."""
_AT_ONCE = 64
"""Choices in that table."""
_BLOCKS = 128
"""Most blocks, about as many as a GPU has multiprocessors."""
_TOGETHER = 16
"""Blocks whose counts are read at a time."""


@triton.jit
def _table(slots, sent, choice, num_choices, bins, MASKED: tl.constexpr):  # noqa: N803 (Triton's spelling)
    """Which slot each choice is sent to: 1 there, 0 elsewhere, ``[choices, slots]``."""
    wanted = choice < num_choices
    if MASKED:
        wanted = wanted & (tl.load(sent + choice, mask=wanted, other=0) != 0)
    slot = tl.load(slots + choice, mask=wanted, other=-1)
    return (slot[:, None] == bins[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=["num_choices", "steps"])
def _count_kernel(
    slots,
    sent,
    counts,
    num_choices,
    steps,
    MASKED: tl.constexpr,  # noqa: N803
    BINS: tl.constexpr,  # noqa: N803
    AT_ONCE: tl.constexpr,  # noqa: N803
):
    block, bins = tl.program_id(0), tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    for step in range(steps):
        choice = (block * steps + step) * AT_ONCE + tl.arange(0, AT_ONCE)
        total += tl.sum(_table(slots, sent, choice, num_choices, bins, MASKED), 0)
    tl.store(counts + block * BINS + bins, total)


@triton.jit(do_not_specialize=["num_choices", "num_blocks", "steps"])
def _place_kernel(
    slots,
    sent,
    counts,
    row_of_choice,
    choice_of_row,
    num_choices,
    num_blocks,
    steps,
    MASKED: tl.constexpr,  # noqa: N803
    BINS: tl.constexpr,  # noqa: N803
    AT_ONCE: tl.constexpr,  # noqa: N803
    TOGETHER: tl.constexpr,  # noqa: N803
):
    block, bins = tl.program_id(0), tl.arange(0, BINS)
    whole = tl.zeros((BINS,), tl.int32)
    earlier = tl.zeros((BINS,), tl.int32)
    for first in range(0, num_blocks, TOGETHER):
        other = first + tl.arange(0, TOGETHER)[:, None]
        found = tl.load(counts + other * BINS + bins[None, :], mask=other < num_blocks, other=0)
        whole += tl.sum(found, 0)
        earlier += tl.sum(tl.where(other < block, found, 0), 0)
    next_row = tl.cumsum(whole, 0) - whole + earlier
    for step in range(steps):
        choice = (block * steps + step) * AT_ONCE + tl.arange(0, AT_ONCE)
        table = _table(slots, sent, choice, num_choices, bins, MASKED)
        row = tl.sum(table * (tl.cumsum(table, 0) - 1 + next_row[None, :]), 1)
        tl.store(row_of_choice + choice, row.to(tl.int64), mask=choice < num_choices)
        tl.store(choice_of_row + row, choice.to(tl.int64), mask=tl.sum(table, 1) > 0)
        next_row += tl.sum(table, 0)


def match_rows(slots: Tensor, num_slots: int, num_rows: int, sent: Tensor | None) -> tuple[Tensor, Tensor]:
    """Match choices with rows; see :func:`lightning_moe.moe.dispatch.match_rows`.

    Args:
        slots: Slot of each choice, int64 ``[N]``.
        num_slots: Number of slots ``S``, at most :data:`MOST_SLOTS`.
        num_rows: Number of choices that are sent ``R``.
        sent: Bool ``[N]``: choices that are sent; None for all.

    Returns:
        Row of each choice (0 where not sent), int64 ``[N]``, and choice of each row, int64 ``[R]``.
    """
    slots, num_choices = slots.contiguous(), slots.numel()
    row_of_choice, choice_of_row = slots.new_empty(num_choices), slots.new_empty(num_rows)
    if not num_choices:
        return row_of_choice, choice_of_row
    steps = triton.cdiv(num_choices, _AT_ONCE * _BLOCKS)
    blocks = triton.cdiv(num_choices, _AT_ONCE * steps)
    bins = triton.next_power_of_2(num_slots)
    counts = torch.empty((blocks, bins), dtype=torch.int32, device=slots.device)
    shape = {"MASKED": sent is not None, "BINS": bins, "AT_ONCE": _AT_ONCE}
    mask = slots if sent is None else sent.contiguous()
    _count_kernel[(blocks,)](slots, mask, counts, num_choices, steps, **shape)
    _place_kernel[(blocks,)](
        slots, mask, counts, row_of_choice, choice_of_row, num_choices, blocks, steps, TOGETHER=_TOGETHER, **shape
    )
    return row_of_choice, choice_of_row
