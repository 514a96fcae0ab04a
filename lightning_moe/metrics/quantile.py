"""Quantile losses: the pinball loss and its weighted form, WQL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_moe.metrics.base import DECILES, QuantileForecastMetric


def _pinball(quantiles: Tensor, target: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Pinball loss max(tau * e, (tau - 1) * e) of e = target - forecast, [B, Q, H]."""
    tau = torch.tensor(levels, dtype=quantiles.dtype, device=quantiles.device)[:, None]
    error = target[:, None] - quantiles
    return torch.maximum(tau * error, (tau - 1.0) * error)


class WeightedQuantileLoss(QuantileForecastMetric):
    """WQL: mean over levels of (twice the summed pinball loss / summed absolute target).

    The same as ``MeanWeightedSumQuantileLoss(axis=None)`` of GluonTS and ``WQL`` of fev and
    chronos-forecasting. Sums run over all observed points of all series, so series with large values weigh
    more. A point forecast repeated at symmetric levels scores its normalised deviation sum|e| / sum|y|.

    Args:
        quantile_levels: Levels of the forecasts.
        kwargs: Passed to :class:`torchmetrics.Metric`.
    """

    loss_sum: Tensor
    absolute_target_sum: Tensor

    def __init__(self, quantile_levels: Sequence[float] = DECILES, **kwargs: Any) -> None:
        super().__init__(quantile_levels, **kwargs)
        self._add_sum("loss_sum", len(self.quantile_levels))
        self._add_sum("absolute_target_sum")

    def update(self, quantiles: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            quantiles: Forecasts [B, Q, H], in original units.
            target: Targets [B, H], NaN where missing, in original units.
        """
        quantiles, target, observed = self._observed(quantiles, target)
        loss = _pinball(quantiles, target, self.quantile_levels)
        self.loss_sum += 2.0 * torch.where(observed[:, None], loss, 0.0).sum(dim=(0, 2))
        self.absolute_target_sum += target.abs().sum()

    def compute(self) -> Tensor:
        """Return the mean over levels, float64 scalar."""
        return (self.loss_sum / self.absolute_target_sum).mean()


class PinballLoss(QuantileForecastMetric):
    """Mean pinball loss over observed points and levels, in the units of the target.

    Koenker and Bassett, "Regression Quantiles", Econometrica 46 (1978). Half the quantile loss of GluonTS,
    which carries a factor of two so that the median's loss is the absolute error.

    Args:
        quantile_levels: Levels of the forecasts.
        kwargs: Passed to :class:`torchmetrics.Metric`.
    """

    loss_sum: Tensor
    num_observed: Tensor

    def __init__(self, quantile_levels: Sequence[float] = DECILES, **kwargs: Any) -> None:
        super().__init__(quantile_levels, **kwargs)
        self._add_sum("loss_sum")
        self._add_sum("num_observed", dtype=torch.int64)

    def update(self, quantiles: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            quantiles: Forecasts [B, Q, H].
            target: Targets [B, H], NaN where missing, in the units of the forecasts.
        """
        quantiles, target, observed = self._observed(quantiles, target)
        loss = _pinball(quantiles, target, self.quantile_levels)
        self.loss_sum += torch.where(observed[:, None], loss, 0.0).sum()
        self.num_observed += observed.sum()

    def compute(self) -> Tensor:
        """Return the mean over points and levels, float64 scalar."""
        return self.loss_sum / (self.num_observed * len(self.quantile_levels))
