"""Metrics that give the same value on any number of ranks, and published scores to compare with.

The forecast metrics take quantile forecasts [B, Q, H] and targets [B, H] in which NaN marks a missing value. In a
torchmetrics ``MetricCollection`` pass ``compute_groups=False``: it would otherwise merge two metrics whose sums happen
to agree after the first batch, such as two intervals that both covered every point.
"""

from lightning_moe.metrics.bits_per_byte import BitsPerByte
from lightning_moe.metrics.coverage import IntervalCoverage
from lightning_moe.metrics.expert_load import ExpertLoad
from lightning_moe.metrics.mase import MASE
from lightning_moe.metrics.mean_loss import MeanLoss
from lightning_moe.metrics.published import (
    BASELINE,
    COMPARABLE_DATASETS,
    PUBLISHED,
    Score,
    published_relative,
)
from lightning_moe.metrics.quantile import PinballLoss, WeightedQuantileLoss
from lightning_moe.metrics.relative import RelativeScore
from lightning_moe.metrics.seasonal import seasonal_error
from lightning_moe.metrics.smape import SMAPE

__all__ = [
    "BASELINE",
    "COMPARABLE_DATASETS",
    "MASE",
    "PUBLISHED",
    "SMAPE",
    "BitsPerByte",
    "ExpertLoad",
    "IntervalCoverage",
    "MeanLoss",
    "PinballLoss",
    "RelativeScore",
    "Score",
    "WeightedQuantileLoss",
    "published_relative",
    "seasonal_error",
]
