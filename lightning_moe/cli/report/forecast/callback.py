"""The report of a test of a forecaster: scores, and a picture of forecasts."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import Tensor
from typing_extensions import override

from lightning_moe.cli.report.callback import Report
from lightning_moe.cli.report.forecast.baseline import naive_scores
from lightning_moe.cli.report.forecast.summary import (
    DatasetScores,
    ForecastSummary,
    mean_datasets,
    published_scores,
    relative_score,
)
from lightning_moe.cli.report.forecast.tables import print_forecast_summary
from lightning_moe.cli.report.summary import RunFacts
from lightning_moe.data import SeriesDataModule
from lightning_moe.data.time_series import Series
from lightning_moe.metrics import Score
from lightning_moe.metrics.base import DECILES
from lightning_moe.models.chronos_moe import ChronosMoE
from lightning_moe.models.chronos_moe.plot import plot_forecast_grid

PICTURE_NAME = "forecasts.png"


class Forecasts(NamedTuple):
    """What takes all ranks to find out."""

    scores: dict[str, Tensor]
    """Scores by name."""
    shown: dict[str, Series]
    """The series of the picture, by data set."""
    quantiles: Tensor
    """Forecasts of these series."""


class ForecastReport(Report[ChronosMoE, SeriesDataModule, Forecasts]):
    """The report of a forecaster; it also draws ``forecasts.png``."""

    model_type = ChronosMoE
    data_type = SeriesDataModule

    @override
    def gather(self, trainer: pl.Trainer, model: ChronosMoE, data: SeriesDataModule) -> Forecasts:
        assert model.scores is not None
        shown = {name: _middle(_members(data, name)) for name in data.dataset_names}
        return Forecasts(model.scores.compute(), shown, _forecast(model, list(shown.values())))

    @override
    def summarize(
        self, gathered: Forecasts, model: ChronosMoE, data: SeriesDataModule, folder: Path, facts: RunFacts
    ) -> ForecastSummary:
        levels, scores = model.config.quantiles, gathered.scores
        datasets = {}
        for name in data.dataset_names:
            members = _members(data, name)
            reached = Score(mase=scores[f"mase/{name}"].item(), wql=scores[f"wql/{name}"].item())
            datasets[name] = DatasetScores.against(len(members), reached, naive_scores(members, levels))
        averaged = mean_datasets(datasets)
        mean = relative_score(
            {name: Score(one.mase, one.wql) for name, one in datasets.items()},
            {name: Score(one.naive_mase, one.naive_wql) for name, one in datasets.items()},
            averaged,
        )
        return ForecastSummary(
            **facts,
            relative_mase=mean.mase,
            relative_wql=mean.wql,
            relative_datasets=averaged,
            datasets=datasets,
            # Published WQL is over deciles; over other levels it is another quantity.
            published=published_scores(averaged) if levels == DECILES else {},
            forecast_png=_draw(folder / PICTURE_NAME, gathered.shown, gathered.quantiles, levels),
        )

    @override
    @staticmethod
    def show(path: Path, console: Console) -> ForecastSummary:
        summary = ForecastSummary.read(path)
        print_forecast_summary(summary, console)
        return summary


def _members(datamodule: SeriesDataModule, dataset: str) -> list[Series]:
    return [series for series in datamodule.series if series.dataset == dataset]


def _middle(series: list[Series]) -> Series:
    """The series to show: picked by position, so that nobody picks the prettiest."""
    return series[len(series) // 2]


def _forecast(model: ChronosMoE, series: list[Series]) -> Tensor:
    histories = [torch.from_numpy(one.values) for one in series]
    quantiles, _ = model.predict_quantiles(histories, quantile_levels=model.config.quantiles)
    return quantiles


def _draw(path: Path, shown: dict[str, Series], forecasts: Tensor, levels: tuple[float, ...]) -> str | None:
    if find_spec("matplotlib") is None:
        return None
    series = list(shown.values())
    plot_forecast_grid(
        path,
        [one.values for one in series],
        [quantiles[: one.horizon].numpy() for one, quantiles in zip(series, forecasts, strict=True)],
        [one.test for one in series],
        titles=[f"{name}: {one.item_id}" for name, one in shown.items()],
        quantile_levels=levels,
        max_history=60,
    )
    return str(path)
