"""RMSNorm against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_moe.layers import ParallelRMSNorm, RMSNorm
from lightning_moe.parallel.mesh import ParallelMesh
from tests.distributed import RankPool
from tests.layers.parallel import (
    TOLERANCES,
    Grads,
    assert_close,
    assert_shards,
    random,
    result_of,
    run_cases,
)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)]
)
def test_equals_definition(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(16, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 16, dtype=dtype)
    reference = x.double().numpy()
    reference = (
        reference / np.sqrt((reference**2).mean(-1, keepdims=True) + 1e-5) * norm.weight.detach().double().numpy()
    )
    out = norm(x)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.detach().double().numpy(), reference, rtol=tolerance, atol=tolerance)


def test_float16_does_not_overflow() -> None:
    # 300 ** 2 is beyond the largest float16.
    out = RMSNorm(8).half()(torch.full((1, 8), 300.0, dtype=torch.float16))
    torch.testing.assert_close(out, torch.ones(1, 8, dtype=torch.float16), rtol=1e-3, atol=0)


def test_zero_vector_has_finite_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    RMSNorm(4)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


SIZE, TOKENS = 7, 5


def run_parallel_norm(mesh: ParallelMesh, dtype: torch.dtype) -> tuple[Grads, list[int]]:
    """Every rank has every second (or fourth) feature."""
    index = list(range(SIZE))[mesh.rank("tensor") :: mesh.size("tensor")]
    norm = ParallelRMSNorm(SIZE, mesh, index, eps=1e-2).to(dtype)
    norm.weight.data = random(SIZE, seed=2, dtype=dtype)[index]
    leaf = random(TOKENS, SIZE, dtype=dtype)[:, index].clone().requires_grad_()
    output = norm(leaf)
    (random(TOKENS, SIZE, seed=1, dtype=dtype)[:, index] * output.sin()).sum().backward()
    return result_of(norm, output, leaf), index


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_parallel_norm_equals_the_whole_one(ranks: RankPool, world_size: int) -> None:
    cases = [(dtype,) for dtype in TOLERANCES]
    for (dtype,), results in run_cases(ranks, {"tensor": world_size}, run_parallel_norm, cases):
        check_parallel_norm(results, dtype)


def check_parallel_norm(results: list[tuple[Grads, list[int]]], dtype: torch.dtype) -> None:
    hidden = random(TOKENS, SIZE, dtype=dtype).requires_grad_()
    gain = random(SIZE, seed=2, dtype=dtype).requires_grad_()
    output = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-2).sqrt() * gain
    (random(TOKENS, SIZE, seed=1, dtype=dtype) * output.sin()).sum().backward()
    assert hidden.grad is not None
    assert gain.grad is not None
    for result, index in results:
        assert_close(result.output, output.detach()[:, index], TOLERANCES[dtype])
        assert_close(result.input, hidden.grad[:, index], TOLERANCES[dtype])
        assert_shards([result], {"weight": gain.grad}, TOLERANCES[dtype])
