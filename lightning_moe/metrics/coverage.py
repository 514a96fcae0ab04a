"""How often the target lies inside a forecast interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_moe.errors import ConfigError
from lightning_moe.metrics.base import DECILES, QuantileForecastMetric


class IntervalCoverage(QuantileForecastMetric):
    """Share of observed targets between two forecast quantiles, bounds included; ideally ``upper - lower``.

    Args:
        lower: Level of the lower bound.
        upper: Level of the upper bound.
        quantile_levels: Levels of the forecasts; both bounds must be among them.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ConfigError: A bound is not forecast, or ``lower`` is not below ``upper``.
    """

    # Neither way: coverage above the nominal level is as wrong as coverage below it.
    higher_is_better = None
    num_covered: Tensor
    num_observed: Tensor

    def __init__(
        self,
        lower: float = 0.1,
        upper: float = 0.9,
        quantile_levels: Sequence[float] = DECILES,
        **kwargs: Any,
    ) -> None:
        super().__init__(quantile_levels, **kwargs)
        self._lower = self._index_of(lower, "lower")
        self._upper = self._index_of(upper, "upper")
        if not lower < upper:
            raise ConfigError("lower", lower, f"a level below upper, which is {upper}")
        self._add_sum("num_covered", dtype=torch.int64)
        self._add_sum("num_observed", dtype=torch.int64)

    def update(self, quantiles: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            quantiles: Forecasts [B, Q, H].
            target: Targets [B, H], NaN where missing, in the units of the forecasts.
        """
        quantiles, target, observed = self._observed(quantiles, target)
        inside = (quantiles[:, self._lower] <= target) & (target <= quantiles[:, self._upper])
        self.num_covered += (inside & observed).sum()
        self.num_observed += observed.sum()

    def compute(self) -> Tensor:
        """Return the covered share, float64 scalar."""
        return self.num_covered.double() / self.num_observed
