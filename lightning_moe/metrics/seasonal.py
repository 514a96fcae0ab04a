"""The scale that MASE divides by: the in-sample error of the seasonal naive forecast."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def seasonal_error(history: NDArray[np.float64], season_length: int) -> float:
    """Mean absolute difference between observations that lie one season apart.

    Hyndman and Koehler, "Another look at measures of forecast accuracy", International Journal of Forecasting
    22 (2006), equation for the scaled error, with the seasonal lag of the M4 competition.

    Args:
        history: In-sample values, shape [T], oldest first, in original units; NaN marks a missing value.
        season_length: Observations per season, at least 1; 1 gives the plain naive forecast.

    Returns:
        The mean over all pairs whose two members are observed, in the units of ``history``. NaN when there is
        no such pair, as in a history that is no longer than one season: the scale is then undefined.
    """
    assert season_length >= 1, season_length
    history = np.asarray(history, dtype=np.float64)
    differences = np.abs(history[season_length:] - history[:-season_length])
    differences = differences[~np.isnan(differences)]
    return float(differences.mean()) if differences.size else math.nan
