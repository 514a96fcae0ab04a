"""Plans for all ranks at once, with the exchange between them written out; and the gradients of a round trip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_moe.moe.choices import count_choices
from lightning_moe.moe.dispatch import DispatchPlan, RowCounts, combine, dispatch, match_rows, plan_dispatch


def row_counts(numbers: list[list[int]]) -> RowCounts:
    return RowCounts(torch.tensor(numbers), numbers)


@dataclass
class World:
    """What every rank of an expert group routed."""

    num_slots: int
    slots: list[Tensor]
    sent: list[Tensor | None]
    capacity: int | None

    def plans(self) -> list[DispatchPlan]:
        counts = row_counts([self._sizes(rank) for rank in range(len(self.slots))])
        return [
            plan_dispatch(slots, counts, rank, sent, padded=self.capacity is not None)
            for rank, (slots, sent) in enumerate(zip(self.slots, self.sent, strict=True))
        ]

    def _sizes(self, rank: int) -> list[int]:
        if self.capacity is not None:
            return [self.capacity] * self.num_slots
        return count_choices(self.slots[rank], self.num_slots, self.sent[rank]).tolist()


@st.composite
def worlds(draw: st.DrawFn) -> World:
    num_ranks, slots_per_rank, top_k = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    num_slots = num_ranks * slots_per_rank
    padded = draw(st.booleans())
    slots, sent = [], []
    for _ in range(num_ranks):
        num_tokens = draw(st.integers(0, 5))
        numbers = draw(
            st.lists(st.integers(0, num_slots - 1), min_size=num_tokens * top_k, max_size=num_tokens * top_k)
        )
        slots.append(torch.tensor(numbers, dtype=torch.int64).view(num_tokens, top_k))
        flags = draw(st.none() | st.lists(st.booleans(), min_size=len(numbers), max_size=len(numbers)))
        if padded and flags is None:
            flags = [True] * len(numbers)
        sent.append(None if flags is None else torch.tensor(flags, dtype=torch.bool).view(num_tokens, top_k))
    most = max(int(count_choices(s, num_slots, flags).max()) for s, flags in zip(slots, sent, strict=True))
    return World(num_slots, slots, sent, most + draw(st.integers(0, 2)) if padded else None)


def exchange(sent: list[list[Tensor]]) -> list[list[Tensor]]:
    """``sent[p][q]`` goes from rank p to rank q; returns what each rank receives from each."""
    return [[sent[p][q] for p in range(len(sent))] for q in range(len(sent))]


@given(worlds())
def test_every_row_reaches_its_expert_and_returns(world: World) -> None:
    plans = world.plans()
    num_ranks, slots_per_rank = len(plans), world.num_slots // len(plans)
    # Each row carries (rank, choice, slot); padding carries -1.
    buffers = []
    for rank, plan in enumerate(plans):
        slots = torch.cat([world.slots[rank].flatten(), torch.zeros(1, dtype=torch.int64)])  # never empty
        choice = plan.choice_of_row
        rows = torch.stack([torch.full_like(choice, rank), choice, slots[choice]], 1)
        if plan.row_filled is not None:
            rows[~plan.row_filled] = -1
        buffers.append(rows)
    received = exchange([list(rows.split(list(plan.input_splits))) for rows, plan in zip(buffers, plans, strict=True)])
    returned = []
    for rank, (plan, blocks) in enumerate(zip(plans, received, strict=True)):
        assert tuple(len(block) for block in blocks) == plan.output_splits
        rows = torch.cat(blocks)
        rows = rows if plan.to_expert_major is None else rows[plan.to_expert_major]
        assert sum(plan.expert_counts) == len(rows)
        assert plan.expert_offsets.tolist() == torch.tensor(plan.expert_counts).cumsum(0).tolist()
        assert plan.expert_offsets.dtype == torch.int32
        for local, piece in enumerate(rows.split(list(plan.expert_counts))):
            real = piece[piece[:, 0] >= 0]
            assert (real[:, 2] == rank * slots_per_rank + local).all()
            # Within an expert: by source rank, then in token order.
            assert real[:, :2].tolist() == sorted(real[:, :2].tolist())
            if world.capacity is not None:
                assert len(piece) == world.capacity * num_ranks
        rows = rows if plan.to_source_major is None else rows[plan.to_source_major]
        returned.append(list(rows.split(list(plan.output_splits))))
    for rank, (plan, blocks) in enumerate(zip(plans, exchange(returned), strict=True)):
        rows = torch.cat(blocks)
        for choice, row in enumerate(plan.row_of_choice.tolist()):
            if plan.choice_sent is None or plan.choice_sent[choice]:
                assert rows[row].tolist() == [rank, choice, world.slots[rank].flatten()[choice]]
        num_sent = len(plan.row_of_choice) if plan.choice_sent is None else int(plan.choice_sent.sum())
        assert (rows[:, 0] >= 0).sum() == num_sent


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked: bool, padded: bool) -> None:
    """Dispatch, something per row, combine: the hand-written backward passes against finite differences."""
    slots = torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0]])
    sent = torch.tensor([[1, 1], [0, 1], [0, 0], [1, 0]]).bool() if masked else torch.ones(4, 2, dtype=torch.bool)
    sizes = [3] * 3 if padded else count_choices(slots, 3, sent).tolist()
    plan = plan_dispatch(slots, row_counts([sizes]), 0, sent if masked or padded else None, padded=padded)
    scale = torch.randn(sum(sizes), 1, dtype=torch.float64)

    def round_trip(tokens: Tensor, weights: Tensor) -> Tensor:
        return combine((scale * dispatch(tokens, plan, None)).sin(), weights, plan, None, tokens.dtype)

    tokens = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(round_trip, (tokens, weights))
    rows = dispatch(tokens, plan, None)
    if padded:
        assert (rows == 0).all(1).sum() == 9 - sent.sum()
    out = combine(rows, weights, plan, None, tokens.dtype)
    expected = tokens * torch.where(sent, weights, 0).sum(1, keepdim=True)
    assert torch.allclose(out, expected, rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_run_in_float32(dtype: torch.dtype) -> None:
    """256 + 0.5 + 0.5 + ... (8 terms in all) needs float32 on the way: in bf16 every half would be lost."""
    slots = torch.arange(8).view(1, 8)
    plan = plan_dispatch(slots, row_counts([[1] * 8]), 0)
    rows = torch.tensor([[256.0]] + [[0.5]] * 7).to(dtype).requires_grad_()
    out = combine(rows, torch.ones(1, 8), plan, None, torch.float32)
    assert out.item() == 259.5
    tokens = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
    dispatch(tokens, plan, None).backward(rows.detach())
    assert tokens.grad is not None
    assert tokens.grad.item() == torch.tensor(259.5).to(dtype).item()


class _Unread(Sequence[int]):
    """Numbers that nobody may look at."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("the host has waited for the device")


def test_a_rank_that_holds_all_experts_looks_at_no_number() -> None:
    slots = torch.tensor([[0, 2], [2, 1], [0, 1]])
    sizes = torch.tensor([2, 2, 2])
    matched = match_rows(slots, sizes, slots.numel())
    plan = plan_dispatch(slots, RowCounts(sizes[None], [_Unread()]), 0, matched=matched)
    known = plan_dispatch(slots, row_counts([[2, 2, 2]]), 0)
    assert (plan.input_splits, plan.output_splits) == (known.input_splits, known.output_splits) == ((6,), (6,))
    assert torch.equal(plan.choice_of_row, known.choice_of_row)
    assert torch.equal(plan.expert_offsets, known.expert_offsets)
    with pytest.raises(AssertionError, match="waited"):
        sum(plan.expert_counts)
