"""Feed-forward layers against their formulas."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.layers import FeedForward, ResidualBlock, SwiGLU, TokenLayout, swiglu
from lightning_moe.parallel.mesh import ParallelMesh
from tests.distributed import RankPool
from tests.layers.parallel import (
    TOLERANCES,
    Grads,
    assert_close,
    assert_shards,
    gather,
    own_rows,
    random,
    result_of,
    run_cases,
)


def test_feed_forward() -> None:
    torch.manual_seed(0)
    layer = FeedForward(6, 10).double()
    assert sorted(name for name, _ in layer.named_parameters()) == ["down_proj.weight", "up_proj.weight"]
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = (x @ layer.up_proj.weight.T).clamp(min=0) @ layer.down_proj.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)


def test_residual_block() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(3, 5, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    hidden = (x @ block.hidden_proj.weight.T + block.hidden_proj.bias).clamp(min=0)
    expected = hidden @ block.output_proj.weight.T + block.output_proj.bias
    expected = expected + x @ block.residual_proj.weight.T + block.residual_proj.bias
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-14)


def plain_swiglu(projected: Tensor) -> Tensor:
    gate, up = projected.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_swiglu_is_autograds_to_the_last_bit(dtype: torch.dtype) -> None:
    projected, weight = random(5, 3, 14, dtype=dtype), random(5, 3, 7, seed=1, dtype=dtype)
    results = []
    for function in (swiglu, plain_swiglu):
        leaf = projected.clone().requires_grad_()
        output = function(leaf)
        output.backward(weight)
        assert leaf.grad is not None
        results.append((output.detach(), leaf.grad))
    for value, expected in zip(*results, strict=True):
        assert torch.equal(value, expected)


def test_swiglu_keeps_only_its_input() -> None:
    kept = []
    projected = random(5, 14).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        swiglu(projected)
    assert [tensor.data_ptr() for tensor in kept] == [projected.data_ptr()]


def test_swiglu_second_derivative_and_transposed_input() -> None:
    projected = random(6, 4).requires_grad_()
    torch.autograd.gradcheck(lambda x: swiglu(x.t()), projected)
    torch.autograd.gradgradcheck(swiglu, projected)


WIDTH, INNER, TOKENS = 6, 10, 8


def feed_forward(mesh: ParallelMesh) -> SwiGLU:
    torch.manual_seed(0)
    return SwiGLU(WIDTH, INNER, mesh, init_std=0.7, output_init_std=0.5)


def run_feed_forward(mesh: ParallelMesh, layout: TokenLayout, dtype: torch.dtype) -> Grads:
    layer = feed_forward(mesh).to(dtype)
    leaf = own_rows(random(TOKENS, WIDTH, dtype=dtype), mesh, layout).clone().requires_grad_()
    output = layer(leaf, layout)
    (own_rows(random(TOKENS, WIDTH, seed=1, dtype=dtype), mesh, layout) * output.sin()).sum().backward()
    return result_of(layer, output, leaf)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_swiglu_layer(ranks: RankPool, world_size: int) -> None:
    """On four ranks the inner width of 10 is split unevenly."""
    layouts = (TokenLayout(2, 4), TokenLayout(2, 4, sequence_parallel=True))
    cases = list(product(layouts, TOLERANCES))
    for (layout, dtype), results in run_cases(ranks, {"tensor": world_size}, run_feed_forward, cases):
        check_feed_forward(results, layout, dtype)


def check_feed_forward(results: list[Grads], layout: TokenLayout, dtype: torch.dtype) -> None:
    layer = feed_forward(ParallelMesh.single()).to(dtype)
    gate, up = layer.gate_up_proj.weight[:INNER], layer.gate_up_proj.weight[INNER:]
    hidden = random(TOKENS, WIDTH, dtype=dtype).requires_grad_()
    output = (F.silu(hidden @ gate.T) * (hidden @ up.T)) @ layer.down_proj.weight.T
    (random(TOKENS, WIDTH, seed=1, dtype=dtype) * output.sin()).sum().backward()
    assert hidden.grad is not None
    assert_close(gather([result.output for result in results], layout), output.detach(), TOLERANCES[dtype])
    assert_close(gather([result.input for result in results], layout), hidden.grad, TOLERANCES[dtype])
    expected = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert_shards(results, expected, TOLERANCES[dtype])


@pytest.mark.slow
def test_swiglu_layer_compiled() -> None:
    layer = feed_forward(ParallelMesh.single()).double()
    layout = TokenLayout(2, 4)
    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager")):
        hidden = random(TOKENS, WIDTH).requires_grad_()
        output = function(hidden, layout)
        results.append([output, *torch.autograd.grad(output.sin().sum(), [hidden, *layer.parameters()])])
    for value, expected in zip(*results, strict=True):
        assert_close(value, expected, 1e-12)
