"""Gradients of parts of a weight: alone, in a queue, and in a bucket."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_moe.parallel.gradients import GradientReducer
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.weight_grad import GroupedMatmulGrad, MatmulGrad, WeightGradQueue, deliver, sink_of
from lightning_moe.weight_grad.segments import PartOfGrad
from tests.weight_grad.owners import MainGrad, NamedGrad, flops

ROWS, COLUMNS, TOKENS = 10, 6, 64
INDEX = (slice(7, 9), slice(0, 3), slice(4, 5))
"""Six of ten rows, or columns, not in order."""
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def operands(dtype: torch.dtype, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(TOKENS, n, generator=generator, dtype=torch.float64).to(dtype) for n in (width, COLUMNS))
    return left, right


def rows_of(index: tuple[slice, ...]) -> list[int]:
    return [row for run in index for row in range(run.start, run.stop)]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("index", [INDEX, INDEX[1:2], (slice(0, ROWS),)], ids=["runs", "run", "all"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_its_part_only_in_the_precision_of_the_sum(
    dtype: torch.dtype, dim: int, index: tuple[slice, ...], accumulate: bool
) -> None:
    rows = rows_of(index)
    left, right = operands(dtype, len(rows))
    part = MatmulGrad(left, right) if dim == 0 else MatmulGrad(right, left)
    shape = (ROWS, COLUMNS) if dim == 0 else (COLUMNS, ROWS)
    grad = PartOfGrad(part, index, shape, dim)
    product = left.double().t() @ right.double()
    expected = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    expected[rows] = product
    if dim == 1:
        expected = expected.t()
    before = 3.0 if accumulate else torch.nan
    main = torch.full(shape, before, dtype=torch.promote_types(dtype, torch.float32))
    grad.add_to(main, accumulate=accumulate)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5  # bfloat16 too: its products are exact in float32
    torch.testing.assert_close(main.double(), expected + (3.0 if accumulate else 0.0), rtol=tolerance, atol=tolerance)
    outside = torch.ones(shape, dtype=torch.bool).index_fill_(dim, torch.tensor(rows), False)
    assert (main[outside] == (3.0 if accumulate else 0.0)).all()
    whole = grad.compute()
    assert whole.dtype == dtype
    assert (whole[outside] == 0).all()
    rounding = 2**-7 if dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(whole.double(), expected, rtol=rounding, atol=rounding)


def test_stacked_experts() -> None:
    rows, grads = torch.randn(7, 4), torch.randn(7, 3)
    offsets = torch.tensor([5, 7], dtype=torch.int32)
    part = GroupedMatmulGrad(grads, rows, (5, 2), offsets, False)
    main = torch.full((4, 3, 4), torch.nan)
    PartOfGrad(part, (slice(1, 2), slice(3, 4)), (4, 3, 4)).add_to(main, accumulate=False)
    expected = torch.zeros(4, 3, 4)
    expected[1], expected[3] = grads[:5].t() @ rows[:5], grads[5:].t() @ rows[5:]
    torch.testing.assert_close(main, expected)


def test_says_of_itself_what_its_part_says() -> None:
    buffer = torch.randn(256, COLUMNS)
    left, right = torch.randn(8, 3), buffer[16:24]
    grad = PartOfGrad(MatmulGrad(left, right), (slice(2, 5),), (ROWS, COLUMNS))
    assert grad.flops == 2 * 8 * 3 * COLUMNS
    assert not grad.has_collective
    assert grad.tensors == (left, right)
    assert grad.nbytes == 4 * (8 * 3 + 256 * COLUMNS)
    compact = grad.compact()
    assert compact.nbytes == 4 * 8 * (3 + COLUMNS)
    assert torch.equal(compact.compute(), grad.compute())
    prefetched: list[str] = []

    class Communicating(NamedGrad):
        def prefetch(self) -> None:
            prefetched.append(self.name)

    collective = PartOfGrad(Communicating("a", collective=True), (slice(0, 1),), (ROWS, COLUMNS))
    collective.prefetch()
    assert collective.has_collective
    assert prefetched == ["a"]


class ByParts(torch.autograd.Function):
    """``hidden @ weight^T``, whose weight gradients are delivered in parts of the rows, the last part first."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, parts: tuple[tuple[slice, ...], ...]) -> Tensor:
        ctx.parts, ctx.sink = parts, sink_of(weight)
        ctx.save_for_backward(hidden, weight)
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        total = None
        for index in reversed(ctx.parts):
            part = MatmulGrad(grad[:, rows_of(index)], hidden)
            rest = deliver(PartOfGrad(part, index, tuple(weight.shape)), ctx.sink, weight.dtype)
            total = rest if total is None else total if rest is None else total + rest
        return None, total, None


PARTS = (INDEX, (slice(3, 4),), (slice(5, 7), slice(9, 10)))


def backward(weight: nn.Parameter, microbatch: int) -> None:
    hidden = operands(weight.dtype, seed=microbatch)[1]
    out: Tensor = ByParts.apply(hidden, weight, PARTS)
    out.sin().sum().backward()


def weight_of(dtype: torch.dtype) -> nn.Parameter:
    generator = torch.Generator().manual_seed(5)
    return nn.Parameter(torch.randn(ROWS, COLUMNS, generator=generator).to(dtype))


@pytest.mark.parametrize("max_bytes", [None, 0, 3000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deferred_parts_equal_those_added_at_once(dtype: torch.dtype, max_bytes: int | None) -> None:
    """Three parts of each of three microbatches, the first of which replaces what was there."""
    weight = weight_of(dtype)
    at_once = MainGrad(weight, None)
    for microbatch in range(3):
        backward(weight, microbatch)
    assert at_once.added == 9
    for by_weight in (False, True):
        queue = WeightGradQueue(max_bytes)
        sink = MainGrad(weight, queue)
        for microbatch in range(3):
            with queue.capture(microbatch):
                backward(weight, microbatch)
            if microbatch == 1:
                queue.run_within(2.5 * 2 * TOKENS * COLUMNS, flops)
        if by_weight:
            queue.run_tail([(microbatch, 0) for microbatch in range(3)])
        else:
            queue.pop_all()
        assert queue.live_bytes == queue.num_held == 0
        assert sink.added == 9
        assert torch.equal(sink.sum, at_once.sum)
    plain = nn.Parameter(weight.detach().clone())
    for microbatch in range(3):
        hidden = operands(dtype, seed=microbatch)[1]
        (hidden @ plain.t()).sin().sum().backward()
    assert plain.grad is not None
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(at_once.sum.to(dtype), plain.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("defers", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bucket_takes_parts(dtype: torch.dtype, defers: bool) -> None:
    """A pipeline step of two microbatches, twice: the second step replaces the gradients of the first."""
    module = nn.Module()
    module.weight = weight_of(dtype)
    queue = WeightGradQueue()
    reducer = GradientReducer(module, ParallelMesh.single(), 2**20, queue=queue)
    assert isinstance(module.weight, nn.Parameter)
    expected = MainGrad(plain := weight_of(dtype), None)
    for microbatch in (2, 3):
        backward(plain, microbatch)
    for step in range(2):
        reducer.begin_schedule(fresh=True)
        microbatches = (2 * step, 2 * step + 1)
        for microbatch in microbatches:
            reducer.start_pass(0, final=microbatch == microbatches[-1])
            if defers:
                with queue.capture(microbatch):
                    backward(module.weight, microbatch)
            else:
                backward(module.weight, microbatch)
            reducer.end_pass()
        assert queue.num_held == (6 if defers else 0)
        if defers:
            queue.run_tail([(microbatch, 0) for microbatch in microbatches])
        reducer.end_schedule()
        reducer.finish()
    assert module.weight.grad is not None
    assert torch.equal(module.weight.grad, expected.sum.to(dtype))
