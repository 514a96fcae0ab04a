"""Attention that overlaps its exchanges against dense attention, and what runs when."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_moe.layers import TokenLayout
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.weight_grad import GatheredInputGrad, MatmulGrad, WeightGrad, WeightGradQueue
from lightning_moe.weight_grad.segments import PartOfGrad
from tests.distributed import RankPool
from tests.layers.overlapped import (
    BATCH,
    LENGTH,
    TOLERANCES,
    WIDTH,
    Case,
    assert_bitwise,
    build,
    check_dense,
    dense,
    parts,
    positions,
    rope,
    run_overlapped,
    traced,
    variants,
)
from tests.layers.parallel import build_mesh, random, run_cases
from tests.weight_grad.owners import MainGrad

KINDS = {
    2: [Case(8, 8, "none"), Case(8, 4, "head"), Case(8, 2, "projection"), Case(8, 1, "head")],
    # As many key heads as ranks need, numbers that the ranks do not divide, fewer than ranks, a single one.
    3: [Case(9, 9, "projection"), Case(12, 4, "head"), Case(12, 2, "none"), Case(12, 1, "head")],
    4: [Case(12, 12, "head"), Case(12, 6, "projection"), Case(12, 2, "none"), Case(12, 1, "head")],
}
"""For each number of context ranks."""

BESIDE_TENSOR = [
    Case(8, 8, "none", sequence_parallel=True),
    Case(8, 2, "head"),
    Case(8, 2, "projection"),
    Case(8, 4, "head", sequence_parallel=True),
]
"""On two tensor and two context ranks."""


def cases_of(ranks_: int) -> list[Case]:
    """Every kind with every number of chunks, the last one of more than there are heads; in other dtypes two chunks."""
    kinds = KINDS[ranks_]
    cases = [replace(kind, chunks=n) for kind in kinds for n in (*range(1, kind.heads // ranks_ + 1), 99)]
    return cases + [replace(kind, dtype=dtype) for kind in kinds for dtype in TOLERANCES if dtype != torch.float64]


@pytest.mark.parametrize("ranks_", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (3, 4))])
def test_equals_dense_attention_for_every_number_of_chunks(ranks: RankPool, ranks_: int) -> None:
    cases = cases_of(ranks_)
    compared = [case for i, case in enumerate(cases) if i % 5 == 3]
    results = run_all(ranks, {"context": ranks_}, cases + [each for case in compared for each in variants(case)])
    expected = {kind: dense(kind) for kind in {replace(case, chunks=2) for case in cases}}
    for case in cases:
        check_dense(results[case], expected[replace(case, chunks=2)], case, 1, TOLERANCES[case.dtype])
    for case in compared:
        overlapped, waiting = variants(case)
        assert_bitwise(results[overlapped], results[waiting], case)


def run_all(ranks: RankPool, sizes: dict[str, int], cases: list[Case]) -> dict[Case, list[Any]]:
    arguments = [(case,) for case in cases]
    return {case: results for (case,), results in run_cases(ranks, sizes, run_overlapped, arguments)}


@pytest.mark.slow
def test_beside_tensor_ranks(ranks: RankPool) -> None:
    cases = [replace(kind, dtype=dtype) for kind in BESIDE_TENSOR for dtype in TOLERANCES]
    also = [each for case in cases for each in variants(case)]
    results = run_all(ranks, {"tensor": 2, "context": 2}, cases + also)
    for case in cases:
        check_dense(results[case], dense(case), case, 2, TOLERANCES[case.dtype])
        overlapped, waiting = variants(case)
        assert_bitwise(results[overlapped], results[waiting], case)


# ---- what runs when


def trace(mesh: ParallelMesh, wait_at_once: bool) -> tuple[str, str, str]:
    """What the forward pass, the backward pass and deferred weight gradients do, of two chunks."""
    module, layout, tables, leaf = parts(mesh, Case(4, 4, "head", wait_at_once=wait_at_once))
    queue = WeightGradQueue()
    MainGrad(module.qkv_proj.weight, queue)
    MainGrad(module.o_proj.weight, queue)
    with traced() as events:
        loss = module(leaf, layout, tables).sum()
        events.append("|")
        with queue.capture(0):
            loss.backward()
        events.append("|")
        queue.pop(0)
    forward, backward, deferred = " ".join(events).split("|")
    return forward.strip(), backward.strip(), deferred.strip()


def test_exchanges_are_under_way_while_others_are_computed(ranks: RankPool) -> None:
    (_, overlapped), (_, waiting) = run_cases(ranks, {"context": 2}, trace, [(False,), (True,)])
    for forward, backward, deferred in overlapped:
        assert forward == "project post0 project post1 wait0 attend post2 wait1 attend post3 wait2 add wait3 add"
        assert backward == "post3 post2 wait3 post1 wait2 post0 wait1 add wait0 add"
        assert deferred == "add add add add"
    for forward, backward, _ in waiting:
        for events in (forward.split(), backward.split()):
            for i, event in enumerate(events):
                assert not event.startswith("post") or events[i + 1] == event.replace("post", "wait")
        assert forward.count("wait") == backward.count("wait") == 4


class Operands(MainGrad):
    """Keeps what it is given to take."""

    def take(self, grad: WeightGrad, *, deferrable: bool = True) -> bool:
        self.grads = [*getattr(self, "grads", []), grad]
        return super().take(grad, deferrable=deferrable)


def run_with_tensor_ranks(mesh: ParallelMesh) -> list[Any]:
    """Kinds of weight gradients and whether they communicate, while a queue captures and without."""
    found = []
    for queue in (None, WeightGradQueue()):
        module, layout, tables, leaf = parts(mesh, Case(8, 2, "none", sequence_parallel=True))
        sinks = [Operands(weight, queue) for weight in (module.qkv_proj.weight, module.o_proj.weight)]
        own = leaf.detach().chunk(2)[mesh.rank("tensor")].requires_grad_()
        loss = module(own, layout, tables).sum()
        if queue is None:
            loss.backward()
        else:
            with queue.capture(0):
                loss.backward()
            queue.pop(0)
        found.append([(type(grad.grad), grad.has_collective) for sink in sinks for grad in sink.grads])
        assert all(isinstance(grad, PartOfGrad) for sink in sinks for grad in sink.grads)
    return found


def test_shared_tokens_are_gathered_where_weight_gradients_are_computed(ranks: RankPool) -> None:
    ((_, results),) = run_cases(ranks, {"tensor": 2, "context": 2}, run_with_tensor_ranks, [()])
    for at_once, deferred in results:
        assert at_once == [(MatmulGrad, False)] * 4
        assert [kind for kind, _ in deferred].count(GatheredInputGrad) == len(deferred) // 2 == 2
        assert all(collective for _, collective in deferred)


def test_one_chunk_is_the_blocking_exchange() -> None:
    """Nothing is exchanged in a world of one, and heads of one rank each are one chunk."""
    mesh = build_mesh()
    module = build(Case(4, 2, "head", chunks=4), mesh)
    hidden, layout = random(BATCH * LENGTH, WIDTH), TokenLayout(BATCH, LENGTH)
    tables = rope(positions(), torch.float64)
    with traced() as events:
        module(hidden, layout, tables)
    assert events == ["project", "attend", "project"]
