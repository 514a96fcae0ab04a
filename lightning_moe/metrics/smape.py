"""Symmetric mean absolute percentage error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_moe.metrics.base import DECILES, QuantileForecastMetric


class SMAPE(QuantileForecastMetric):
    """Mean over observed points of 2 |forecast - target| / (|forecast| + |target|), from 0 to 2.

    The measure of the M3 and M4 competitions (there times 100), for the median forecast. A point where
    forecast and target are both zero counts as no error.

    Args:
        quantile_levels: Levels of the forecasts; 0.5 must be among them.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ConfigError: The median is not forecast.
    """

    error_sum: Tensor
    num_observed: Tensor

    def __init__(self, quantile_levels: Sequence[float] = DECILES, **kwargs: Any) -> None:
        super().__init__(quantile_levels, **kwargs)
        self._median = self._index_of(0.5, "quantile_levels")
        self._add_sum("error_sum")
        self._add_sum("num_observed", dtype=torch.int64)

    def update(self, quantiles: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            quantiles: Forecasts [B, Q, H], in original units.
            target: Targets [B, H], NaN where missing, in original units.
        """
        quantiles, target, observed = self._observed(quantiles, target)
        point = quantiles[:, self._median]
        magnitude = point.abs() + target.abs()
        error = 2.0 * (point - target).abs() / torch.where(magnitude == 0.0, 1.0, magnitude)
        self.error_sum += torch.where(observed, error, 0.0).sum()
        self.num_observed += observed.sum()

    def compute(self) -> Tensor:
        """Return the mean over points, float64 scalar."""
        return self.error_sum / self.num_observed
