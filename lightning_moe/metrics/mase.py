"""Mean absolute scaled error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_moe.metrics.base import DECILES, QuantileForecastMetric


class MASE(QuantileForecastMetric):
    """Mean over series of (mean absolute error of the median forecast / in-sample seasonal naive error).

    Hyndman and Koehler (2006). The inner mean runs over the observed targets of a series. Series whose scale
    is zero or undefined (see :func:`lightning_moe.metrics.seasonal_error`), or which have no observed target,
    are left out; the result is NaN when no series is left. GluonTS and fev average over all points at once,
    which is the same number wherever the series of a data set have one horizon and no missing target.

    Args:
        quantile_levels: Levels of the forecasts; 0.5 must be among them, it is the point forecast.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ConfigError: The median is not forecast.
    """

    scaled_error_sum: Tensor
    num_series: Tensor

    def __init__(self, quantile_levels: Sequence[float] = DECILES, **kwargs: Any) -> None:
        super().__init__(quantile_levels, **kwargs)
        self._median = self._index_of(0.5, "quantile_levels")
        self._add_sum("scaled_error_sum")
        self._add_sum("num_series", dtype=torch.int64)

    def update(self, quantiles: Tensor, target: Tensor, seasonal_error: Tensor) -> None:
        """Add a batch.

        Args:
            quantiles: Forecasts [B, Q, H], in original units.
            target: Targets [B, H], NaN where missing, in original units.
            seasonal_error: Scale of each series [B], in original units; NaN where undefined.
        """
        quantiles, target, observed = self._observed(quantiles, target)
        if seasonal_error.shape != target.shape[:1]:
            raise ValueError(f"expected one scale per series, got shape {list(seasonal_error.shape)}")
        scale = seasonal_error.double()
        num_observed = observed.sum(dim=-1)
        # A comparison with NaN is False, so undefined scales drop out here.
        counts = (num_observed > 0) & (scale > 0)
        error = torch.where(observed, (quantiles[:, self._median] - target).abs(), 0.0).sum(dim=-1)
        scaled = error / num_observed.clamp(min=1) / torch.where(counts, scale, 1.0)
        self.scaled_error_sum += torch.where(counts, scaled, 0.0).sum()
        self.num_series += counts.sum()

    def compute(self) -> Tensor:
        """Return the mean over all series, float64 scalar."""
        return self.scaled_error_sum / self.num_series
