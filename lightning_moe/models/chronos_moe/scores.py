"""Forecast scores per data set, accumulated over an evaluation and reduced over ranks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_moe.metrics import MASE, SMAPE, IntervalCoverage, MeanLoss, WeightedQuantileLoss
from lightning_moe.metrics.base import QuantileForecastMetric


class ForecastScores(nn.Module):
    """MASE, WQL, sMAPE and interval coverage of each data set, and the mean loss over all of them.

    Args:
        datasets: Names of the data sets; the position of a name is its index in the batches.
        quantile_levels: Levels of the forecasts, ascending, with 0.5 among them.
    """

    def __init__(self, datasets: Sequence[str], quantile_levels: Sequence[float]) -> None:
        super().__init__()
        self.datasets = tuple(datasets)
        self.loss = MeanLoss()
        self.metrics = nn.ModuleList(nn.ModuleDict(_metrics(quantile_levels)) for _ in self.datasets)

    def update(self, quantiles: Tensor, target: Tensor, seasonal_error: Tensor, dataset_index: Tensor) -> None:
        """Add a batch; one host synchronisation.

        Args:
            quantiles: ``[B, Q, H]`` in original units.
            target: ``[B, H]`` in original units, NaN where missing.
            seasonal_error: ``[B]`` in original units.
            dataset_index: int64 ``[B]``, positions in ``datasets``.
        """
        for index in dataset_index.unique().tolist():
            of_set = dataset_index == index
            for metric in self._of(index).values():
                extra = (seasonal_error[of_set],) if isinstance(metric, MASE) else ()
                metric.update(quantiles[of_set], target[of_set], *extra)

    def compute(self) -> dict[str, Tensor]:
        """Reduce over ranks and return the scores; a collective call.

        Returns:
            ``"loss"``, and for each metric ``"name/dataset"`` and ``"name"``: the geometric mean over data
            sets for MASE and WQL (so that ranking by it is ranking by the mean *relative* score, whatever
            the baseline) and the plain mean for the others. A data set without data is NaN and does not
            enter the mean.
        """
        with warnings.catch_warnings():
            # A rank without a single series of some data set is no reason to warn.
            warnings.filterwarnings("ignore", message=".*was called before the ``update`` method")
            return self._compute()

    def _compute(self) -> dict[str, Tensor]:
        scores = {"loss": self.loss.compute()}
        for name in self._of(0):
            values = torch.stack([self._of(index)[name].compute() for index in range(len(self.datasets))])
            if name in ("mase", "wql"):
                scores[name] = values.log().nanmean().exp()
            else:
                scores[name] = values.nanmean()
            scores |= {f"{name}/{dataset}": value for dataset, value in zip(self.datasets, values, strict=True)}
        return scores

    def reset(self) -> None:
        """Forget everything that was added."""
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()

    def _of(self, index: int) -> dict[str, QuantileForecastMetric]:
        table = self.metrics[index]
        assert isinstance(table, nn.ModuleDict)
        return {name: metric for name, metric in table.items() if isinstance(metric, QuantileForecastMetric)}


def _metrics(levels: Sequence[float]) -> dict[str, nn.Module]:
    low, high = levels[0], levels[-1]
    metrics: dict[str, nn.Module] = {
        "mase": MASE(levels),
        "wql": WeightedQuantileLoss(levels),
        "smape": SMAPE(levels),
    }
    if low < high:
        metrics["coverage"] = IntervalCoverage(low, high, levels)
    return metrics
