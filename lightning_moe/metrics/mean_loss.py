"""The mean of a loss over an evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_moe.metrics.base import SumMetric


class MeanLoss(SumMetric):
    """Mean of a loss over all of its terms, whatever their number per batch and rank.

    Args:
        kwargs: Passed to :class:`torchmetrics.Metric`.
    """

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sum("total")
        self._add_sum("count", dtype=torch.int64)

    def update(self, total: Tensor, count: Tensor) -> None:
        """Add the sum of a batch's terms, scalar, and their number, int64 scalar."""
        self.total += total.detach()
        self.count += count

    def compute(self) -> Tensor:
        """Return the mean, float64 scalar; NaN without any term."""
        return self.total / self.count
