"""Sending tokens to the ranks that hold their experts, and bringing the results back.

T tokens, K top-k, E experts (in slots), D model width, P expert ranks, N = T*K choices (see ``choices``), R
rows that this rank sends.

[Note: order of rows]
The rows that a rank sends are sorted by slot, and within a slot by token. Slots are rank-major, so what goes
to one rank is one block, and within it what goes to one expert is one piece. A rank receives one block per
source, in rank order; a stable sort by expert turns that into expert-major rows for the grouped GEMM. All
orders depend on the routing alone, so equal inputs give bitwise equal results.

[Note: no atomics]
Both directions *gather*, forward and backward: each choice reads its one row, and a token adds its K choices
in a loop over k, in float32 (float64 for float64). ``index_add`` would add in an order that changes from run
to run on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.moe.choices import order_of_choices, position_in_expert
from lightning_moe.moe.rows import dot_choices, spread_grad, sum_choices, take_rows
from lightning_moe.parallel.collectives import all_to_all
from lightning_moe.weight_grad.fused_kernels import has_triton


@dataclass(frozen=True)
class RowCounts:
    """How many rows each rank sends to each slot.

    Both forms are kept because each is needed, and making one from the other would wait for the device once more.

    Attributes:
        tensor: int64 ``[P, E]`` on the device.
        numbers: The same as ``P`` sequences of ``E`` numbers.
    """

    tensor: Tensor
    numbers: Sequence[Sequence[int]]

    @property
    def num_slots(self) -> int:
        """Number of slots ``E`` of all ranks."""
        return self.tensor.shape[1]


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """Who sends which rows to whom, for one layer and one micro-batch; built by :func:`plan_dispatch`.

    Attributes:
        num_tokens: Tokens ``T`` of this rank.
        top_k: Choices per token ``K``.
        row_of_choice: Row of the send buffer that each choice becomes, int64 ``[N]``; 0 for choices that are
            not sent.
        choice_sent: Bool ``[N]``; None when every choice is sent.
        choice_of_row: Choice that each row of the send buffer comes from, int64 ``[R]``; 0 for padding.
        row_filled: Bool ``[R]``, False for padding; None when there is none.
        input_splits: Rows sent to each rank, ``P`` numbers that sum to ``R``.
        output_splits: Rows received from each rank, ``P`` numbers.
        to_expert_major: Received row at each expert-major position, int64; None when the two orders are the
            same.
        to_source_major: The inverse permutation; None likewise.
        expert_counts: Rows of each local expert.
        expert_offsets: The end of each local expert's rows, int32 ``[E / P]`` on the device.
    """

    num_tokens: int
    top_k: int
    row_of_choice: Tensor
    choice_sent: Tensor | None
    choice_of_row: Tensor
    row_filled: Tensor | None
    input_splits: tuple[int, ...]
    output_splits: tuple[int, ...]
    to_expert_major: Tensor | None
    to_source_major: Tensor | None
    expert_counts: Sequence[int]
    expert_offsets: Tensor


def plan_dispatch(
    slots: Tensor,
    counts: RowCounts,
    rank: int,
    sent: Tensor | None = None,
    *,
    padded: bool = False,
    matched: tuple[Tensor, Tensor] | None = None,
) -> DispatchPlan:
    """Work out a plan; pure, and without communication.

    A rank that holds all experts looks at no number where ``matched`` is given: a host that waited for the choices of
    every layer could not run ahead of its device. Without ``matched`` it looks at the counts.

    Args:
        slots: Slot of each choice, int64 ``[T, K]``.
        counts: Rows that each rank sends to each slot.
        rank: This rank's position among the ``P``.
        sent: Bool ``[T, K]``: choices that are sent (real tokens, within capacity); None for all.
        padded: Whether this rank sends more rows to a slot than it has choices for it; the rest are zeros.
        matched: What :func:`match_rows` has given already; None to call it.

    Returns:
        The plan, with index tensors on the device of ``slots``.
    """
    local_slots = _slots_of(rank, counts)
    received = counts.tensor[:, local_slots]
    row_of_choice, choice_of_row = matched or match_rows(
        slots, counts.tensor[rank], sum(counts.numbers[rank]), sent, padded=padded
    )
    input_splits, output_splits, expert_counts = _splits(rank, counts, choice_of_row.numel())
    to_expert_major, to_source_major = _expert_major(received, sum(output_splits))
    return DispatchPlan(
        num_tokens=slots.shape[0],
        top_k=slots.shape[1],
        row_of_choice=row_of_choice,
        choice_sent=None if sent is None else sent.flatten(),
        choice_of_row=choice_of_row.clamp(min=0) if padded else choice_of_row,
        row_filled=choice_of_row >= 0 if padded else None,
        input_splits=input_splits,
        output_splits=output_splits,
        to_expert_major=to_expert_major,
        to_source_major=to_source_major,
        expert_counts=expert_counts,
        expert_offsets=received.sum(0).cumsum(0).to(torch.int32),
    )


def match_rows(
    slots: Tensor, sizes: Tensor, num_rows: int, sent: Tensor | None = None, *, padded: bool = False
) -> tuple[Tensor, Tensor]:
    """Match choices with rows of the send buffer; needs to know nothing of the other ranks.

    Args:
        slots: Slot of each choice, int64 ``[T, K]``.
        sizes: Rows that this rank sends to each slot, int64 ``[slots]`` on the device.
        num_rows: Their sum ``R``.
        sent: Bool ``[T, K]``: choices that are sent; None for all.
        padded: Whether there are more rows for a slot than choices.

    Returns:
        Row of each choice (0 where not sent), ``[N]``, and choice of each row (-1 at padding), ``[R]``.
    """
    flat_sent = None if sent is None else sent.flatten()
    if not padded and slots.is_cuda and has_triton():
        from lightning_moe.moe import triton_choices

        if sizes.numel() <= triton_choices.MOST_SLOTS:
            return triton_choices.match_rows(slots.flatten(), sizes.numel(), num_rows, flat_sent)
    if padded:
        first_row = sizes.cumsum(0) - sizes
        rows = (first_row[slots] + position_in_expert(slots, sizes.numel(), sent)).flatten()
        if flat_sent is not None:
            # One more row takes what is not sent: selecting by a mask would wait for the device to count it.
            rows = rows.where(flat_sent, num_rows)
        choices = torch.full((num_rows + 1,), -1, device=slots.device)
        choices[rows] = torch.arange(rows.numel(), device=slots.device)
    else:
        choices = order_of_choices(slots, sizes.numel(), sent)
        rows = torch.empty_like(choices)
        rows[choices] = torch.arange(rows.numel(), device=slots.device)
    return (rows if flat_sent is None else rows.where(flat_sent, 0)), choices[:num_rows]


def dispatch(tokens: Tensor, plan: DispatchPlan, group: dist.ProcessGroup | None) -> Tensor:
    """Bring every token to its experts.

    Args:
        tokens: ``[T, D]``.
        plan: This rank's plan.
        group: The expert group; a collective call on all of its ranks, forward and backward.

    Returns:
        ``[sum(plan.expert_counts), D]``, sorted by local expert.
    """
    rows: Tensor = _SendRows.apply(tokens, plan)  # type: ignore[no-untyped-call]
    received = all_to_all(rows, plan.output_splits, plan.input_splits, group)
    return _permute(received, plan.to_expert_major, plan.to_source_major)


def combine(
    rows: Tensor, weights: Tensor, plan: DispatchPlan, group: dist.ProcessGroup | None, dtype: torch.dtype
) -> Tensor:
    """Bring the experts' results back and add up each token's, weighted.

    Args:
        rows: ``[sum(plan.expert_counts), D]``, sorted by local expert.
        weights: ``[T, K]``, float32 or float64: the sum runs in this dtype (or in that of the rows, if that
            is wider).
        plan: The plan that the rows were dispatched with.
        group: The expert group; a collective call on all of its ranks, forward and backward.
        dtype: Dtype of the result.

    Returns:
        ``[T, D]``; zeros for tokens none of whose choices were sent.
    """
    received = _permute(rows, plan.to_source_major, plan.to_expert_major)
    returned = all_to_all(received, plan.input_splits, plan.output_splits, group)
    out: Tensor = _SumChoices.apply(returned, weights, plan, dtype)  # type: ignore[no-untyped-call]
    return out


def _slots_of(rank: int, counts: RowCounts) -> slice:
    per_rank = counts.num_slots // len(counts.numbers)
    return slice(rank * per_rank, (rank + 1) * per_rank)


def _splits(rank: int, counts: RowCounts, sent: int) -> tuple[tuple[int, ...], tuple[int, ...], Sequence[int]]:
    """Rows to each rank, rows from each rank, and rows of each local expert; ``sent`` rows leave this rank in all."""
    if len(counts.numbers) == 1:
        return (sent,), (sent,), counts.numbers[0]
    own, local_slots = counts.numbers[rank], _slots_of(rank, counts)
    pieces = [source[local_slots] for source in counts.numbers]
    to_ranks = tuple(sum(own[_slots_of(other, counts)]) for other in range(len(pieces)))
    return to_ranks, tuple(map(sum, pieces)), tuple(map(sum, zip(*pieces, strict=True)))


def _expert_major(received: Tensor, num_rows: int) -> tuple[Tensor | None, Tensor | None]:
    """Permutations between source-major and expert-major, for ``received[p, e]`` rows from rank p to expert e."""
    num_ranks, num_experts = received.shape
    if num_ranks == 1 or num_experts == 1:
        return None, None
    experts = torch.arange(num_experts, device=received.device).repeat(num_ranks)
    expert_of_row = experts.repeat_interleave(received.flatten(), output_size=num_rows)
    to_source_major, to_expert_major = match_rows(expert_of_row[:, None], received.sum(0), num_rows)
    return to_expert_major, to_source_major


class _SendRows(torch.autograd.Function):
    """The send buffer ``[R, D]`` from tokens ``[T, D]``; backward adds up each token's gradients."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return take_rows(tokens, plan.choice_of_row // plan.top_k, plan.row_filled)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        plan: DispatchPlan = ctx.plan
        return sum_choices(grad, plan.row_of_choice, plan.choice_sent, None, plan.top_k, grad.dtype), None


class _SumChoices(torch.autograd.Function):
    """Tokens ``[T, D]`` as weighted sums of their choices' rows ``[R, D]``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, plan: DispatchPlan, dtype: torch.dtype) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(rows, weights)
        return sum_choices(rows, plan.row_of_choice, plan.choice_sent, weights, plan.top_k, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        plan: DispatchPlan = ctx.plan
        rows, weights = ctx.saved_tensors
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_rows = spread_grad(grad, weights, plan.choice_of_row, plan.row_filled, plan.top_k, rows.dtype)
        if ctx.needs_input_grad[1]:
            grad_weights = dot_choices(grad, rows, plan.row_of_choice, plan.choice_sent, weights, plan.top_k)
        return grad_rows, grad_weights, None, None


class _Permute(torch.autograd.Function):
    """Rows in another order; backward gathers with the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.inverse), None, None


def _permute(rows: Tensor, order: Tensor | None, inverse: Tensor | None) -> Tensor:
    if order is None or inverse is None:
        return rows
    out: Tensor = _Permute.apply(rows, order, inverse)  # type: ignore[no-untyped-call]
    return out
