"""The layer equals Hugging Face's Mixtral, Qwen2-MoE, Qwen3-MoE and DeepSeek-V3 blocks, on one and several ranks.

All four blocks compute their router's scores in float32 even when everything else is float64. Three comparisons deal
with that: float64 with those casts undone, float64 with Hugging Face's routing handed to our dispatch and experts, and
everything as it is, where the router's float32 sets the tolerance.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.distributed import RankPool
from tests.moe.cases import Case, Result, assemble, assert_same, relative_error, run_ranks, run_single
from tests.moe.hugging_face import BLOCKS, Reference, reference, routed_reference
from tests.moe.routed import RoutedBatch, RoutedResult, run_routed

BATCH, SEQUENCE = 6, 12
SPLITS = {1: [6], 2: [4, 2], 3: [1, 0, 5]}

cached_reference = cache(reference)


def case_of(expected: Reference, num_ranks: int) -> Case:
    order = tuple((5 * slot + 3) % expected.config.num_experts for slot in range(expected.config.num_experts))
    config = type(expected.config)(**(vars(expected.config) | {"expert_placement": order}))
    lengths = SPLITS[num_ranks]
    return Case(
        config=config,
        state=expected.state,
        hidden=expected.hidden.split(lengths),
        cotangent=expected.cotangent.split(lengths),
        expert=num_ranks,
    )


def result_of(expected: Reference) -> Result:
    zero = torch.zeros(())
    return Result(
        expected.output,
        expected.hidden_grad,
        expected.grads,
        {},
        zero,
        zero,
        expected.tokens_per_expert,
        torch.tensor(0),
    )


def compare(ranks: RankPool, num_ranks: int, tolerances: dict[tuple[str, torch.dtype, bool], float]) -> None:
    expected = {
        (name, dtype, keep): cached_reference(name, dtype, BATCH, SEQUENCE, keep_float64=keep)
        for name, dtype, keep in tolerances
    }
    cases = [case_of(one, num_ranks) for one in expected.values()]
    by_rank = [list(map(run_single, cases))] if num_ranks == 1 else ranks.run(num_ranks, run_ranks, cases)
    for number, (key, one) in enumerate(expected.items()):
        actual = assemble([results[number] for results in by_rank])
        try:
            assert_same(actual, result_of(one), tolerances[key])
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from error


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_float64(ranks: RankPool, num_ranks: int) -> None:
    compare(ranks, num_ranks, {(name, torch.float64, True): 1e-12 for name in BLOCKS})


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_float32(ranks: RankPool, num_ranks: int) -> None:
    compare(ranks, num_ranks, {(name, torch.float32, False): 1e-6 for name in BLOCKS})


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_float64_with_a_float32_router(ranks: RankPool, num_ranks: int) -> None:
    compare(ranks, num_ranks, {(name, torch.float64, False): 5e-7 for name in BLOCKS})


def run_all_routed(batches: list[RoutedBatch], num_ranks: int) -> list[RoutedResult]:
    return [run_routed(batch, num_ranks) for batch in batches]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_float64_with_hugging_faces_routing(ranks: RankPool, num_ranks: int) -> None:
    """Given the same choices and weights, everything behind the router agrees.

    DeepSeek's weights are float32 (the other blocks' too, or were rounded to it), and so are their gradients.
    """
    expected = {name: routed_reference(name, torch.float64, 40) for name in BLOCKS}
    batches = [batch for batch, _ in expected.values()]
    if num_ranks == 1:
        by_rank = [run_all_routed(batches, 1)]
    else:
        by_rank = ranks.run(num_ranks, run_all_routed, batches, num_ranks)
    for number, (name, (batch, theirs)) in enumerate(expected.items()):
        ours = [results[number] for results in by_rank]
        interleaved = {
            field: torch.empty_like(getattr(theirs, field)) for field in ("output", "hidden_grad", "weights_grad")
        }
        for field, whole in interleaved.items():
            for rank, result in enumerate(ours):
                whole[rank::num_ranks] = getattr(result, field)
        errors = {field: relative_error(whole, getattr(theirs, field)) for field, whole in interleaved.items()}
        for field in ("gate_up_grad", "down_grad"):
            errors[field] = relative_error(torch.cat([getattr(r, field) for r in ours]), getattr(theirs, field))
        weights_tolerance = 2e-7 if batch.weights.dtype == torch.float32 else 1e-12
        assert errors.pop("weights_grad") <= weights_tolerance, name
        assert max(errors.values()) <= 1e-12, (name, errors)


def test_the_router_casts_are_really_there() -> None:
    """The undone casts matter, so the comparison with them undone is the stronger one."""
    for name in BLOCKS:
        kept, rounded = (cached_reference(name, torch.float64, BATCH, SEQUENCE, keep_float64=k) for k in (True, False))
        assert 1e-9 < relative_error(rounded.output, kept.output) < 5e-7
