"""Gradient buckets: what they hold, when they are reduced, and the global norm."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_moe import ConfigError, ParallelConfig, ParallelMesh, ShardSpec, set_shard_spec
from lightning_moe.parallel.grad_norm import global_grad_norm
from lightning_moe.parallel.gradients import GradientReducer
from lightning_moe.parallel.sharding import set_partial_grad
from lightning_moe.weight_grad import linear, sink_of
from tests.distributed import RankPool


class Two(nn.Module):
    """One dense and one expert-parallel parameter; the loss is linear, so gradients are known."""

    def __init__(self, mesh: ParallelMesh, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dense = nn.Parameter(torch.zeros(3, dtype=dtype))
        first = mesh.rank("expert") * 2
        self.experts = nn.Parameter(torch.zeros(2, 3, dtype=dtype))
        size = 2 * mesh.size("expert")
        set_shard_spec(self, "experts", ShardSpec("expert", 0, size, (first, first + 1)))

    def loss(self, weight: float) -> Tensor:
        return weight * (self.dense.sum() + self.experts.sum())


def _backward(reducer: GradientReducer, loss: Tensor) -> None:
    reducer.arm()
    loss.backward()
    reducer.finish()


def reduce_known_gradients(bucket_bytes: int) -> tuple[list[float], list[float]]:
    """Rank ``r`` contributes ``r + 1`` to every element."""
    mesh = ParallelMesh.build(ParallelConfig(expert=2))
    module = Two(mesh)
    reducer = GradientReducer(module, mesh, bucket_bytes)
    _backward(reducer, module.loss(float(dist.get_rank() + 1)))
    assert module.dense.grad is not None
    assert module.experts.grad is not None
    return module.dense.grad.tolist(), module.experts.grad.flatten().tolist()


@pytest.mark.parametrize("bucket_bytes", [1, 2**20])
def test_scaling(ranks: RankPool, bucket_bytes: int) -> None:
    """Dense: mean over 4 ranks of 1..4. Experts of rank 0 and 2: their sum (1 + 3) over the same 4 ranks."""
    results = ranks.run(4, reduce_known_gradients, bucket_bytes)
    for rank, (dense, experts) in enumerate(results):
        assert dense == [2.5] * 3
        assert experts == [(1 + 3) / 4 if rank % 2 == 0 else (2 + 4) / 4] * 6


def accumulate(dtype: torch.dtype) -> list[float]:
    mesh = ParallelMesh.build(ParallelConfig())
    module = Two(mesh, dtype)
    reducer = GradientReducer(module, mesh, 2**20)
    seen = []
    calls: list[int] = []
    original = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    dist.all_reduce = counted
    try:
        with reducer.no_sync():
            _backward(reducer, module.loss(1.0 + dist.get_rank()))
            _backward(reducer, module.loss(1 / 512))  # too small to change 1.0 in bfloat16
        assert not calls, "accumulation must not communicate"
        _backward(reducer, module.loss(1 / 512))
    finally:
        dist.all_reduce = original
    assert module.dense.grad is not None
    assert module.dense.grad.dtype == dtype
    seen.append(float(module.dense.grad[0]))
    module.zero_grad()
    assert module.dense.grad is None
    _backward(reducer, module.loss(2.0))
    seen.append(float(module.dense.grad[0]))
    module.zero_grad(set_to_none=False)
    _backward(reducer, module.loss(3.0))
    seen.append(float(module.dense.grad[0]))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_accumulation_restarts_and_precision(ranks: RankPool, dtype: torch.dtype) -> None:
    """Low precision accumulates in float32: parts that bfloat16 would lose one by one count together."""
    first, second, third = ranks.run(2, accumulate, dtype)[0]
    exact = 1.5 + 2 / 512
    assert first == float(torch.tensor(exact).to(dtype))
    if dtype is torch.bfloat16:
        assert first == pytest.approx(exact, rel=2**-8)
    assert (second, third) == (2.0, 3.0)


class Chain(nn.Module):
    """Layers used in an order of the rank's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(6))

    def forward(self, x: Tensor, order: list[int]) -> Tensor:
        for i in order:
            x = self.layers[i](x)
        return x


def reduce_in_different_orders() -> list[Tensor]:
    mesh = ParallelMesh.build(ParallelConfig())
    torch.manual_seed(0)
    module = Chain()
    reducer = GradientReducer(module, mesh, 1)
    order = list(range(6)) if dist.get_rank() == 0 else [5, 0, 4, 1, 3, 2]
    _backward(reducer, module(torch.ones(2, 4), order).sum())
    return [layer.weight.grad for layer in module.layers]  # type: ignore[misc]


def test_ranks_that_reach_parameters_in_different_orders(ranks: RankPool) -> None:
    """Buckets go in one order everywhere; otherwise ranks would reduce different buckets with each other."""
    first, second = ranks.run(2, reduce_in_different_orders)
    torch.manual_seed(0)
    module = Chain()
    loss = module(torch.ones(2, 4), list(range(6))).sum() + module(torch.ones(2, 4), [5, 0, 4, 1, 3, 2]).sum()
    loss.backward()
    for ours, theirs, layer in zip(first, second, module.layers, strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, layer.weight.grad / 2, rtol=1e-6, atol=1e-6)


def record_backward(orders: list[list[int]]) -> list[str]:
    """What happens in one backward pass, with one bucket per layer: gradients arrive, and buckets are reduced."""
    mesh = ParallelMesh.build(ParallelConfig())
    torch.manual_seed(0)
    module = Chain()
    events: list[str] = []
    reduced: list[Tensor] = []
    for i, layer in enumerate(module.layers):
        # A hook on the tensor runs before the gradient is accumulated, so before the reducer hears of it.
        layer.weight.register_hook(lambda _, i=i: events.append(f"gradient {i}"))  # type: ignore[operator, misc]
    reducer = GradientReducer(module, mesh, 1)
    original = dist.all_reduce

    def recorded(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        events.append("reduce" if kwargs.get("async_op") else "wait for a reduction")
        reduced.append(tensor)
        return original(tensor, *args, **kwargs)

    dist.all_reduce = recorded
    try:
        reducer.arm()
        module(torch.ones(2, 4), orders[dist.get_rank()]).sum().backward()
        events.append("end of backward")
        reducer.finish()
    finally:
        dist.all_reduce = original
    # A gradient is a view of the bucket it was reduced in.
    layer_of = {layer.weight.grad.untyped_storage().data_ptr(): i for i, layer in enumerate(module.layers)}  # type: ignore[union-attr, operator]
    numbers = iter(layer_of[tensor.untyped_storage().data_ptr()] for tensor in reduced)
    return [f"{event} {next(numbers)}" if event == "reduce" else event for event in events]


def test_buckets_are_reduced_during_backward_and_in_one_order(ranks: RankPool) -> None:
    """Each as soon as it is complete, but none before the one ahead of it, whatever a rank reaches first."""
    natural = [0, 1, 2, 3, 4, 5]
    delayed = [0, 5, 1, 2, 3, 4]  # backward reaches layer 5, whose bucket goes first, almost last
    first, second = ranks.run(2, record_backward, [natural, delayed])
    assert first == [event for i in reversed(natural) for event in (f"gradient {i}", f"reduce {i}")] + [
        "end of backward"
    ]
    assert second == [
        *(f"gradient {i}" for i in (4, 3, 2, 1, 5)),
        *(f"reduce {i}" for i in (5, 4, 3, 2, 1)),
        "gradient 0",
        "reduce 0",
        "end of backward",
    ]


def unfreeze_later() -> float:
    mesh = ParallelMesh.build(ParallelConfig())
    module = Two(mesh)
    module.dense.requires_grad_(False)
    reducer = GradientReducer(module, mesh, 2**20)
    _backward(reducer, module.loss(1.0))
    assert module.dense.grad is None
    module.dense.requires_grad_(True)
    module.zero_grad()
    _backward(reducer, module.loss(float(dist.get_rank())))
    assert module.dense.grad is not None
    return float(module.dense.grad[0])


def test_parameters_unfrozen_by_a_callback_are_reduced(ranks: RankPool) -> None:
    assert ranks.run(2, unfreeze_later) == [0.5, 0.5]


def unfreeze_in_turns() -> list[Any]:
    """One of two parameters at a time, as ``toggle_optimizer`` does, the second for the first time later."""
    mesh = ParallelMesh.build(ParallelConfig())
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1), requires_grad=False)
    reducer = GradientReducer(nn.ParameterList([first, second]), mesh, 2**20)
    weight = float(dist.get_rank())
    _backward(reducer, (weight * first).sum())
    buckets = []
    for active, frozen in ((second, first), (first, second), (second, first)):
        active.requires_grad_(True)
        frozen.requires_grad_(False)
        _backward(reducer, (weight * active).sum())
        buckets.append(len(reducer._buckets))
    assert first.grad is not None
    assert second.grad is not None
    return [float(first.grad), float(second.grad), buckets]


def test_gradients_survive_when_other_parameters_are_unfrozen(ranks: RankPool) -> None:
    """What a frozen parameter has accumulated stays, and buckets are built once for each parameter."""
    assert ranks.run(2, unfreeze_in_turns) == [[1.0, 1.0, [2, 2, 2]]] * 2


def test_a_gradient_set_by_the_user_survives_a_backward_that_does_not_reach_it() -> None:
    module = Two(ParallelMesh.single())
    reducer = GradientReducer(module, ParallelMesh.single(), 2**20)
    module.dense.grad = torch.full((3,), 5.0)
    _backward(reducer, module.experts.sum())
    assert module.dense.grad is not None
    assert module.dense.grad.tolist() == [5.0] * 3


def test_gradients_have_the_memory_layout_of_their_parameters() -> None:
    """Fused optimizers walk through both in memory order, on the CPU without checking it."""
    torch.manual_seed(0)
    weights = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), torch.randn(5, 3).t()
    module = nn.ParameterList([nn.Parameter(weight.clone()) for weight in weights])
    twin = nn.ParameterList([nn.Parameter(weight.clone()) for weight in weights])
    reducer = GradientReducer(module, ParallelMesh.single(), 2**20)
    for parameters in (module, twin):
        optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
        loss = sum(parameter.pow(3).sum() for parameter in parameters)
        assert isinstance(loss, Tensor)
        if parameters is module:
            _backward(reducer, loss)
        else:
            loss.backward()
        optimizer.step()
    for parameter, expected in zip(module, twin, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-6)


def reduce_complex() -> tuple[list[complex], bool, float]:
    mesh = ParallelMesh.build(ParallelConfig())
    used, unused = nn.Parameter(torch.zeros(2, dtype=torch.complex64)), nn.Parameter(torch.zeros(2, dtype=torch.cfloat))
    reducer = GradientReducer(nn.ParameterList([used, unused]), mesh, 2**20)
    _backward(reducer, (used * complex(0, dist.get_rank())).real.sum())
    assert used.grad is not None
    own = reducer.own_grad(used)
    assert own is not None
    assert reducer.own_grad(unused) is None
    return used.grad.tolist(), unused.grad is None, float(global_grad_norm([own], mesh, used.device))


def test_complex_parameters(ranks: RankPool) -> None:
    for grad, unused, norm in ranks.run(2, reduce_complex):
        assert grad == [-0.5j, -0.5j]
        assert unused
        assert norm == pytest.approx(0.5**0.5, rel=1e-6)


def test_backward_that_records_its_own_graph() -> None:
    """``create_graph=True`` runs hooks in grad mode, where the bucket would become a part of the graph."""
    module = Two(ParallelMesh.single())
    reducer = GradientReducer(module, ParallelMesh.single(), 2**20)
    reducer.arm()
    (module.dense.sum() + 3 * module.dense.sum().square() + 2.0).backward(create_graph=True)
    reducer.finish()
    assert module.dense.grad is not None
    assert module.dense.grad.tolist() == [1.0] * 3


def test_sparse_gradients_are_refused() -> None:
    module = nn.Embedding(4, 2, sparse=True)
    reducer = GradientReducer(module, ParallelMesh.single(), 2**20)
    with pytest.raises(ConfigError, match="sparse"):
        _backward(reducer, module(torch.tensor([1])).sum())


def test_reentrant_checkpoints_of_a_shared_weight_are_refused() -> None:
    """Each of them brings a part of the gradient, and the reduction begins with the first."""
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    reducer = GradientReducer(shared, ParallelMesh.single(), 1)
    x = torch.ones(2, 4, requires_grad=True)
    for _ in range(2):
        x = checkpoint(shared, x, use_reentrant=True)
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        _backward(reducer, x.sum())
    shared.zero_grad()
    x = torch.ones(2, 4, requires_grad=True)
    for _ in range(2):
        x = checkpoint(shared, x, use_reentrant=False)
    _backward(reducer, x.sum())
    ours = [parameter.grad.clone() for parameter in shared.parameters() if parameter.grad is not None]
    reducer.close()
    shared.zero_grad()
    shared(shared(torch.ones(2, 4))).sum().backward()
    for grad, parameter in zip(ours, shared.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)


def test_backward_outside_of_a_step_is_left_alone() -> None:
    """E.g. a gradient penalty's inner backward."""
    module = Two(ParallelMesh.single())
    reducer = GradientReducer(module, ParallelMesh.single(), 2**20)
    module.loss(2.0).backward()
    assert module.dense.grad is not None
    assert float(module.dense.grad[0]) == 2.0
    reducer.close()


def norm(norm_type: float) -> float:
    mesh = ParallelMesh.build(ParallelConfig(expert=2))
    grads = [(torch.tensor([3.0, 4.0]), 4)]  # all four ranks answer for it
    if mesh.rank("expert") == 1:  # the others have no expert gradient at all
        grads.append((torch.tensor([12.0], dtype=torch.float64), 2))
    return float(global_grad_norm(grads, mesh, torch.device("cpu"), norm_type))


def test_global_norm_counts_every_parameter_once(ranks: RankPool) -> None:
    assert ranks.run(4, norm, 2.0) == [13.0] * 4
    assert ranks.run(4, norm, math.inf) == [12.0] * 4
    assert ranks.run(4, norm, 1.0) == [19.0] * 4


class Tied(nn.Module):
    """An embedding whose weight is also the head's, and a projection: gradients by both ways into a bucket."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(7, 4, generator=generator).to(dtype))
        self.projection = nn.Parameter(torch.randn(4, 4, generator=generator).to(dtype))

    def loss(self, tokens: Tensor) -> Tensor:
        hidden = nn.functional.embedding(tokens, self.embedding)
        return linear(linear(hidden, self.projection).tanh(), self.embedding).square().mean()


@pytest.mark.parametrize("bucket_bytes", [1, 2**20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_weight_gradients_that_bypass_autograd(dtype: torch.dtype, bucket_bytes: int) -> None:
    """A tied weight gets one contribution from the sink and one from autograd, over two micro-batches."""
    module, plain = Tied(dtype), Tied(dtype)
    reducer = GradientReducer(module, ParallelMesh.single(), bucket_bytes)
    batches = [torch.tensor([0, 3, 3]), torch.tensor([6, 1, 0])]
    for tokens in batches:
        _backward(reducer, module.loss(tokens))
        plain.loss(tokens).backward()
    for (name, parameter), expected in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None, name
        tolerance = 1e-14 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=tolerance, atol=tolerance)


def test_low_precision_weights_have_their_gradients_summed_in_float32() -> None:
    """Autograd would add 256 contributions in bfloat16, which stops at 8 bits."""
    weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))
    module = nn.Module()
    module.register_parameter("weight", weight)
    reducer = GradientReducer(module, ParallelMesh.single(), 2**20)
    rows = torch.full((1, 1), 1.0, dtype=torch.bfloat16)
    for scale in (1.0, *[1 / 512] * 256):
        _backward(reducer, scale * linear(rows, weight).sum())
    assert weight.grad is not None
    assert weight.grad.item() == 1.5


def test_a_backward_of_somebody_else_does_not_reach_the_buckets() -> None:
    module = Tied()
    reducer = GradientReducer(module, ParallelMesh.single(), 2**20)
    loss = module.loss(torch.tensor([1, 2]))
    grads = torch.autograd.grad(loss, list(module.parameters()))
    assert all(grad.abs().sum() > 0 for grad in grads)
    assert module.projection.grad is None
    reducer.close()
    assert sink_of(module.projection) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hooks_of_a_weight_see_its_gradient(dtype: torch.dtype) -> None:
    """They mask or scale gradients; autograd calls them with None where the gradient went past it."""
    weights = [nn.Parameter(torch.ones(2, 2, dtype=dtype)) for _ in range(2)]
    seen: list[Tensor | None] = []
    weights[0].register_hook(lambda grad: 2 * grad)  # type: ignore[no-untyped-call]
    weights[1].register_post_accumulate_grad_hook(lambda parameter: seen.append(_copy(parameter.grad)))
    reducer = GradientReducer(nn.ParameterList(weights), ParallelMesh.single(), 2**20)
    rows = torch.ones(1, 2, dtype=dtype)
    _backward(reducer, (linear(rows, weights[0]) + linear(rows, weights[1])).sum())
    ones = torch.ones(2, 2, dtype=dtype)
    assert seen[0] is not None
    assert torch.equal(seen[0], ones)
    for weight, expected in zip(weights, (2 * ones, ones), strict=True):
        assert weight.grad is not None
        assert torch.equal(weight.grad, expected)


def _copy(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.clone()


def test_a_module_with_a_reducer_can_be_pickled() -> None:
    module = Tied()
    reducer = GradientReducer(module, ParallelMesh.single(), 2**20)
    twin = pickle.loads(pickle.dumps(module))
    assert sink_of(twin.projection) is None
    assert torch.equal(twin.projection, module.projection)
    reducer.close()


class Replicated(nn.Module):
    """A copy on every tensor rank, used in the same way by all, or with a part each."""

    def __init__(self, partial: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        if partial:
            set_partial_grad(self, "weight")


def reduce_over_tensor(partial: bool) -> list[float]:
    """Rank ``r`` contributes ``r + 1``."""
    mesh = ParallelMesh.build(ParallelConfig(tensor=2))
    module = Replicated(partial)
    reducer = GradientReducer(module, mesh, 2**20)
    _backward(reducer, (mesh.global_rank + 1.0) * module.weight.sum())
    assert module.weight.grad is not None
    return module.weight.grad.tolist()


def test_partial_gradients_are_summed_over_tensor(ranks: RankPool) -> None:
    """Data ranks {0, 2} and {1, 3}: the mean of each for copies, the mean over data of the sums for parts."""
    assert ranks.run(4, reduce_over_tensor, False) == [[2.0] * 2, [3.0] * 2, [2.0] * 2, [3.0] * 2]
    assert ranks.run(4, reduce_over_tensor, True) == [[5.0] * 2] * 4


class FailsOnce(torch.autograd.Function):
    """The identity, whose backward raises an exception."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ArithmeticError


def survive_a_failed_backward() -> list[float]:
    """The dense parameter arrives and its bucket is sent; then backward fails, is caught and done again."""
    mesh = ParallelMesh.build(ParallelConfig())
    module = Two(mesh)
    reducer = GradientReducer(module, mesh, 1)
    reducer.arm()
    with pytest.raises(ArithmeticError):
        (module.experts.sum() * FailsOnce.apply(module.dense.sum() * 0.0 + module.experts.sum())).backward()
    module.zero_grad()
    _backward(reducer, module.loss(float(dist.get_rank() + 1)))
    assert module.dense.grad is not None
    return module.dense.grad.tolist()


def test_a_backward_that_failed_is_forgotten(ranks: RankPool) -> None:
    assert ranks.run(2, survive_a_failed_backward) == [[1.5] * 3] * 2
