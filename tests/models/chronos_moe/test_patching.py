"""Instance norm and patches against numpy, and their edge cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_moe.models.chronos_moe.patching import (
    InstanceStatistics,
    context_patches,
    denormalize,
    fit_context,
    future_patches,
    instance_statistics,
    normalize,
)


def _statistics(context: torch.Tensor) -> InstanceStatistics:
    observed = context.isfinite()
    return instance_statistics(torch.where(observed, context, 0.0), observed)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_statistics_equal_numpy(dtype: torch.dtype, tolerance: float) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 2.0, (6, 40))
    values[rng.random(values.shape) < 0.3] = np.nan
    loc, scale = _statistics(torch.tensor(values, dtype=dtype))
    assert loc.dtype == scale.dtype == dtype
    np.testing.assert_allclose(loc[:, 0].numpy(), np.nanmean(values, 1), rtol=tolerance)
    np.testing.assert_allclose(scale[:, 0].numpy(), np.nanstd(values, 1), rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_constant_series_has_a_scale_of_its_level(dtype: torch.dtype) -> None:
    nan = torch.nan
    context = torch.tensor(
        [[nan, nan, nan, nan], [nan, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, nan], [nan, nan, nan, -7.0]], dtype=dtype
    )
    loc, scale = _statistics(context)
    torch.testing.assert_close(loc[:, 0], torch.tensor([0.0, 0.0, 0.1, -7.0], dtype=dtype))
    torch.testing.assert_close(scale[:, 0], torch.tensor([1.0, 1.0, 1e-4, 7e-3], dtype=dtype))


def test_rounding_noise_is_not_blown_up() -> None:
    # The mean of 144 times 0.1 is not exactly 0.1 in float32; divided by its own noise the series would be
    # +-1.
    context = torch.full((1, 144), 0.1)
    normalized = normalize(context, _statistics(context), use_arcsinh=True)
    assert normalized.abs().max() < 1e-3


def test_small_variation_at_a_large_level_survives() -> None:
    context = 1e4 + torch.randn(1, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, scale = _statistics(context.float())
    assert scale.item() == pytest.approx(context.std(correction=0).item(), rel=1e-3)


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_no_unit_overflows_or_vanishes_in_float32(unit: float) -> None:
    context = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    loc, scale = _statistics(context)
    loc_in_unit, scale_in_unit = _statistics(context * unit)
    torch.testing.assert_close(loc_in_unit, loc * unit, rtol=1e-5, atol=0)
    torch.testing.assert_close(scale_in_unit, scale * unit, rtol=1e-5, atol=0)


@pytest.mark.parametrize("use_arcsinh", [True, False])
def test_normalize_equals_numpy_and_is_inverted(use_arcsinh: bool) -> None:
    rng = np.random.default_rng(1)
    values, loc, scale = rng.normal(size=(3, 5)), rng.normal(size=(3, 1)), rng.uniform(0.1, 2, (3, 1))
    statistics = InstanceStatistics(torch.tensor(loc), torch.tensor(scale))
    expected = (values - loc) / scale
    expected = np.arcsinh(expected) if use_arcsinh else expected
    normalized = normalize(torch.tensor(values), statistics, use_arcsinh)
    np.testing.assert_allclose(normalized.numpy(), expected, rtol=1e-13)
    back = denormalize(normalized[:, None].expand(3, 4, 5), statistics, use_arcsinh)
    np.testing.assert_allclose(back[:, 2].numpy(), values, rtol=1e-12)


@pytest.mark.parametrize("use_arcsinh", [True, False])
@pytest.mark.parametrize("row", [[torch.nan] * 4, [torch.nan, torch.nan, torch.nan, 3.0], [2.0] * 4, [0.0] * 4])
def test_gradients_are_finite(row: list[float], use_arcsinh: bool) -> None:
    context = torch.tensor([row], requires_grad=True)
    observed = context.isfinite()
    values = torch.where(observed, context, 0.0)
    statistics = instance_statistics(values, observed)
    torch.where(observed, normalize(values, statistics, use_arcsinh), 0.0).sum().backward()
    assert context.grad is not None
    assert context.grad.isfinite().all()


@pytest.mark.parametrize(("length", "expected"), [(0, 4), (1, 4), (4, 4), (5, 8), (12, 12), (30, 12)])
def test_fit_context(length: int, expected: int) -> None:
    context = torch.arange(length, dtype=torch.float32).expand(2, length)
    fitted = fit_context(context, context_length=12, patch_length=4)
    kept = min(length, 12)
    assert fitted.shape == (2, expected)
    assert fitted[:, : expected - kept].isnan().all()
    assert torch.equal(fitted[:, expected - kept :], context[:, length - kept :])


def test_context_patches_layout() -> None:
    normalized = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    observed = torch.tensor([[False, True, True, True]])
    patches = context_patches(normalized, observed, patch_length=2, context_length=8)
    expected = [[-4 / 8, -3 / 8, 0, 1, 0, 1], [-2 / 8, -1 / 8, 2, 3, 1, 1]]
    assert torch.equal(patches, torch.tensor([expected]))


def test_future_patches_layout() -> None:
    patches = future_patches(2, patch_length=2, context_length=8, like=torch.empty(0, dtype=torch.float64))
    expected = [[0, 1 / 8, 0, 0, 0, 0], [2 / 8, 3 / 8, 0, 0, 0, 0]]
    assert torch.equal(patches, torch.tensor(expected, dtype=torch.float64))
