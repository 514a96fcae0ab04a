"""The layer on a CUDA device."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_moe.config.moe import MoEConfig
from lightning_moe.moe.experts import can_group
from lightning_moe.moe.layer import MoELayer
from tests.moe.cases import relative_error

pytestmark = pytest.mark.gpu


def run(dtype: torch.dtype, device: str, **changes: Any) -> list[Tensor]:
    """Output and all gradients, on the CPU."""
    config = MoEConfig(num_experts=16, top_k=4, expert_hidden_size=64, shared_expert_hidden_size=32, **changes)
    torch.manual_seed(0)
    layer = MoELayer(128, config).to(dtype)
    hidden, cotangent = torch.randn(2, 500, 128).to(dtype).unbind()
    mask = torch.rand(500) < 0.9
    layer, hidden = layer.to(device), hidden.to(device).requires_grad_()
    output, info = layer(hidden, mask.to(device))
    ((output * cotangent.to(device)).sum() + info.auxiliary_loss + info.z_loss).backward()
    tensors = [output, hidden.grad, *(parameter.grad for parameter in layer.parameters())]
    return [tensor.detach().cpu() for tensor in tensors if tensor is not None]


@pytest.mark.parametrize(
    "changes",
    [{}, {"z_loss_coefficient": 0.1}, {"capacity_factor": 0.8}, {"capacity_factor": 1.2, "pad_to_capacity": True}],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_cpu(dtype: torch.dtype, tolerance: float, changes: dict[str, Any]) -> None:
    pairs = zip(run(dtype, "cuda", **changes), run(dtype, "cpu", **changes), strict=True)
    assert max(relative_error(actual, expected) for actual, expected in pairs) <= tolerance


def test_grouped_gemm_equals_the_loop() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the grouped kernel needs compute capability 9.0")
    rows, weight = torch.zeros(8, 128, device="cuda"), torch.zeros(2, 64, 128, device="cuda")
    assert can_group(rows.bfloat16(), weight.bfloat16())
    assert not can_group(rows, weight)
    grouped = run(torch.bfloat16, "cuda", grouped_gemm=True)
    looped = run(torch.bfloat16, "cuda", grouped_gemm=False)
    assert max(relative_error(a, b) for a, b in zip(grouped, looped, strict=True)) <= 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"capacity_factor": 0.8}], ids=str)
def test_runs_are_bitwise_equal(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    first, second = run(dtype, "cuda", **changes), run(dtype, "cuda", **changes)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_wait_for_the_device() -> None:
    """The routing's row counts are read once; nothing else in forward or backward makes the host wait."""
    layer = MoELayer(128, MoEConfig(num_experts=16, top_k=4, expert_hidden_size=64)).cuda().bfloat16()
    hidden = torch.randn(500, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(hidden)[0].sum().backward()  # kernels are loaded
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            layer(hidden)[0].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "called a synchronizing" in str(warning.message)]
    assert len(waits) == 1, waits
