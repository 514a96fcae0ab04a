"""Scores of the seasonal naive forecast on the holdouts that the model is tested on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from lightning_moe.data.time_series import Series
from lightning_moe.metrics import MASE, Score, WeightedQuantileLoss, seasonal_error
from lightning_moe.models.seasonal_naive import SeasonalNaive


def naive_scores(series: Sequence[Series], quantile_levels: Sequence[float]) -> Score:
    """Score the seasonal naive forecast of each history against its holdout.

    Args:
        series: The series of one data set.
        quantile_levels: Levels that WQL averages over, 0.5 among them.
    """
    # No reduction over ranks: every rank could compute the same, and only rank 0 does.
    mase = MASE(quantile_levels, sync_on_compute=False)
    wql = WeightedQuantileLoss(quantile_levels, sync_on_compute=False)
    for season_length in sorted({one.season_length for one in series}):
        members = [one for one in series if one.season_length == season_length]
        horizon = max(one.horizon for one in members)
        forecast = SeasonalNaive(season_length).predict_quantiles(
            [one.values for one in members], horizon, quantile_levels
        )
        holdouts = [torch.from_numpy(np.asarray(one.test, dtype=np.float64)) for one in members]
        target = pad_sequence(holdouts, batch_first=True, padding_value=torch.nan)
        scale = torch.tensor([seasonal_error(one.values, season_length) for one in members], dtype=torch.float64)
        mase.update(forecast, target, scale)
        wql.update(forecast, target)
    return Score(mase=float(mase.compute()), wql=float(wql.compute()))
