"""Which kernel computes weight gradients of stacked experts: by shapes, alignment and the GPU."""

from __future__ import annotations

import pytest
import torch

from lightning_moe.weight_grad import launching
from lightning_moe.weight_grad.launching import how_to_launch


def launching_of(
    rows: int, shape: tuple[int, int, int], runs: int = 1, gap: int = 0, dtype: torch.dtype = torch.bfloat16
) -> str:
    """Of operands with so many rows, without memory."""
    grad_output = torch.empty(rows, shape[1], dtype=dtype, device="meta")
    operand = torch.empty(rows, shape[2] + gap, dtype=dtype, device="meta")[:, : shape[2]]
    out = torch.empty(shape, dtype=torch.float32, device="meta")
    return how_to_launch(grad_output, operand, out, runs)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A GPU of the compute capability in the list, Hopper's."""
    capability = [9, 0]
    monkeypatch.setattr(launching, "fused_kernels_take", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: tuple(capability))
    # Meta tensors have no address, and ask for none.
    monkeypatch.setattr(launching, "has_aligned_rows", lambda matrix: matrix.stride(0) % 8 == 0)
    return capability


def test_without_a_gpu_there_is_no_kernel() -> None:
    assert launching_of(100, (4, 64, 64)) == "each"


def test_shapes_of_expert_layers(gpu: list[int]) -> None:
    qwen, olmoe, mixtral = (32, 1536, 2048), (16, 2048, 2048), (2, 28672, 4096)
    assert launching_of(131072, qwen, runs=4) == "descriptors"
    assert launching_of(131072, qwen) == "each", "1.3e10 multiply-adds an expert"
    assert launching_of(131072, (32, 2048, 768)) == "descriptors"
    assert launching_of(131072, olmoe, runs=4) == "descriptors"
    assert launching_of(131072, olmoe) == "each"
    assert launching_of(16384, mixtral) == "each"
    assert launching_of(16384, mixtral, runs=4) == "each"
    assert launching_of(32 * 512, qwen) == "loads", "runs are short"


def test_runs_of_several_need_more_to_be_worth_a_product_each(gpu: list[int]) -> None:
    eight = (8, 2048, 2048)
    assert launching_of(8 * 4096, eight) == "each"
    assert launching_of(2 * 8 * 4096, eight, runs=2) == "descriptors"
    assert launching_of(2 * 8 * 8192, eight, runs=2) == "each"


def test_rows_that_descriptors_cannot_address(gpu: list[int]) -> None:
    """By loads, as long as that is faster."""
    assert launching_of(131072, (128, 2048, 768), gap=8) == "descriptors"
    assert launching_of(131072, (128, 2048, 768), gap=3) == "loads"
    assert launching_of(131072, (32, 2048, 768), gap=3) == "each"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), "each"), ((8, 0), "loads"), ((9, 0), "descriptors"), ((10, 3), "descriptors"), ((12, 0), "loads")],
    ids=str,
)
def test_gpus(gpu: list[int], capability: tuple[int, int], expected: str) -> None:
    gpu[:] = capability
    assert launching_of(131072, (128, 2048, 768)) == expected


def test_others_than_sixteen_bits_are_multiplied_one_by_one(gpu: list[int]) -> None:
    assert launching_of(4096, (32, 64, 64)) == "loads"
    assert launching_of(4096, (32, 64, 64), dtype=torch.float32) == "each"
    assert launching_of(4096, (0, 64, 64)) == "each"
