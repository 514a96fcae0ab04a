"""One time series, with the part that is held out for testing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """A regularly sampled series, split into its history and the holdout that forecasts are judged by."""

    item_id: str
    """Name of the series, unique within its data set."""
    dataset: str
    """Name of the data set that it belongs to; scores are averaged within a data set."""
    values: NDArray[np.float64]
    """History, oldest first, in original units; NaN where missing."""
    test: NDArray[np.float64]
    """The observations that follow the history; their number is the horizon of the series."""
    season_length: int
    """Observations per season; 1 where there is no season."""
    frequency: str | None = None
    """Distance of observations as a pandas offset alias such as ``"MS"``; None where unknown."""
    start: pd.Timestamp | None = None
    """Time of the first observation; None where unknown."""

    @property
    def horizon(self) -> int:
        """Number of observations in the holdout."""
        return len(self.test)
