"""Weight gradients of grouped products on CUDA: one kernel for all experts, against float64 and a product for each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_moe.weight_grad import GroupedMatmulGrad
from lightning_moe.weight_grad import grouped as grouped_module
from tests.weight_grad.test_grouped import offsets_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

COUNTS = [[0, 1, 31, 32, 33, 300, 0], [0, 0, 0, 5], [129], [128] * 16]
WIDTHS = [(200, 72), (256, 128), (8, 384)]


def operands(counts: list[int], widths: tuple[int, int], dtype: torch.dtype) -> GroupedMatmulGrad:
    """Of random rows, between rows that belong to no expert and hold no numbers."""
    generator = torch.Generator("cuda").manual_seed(0)
    total = sum(counts) + 40
    left, right = (torch.randn(total, width, generator=generator, device="cuda").to(dtype) for width in widths)
    left[sum(counts) :], right[sum(counts) :] = float("nan"), float("inf")
    return GroupedMatmulGrad(left, right, tuple(counts), offsets_of(counts).cuda(), True)


def exact(grad: GroupedMatmulGrad) -> Tensor:
    counts = [*grad.counts, grad.rows.shape[0] - sum(grad.counts)]
    pieces = zip(grad.grad_output.double().split(counts), grad.rows.double().split(counts), strict=True)
    return torch.stack([left.t() @ right for left, right in pieces])[:-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_one_kernel_computes_all_experts(counts: list[int], widths: tuple[int, int], dtype: torch.dtype) -> None:
    grad = operands(counts, widths, dtype)
    expected = exact(grad)
    written = torch.full_like(expected, float("nan"), dtype=torch.float32)
    assert grad._launches_once(written)
    grad.add_to(written, accumulate=False)
    torch.testing.assert_close(written.double(), expected, rtol=1e-5, atol=1e-4)
    before = torch.randn_like(written)
    added = before.clone()
    grad.add_to(added, accumulate=True)
    torch.testing.assert_close(added.double(), before.double() + expected, rtol=1e-5, atol=1e-4)


def test_sums_are_the_same_in_every_run() -> None:
    grad = operands([700, 0, 513, 90], (512, 384), torch.bfloat16)
    first, *others = [torch.zeros(4, 512, 384, device="cuda") for _ in range(20)]
    for out in (first, *others):
        grad.add_to(out, accumulate=True)
    assert all(torch.equal(first, out) for out in others)


def test_experts_with_much_work_have_a_launch_each(monkeypatch: pytest.MonkeyPatch) -> None:
    grad = operands([64, 64], (256, 256), torch.bfloat16)
    out = torch.zeros(2, 256, 256, device="cuda")
    assert grad._launches_once(out)
    assert not grad._launches_once(out.double())
    grad = replace(grad, grad_output=grad.grad_output[:128], rows=grad.rows[:128])
    monkeypatch.setattr(grouped_module, "_WORTH_A_LAUNCH", 64 * 256 * 256)
    assert not grad._launches_once(out)
    grad.add_to(out, accumulate=False)
    torch.testing.assert_close(out.double(), exact(grad), rtol=1e-5, atol=1e-4)
