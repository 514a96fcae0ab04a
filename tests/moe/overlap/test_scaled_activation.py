"""Scaled activations against autograd through the formula in float64; also of the kernels for CUDA."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.moe.activation import Activation
from lightning_moe.moe.overlap.scaled_activation import backward, forward

ACTIVATIONS = get_args(Activation)
SIZES = [(5, 24), (3, 1100), (1, 7), (0, 24)]
"""Rows and inner widths; one is more than a kernel reads at a time."""
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def formula(projected: Tensor, probabilities: Tensor, activation: Activation) -> Tensor:
    if activation == "swiglu":
        gate, up = projected.chunk(2, dim=1)
        return gate * torch.sigmoid(gate) * up * probabilities[:, None]
    return (F.gelu(projected) if activation == "gelu" else projected.clamp(min=0)) * probabilities[:, None]


def operands(
    dtype: torch.dtype, size: tuple[int, int], activation: Activation, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Projected rows, with some far from zero; probabilities in the pads of wider rows; and a gradient."""
    generator = torch.Generator().manual_seed(0)
    rows, width = size
    projected = 3 * torch.randn(rows, width * 2 if activation == "swiglu" else width, generator=generator)
    projected[:, ::5] *= 10
    pads = torch.full((rows, 6), torch.nan, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    pads[:, 2] = torch.rand(rows, generator=generator)
    grad = torch.randn(rows, width, generator=generator)
    return projected.to(device, dtype), pads.to(device)[:, 2], grad.to(device, dtype)


def run(
    dtype: torch.dtype, size: tuple[int, int], activation: Activation, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Result, result of backward, and both gradients; written into parts of buffers of NaN, the rest of which stays."""
    projected, probabilities, grad = operands(dtype, size, activation, device)
    before = [tensor.clone() for tensor in (projected, probabilities, grad)]
    rows = len(projected)
    buffers = [
        torch.full((rows + 2, like.shape[1]), torch.nan, dtype=dtype, device=device) for like in (projected, grad)
    ]
    out = forward(projected, probabilities, activation)
    parts = [buffer[1 : 1 + rows] for buffer in buffers]
    grad_probabilities = backward(projected, probabilities, grad, activation, *parts)
    assert all(bool(buffer[[0, -1]].isnan().all()) for buffer in buffers)
    assert all(torch.equal(a, b) for a, b in zip(before, (projected, probabilities, grad), strict=True))
    return out, parts[1], parts[0], grad_probabilities


def check(dtype: torch.dtype, size: tuple[int, int], activation: Activation, device: str) -> None:
    projected, probabilities, grad = operands(dtype, size, activation, device)
    leaves = [tensor.double().requires_grad_() for tensor in (projected, probabilities)]
    expected = formula(*leaves, activation)
    gradients = torch.autograd.grad(expected, leaves, grad.double())
    results = run(dtype, size, activation, device)
    assert [result.dtype for result in results] == [dtype, dtype, dtype, probabilities.dtype]
    tolerance = 1e-13 if dtype == torch.float64 else 3e-6
    once = 0.5 * torch.finfo(dtype).eps  # the most that one rounding adds; a second one would add as much again
    rounding = once if dtype.itemsize == 2 else 0.0
    wanted = (expected.detach(), expected.detach(), *gradients)
    for result, value, relative in zip(results, wanted, (rounding, rounding, rounding, 0.0), strict=True):
        smallest = torch.finfo(result.dtype).smallest_normal * torch.finfo(result.dtype).eps
        scale = tolerance * max(1.0, float(value.abs().max())) if value.numel() else 0.0
        excess = (result.double() - value).abs() - relative * value.abs() - smallest - scale
        assert not bool((excess > 0).any()), (activation, dtype, excess.max())
        assert bool(result.isfinite().all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_autograd_and_is_rounded_once(dtype: torch.dtype, size: tuple[int, int], activation: Activation) -> None:
    check(dtype, size, activation, "cpu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_each_other(dtype: torch.dtype, activation: Activation) -> None:
    """However rows are cut into chunks, results are equal bit for bit.

    At this width. torch computes what is left over at the end of a tensor, less than a vector, by other code.
    """
    projected, probabilities, grad = operands(dtype, (9, 64), activation, "cpu")
    whole = [forward(projected, probabilities, activation), torch.empty_like(projected), torch.empty_like(grad)]
    whole.append(backward(projected, probabilities, grad, activation, *whole[1:]))
    for rows in (slice(0, 4), slice(4, 5), slice(5, 9)):
        part = [forward(projected[rows], probabilities[rows], activation)]
        part += [torch.empty_like(projected[rows]), torch.empty_like(grad[rows])]
        part.append(backward(projected[rows], probabilities[rows], grad[rows], activation, *part[1:]))
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))


def check_not_a_number(activation: Activation, device: str) -> None:
    """A NaN must not be hidden by a comparison."""
    projected, probabilities, grad = operands(torch.float32, (2, 8), activation, device)
    projected[1, 3] = torch.nan
    outputs = [torch.empty_like(projected), torch.empty_like(grad)]
    grad_probabilities = backward(projected, probabilities, grad, activation, *outputs)
    for tensor in (forward(projected, probabilities, activation), outputs[1], grad_probabilities[:, None]):
        assert not tensor[0].isnan().any()
        assert bool(tensor[1].isnan().any())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_a_number_stays_so_and_in_its_row(activation: Activation) -> None:
    check_not_a_number(activation, "cpu")
