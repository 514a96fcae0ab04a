"""Experts spread over ranks against one process that holds them all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_moe.config.moe import MoEConfig
from tests.distributed import RankPool
from tests.moe.cases import Case, assemble, assert_same, random_case, run_ranks, run_single


def config(**changes: Any) -> MoEConfig:
    return MoEConfig(**({"num_experts": 12, "top_k": 3, "expert_hidden_size": 8, "load_balancing": "global"} | changes))


def shuffled_order(num_experts: int = 12) -> tuple[int, ...]:
    return tuple((5 * slot + 3) % num_experts for slot in range(num_experts))


def case(lengths: list[int], changes: dict[str, Any] | None = None, **arguments: Any) -> Case:
    return random_case(config(**(changes or {})), lengths, **({"expert": len(lengths)} | arguments))


def check(ranks: RankPool, cases: dict[str, Case], tolerance: float) -> None:
    """Run all cases on the ranks in one job, and compare each with a single process."""
    by_rank = ranks.run(len(next(iter(cases.values())).hidden), run_ranks, list(cases.values()))
    for number, (name, one) in enumerate(cases.items()):
        try:
            assert_same(assemble([results[number] for results in by_rank]), run_single(one), tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def spread_cases(num_ranks: int, dtype: torch.dtype) -> dict[str, Case]:
    even, ragged = [6] * num_ranks, [9, 0, 4, 1][:num_ranks]
    cases = {
        "even": case(even, dtype=dtype),
        "ragged, with a rank without tokens": case(ragged, dtype=dtype),
        "no tokens anywhere": case([0] * num_ranks, dtype=dtype),
        "one token": case([0] * (num_ranks - 1) + [1], dtype=dtype),
        "masked": case(ragged, dtype=dtype, masked=0.5),
        "sequences": case(ragged, dtype=dtype, sequence_length=3, masked=0.3),
        "placement": case(ragged, {"expert_placement": shuffled_order()}, dtype=dtype),
        "built whole, then spread": case(
            ragged, {"expert_placement": shuffled_order()}, dtype=dtype, late_sharding=True
        ),
        "loop": case(ragged, {"grouped_gemm": False}, dtype=dtype),
        "shared expert": case(ragged, {"shared_expert_hidden_size": 6, "shared_expert_gate": True}, dtype=dtype),
        "relu": case(ragged, {"activation": "relu"}, dtype=dtype),
        "series": case(ragged, {"routing_granularity": "series"}, dtype=dtype, sequence_length=4, masked=0.3),
        "sigmoid, biased, in groups": case(
            ragged,
            {"router_score": "sigmoid", "num_groups": 4, "top_k_groups": 2, "expert_bias": True},
            dtype=dtype,
        ),
        "all tokens to the same experts": skewed(case(even, dtype=dtype)),
        "one expert a rank": case(ragged, {"num_experts": num_ranks, "top_k": 1, "renormalize": False}, dtype=dtype),
        "losses that need equal lengths": case(
            even, {"load_balancing": "sequence", "z_loss_coefficient": 0.1}, dtype=dtype, sequence_length=3
        ),
    }
    for top_k in (1, 2, 4, 5, 6, 7, 8):
        cases[f"top {top_k}"] = case(ragged, {"top_k": top_k}, dtype=dtype)
    return cases


def skewed(one: Case) -> Case:
    """Nine of twelve experts get no token, on any rank."""
    state = dict(one.state)
    state["router.weight"] = torch.zeros_like(state["router.weight"])
    state["router.weight"][[1, 5, 10], 0] = torch.tensor([3.0, 2.0, 1.0], dtype=state["router.weight"].dtype)
    hidden = tuple(tokens.index_fill(1, torch.tensor([0]), 1.0) for tokens in one.hidden)
    return Case(**(vars(one) | {"state": state, "hidden": hidden}))


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_float64(ranks: RankPool, num_ranks: int) -> None:
    check(ranks, spread_cases(num_ranks, torch.float64), 1e-12)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_float32(ranks: RankPool, num_ranks: int) -> None:
    check(ranks, spread_cases(num_ranks, torch.float32), 1e-6)


def test_bfloat16(ranks: RankPool) -> None:
    """Dense weight gradients are sums of the ranks' parts, each rounded to bf16: a few units of 2^-8."""
    check(ranks, spread_cases(2, torch.bfloat16), 3 * 2**-8)


@pytest.mark.parametrize("expert", [1, 2])
def test_split_experts(ranks: RankPool, expert: int) -> None:
    """Each expert is cut in two; with ``expert`` 1 two pairs of ranks hold all of them."""
    order = {"expert_placement": shuffled_order()}
    arguments: dict[str, Any] = {"expert": expert, "expert_tensor": 2}
    ragged = [7, 0, 2, 3]
    cases = {
        "even": case([5, 5, 5, 5], order, **arguments),
        "masked": case(ragged, order, masked=0.4, **arguments),
        "no tokens anywhere": case([0] * 4, **arguments),
        "built whole, then spread": case(ragged, order | {"activation": "relu"}, late_sharding=True, **arguments),
        "top 8": case(ragged, {"top_k": 8}, **arguments),
    }
    check(ranks, cases, 1e-12)
    low: dict[str, Any] = arguments | {"dtype": torch.float32}
    grouped = {"grouped": case([5, 5, 5, 5], {"expert_hidden_size": 16}, **low)}
    check(ranks, grouped | {"loop": case([5, 5, 5, 5], {"grouped_gemm": False}, **low)}, 1e-6)


def test_replicated_experts(ranks: RankPool) -> None:
    """Four ranks, experts over two of them: each pair works by itself, gradients add up over both."""
    cases = {
        "even": case([5, 5, 5, 5], expert=2),
        "ragged": case([7, 0, 2, 3], expert=2, masked=0.2),
        "not spread at all": case([7, 0, 2, 3], expert=1),
    }
    check(ranks, cases, 1e-12)


@pytest.mark.parametrize("policy", ["probability", "position"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("lengths", "expert_tensor"), [([9, 0, 6], 1), ([9, 6], 2)])
def test_capacity_is_per_rank(
    ranks: RankPool, lengths: list[int], expert_tensor: int, policy: str, padded: bool
) -> None:
    """Each rank limits its own rows, so it equals a single process on each rank's tokens in turn."""
    changes = {
        "capacity_factor": 0.8,
        "drop_policy": policy,
        "pad_to_capacity": padded,
        "load_balancing": "none",
        "expert_placement": shuffled_order(),
    }
    spread = case(lengths, changes, masked=0.2, expert=len(lengths) // expert_tensor, expert_tensor=expert_tensor)
    actual = assemble([results[0] for results in ranks.run(len(lengths), run_ranks, [spread])])
    assert spread.mask is not None
    parts = [
        run_single(Case(**(vars(spread) | {"hidden": (h,), "cotangent": (c,), "mask": (m,)})))
        for h, c, m in zip(spread.hidden, spread.cotangent, spread.mask, strict=True)
    ]
    assert_same(actual, assemble(parts), 1e-12)
    assert actual.dropped > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_are_bitwise_equal(ranks: RankPool, dtype: torch.dtype) -> None:
    spread = case([30, 0, 17, 5], {"shared_expert_hidden_size": 8}, dtype=dtype, masked=0.1)
    results = ranks.run(4, run_ranks, [spread, spread])
    first, second = (assemble([pair[number] for pair in results]) for number in (0, 1))
    assert_same(first, second, 0.0)
    assert first.output.any()
