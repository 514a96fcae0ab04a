"""Sums over choices and their gradients against autograd through plain indexing, also of the kernels for CUDA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_moe.moe.rows import dot_choices, spread_grad, sum_choices

T, K, D = 33, 3, 70


def case(dtype: torch.dtype, device: str, *, absent: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Rows, row of each choice, choice of each row, weights, and which choices have a row; two thirds if ``absent``."""
    generator = torch.Generator().manual_seed(0)
    present = torch.arange(T * K) % 3 != 1 if absent else None
    choice_of_row = torch.randperm(T * K, generator=generator)
    if present is not None:
        choice_of_row = choice_of_row[present[choice_of_row]]
    row_of_choice = torch.zeros(T * K, dtype=torch.int64)
    row_of_choice[choice_of_row] = torch.arange(len(choice_of_row))
    rows = torch.randn(len(choice_of_row), D, generator=generator).to(device, dtype)
    weights = torch.rand(T, K, generator=generator).to(device, torch.promote_types(dtype, torch.float32))
    on_device = (row_of_choice.to(device), choice_of_row.to(device))
    return rows, *on_device, weights, None if present is None else present.to(device)


def check(dtype: torch.dtype, device: str, absent: bool, tolerance: float) -> None:
    rows, row_of_choice, choice_of_row, weights, present = case(dtype, device, absent=absent)
    leaves = [tensor.double().requires_grad_() for tensor in (rows, weights)]
    mask = torch.ones(T * K, device=device) if present is None else present
    terms = leaves[1][..., None] * (leaves[0][row_of_choice] * mask[:, None]).view(T, K, D)
    grad = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    expected = (terms.sum(1), *torch.autograd.grad(terms.sum(1), leaves, grad.double()))
    with torch.no_grad():
        results = (
            sum_choices(rows, row_of_choice, present, weights, K, torch.promote_types(dtype, torch.float32)),
            spread_grad(grad, weights, choice_of_row, None, K, weights.dtype),
            dot_choices(grad, rows, row_of_choice, present, weights, K),
        )
        ones = sum_choices(rows, row_of_choice, present, None, K, weights.dtype)
        plain = (rows.double()[row_of_choice] * mask[:, None]).view(T, K, D).sum(1)
        torch.testing.assert_close(ones.double(), plain, rtol=tolerance, atol=tolerance)
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), value, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str)
def test_equals_autograd_through_plain_indexing(dtype: torch.dtype, tolerance: float, absent: bool) -> None:
    check(dtype, "cpu", absent, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_equal_autograd_through_plain_indexing(dtype: torch.dtype, absent: bool) -> None:
    """Operands of 16 bits are exact in float32, in which all results are wanted here."""
    check(dtype, "cuda", absent, 1e-14 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_tokens_and_no_rows(device: str) -> None:
    none = torch.empty(0, dtype=torch.int64, device=device)
    with torch.no_grad():
        empty = torch.empty(0, D, device=device)
        weights = torch.empty(0, K, device=device)
        assert sum_choices(empty, none, None, weights, K, torch.float32).shape == (0, D)
        assert spread_grad(empty, weights, none, None, K, torch.float32).shape == (0, D)
        absent = torch.zeros(2 * K, dtype=torch.bool, device=device)
        zeros = torch.zeros(2 * K, dtype=torch.int64, device=device)
        some = torch.ones(2, K, device=device)
        assert torch.equal(sum_choices(empty, zeros, absent, some, K, torch.float32), torch.zeros(2, D, device=device))
        assert not dot_choices(torch.ones(2, D, device=device), empty, zeros, absent, some, K).any()
