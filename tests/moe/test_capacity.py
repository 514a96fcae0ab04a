"""Capacity limits against Python loops; the layer as a whole is compared in test_layer.py."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.config.moe import MoEConfig
from lightning_moe.moe.capacity import expert_capacity, within_capacity
from lightning_moe.moe.layer import MoELayer
from tests.moe.cases import assert_same, random_case, run_single


@given(st.integers(0, 10_000), st.integers(1, 64), st.integers(1, 8), st.floats(0.1, 8))
def test_capacity_formula(num_tokens: int, num_experts: int, top_k: int, factor: float) -> None:
    top_k = min(top_k, num_experts)
    config = MoEConfig(num_experts=num_experts, top_k=top_k, capacity_factor=factor)
    capacity = expert_capacity(torch.tensor(num_tokens), config)
    # Megatron-core's get_capacity, with its num_tokens = tokens * top_k
    assert capacity.item() == math.ceil((num_tokens * top_k / num_experts) * factor)


@given(
    policy=st.sampled_from(["probability", "position"]),
    num_tokens=st.integers(0, 12),
    capacity=st.integers(0, 6),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_keeps_what_fits(
    policy: Literal["probability", "position"], num_tokens: int, capacity: int, masked: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    config = MoEConfig(num_experts=4, top_k=2, capacity_factor=1.0, drop_policy=policy)
    scores = torch.rand(num_tokens, 4, generator=generator)
    experts = scores.topk(2).indices
    # Few distinct weights, so that ties occur.
    weights = torch.randint(1, 4, (num_tokens, 2), generator=generator) / 4
    mask = torch.rand(num_tokens, 1, generator=generator).expand(-1, 2) < 0.7 if masked else None
    kept = within_capacity(experts, weights, torch.tensor(capacity), config, mask)
    flags = torch.ones_like(kept) if mask is None else mask
    expected = torch.zeros_like(kept)
    for expert in range(4):
        takers = [(t, k) for t in range(num_tokens) for k in range(2) if experts[t, k] == expert and flags[t, k]]
        if policy == "probability":
            takers.sort(key=lambda taker: -weights[taker].item())  # a stable sort: earlier choices win ties
        for t, k in takers[:capacity]:
            expected[t, k] = True
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("policy", ["probability", "position"])
@pytest.mark.parametrize("masked", [0.0, 0.3])
def test_padding_changes_shapes_only(policy: Any, masked: float) -> None:
    """Padded rows are exact zeros in, and no one reads them back: same output and gradients."""
    results = []
    for padded in (False, True):
        config = MoEConfig(
            num_experts=6,
            expert_hidden_size=12,
            capacity_factor=0.9,
            drop_policy=policy,
            pad_to_capacity=padded,
            load_balancing="auxiliary",
        )
        results.append(run_single(random_case(config, [20], masked=masked)))
    assert_same(results[1], results[0], 1e-14)
    assert results[0].dropped > 0


def test_padded_experts_all_get_the_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MoEConfig(num_experts=6, expert_hidden_size=12, capacity_factor=1.25, pad_to_capacity=True)
    layer = MoELayer(16, config)
    seen = []
    forward = layer.experts.forward
    monkeypatch.setattr(
        layer.experts, "forward", lambda rows, counts, offsets: seen.append(counts) or forward(rows, counts, offsets)
    )
    layer(torch.randn(20, 16))
    assert [list(counts) for counts in seen] == [[9] * 6]  # ceil(20 * 2 / 6 * 1.25)


def test_a_large_capacity_drops_nothing() -> None:
    results = []
    for factor in (None, 6.0):
        config = MoEConfig(num_experts=6, expert_hidden_size=12, capacity_factor=factor)
        results.append(run_single(random_case(config, [20])))
    assert_same(results[1], results[0], 0.0)
    assert results[1].dropped == 0
