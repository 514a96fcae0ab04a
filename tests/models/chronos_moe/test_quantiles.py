"""Interpolation between trained quantile levels."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from lightning_moe.errors import ConfigError
from lightning_moe.models.chronos_moe.quantiles import interpolate_quantiles

TRAINED = (0.1, 0.25, 0.5, 0.9)


def _quantiles() -> torch.Tensor:
    values = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return values.sort(-1).values


def test_trained_levels_are_returned_exactly_in_the_wanted_order() -> None:
    quantiles = _quantiles()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = interpolate_quantiles(quantiles, TRAINED, [0.9, 0.1, 0.5])
    assert torch.equal(out, quantiles[..., [3, 0, 2]])


def test_levels_between_equal_numpy() -> None:
    quantiles, wanted = _quantiles(), [0.1, 0.17, 0.3, 0.5, 0.77]
    expected = [[np.interp(wanted, TRAINED, row) for row in series] for series in quantiles.numpy()]
    np.testing.assert_allclose(interpolate_quantiles(quantiles, TRAINED, wanted).numpy(), expected, rtol=1e-13)


def test_levels_outside_are_clamped_with_a_warning() -> None:
    quantiles = _quantiles()
    with pytest.warns(UserWarning, match=r"0\.1 to 0\.9"):
        out = interpolate_quantiles(quantiles, TRAINED, [0.01, 0.5, 0.99])
    assert torch.equal(out, quantiles[..., [0, 2, 3]])


@pytest.mark.parametrize("wanted", [[], [-0.1], [0.5, 1.2], [float("nan")]])
def test_refuses_what_is_no_level(wanted: list[float]) -> None:
    with pytest.raises(ConfigError, match="quantile_levels"):
        interpolate_quantiles(_quantiles(), TRAINED, wanted)
