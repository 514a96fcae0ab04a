"""Column- and row-parallel layers against torch's own linear functions on the whole weights."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_moe.layers import ColumnParallelLinear, Linear, RowParallelLinear, TokenLayout
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import local_part, shard_specs
from lightning_moe.weight_grad import WeightGrad, attach_sink
from tests.distributed import RankPool
from tests.layers.parallel import (
    TOLERANCES,
    Grads,
    assert_close,
    assert_shards,
    build_mesh,
    gather,
    own_rows,
    random,
    result_of,
    run_cases,
)

TOKENS, WIDTH, INNER = 8, 6, 10
LAYOUTS = [TokenLayout(2, 4), TokenLayout(2, 4, sequence_parallel=True)]


class Pair(nn.Module):
    """Two stacked blocks of rows whose outputs are multiplied, then a row-parallel layer; all uneven."""

    def __init__(self, mesh: ParallelMesh) -> None:
        super().__init__()
        torch.manual_seed(0)
        size, rank = mesh.size("tensor"), mesh.rank("tensor")
        self.inner = range(INNER)[rank::size]  # neither contiguous nor, on four ranks, even
        index = (*self.inner, *(INNER + row for row in self.inner))
        self.column = ColumnParallelLinear(WIDTH, 2 * INNER, mesh, index=index)
        self.row = RowParallelLinear(INNER, WIDTH, mesh, index=self.inner, init_std=0.5)

    def forward(self, hidden: Tensor, layout: TokenLayout) -> Tensor:
        first, second = self.column(hidden, layout).chunk(2, dim=-1)
        out: Tensor = self.row(first * second, layout)
        return out


def whole_pair(column: Tensor, row: Tensor, hidden: Tensor) -> Tensor:
    first, second = F.linear(hidden, column).chunk(2, dim=-1)
    return F.linear(first * second, row)


def run_pair(mesh: ParallelMesh, layout: TokenLayout, dtype: torch.dtype) -> Grads:
    pair = Pair(mesh).to(dtype)
    leaf = own_rows(random(TOKENS, WIDTH, dtype=dtype), mesh, layout).clone().requires_grad_()
    output = pair(leaf, layout)
    (own_rows(random(TOKENS, WIDTH, seed=1, dtype=dtype), mesh, layout) * output.sin()).sum().backward()
    return result_of(pair, output, leaf)


def reference_pair(dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    weights = {
        name: p.detach().to(dtype).requires_grad_() for name, p in Pair(ParallelMesh.single()).named_parameters()
    }
    hidden = random(TOKENS, WIDTH, dtype=dtype).requires_grad_()
    output = whole_pair(weights["column.weight"], weights["row.weight"], hidden)
    grads = torch.autograd.grad(
        (random(TOKENS, WIDTH, seed=1, dtype=dtype) * output.sin()).sum(), [hidden, *weights.values()]
    )
    return output.detach(), grads[0], dict(zip(weights, grads[1:], strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_whole_matrices(ranks: RankPool, world_size: int) -> None:
    cases = list(product(LAYOUTS, TOLERANCES))
    for (layout, dtype), results in run_cases(ranks, {"tensor": world_size}, run_pair, cases):
        check_pair(results, layout, dtype, TOLERANCES[dtype])


def check_pair(results: list[Grads], layout: TokenLayout, dtype: torch.dtype, tolerance: float) -> None:
    """Compare the results of :func:`run_pair` with whole matrices, computed in ``dtype``."""
    output, grad, parameters = reference_pair(dtype)
    assert_close(gather([result.output for result in results], layout), output, tolerance, "output")
    assert_close(gather([result.input for result in results], layout), grad, tolerance, "input gradient")
    assert_shards(results, parameters, tolerance)


def initial_weights() -> list[tuple[Tensor, Any]]:
    mesh = build_mesh(tensor=torch.distributed.get_world_size())
    torch.manual_seed(0)
    layers = nn.ModuleList([ColumnParallelLinear(64, 7, mesh), RowParallelLinear(7, 64, mesh)])
    specs = shard_specs(layers)
    return [(p.detach(), specs[name]) for name, p in layers.named_parameters()]


def test_initial_weights_do_not_depend_on_the_topology(ranks: RankPool) -> None:
    (column, _), (row, _) = ranks.run(1, initial_weights)[0]
    assert column.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert row.std().item() == pytest.approx(7**-0.5, rel=0.1)
    for own_column, own_row in ranks.run(3, initial_weights):
        assert torch.equal(own_column[0], local_part(column, own_column[1]))
        assert torch.equal(own_row[0], local_part(row, own_row[1]))


class Collector:
    """A sink that takes everything into a float32 (or wider) buffer, or refuses everything."""

    def __init__(self, weight: nn.Parameter, takes: bool) -> None:
        self.takes = takes
        self.calls = 0
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.main_grad = torch.full_like(weight, float("nan"), dtype=dtype, requires_grad=False)
        attach_sink(weight, self)

    @property
    def defers(self) -> bool:
        return False

    def take(self, grad: WeightGrad, *, deferrable: bool = True) -> bool:
        if self.takes:
            grad.add_to(self.main_grad, accumulate=self.calls > 0)
        self.calls += 1
        return self.takes


def run_with_sinks(layout: TokenLayout, dtype: torch.dtype, takes: bool) -> list[tuple[Tensor | None, Tensor, int]]:
    mesh = build_mesh(tensor=2)
    pair = Pair(mesh).to(dtype)
    sinks = [Collector(p, takes) for p in pair.parameters()]
    for seed in (0, 2):
        hidden = own_rows(random(TOKENS, WIDTH, seed=seed, dtype=dtype), mesh, layout)
        pair(hidden, layout).sum().backward()
    return [(p.grad, sink.main_grad, sink.calls) for p, sink in zip(pair.parameters(), sinks, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["copies", "slices"])
def test_sinks_take_the_weight_gradients(ranks: RankPool, layout: TokenLayout) -> None:
    for takes, refuses in zip(
        ranks.run(2, run_with_sinks, layout, torch.float64, True),
        ranks.run(2, run_with_sinks, layout, torch.float64, False),
        strict=True,
    ):
        for (left, main_grad, calls), (grad, unused, _) in zip(takes, refuses, strict=True):
            assert left is None
            assert calls == 2
            assert unused.isnan().all()
            assert_close(main_grad, grad, 1e-14)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["copies", "slices"])
def test_bfloat16_gradients_are_summed_in_float32(ranks: RankPool, layout: TokenLayout) -> None:
    """The sum of two uses, each a product of bfloat16 operands: rounding the first one would show at 1e-3."""
    for _, main_grad, _ in ranks.run(2, run_with_sinks, layout, torch.bfloat16, True)[0][1:]:
        # The row-parallel layer: its operands can be computed exactly as the layer does.
        mesh = ParallelMesh.single()
        weights = Pair(mesh).to(torch.bfloat16)
        expected = torch.zeros_like(main_grad)
        for seed in (0, 2):
            hidden = random(TOKENS, WIDTH, seed=seed, dtype=torch.bfloat16)
            first, second = F.linear(hidden, weights.column.weight).chunk(2, dim=-1)
            inner = (first * second)[:, 0::2].detach().float()
            expected += torch.ones(TOKENS, WIDTH).T @ inner
        assert_close(main_grad, expected, 1e-6)


def run_second_derivative(layout: TokenLayout) -> Grads:
    mesh = build_mesh(tensor=2)
    pair = Pair(mesh).double()
    leaf = own_rows(random(TOKENS, WIDTH), mesh, layout).clone().requires_grad_()
    output = pair(leaf, layout)
    # Slices are summed over ranks as part of one loss; of copies each rank has the loss itself.
    grads = torch.autograd.grad(output.sin().sum(), [leaf, pair.row.weight, pair.column.weight], create_graph=True)
    grads[0].square().sum().backward()
    return result_of(pair, output, leaf)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["copies", "slices"])
def test_second_derivatives(ranks: RankPool, layout: TokenLayout) -> None:
    results = ranks.run(2, run_second_derivative, layout)
    weights = {name: p.detach().double().requires_grad_() for name, p in Pair(ParallelMesh.single()).named_parameters()}
    hidden = random(TOKENS, WIDTH).requires_grad_()
    output = whole_pair(weights["column.weight"], weights["row.weight"], hidden)
    (grad,) = torch.autograd.grad(output.sin().sum(), hidden, create_graph=True)
    expected = torch.autograd.grad(grad.square().sum(), [hidden, *weights.values()])
    assert_close(gather([result.input for result in results], layout), expected[0], 1e-12)
    assert_shards(results, dict(zip(weights, expected[1:], strict=True)), 1e-12)


class Operations(TorchDispatchMode):
    """Records collectives and matrix products in the order in which they are issued."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::") or name in ("aten::mm", "aten::addmm_", "aten::addmm"):
            self.names.append(name.split("::")[1].strip("_"))
        return func(*args, **(kwargs or {}))


def backward_of_a_column(layout: TokenLayout) -> tuple[list[str], list[tuple[int, ...]]]:
    mesh = build_mesh(tensor=2)
    column = ColumnParallelLinear(WIDTH, INNER, mesh)
    leaf = own_rows(random(TOKENS, WIDTH, dtype=torch.float32), mesh, layout).clone().requires_grad_()
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = column(leaf, layout)
    with Operations() as operations:
        torch.autograd.grad(output, [leaf, column.weight], torch.ones_like(output))
    return operations.names, kept


def test_backward_communicates_under_the_matrix_products(ranks: RankPool) -> None:
    copies, slices = LAYOUTS
    names, kept = ranks.run(2, backward_of_a_column, slices)[0]
    assert names == ["allgather_base", "mm", "reduce_scatter_base", "mm"]
    assert kept == [(TOKENS // 2, WIDTH), (INNER // 2, WIDTH)]  # this rank's tokens only
    assert ranks.run(2, backward_of_a_column, copies)[0][0] == ["mm", "allreduce", "mm"]


def frozen(layout: TokenLayout) -> list[list[str]]:
    """Operations of the backward pass when only the input, or only the weight, needs a gradient."""
    mesh = build_mesh(tensor=2)
    found = []
    for trains_input in (True, False):
        column = ColumnParallelLinear(WIDTH, INNER, mesh).requires_grad_(not trains_input)
        leaf = own_rows(random(TOKENS, WIDTH, dtype=torch.float32), mesh, layout).clone().requires_grad_(trains_input)
        output = column(leaf, layout)
        with Operations() as operations:
            output.backward(torch.ones_like(output))
        found.append(operations.names)
    return found


def test_frozen_weights_and_inputs_cost_nothing(ranks: RankPool) -> None:
    copies, slices = LAYOUTS
    assert ranks.run(2, frozen, copies)[0] == [["mm", "allreduce"], ["mm"]]
    assert ranks.run(2, frozen, slices)[0] == [["mm", "reduce_scatter_base"], ["allgather_base", "mm"]]


def autocast(layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor]:
    mesh = build_mesh(tensor=2)
    pair = Pair(mesh)
    leaf = own_rows(random(TOKENS, WIDTH, dtype=torch.float32), mesh, layout).clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        inner, output = pair.column(leaf, layout), pair(leaf, layout)
    assert inner.dtype == output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert leaf.grad is not None
    assert pair.column.weight.grad is not None
    return output.detach().float(), leaf.grad, pair.column.weight.grad


@pytest.mark.parametrize("layout", LAYOUTS, ids=["copies", "slices"])
def test_autocast(ranks: RankPool, layout: TokenLayout) -> None:
    """Computed and sent in bfloat16 (8 bits: errors of 2^-8 for each of a few roundings), gradients in float32."""
    results = ranks.run(2, autocast, layout)
    weights = Pair(ParallelMesh.single())
    hidden = random(TOKENS, WIDTH, dtype=torch.float32).requires_grad_()
    output = whole_pair(weights.column.weight, weights.row.weight, hidden)
    output.sum().backward()
    assert hidden.grad is not None
    assert weights.column.weight.grad is not None
    assert_close(gather([result[0] for result in results], layout), output.detach(), 2e-2)
    assert_close(gather([result[1] for result in results], layout), hidden.grad, 2e-2)
    for rank, result in enumerate(results):
        assert result[2].dtype == torch.float32
        index = [*range(rank, INNER, 2), *range(INNER + rank, 2 * INNER, 2)]
        assert_close(result[2], weights.column.weight.grad[index], 2e-2)


def compiled(layout: TokenLayout) -> list[tuple[Tensor, ...]]:
    mesh = build_mesh(tensor=torch.distributed.get_world_size())
    results = []
    for compile_it in (False, True):
        pair = Pair(mesh)
        function = torch.compile(pair, backend="aot_eager") if compile_it else pair
        leaf = own_rows(random(TOKENS, WIDTH, dtype=torch.float32), mesh, layout).clone().requires_grad_()
        output = function(leaf, layout)
        output.sin().sum().backward()
        results.append((output.detach(), leaf.grad, *(p.grad for p in pair.parameters())))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=["copies", "slices"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_compiled_equals_eager(ranks: RankPool, world_size: int, layout: TokenLayout) -> None:
    for eager, other in ranks.run(world_size, partial(compiled, layout)):
        for value, expected in zip(other, eager, strict=True):
            assert_close(value, expected, 1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_a_drop_in_for_torchs(bias: bool) -> None:
    torch.manual_seed(0)
    peer = torch.nn.Linear(6, 5, bias=bias, dtype=torch.float64)
    torch.manual_seed(0)
    ours = Linear(6, 5, bias=bias, dtype=torch.float64)
    ours.load_state_dict(peer.state_dict())
    assert torch.equal(ours.weight, peer.weight)
    input = torch.randn(3, 4, 6, dtype=torch.float64)
    for module in (ours, peer):
        module(input).square().sum().backward()
    torch.testing.assert_close(ours(input), peer(input), rtol=1e-14, atol=1e-14)
    for parameter, expected in zip(ours.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-13, atol=1e-13)
