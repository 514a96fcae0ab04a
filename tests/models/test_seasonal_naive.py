from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_moe.data import load_competitions
from lightning_moe.errors import ConfigError
from lightning_moe.metrics import (
    BASELINE,
    COMPARABLE_DATASETS,
    MASE,
    PUBLISHED,
    WeightedQuantileLoss,
    seasonal_error,
)
from lightning_moe.models.seasonal_naive import SeasonalNaive

DECILES = tuple(level / 10 for level in range(1, 10))


@pytest.mark.parametrize("dataset", COMPARABLE_DATASETS)
def test_reproduces_the_published_scores(dataset: str) -> None:
    members = load_competitions([dataset])[dataset]
    season_length = members[0].season_length
    quantiles = SeasonalNaive(season_length).predict_quantiles(
        [series.values for series in members], members[0].horizon, DECILES
    )
    target = torch.from_numpy(np.stack([series.test for series in members]))
    scale = torch.tensor([seasonal_error(series.values, season_length) for series in members], dtype=torch.float64)
    mase, wql = MASE(DECILES), WeightedQuantileLoss(DECILES)
    mase.update(quantiles, target, scale)
    wql.update(quantiles, target)
    published = PUBLISHED[BASELINE][dataset]
    assert float(mase.compute()) == pytest.approx(published.mase, abs=0.002)
    assert float(wql.compute()) == pytest.approx(published.wql, abs=5e-5)


def test_repeats_the_last_season() -> None:
    forecast = SeasonalNaive(3).predict_quantiles([[1.0, 2.0, 3.0, 4.0, 5.0]], 7, (0.1, 0.9))
    assert forecast.dtype == torch.float64
    assert forecast.tolist() == [[[3.0, 4.0, 5.0, 3.0, 4.0, 5.0, 3.0]] * 2]


def test_padding_and_ragged_rows_give_the_same() -> None:
    nan = math.nan
    rows = [[1.0, 2.0, 3.0, 4.0], [7.0, 8.0], [5.0]]
    padded = torch.tensor([[1.0, 2.0, 3.0, 4.0], [nan, nan, 7.0, 8.0], [nan, nan, nan, 5.0]])
    expected = [[3.0, 4.0, 3.0], [7.0, 8.0, 7.0], [5.0, 5.0, 5.0]]
    for contexts in (rows, padded, [np.array(row) for row in rows]):
        forecast = SeasonalNaive(2).predict_quantiles(contexts, 3, (0.5,))  # type: ignore[arg-type]
        assert forecast[:, 0].tolist() == expected


def test_missing_observations_are_filled_from_the_same_phase_first() -> None:
    nan = math.nan
    context = [[1.0, 2.0, nan, 4.0, nan, nan], [nan, 2.0, nan, nan, 5.0, nan]]
    forecast = SeasonalNaive(3).predict_quantiles(context, 3, (0.5,))
    # First row: phases 4, 2 and the never observed third, which takes the latest of all, 4.
    assert forecast[:, 0].tolist() == [[4.0, 2.0, 4.0], [5.0, 5.0, 5.0]]


def test_nothing_observed_gives_no_number() -> None:
    forecast = SeasonalNaive(2).predict_quantiles([[math.nan, math.nan], []], 3, (0.5,))
    assert forecast.isnan().all()
    assert SeasonalNaive(2).predict_quantiles([], 3, (0.1, 0.5)).shape == (0, 2, 3)


def test_season_length_is_checked() -> None:
    with pytest.raises(ConfigError, match="season_length"):
        SeasonalNaive(0)
