"""Attention that overlaps its exchanges against dense attention, and what runs when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_moe.layers import TokenLayout
from lightning_moe.layers.pending_exchange import PendingExchange
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
    count_differences,
    dense,
    positions,
    rope,
    run_overlapped,
    variants,
)
from tests.layers.parallel import assert_close, build_mesh, own_sequence, random, run_cases
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
    """Every kind in every dtype, with every number of chunks; the last one is of more than there are heads."""
    kinds = [replace(kind, dtype=dtype) for kind in KINDS[ranks_] for dtype in TOLERANCES]
    return [replace(kind, chunks=n) for kind in kinds for n in (*range(1, kind.heads // ranks_ + 1), 99)]


@pytest.mark.parametrize("ranks_", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_equals_dense_attention_for_every_number_of_chunks(ranks: RankPool, ranks_: int) -> None:
    cases = cases_of(ranks_)
    compared = [case for i, case in enumerate(cases) if i % 7 == 0]
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


def test_beside_tensor_ranks(ranks: RankPool) -> None:
    cases = [replace(kind, dtype=dtype) for kind in BESIDE_TENSOR for dtype in TOLERANCES]
    also = [each for case in cases for each in variants(case)]
    results = run_all(ranks, {"tensor": 2, "context": 2}, cases + also)
    for case in cases:
        check_dense(results[case], dense(case), case, 2, TOLERANCES[case.dtype])
        overlapped, waiting = variants(case)
        assert_bitwise(results[overlapped], results[waiting], case)


# ---- what runs when


@contextmanager
def traced() -> Iterator[list[str]]:
    """Exchanges posted and waited for, numbered in the order of the forward pass; projections, attention, sums."""
    events: list[str] = []
    numbers: dict[PendingExchange, int] = {}
    post, wait, linear, add_to = PendingExchange.post, PendingExchange._wait, F.linear, MatmulGrad.add_to
    attend = F.scaled_dot_product_attention

    def logged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number = numbers.setdefault(args[0], len(numbers)) if isinstance(args[0], PendingExchange) else ""
            events.append(f"{name}{number}")
            return function(*args, **kwargs)

        return call

    with (
        patch.object(PendingExchange, "post", logged("post", post)),
        patch.object(PendingExchange, "_wait", logged("wait", wait)),
        patch.object(F, "linear", logged("project", linear)),
        patch.object(F, "scaled_dot_product_attention", logged("attend", attend)),
        patch.object(MatmulGrad, "add_to", logged("add", add_to)),
    ):
        yield events


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


# ---- ways to run a module


def parts(mesh: ParallelMesh, case: Case) -> tuple[Any, TokenLayout, tuple[Tensor, Tensor], Tensor]:
    """A module, and what it is called with, on tensor or context ranks."""
    context = mesh.size("context")
    layout = TokenLayout(BATCH, LENGTH // context, case.sequence_parallel, context_parallel=True)
    hidden = own_sequence(random(BATCH, LENGTH, WIDTH, dtype=case.dtype), mesh, layout).flatten(0, 1)
    leaf = hidden.clone().requires_grad_()
    return build(case, mesh), layout, rope(own_sequence(positions(), mesh, layout), case.dtype), leaf


def grads_of(module: Any, output: Tensor, *more: Tensor, **settings: Any) -> list[Tensor]:
    wanted = [*more, *(p for p in module.parameters() if p.requires_grad)]
    return [output.detach(), *torch.autograd.grad(output.sin().sum(), wanted, **settings)]


def run_in_other_ways(mesh: ParallelMesh) -> dict[str, bool]:
    case = Case(6, 2, "head", chunks=3)
    module, layout, tables, leaf = parts(mesh, case)
    expected = grads_of(module, module(leaf, layout, tables), leaf)

    def same(values: list[Tensor], others: list[Tensor] = expected) -> bool:
        return all(map(torch.equal, values, others))

    report = {}
    output = module(leaf, layout, tables)
    report["twice"] = same(grads_of(module, output, leaf, retain_graph=True)) and same(grads_of(module, output, leaf))
    again = checkpoint(module, leaf, layout, tables, use_reentrant=False)
    report["checkpointed"] = same(grads_of(module, again, leaf))
    with torch.no_grad():
        report["without a graph"] = torch.equal(module(leaf, layout, tables), expected[0])
    report["without the input's gradient"] = same(
        grads_of(module, module(leaf.detach(), layout, tables)), [expected[0], *expected[2:]]
    )
    module.requires_grad_(False)
    report["frozen"] = same(grads_of(module, module(leaf, layout, tables), leaf), expected[:2])
    module.qkv_proj.requires_grad_(True)
    report["half frozen"] = same(grads_of(module, module(leaf, layout, tables), leaf), expected[:3])
    module.requires_grad_(True)
    output = module(leaf, layout, tables)
    only = torch.autograd.grad(output.sin().sum(), module.o_proj.weight)
    report["one weight"] = torch.equal(only[0], expected[3])
    module.requires_grad_(False).o_proj.requires_grad_(True)
    output = module(leaf.detach(), layout, tables)
    with traced() as events:
        report["the last weight"] = same(grads_of(module, output), [expected[0], expected[3]])
    report["nothing is sent for it"] = not any(event.startswith("post") for event in events)
    module.requires_grad_(True)
    module.compile(backend="eager")
    report["compiled"] = same(grads_of(module, module(leaf, layout, tables), leaf))
    return report


def run_autocast(mesh: ParallelMesh) -> list[list[Tensor]]:
    """Blocking and by chunks; weights and their gradients are float32."""
    results = []
    for chunks in (1, 3):
        module, layout, tables, leaf = parts(mesh, Case(6, 2, "head", torch.float32, chunks))
        sinks = [MainGrad(weight, None) for weight in (module.qkv_proj.weight, module.o_proj.weight)]
        with torch.autocast(leaf.device.type, torch.bfloat16):
            output = module(leaf, layout, tables)
        assert output.dtype == torch.bfloat16
        output.float().sin().sum().backward()
        assert leaf.grad is not None
        results.append([output.detach().float(), leaf.grad, *(sink.sum for sink in sinks)])
    return results


def refuse(mesh: ParallelMesh) -> str:
    module, layout, tables, leaf = parts(mesh, Case(4, 4, "none"))
    output = module(leaf, layout, tables)
    with pytest.raises(RuntimeError, match=r"create_graph=True, or .*overlap\.attention_chunks: 1") as error:
        torch.autograd.grad(output.sum(), leaf, create_graph=True)
    module.exchange_chunks = 1
    (grad,) = torch.autograd.grad(module(leaf, layout, tables).sum(), leaf, create_graph=True)
    assert grad.requires_grad
    return str(error.value)


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


def run_cheap_checks(mesh: ParallelMesh) -> tuple[dict[str, bool], list[list[Tensor]], str, int]:
    differences = count_differences(mesh, Case(4, 2, "head", torch.bfloat16), length=32, width=16, head=8, times=6)
    return run_in_other_ways(mesh), run_autocast(mesh), refuse(mesh), differences


def test_ways_to_run_a_module(ranks: RankPool) -> None:
    ((_, results),) = run_cases(ranks, {"context": 2}, run_cheap_checks, [()])
    for report, (blocking, chunked), message, differences in results:
        assert [name for name, equal in report.items() if not equal] == []
        assert len(report) == 10
        for value, expected in zip(chunked, blocking, strict=True):
            assert_close(value, expected, 2e-2)
        assert "has no second derivative" in message
        assert differences == 0


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
