"""What a forecasting run came to, as it is written to ``summary.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from lightning_moe.cli.report.summary import RunSummary, with_nan
from lightning_moe.metrics import BASELINE, COMPARABLE_DATASETS, PUBLISHED, RelativeScore, Score


@dataclass(frozen=True, kw_only=True)
class DatasetScores:
    """Scores on one data set; NaN where one is undefined."""

    series: int
    """Number of series."""
    mase: float
    """MASE of the model."""
    wql: float
    """WQL of the model."""
    naive_mase: float
    """MASE of the seasonal naive forecast."""
    naive_wql: float
    """WQL of the seasonal naive forecast."""
    relative_mase: float
    """``mase / naive_mase``."""
    relative_wql: float
    """``wql / naive_wql``."""

    @classmethod
    def against(cls, series: int, model: Score, naive: Score) -> DatasetScores:
        """Compare the model's scores with the baseline's."""
        return cls(
            series=series,
            mase=model.mase,
            wql=model.wql,
            naive_mase=naive.mase,
            naive_wql=naive.wql,
            relative_mase=model.mase / naive.mase if naive.mase else math.nan,
            relative_wql=model.wql / naive.wql if naive.wql else math.nan,
        )


@dataclass(frozen=True, kw_only=True)
class ForecastSummary(RunSummary):
    """A run of a forecaster."""

    relative_mase: float
    """Geometric mean of the relative MASE over ``relative_datasets``."""
    relative_wql: float
    """Geometric mean of the relative WQL over ``relative_datasets``."""
    relative_datasets: tuple[str, ...]
    """The data sets of the means: those with published scores, or all of them when there is none."""
    datasets: Mapping[str, DatasetScores]
    """Scores by data set."""
    published: Mapping[str, Score]
    """The same means of published forecasters; empty where they are not comparable."""
    forecast_png: str | None
    """The picture with forecasts; null without matplotlib."""

    @override
    def _plain(self) -> dict[str, Any]:
        # JSON would make lists of named tuples.
        return super()._plain() | {"published": {name: score._asdict() for name, score in self.published.items()}}

    @override
    @classmethod
    def _restored(cls, values: dict[str, Any]) -> dict[str, Any]:
        means = {name: values[name] for name in ("relative_mase", "relative_wql")}
        return {
            **values,
            **with_nan(means),
            "relative_datasets": tuple(values["relative_datasets"]),
            "datasets": {name: DatasetScores(**with_nan(scores)) for name, scores in values["datasets"].items()},
            "published": {name: Score(**with_nan(scores)) for name, scores in values["published"].items()},
        }


def mean_datasets(datasets: Mapping[str, DatasetScores]) -> tuple[str, ...]:
    """The data sets that the geometric means run over: those with published scores, or all when none has."""
    return tuple(name for name in COMPARABLE_DATASETS if name in datasets) or tuple(datasets)


def relative_score(model: Mapping[str, Score], baseline: Mapping[str, Score], datasets: tuple[str, ...]) -> Score:
    """Geometric means over data sets of the model's scores over the baseline's; NaN where one is undefined."""
    means = []
    for part in ("mase", "wql"):
        # The scores are those of all ranks, and only rank 0 is here.
        mean = RelativeScore(datasets, sync_on_compute=False)
        for name in datasets:
            mean.update(name, getattr(model[name], part), getattr(baseline[name], part))
        means.append(float(mean.compute()))
    return Score(*means)


def published_scores(datasets: tuple[str, ...]) -> dict[str, Score]:
    """Relative scores of the published forecasters over the given data sets; empty where any has no such score."""
    if not set(datasets) <= set(COMPARABLE_DATASETS):
        return {}
    return {
        name: relative_score(scores, PUBLISHED[BASELINE], datasets)
        for name, scores in PUBLISHED.items()
        if name != BASELINE
    }
