"""Values and gradients of the collectives against the same computation on all ranks' tensors in one process.

Shapes: P ranks, D width; ``inputs[r]`` and ``weights[r]`` belong to rank r. The loss is the sum over ranks of
``(weights[r] * sin(outputs[r])).sum()``, so that gradients depend on values and on positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.parallel.collectives import (
    all_gather,
    all_to_all,
    copies_to_slices,
    copies_to_summands,
    reduce_scatter,
    slices_to_copies,
    start_all_gather,
    start_all_reduce_,
    start_reduce_scatter,
    summands_to_copies,
)
from lightning_moe.parallel.mesh import ParallelMesh
from tests.distributed import RankFailure, RankPool

Splits = Sequence[Sequence[int]]
"""``splits[s][d]``: rows that rank s sends to rank d."""

SPLITS: dict[str, Splits] = {
    "even": [[2, 2], [2, 2]],
    "uneven": [[3, 1], [2, 5]],
    "one rank receives all": [[0, 4], [0, 3]],
    "one rank sends nothing": [[0, 0], [2, 1]],
    "nobody sends": [[0, 0], [0, 0]],
    "three": [[1, 0, 4], [0, 0, 2], [3, 1, 0]],
    "four": [[0, 1, 2, 3], [4, 0, 0, 1], [0, 0, 0, 0], [2, 2, 0, 5]],
}
WIDTH = 3


def random_tensor(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_and_grad(
    function: Callable[[Tensor], Tensor], inputs: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """This rank's output and the gradient of its input; runs on every rank."""
    rank = dist.get_rank()
    leaf = inputs[rank].clone().requires_grad_()
    output = function(leaf)
    (weights[rank] * output.sin()).sum().backward()
    assert leaf.grad is not None
    return output.detach(), leaf.grad


def reference(
    function: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor], weights: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Every rank's output and input gradient, in one process, by torch's own autograd."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    outputs = function(leaves)
    total = sum((weight * out.sin()).sum() for weight, out in zip(weights, outputs, strict=True))
    assert isinstance(total, Tensor)
    grads = torch.autograd.grad(total, leaves, materialize_grads=True)
    return [output.detach() for output in outputs], list(grads)


def exchange(inputs: list[Tensor], splits: Splits) -> list[Tensor]:
    """All-to-all as slicing and concatenating."""
    blocks = [tensor.split(list(sent)) for tensor, sent in zip(inputs, splits, strict=True)]
    return [torch.cat([blocks[s][d] for s in range(len(splits))]) for d in range(len(splits))]


def columns(splits: Splits, rank: int) -> list[int]:
    return [sent[rank] for sent in splits]


def run_all_to_all(splits: Splits, inputs: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    return loss_and_grad(
        lambda x: all_to_all(x, columns(splits, rank), splits[rank], dist.group.WORLD), inputs, weights
    )


def run_there_and_back(splits: Splits, inputs: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Use one tensor in two exchanges, and one result in a second exchange, as dispatch and combine do."""
    rank, world = dist.get_rank(), dist.group.WORLD

    def function(x: Tensor) -> Tensor:
        there = all_to_all(x, columns(splits, rank), splits[rank], world)
        again = all_to_all(x * 2, columns(splits, rank), splits[rank], world)
        return x * all_to_all(there * again, splits[rank], columns(splits, rank), world)

    return loss_and_grad(function, inputs, weights)


def run_strided_all_to_all(splits: Splits, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Send every second column of a transposed tensor, and get an expanded (stride 0) gradient."""
    rank = dist.get_rank()
    leaf = inputs[rank].t().contiguous().requires_grad_()  # [D, rows]
    strided = leaf.t()[:, ::2]
    assert not strided.is_contiguous()
    output = all_to_all(strided, columns(splits, rank), splits[rank], dist.group.WORLD)
    output.sum().backward()
    assert leaf.grad is not None
    return output.detach(), leaf.grad.t()


def run_all_gather(dim: int, inputs: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    return loss_and_grad(lambda x: all_gather(x, dist.group.WORLD, dim), inputs, weights)


def run_reduce_scatter(dim: int, inputs: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    return loss_and_grad(lambda x: reduce_scatter(x, dist.group.WORLD, dim), inputs, weights)


def run_on_strided_and_twice(dim: int, inputs: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Gather and scatter transposed views, and use the input of each twice."""

    def function(x: Tensor) -> Tensor:
        gathered = all_gather(x.transpose(0, 1), dist.group.WORLD, dim)
        return x.transpose(0, 1) * reduce_scatter(gathered * gathered, dist.group.WORLD, dim)

    return loss_and_grad(function, inputs, weights)


def second_derivatives(inputs: list[Tensor]) -> list[Tensor]:
    """Gradient of the sum of squared gradients, for each collective."""
    world, results = dist.group.WORLD, []
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: all_to_all(x, [2, 2], [2, 2], world),
        lambda x: all_gather(x, world, 1),
        lambda x: reduce_scatter(x, world),
    ]
    for function in functions:
        leaf = inputs[dist.get_rank()].clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(leaf**2).pow(2).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(grad.pow(2).sum(), leaf)
        results.append(second)
    return results


def run_on_axes_of_size_one() -> bool:
    mesh = ParallelMesh.build(ParallelConfig(expert=2))
    group = mesh.group("tensor")
    assert group is not None
    x = random_tensor(dist.get_rank(), 4, WIDTH)
    results = (all_to_all(x, [4], [4], group), all_gather(x, group, 1), reduce_scatter(x, group))
    return all(torch.equal(result, x) for result in results)


def exchange_in(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    rows = torch.arange(4).mul(rank + 1).to(dtype).unsqueeze(1)
    return all_to_all(rows, [2, 2], [2, 2], dist.group.WORLD), all_gather(rows, dist.group.WORLD)


def assert_equal_to(
    expected: tuple[list[Tensor], list[Tensor]], results: list[tuple[Tensor, Tensor]], rtol: float
) -> None:
    for rank, (output, grad) in enumerate(results):
        torch.testing.assert_close(output, expected[0][rank], rtol=rtol, atol=rtol)
        torch.testing.assert_close(grad, expected[1][rank], rtol=rtol, atol=rtol)


def rows_for(splits: Splits) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of every rank, and weights for what each receives."""
    inputs = [random_tensor(i, sum(sent), WIDTH) for i, sent in enumerate(splits)]
    weights = [random_tensor(10 + i, sum(columns(splits, i)), WIDTH) for i in range(len(splits))]
    return inputs, weights


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS.keys())
def test_all_to_all(ranks: RankPool, splits: Splits) -> None:
    inputs, weights = rows_for(splits)
    results = ranks.run(len(splits), run_all_to_all, splits, inputs, weights)
    # Rows are only moved: equal to the last bit.
    assert_equal_to(reference(lambda xs: exchange(xs, splits), inputs, weights), results, rtol=0.0)


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS.keys())
def test_all_to_all_there_and_back(ranks: RankPool, splits: Splits) -> None:
    inputs, _ = rows_for(splits)
    weights = [random_tensor(10 + i, sum(sent), WIDTH) for i, sent in enumerate(splits)]
    back = [columns(splits, rank) for rank in range(len(splits))]

    def function(xs: list[Tensor]) -> list[Tensor]:
        there, again = exchange(xs, splits), exchange([x * 2 for x in xs], splits)
        returned = exchange([a * b for a, b in zip(there, again, strict=True)], back)
        return [x * y for x, y in zip(xs, returned, strict=True)]

    results = ranks.run(len(splits), run_there_and_back, splits, inputs, weights)
    assert_equal_to(reference(function, inputs, weights), results, rtol=1e-14)


def test_all_to_all_of_strided_rows(ranks: RankPool) -> None:
    splits = SPLITS["uneven"]
    inputs, _ = rows_for(splits)
    expected = exchange([x[:, ::2] for x in inputs], splits)
    for rank, (output, grad) in enumerate(ranks.run(2, run_strided_all_to_all, splits, inputs)):
        assert torch.equal(output, expected[rank])
        ones_in_used_columns = torch.zeros_like(inputs[rank])
        ones_in_used_columns[:, ::2] = 1
        assert torch.equal(grad, ones_in_used_columns)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("world_size", [2, 3])
def test_all_gather(ranks: RankPool, world_size: int, dim: int) -> None:
    inputs = [random_tensor(i, 2, 4, WIDTH) for i in range(world_size)]
    shape = torch.cat(inputs, dim).shape
    weights = [random_tensor(10 + i, *shape) for i in range(world_size)]
    results = ranks.run(world_size, run_all_gather, dim, inputs, weights)
    expected = reference(lambda xs: [torch.cat(xs, dim)] * world_size, inputs, weights)
    assert_equal_to(expected, results, rtol=1e-14)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("world_size", [2, 3])
def test_reduce_scatter(ranks: RankPool, world_size: int, dim: int) -> None:
    inputs = [random_tensor(i, 6, 12, 6) for i in range(world_size)]
    shape = inputs[0].chunk(world_size, dim)[0].shape
    weights = [random_tensor(10 + i, *shape) for i in range(world_size)]
    results = ranks.run(world_size, run_reduce_scatter, dim, inputs, weights)
    expected = reference(lambda xs: list(torch.stack(xs).sum(0).chunk(world_size, dim)), inputs, weights)
    assert_equal_to(expected, results, rtol=1e-14)


@pytest.mark.parametrize("dim", [0, 1])
def test_gather_and_scatter_of_strided_tensors_used_twice(ranks: RankPool, dim: int) -> None:
    inputs = [random_tensor(i, 2, 4) for i in range(2)]
    weights = [random_tensor(10 + i, 4, 2) for i in range(2)]

    def function(xs: list[Tensor]) -> list[Tensor]:
        squares = torch.cat([x.t() for x in xs], dim).square() * 2  # the same on both ranks, so their sum
        return [x.t() * part for x, part in zip(xs, squares.chunk(2, dim), strict=True)]

    results = ranks.run(2, run_on_strided_and_twice, dim, inputs, weights)
    assert_equal_to(reference(function, inputs, weights), results, rtol=1e-14)


def test_second_derivatives(ranks: RankPool) -> None:
    inputs = [random_tensor(i, 4, WIDTH) for i in range(2)]
    references: list[Callable[[list[Tensor]], list[Tensor]]] = [
        lambda xs: exchange(xs, [[2, 2], [2, 2]]),
        lambda xs: [torch.cat(xs, 1)] * 2,
        lambda xs: list((xs[0] + xs[1]).chunk(2)),
    ]
    results = ranks.run(2, second_derivatives, inputs)
    for i, function in enumerate(references):
        leaves = [x.clone().requires_grad_() for x in inputs]
        total = torch.stack([out.pow(2).sum() for out in function([x**2 for x in leaves])]).sum()
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        expected = torch.autograd.grad(torch.stack([grad.pow(2).sum() for grad in grads]).sum(), leaves)
        for rank in range(2):
            torch.testing.assert_close(results[rank][i], expected[rank], rtol=1e-13, atol=1e-13)


def run_copies_and_parts(dim: int, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Value, gradient and second derivative of a function of a copy that goes through summands, then through slices.

    ``f(x) = sin(sum_r (r + 1) x^2)`` cut into slices, each cubed and weighted by its rank, and put together again.
    """
    world, rank = dist.group.WORLD, dist.get_rank()
    x = random_tensor(0, 4, 4, dtype=dtype).transpose(0, 1).requires_grad_()

    def function(copy: Tensor) -> list[Tensor]:
        summand = copies_to_summands(copy, world).square() * (rank + 1)
        total = summands_to_copies(summand, world).sin()
        return [total, slices_to_copies(copies_to_slices(total, world, dim) ** 3 * (rank + 1), world, dim)]

    results = []
    for output in function(x):
        (grad,) = torch.autograd.grad(output.cos().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.pow(2).sum(), x, retain_graph=True)
        results.append((output.detach(), grad.detach(), second))
    return results


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("world_size", [2, 4])
def test_copies_and_parts(ranks: RankPool, world_size: int, dim: int) -> None:
    x = random_tensor(0, 4, 4).transpose(0, 1).requires_grad_()
    total = (x.square() * sum(range(1, world_size + 1))).sin()
    weighted = torch.cat([part**3 * (r + 1) for r, part in enumerate(total.chunk(world_size, dim))], dim)
    results = ranks.run(world_size, run_copies_and_parts, dim, torch.float64)
    for i, output in enumerate((total, weighted)):
        (grad,) = torch.autograd.grad(output.cos().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.pow(2).sum(), x, retain_graph=True)
        for result in results:
            torch.testing.assert_close(result[i][0], output.detach(), rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(result[i][1], grad.detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(result[i][2], second, rtol=1e-11, atol=1e-11)


def slice_unevenly(dim: int) -> None:
    copies_to_slices(torch.zeros(4, 5), dist.group.WORLD, dim)


def test_slices_need_a_multiple_of_the_ranks(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match="length 5 along dim 1 is not a multiple of 2 ranks"):
        ranks.run(2, slice_unevenly, 1)


def run_started() -> list[Tensor]:
    world = dist.group.WORLD
    assert world is not None
    x = random_tensor(dist.get_rank(), 4, WIDTH)
    gather, scatter = start_all_gather(x[::2], world), start_reduce_scatter(x.t().contiguous().t(), world)
    reduce = start_all_reduce_(x.clone(), world)
    return [pending.wait() for pending in (gather, scatter, reduce)]


def test_started_collectives(ranks: RankPool) -> None:
    first, second = random_tensor(0, 4, WIDTH), random_tensor(1, 4, WIDTH)
    for rank, (gathered, scattered, reduced) in enumerate(ranks.run(2, run_started)):
        assert torch.equal(gathered, torch.cat((first[::2], second[::2])))
        assert torch.equal(scattered, (first + second).chunk(2)[rank])
        assert torch.equal(reduced, first + second)


def test_no_group_is_the_identity() -> None:
    x = random_tensor(0, 4, WIDTH).requires_grad_()
    assert all_to_all(x, [4], [4], None) is x
    assert all_gather(x, None, dim=1) is x
    assert reduce_scatter(x, None) is x
    assert copies_to_summands(x, None) is x
    assert summands_to_copies(x, None) is x
    assert copies_to_slices(x, None, dim=1) is x
    assert slices_to_copies(x, None, dim=1) is x


def test_group_of_one_rank_is_the_identity(ranks: RankPool) -> None:
    assert ranks.run(2, run_on_axes_of_size_one) == [True, True]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float16, torch.float32, torch.bool])
def test_dtypes_are_carried(ranks: RankPool, dtype: torch.dtype) -> None:
    own = [torch.arange(4).mul(rank + 1).to(dtype).unsqueeze(1) for rank in range(2)]
    for rank, (exchanged, gathered) in enumerate(ranks.run(2, exchange_in, dtype)):
        assert exchanged.dtype == gathered.dtype == dtype
        assert torch.equal(exchanged, exchange(own, [[2, 2], [2, 2]])[rank])
        assert torch.equal(gathered, torch.cat(own))
