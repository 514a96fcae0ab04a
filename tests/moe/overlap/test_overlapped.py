"""Overlapped expert layers: against a process that holds all experts, and bit for bit against waiting at once."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch

from lightning_moe.config import OverlapConfig
from lightning_moe.moe.overlap import function, matrices
from lightning_moe.moe.overlap.cost import Rates
from lightning_moe.weight_grad.grouped_segments import SegmentedMatmulGrad
from tests.distributed import RankPool
from tests.margins import Margins
from tests.moe.cases import Case, Result, assemble, assert_same, run_ranks, run_single
from tests.moe.test_expert_parallel import case, shuffled_order, spread_cases

PLANS = [("source", None), ("expert", 1), ("expert", 2), ("expert", 5)]
WITH_EVERY_PLAN = {
    "ragged, with a rank without tokens",
    "no tokens anywhere",
    "one token",
    "masked",
    "placement",
    "loop",
    "all tokens to the same experts",
    "one expert a rank",
}
"""Where it matters which rows there are, and in which pieces they are computed."""
SAVES = ["fc1", "recompute", "redispatch"]
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def overlap(chunk: str, groups: int | None, save: str, **changes: bool) -> OverlapConfig:
    return OverlapConfig(dispatch="p2p", chunk=chunk, expert_groups=groups, save=save, **changes)  # type: ignore[arg-type]


def bitwise(actual: list[Result], expected: list[Result], name: str) -> None:
    for rank, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(one.output, other.output), f"{name}: output of rank {rank}"
        assert torch.equal(one.hidden_grad, other.hidden_grad), f"{name}: input gradient of rank {rank}"
        for key, grad in other.grads.items():
            assert torch.equal(one.grads[key], grad), f"{name}: {key} of rank {rank}"


def check(ranks: RankPool, cases: dict[str, Case], tolerance: float) -> None:
    """Each case overlapped and waiting at once: equal to the last bit, and to a single process within a tolerance."""
    overlapped, waiting = list(cases.values()), []
    for one in overlapped:
        assert one.overlap is not None
        waiting.append(replace(one, overlap=replace(one.overlap, wait_at_once=True)))
    results = ranks.run(len(overlapped[0].hidden), run_ranks, overlapped + waiting)
    for number, (name, one) in enumerate(cases.items()):
        first, second = ([by_rank[n] for by_rank in results] for n in (number, number + len(cases)))
        bitwise(first, second, name)
        try:
            assert_same(assemble(first), run_single(one), tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def overlapped_cases(num_ranks: int, dtype: torch.dtype, every_plan: bool) -> dict[str, Case]:
    """The cases of the blocking layer with the plans in turn, some with every plan; and all kinds of saving."""
    saves, plans, layouts = cycle(SAVES), cycle(PLANS), cycle([False, True, True, False, True])
    cases = {}
    spread = spread_cases(num_ranks, dtype)
    # A single weight that is scaled to one has no gradient but rounding errors.
    spread["top 1"] = case([9, 0, 4, 1][:num_ranks], {"top_k": 1, "renormalize": False}, dtype=dtype)
    for name, one in spread.items():
        for plan in PLANS if every_plan and name in WITH_EVERY_PLAN else [next(plans)]:
            save, slot_major = next(saves), next(layouts)
            settings = replace(one, overlap=overlap(*plan, save), slot_major=slot_major)
            cases[f"{name}, {plan}, {save}, {slot_major}"] = settings
    return cases


@pytest.mark.parametrize(
    "num_ranks", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_float64(ranks: RankPool, num_ranks: int) -> None:
    check(ranks, overlapped_cases(num_ranks, torch.float64, num_ranks == 3), TOLERANCES[torch.float64])


def margins_of(cases: list[Case]) -> list[Margins]:
    """What this rank's products leave free in each case."""
    found = []
    for one in cases:
        margins = Margins()
        with pytest.MonkeyPatch.context() as patch:
            margins.record(patch, matrices, SegmentedMatmulGrad)
            run_ranks([one])
        found.append(margins)
    return found


def test_products_leave_room_for_messages_and_weight_gradients_do_not(ranks: RankPool) -> None:
    """Own rows and one remote chunk: two products of each forward, two backward; one gradient of each weight."""
    one = replace(case([9, 4]), overlap=replace(overlap("source", None, "fc1"), sm_margin=7))
    for margins in ranks.run(2, margins_of, [one, replace(one, overlap=replace(one.overlap, save="recompute"))]):
        kept, again = margins
        assert kept.entered == [7] * 8
        assert again.entered == [7] * 10
        assert kept.weight_grads == again.weight_grads == 2


def runs_of(cases: list[Case]) -> list[list[tuple[int, int, int]]]:
    """Of each weight gradient of each case: experts of its range, most runs of one of them, and runs that it says."""
    found = []
    for one in cases:
        grads: list[SegmentedMatmulGrad] = []

        def made(*args: Any, grads: list[SegmentedMatmulGrad] = grads) -> SegmentedMatmulGrad:
            grads.append(SegmentedMatmulGrad(*args))
            return grads[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(function, "SegmentedMatmulGrad", made)
            run_ranks([one])
        found.append([(len(grad.segments), max(map(len, grad.segments)), grad.num_runs) for grad in grads])
    return found


def test_parts_of_a_weight_gradient_are_launched_like_the_whole(ranks: RankPool) -> None:
    """Deferred it comes in parts, and the experts of a part may have fewer runs than others."""
    plain = replace(case([9, 0, 4], {"num_experts": 12, "top_k": 1}), overlap=overlap("source", None, "fc1"))
    fewer = 0
    for sunk, queued in ranks.run(3, runs_of, [replace(plain, weight_grads=to) for to in ("sink", "queue")]):
        assert [experts for experts, _, _ in sunk] == [4, 4]
        assert [experts for experts, _, _ in queued] == [1] * 8
        (runs,) = {grad[2] for grad in sunk}
        assert {grad[2] for grad in queued} == {runs}
        assert runs == max(1, *(most for _, most, _ in sunk))
        fewer += sum(most < runs for _, most, _ in queued)
    assert fewer, "no part has fewer runs: nothing is tested"


def test_messages_to_more_ranks_get_more_room(ranks: RankPool) -> None:
    one = replace(case([9, 4, 5]), overlap=overlap("source", None, "fc1"))
    for (margins,) in ranks.run(3, margins_of, [one]):
        assert margins.entered == [8] * 12


@pytest.mark.parametrize("chunk", ["source", "expert"])
@pytest.mark.parametrize(("width", "tokens"), [(33, 63), (5, 61), (16, 64)])
def test_what_is_kept_changes_no_bit(ranks: RankPool, width: int, tokens: int, chunk: str) -> None:
    """Also where rows are no multiple of 16 bytes, and the own ones begin between two of them in the send buffer.

    There products take another way, at least on the machine where this was written.
    """
    one = case([64, tokens], {"num_experts": 4, "expert_hidden_size": 32}, hidden_size=width)
    kept = [replace(one, overlap=overlap(chunk, None, save)) for save in SAVES]
    results = ranks.run(2, run_ranks, kept)
    for number, save in enumerate(SAVES[1:], 1):
        bitwise([by_rank[number] for by_rank in results], [by_rank[0] for by_rank in results], save)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precisions(ranks: RankPool, dtype: torch.dtype) -> None:
    check(ranks, overlapped_cases(3, dtype, False), TOLERANCES[dtype])


@pytest.mark.slow
def test_split_and_replicated_experts(ranks: RankPool) -> None:
    order = {"expert_placement": shuffled_order()}
    cases = {}
    for plan, save in zip(PLANS, [*SAVES, "fc1"], strict=True):
        settings = overlap(*plan, save)
        split = case([7, 0, 2, 3], order, masked=0.4, expert=2, expert_tensor=2)
        cases[f"split, {plan}"] = replace(split, overlap=settings)
        replicated = case([7, 0, 2, 3], expert=2, masked=0.2)
        cases[f"replicated, {plan}"] = replace(replicated, overlap=settings, slot_major=save == "fc1")
        whole = case([5, 5, 5, 5], order | {"activation": "gelu"}, late_sharding=True, expert=2, expert_tensor=2)
        cases[f"built whole, {plan}"] = replace(whole, overlap=settings)
    check(ranks, cases, 1e-13)


@pytest.mark.parametrize("policy", ["probability", "position"])
def test_capacity(ranks: RankPool, policy: str) -> None:
    """Against the all-to-all, which is tested against a single process: rows are limited on each rank."""
    cases = []
    for padded in (False, True):
        changes = {
            "capacity_factor": 0.8,
            "drop_policy": policy,
            "pad_to_capacity": padded,
            "load_balancing": "none",
            "expert_placement": shuffled_order(),
        }
        blocking = case([9, 0, 6], changes, masked=0.2, expert=3)
        cases += [blocking, *(replace(blocking, overlap=overlap(*plan, "redispatch")) for plan in PLANS)]
    results = ranks.run(3, run_ranks, cases)
    for first in (0, len(PLANS) + 1):
        expected = assemble([by_rank[first] for by_rank in results])
        assert expected.dropped > 0
        for number in range(first + 1, first + len(PLANS) + 1):
            assert_same(assemble([by_rank[number] for by_rank in results]), expected, 1e-13)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def test_weight_gradients_in_a_queue(ranks: RankPool, dtype: torch.dtype) -> None:
    """Deferred or computed at once, or partly in the waits of the exchange: the same sums to the last bit."""
    starved = Rates(link_bytes_per_second=1e3, gemm=((1.0, 1e15),), launch=0.0)
    plain = case([9, 0, 4], dtype=dtype, masked=0.2)
    expected = run_single(plain)
    kinds = [
        (plan, save, (number + turn) % 2 > 0) for number, plan in enumerate(PLANS) for turn, save in enumerate(SAVES)
    ]
    cases = []
    for plan, save, slot_major in kinds:
        overlapped = replace(plain, overlap=overlap(*plan, save), slot_major=slot_major)
        deferred = replace(overlapped, weight_grads="queue")
        cases += [replace(overlapped, weight_grads="sink"), deferred, replace(deferred, rates=starved)]
    results = ranks.run(3, run_ranks, cases)
    for number, kind in enumerate(kinds):
        sunk, queued, filled = ([by_rank[3 * number + n] for by_rank in results] for n in range(3))
        bitwise(queued, sunk, f"queue, {kind}")
        bitwise(filled, sunk, f"queue in waits, {kind}")
        assert_same(assemble(sunk), expected, TOLERANCES[dtype])
        assert all(one.extra["held"] > 0 and one.extra["run_within"] == 0 for one in queued)
        assert all(one.extra["run_within"] > 0 for one in filled)


def test_an_all_to_all_where_the_model_says_so(ranks: RankPool) -> None:
    """``auto`` on a link so fast that nothing is to be hidden gives the blocking layer's bits."""
    fast = Rates(link_bytes_per_second=1e18, gemm=((1.0, 1e9),), latency=0.0)
    blocking = case([9, 0, 6])
    automatic = replace(blocking, overlap=OverlapConfig(), rates=fast)
    results = ranks.run(3, run_ranks, [blocking, automatic])
    bitwise([by_rank[1] for by_rank in results], [by_rank[0] for by_rank in results], "auto")


def test_second_derivatives_are_refused(ranks: RankPool) -> None:
    messages = ranks.run(2, _second_derivative, replace(case([3, 2]), overlap=overlap("source", None, "fc1")))
    assert all("once_differentiable" in message for message in messages)


def _second_derivative(one: Case) -> str:
    import torch.distributed as dist

    from lightning_moe.config import ParallelConfig
    from lightning_moe.moe.overlap.executor import ExpertOverlap
    from lightning_moe.parallel.mesh import ParallelMesh
    from tests.moe.cases import build_layer

    layer = build_layer(one, ParallelMesh.build(ParallelConfig(expert=2)))
    assert one.overlap is not None
    layer.overlap = ExpertOverlap(one.overlap)
    hidden = one.hidden[dist.get_rank()].clone().requires_grad_()
    output, _ = layer(hidden)
    grad = torch.autograd.grad(output.square().sum(), hidden, create_graph=True)[0]
    try:
        grad.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"
