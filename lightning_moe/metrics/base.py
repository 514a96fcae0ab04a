"""What the metrics share: sums that reduce exactly, forecast levels, and the mask of observed targets.

Shapes: B series, Q quantile levels, H horizon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from lightning_moe.errors import ConfigError

DECILES: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class SumMetric(Metric):
    """A metric whose states are sums and counts, in float64 and int64, reduced over ranks by addition.

    Any split of the series over any number of ranks, empty shares included, then gives the value of a single
    process up to the rounding of the last bits. (List states would not: a rank whose list is empty gathers a
    tensor of another dtype.)
    """

    is_differentiable = False
    higher_is_better: bool | None = False
    full_state_update = False

    def _add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        self.add_state(name, default=torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        # Follow the module to its device but not to its dtype: precision "bf16-true" calls
        # module.to(bfloat16), which torchmetrics lets through to the sums, and these would keep three digits.
        return super()._apply(lambda state: state.to(fn(state).device), exclude_state)


class QuantileForecastMetric(SumMetric):
    """Base of the metrics of quantile forecasts.

    Args:
        quantile_levels: Levels of the forecasts' second dimension, each strictly between 0 and 1.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ConfigError: No levels, a level outside (0, 1), or a level given twice.
    """

    def __init__(self, quantile_levels: Sequence[float] = DECILES, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        levels = tuple(float(level) for level in quantile_levels)
        if not levels or not all(0.0 < level < 1.0 for level in levels) or len(set(levels)) < len(levels):
            raise ConfigError("quantile_levels", quantile_levels, "distinct levels between 0 and 1")
        self.quantile_levels = levels

    def _index_of(self, level: float, field: str) -> int:
        """Position of ``level`` among the forecast levels."""
        for index, candidate in enumerate(self.quantile_levels):
            if math.isclose(candidate, level, abs_tol=1e-9):
                return index
        raise ConfigError(field, level, f"one of the forecast levels {self.quantile_levels}")

    def _observed(self, quantiles: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Check the shapes and split off the mask.

        Returns:
            Forecasts float64 [B, Q, H], targets float64 [B, H] with 0 where missing, and the bool mask [B, H]
            of observed targets.

        Raises:
            ValueError: The shapes do not belong together.
        """
        num_levels = len(self.quantile_levels)
        if target.dim() != 2 or quantiles.shape != (target.shape[0], num_levels, target.shape[1]):
            raise ValueError(
                f"expected forecasts of shape [B, {num_levels}, H] and targets of shape [B, H], "
                f"got {list(quantiles.shape)} and {list(target.shape)}"
            )
        observed = ~torch.isnan(target)
        return quantiles.double(), torch.where(observed, target, 0.0).double(), observed
