from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_moe.metrics import seasonal_error


@pytest.mark.parametrize("season_length", [1, 4, 12])
def test_equals_a_loop_over_pairs(season_length: int) -> None:
    history = np.random.default_rng(0).normal(size=60)
    history[[3, 17, 40]] = np.nan
    differences = [abs(history[t] - history[t - season_length]) for t in range(season_length, 60)]
    expected = np.mean([difference for difference in differences if not math.isnan(difference)])
    assert seasonal_error(history, season_length) == pytest.approx(expected, rel=1e-14)


def test_integers_are_computed_in_float64() -> None:
    history = np.array([0, 255, 0], dtype=np.uint8)
    assert seasonal_error(history, 1) == 255.0  # type: ignore[arg-type]


@pytest.mark.parametrize("history", [[], [1.0], [1.0, 2.0, 3.0, 4.0], [1.0, np.nan, np.nan, np.nan, np.nan, 2.0]])
def test_no_pair_is_undefined(history: list[float]) -> None:
    assert math.isnan(seasonal_error(np.array(history), 4))


def test_constant_history_has_zero_error() -> None:
    assert seasonal_error(np.full(9, 3.0), 4) == 0.0
