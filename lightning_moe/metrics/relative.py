"""A model's scores against a baseline's, as one number over many data sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_moe.errors import ConfigError
from lightning_moe.metrics.base import SumMetric


class RelativeScore(SumMetric):
    """Geometric mean over data sets of (score of the model / score of the baseline).

    Below 1 the model beats the baseline. The geometric mean is the only one that does not depend on which of
    the two is called the baseline: Fleming and Wallace, "How not to lie with statistics", Communications of
    the ACM 29 (1986).

    A data set that was reported several times, by several ranks or epochs, enters with the geometric mean of
    its reports. Ranks may therefore all report the same (already reduced) scores, or each report its own data
    sets.

    Args:
        datasets: Names of the data sets that make up the mean.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ConfigError: No names, or a name given twice.
    """

    log_ratio_sum: Tensor
    num_reports: Tensor

    def __init__(self, datasets: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not datasets or len(set(datasets)) < len(datasets):
            raise ConfigError("datasets", datasets, "one or more distinct names")
        self.datasets = tuple(datasets)
        self._add_sum("log_ratio_sum", len(self.datasets))
        self._add_sum("num_reports", len(self.datasets), dtype=torch.int64)

    def update(self, dataset: str, score: Tensor | float, baseline: Tensor | float) -> None:
        """Add the scores on one data set.

        Args:
            dataset: Its name, one of ``datasets``.
            score: Score of the model; scalar, smaller is better.
            baseline: Score of the baseline on the same data; scalar.

        Raises:
            ConfigError: ``dataset`` is not one of the names given at construction.
        """
        if dataset not in self.datasets:
            raise ConfigError("dataset", dataset, f"one of {', '.join(self.datasets)}")
        index = self.datasets.index(dataset)
        model = torch.as_tensor(score, dtype=torch.float64, device=self.log_ratio_sum.device)
        reference = torch.as_tensor(baseline, dtype=torch.float64, device=self.log_ratio_sum.device)
        self.log_ratio_sum[index] += (model / reference).log()
        self.num_reports[index] += 1

    def compute(self) -> Tensor:
        """Return the geometric mean, float64 scalar; NaN while a data set has not been reported.

        A mean over the sets that happen to be there would not be comparable with one over all of them.
        """
        return (self.log_ratio_sum / self.num_reports).mean().exp()
