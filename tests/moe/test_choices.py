from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.moe.choices import count_choices, order_of_choices, position_in_expert


@st.composite
def choices(draw: st.DrawFn) -> tuple[torch.Tensor, int, torch.Tensor | None]:
    num_experts, num_tokens, top_k = draw(st.integers(1, 6)), draw(st.integers(0, 8)), draw(st.integers(1, 3))
    size = num_tokens * top_k
    experts = draw(st.lists(st.integers(0, num_experts - 1), min_size=size, max_size=size))
    sent = draw(st.none() | st.lists(st.booleans(), min_size=size, max_size=size))
    shaped = torch.tensor(experts, dtype=torch.int64).view(num_tokens, top_k)
    flags = None if sent is None else torch.tensor(sent, dtype=torch.bool).view(num_tokens, top_k)
    return shaped, num_experts, flags


@given(choices())
def test_counts_and_positions(drawn: tuple[torch.Tensor, int, torch.Tensor | None]) -> None:
    experts, num_experts, sent = drawn
    seen = [0] * num_experts
    expected = []
    flags = [True] * experts.numel() if sent is None else sent.flatten().tolist()
    for expert, flag in zip(experts.flatten().tolist(), flags, strict=True):
        expected.append(seen[expert] if flag else None)
        seen[expert] += flag
    positions = position_in_expert(experts, num_experts, sent)
    assert positions.shape == experts.shape
    assert [p if flag else None for p, flag in zip(positions.flatten().tolist(), flags, strict=True)] == expected
    assert count_choices(experts, num_experts, sent).tolist() == seen
    in_order = sorted(range(len(flags)), key=lambda n: experts.flatten()[n].item() if flags[n] else num_experts)
    assert order_of_choices(experts, num_experts, sent).tolist() == in_order


def test_order_of_more_experts_than_16_bits_count() -> None:
    experts = torch.tensor([[40000, 3], [70000, 40000], [32768, 0]])
    assert order_of_choices(experts, 80000).tolist() == [5, 1, 4, 0, 3, 2]
