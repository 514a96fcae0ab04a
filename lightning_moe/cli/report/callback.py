"""The callback that makes the report of a test, on whatever process the test runs."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from lightning_moe.cli.report.baseline import naive_scores
from lightning_moe.cli.report.summary import (
    DatasetScores,
    Summary,
    mean_datasets,
    published_scores,
    relative_score,
)
from lightning_moe.data import SeriesDataModule
from lightning_moe.data.time_series import Series
from lightning_moe.errors import ConfigError
from lightning_moe.metrics import Score
from lightning_moe.metrics.base import DECILES
from lightning_moe.models.chronos_moe import ChronosMoE
from lightning_moe.models.chronos_moe.plot import plot_forecast_grid
from lightning_moe.parallel.sharding import sharded_parameters

SUMMARY_NAME = "summary.json"
PICTURE_NAME = "forecasts.png"


class ForecastReport(Callback):
    """Writes ``summary.json`` and ``forecasts.png`` into the run's folder when a test ends.

    It works inside the test because only there every rank is at hand: the scores are reduced over ranks, and a
    forecast needs the experts of all of them.

    Args:
        command: The command that is reported.
        checkpoint: The checkpoint that is tested; None for the weights as they are.
        seconds: Wall time of the training that led here; None reports the time of the test.
    """

    def __init__(self, command: str, checkpoint: str | None, seconds: float | None = None) -> None:
        self._command = command
        self._checkpoint = checkpoint
        self._seconds = seconds
        self._started = 0.0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_reportable(pl_module, trainer.datamodule)  # type: ignore[attr-defined]

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seconds = time.perf_counter() - self._started if self._seconds is None else self._seconds
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, ChronosMoE)
        assert isinstance(datamodule, SeriesDataModule)
        assert pl_module.scores is not None
        # Calls that all ranks make together.
        scores = pl_module.scores.compute()
        tokens = None if pl_module.expert_load is None else pl_module.expert_load.compute()
        shown = {name: _middle(_members(datamodule, name)) for name in datamodule.dataset_names}
        forecasts = _forecast(pl_module, list(shown.values()))
        folder = Path(trainer.log_dir or trainer.default_root_dir).resolve()
        if not trainer.is_global_zero:
            return

        folder.mkdir(parents=True, exist_ok=True)
        levels = pl_module.config.quantiles
        datasets = {}
        for name in datamodule.dataset_names:
            members = _members(datamodule, name)
            model = Score(mase=scores[f"mase/{name}"].item(), wql=scores[f"wql/{name}"].item())
            datasets[name] = DatasetScores.against(len(members), model, naive_scores(members, levels))
        averaged = mean_datasets(datasets)
        mean = relative_score(
            {name: Score(one.mase, one.wql) for name, one in datasets.items()},
            {name: Score(one.naive_mase, one.naive_wql) for name, one in datasets.items()},
            averaged,
        )
        summary = Summary(
            command=self._command,
            relative_mase=mean.mase,
            relative_wql=mean.wql,
            relative_datasets=averaged,
            datasets=datasets,
            # Published WQL is over deciles; over other levels it is another quantity.
            published=published_scores(averaged) if levels == DECILES else {},
            expert_load=None if tokens is None else _shares(tokens),
            parameters=_count_parameters(pl_module),
            world_size=trainer.world_size,
            seconds=seconds,
            checkpoint=None if self._checkpoint is None else str(Path(self._checkpoint).resolve()),
            forecast_png=_draw(folder / PICTURE_NAME, shown, forecasts, levels),
        )
        summary.write(folder / SUMMARY_NAME)


def check_reportable(model: object, data: object) -> None:
    """Refuse to report on a model or data that have no such scores.

    Raises:
        ConfigError: The model is no ``ChronosMoE``, or the data no ``SeriesDataModule``.
    """
    for field, value, wanted in (("model", model, ChronosMoE), ("data", data, SeriesDataModule)):
        if not isinstance(value, wanted):
            raise ConfigError(
                "report",
                True,
                f"false, or lightning_moe.{wanted.__name__} as {field} (it is {type(value).__name__})",
                "the report compares forecasts of series",
            )


def _members(datamodule: SeriesDataModule, dataset: str) -> list[Series]:
    return [series for series in datamodule.series if series.dataset == dataset]


def _middle(series: list[Series]) -> Series:
    """The series to show: picked by position, so that nobody picks the prettiest."""
    return series[len(series) // 2]


def _forecast(model: ChronosMoE, series: list[Series]) -> Tensor:
    histories = [torch.from_numpy(one.values) for one in series]
    quantiles, _ = model.predict_quantiles(histories, quantile_levels=model.config.quantiles)
    return quantiles


def _shares(tokens: Tensor) -> tuple[tuple[float, ...], ...]:
    shares = tokens.double() / tokens.sum(dim=1, keepdim=True).clamp(min=1)
    return tuple(tuple(layer) for layer in shares.tolist())


def _count_parameters(model: ChronosMoE) -> int:
    return sum(
        parameter.numel() if spec is None else parameter.numel() // len(spec.index) * spec.size
        for _, parameter, spec in sharded_parameters(model)
    )


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
