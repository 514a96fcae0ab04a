"""The data module: forecasting windows out of many series, for any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from lightning_moe.data.datasets import FixedWindows, ForecastBatch, TrainingWindows
from lightning_moe.data.fcomp import load_competitions
from lightning_moe.data.frame import read_frame, series_from_frame
from lightning_moe.data.loading import EpochSampler, ResumableDataLoader, ShardedSampler, as_fetched, data_shard
from lightning_moe.data.time_series import Series
from lightning_moe.data.windows import FlatSeries
from lightning_moe.errors import ConfigError
from lightning_moe.metrics import seasonal_error

Integers = NDArray[np.int64]

MIN_TRAINING_LENGTH = 6
"""A history that would keep fewer observations than this without its last horizon is not validated on."""


class SeriesDataModule(LightningDataModule):
    """Windows of the M1, M3 and Tourism competitions, or of series of your own.

    Every series is used in four ways. Its *holdout* (the official one, or the last ``prediction_length``
    observations of your own data) is the test target. The last horizon of its *history* is the validation
    target. Training windows are cut at random from the rest. Prediction looks at everything and has no
    target. A history too short to give up a horizon is trained on whole and not validated on.

    Training batches are the same for any number of ranks, workers and processes of the same global batch; see
    the note in :mod:`lightning_moe.data.loading`. Validation, test and prediction see each series on exactly
    one rank, so ranks may differ by one batch. All of this needs nothing from
    ``Trainer(use_distributed_sampler=...)``: the samplers are already in place.

    Args:
        datasets: Names out of :data:`lightning_moe.data.DATASETS`; None means all ten, unless ``path`` or
            ``frame`` is given.
        path: A ``.csv`` or ``.parquet`` file in long format, one row per series and time.
        frame: The same as a DataFrame.
        id_column: Column of ``path`` or ``frame`` that tells the series apart.
        timestamp_column: Column of times.
        target: Column of values.
        context_length: Most observations that a forecast looks at.
        prediction_length: Observations to forecast; series with a shorter horizon have their target padded by
            NaN.
        batch_size: Windows per batch on each rank, as everywhere in Lightning. The global batch is this times
            the number of data-parallel ranks.
        batches_per_epoch: Training batches per rank and epoch.
        season_length: Observations per season of your own data; None takes the one customary for the
            frequency.
        frequency: pandas offset alias of your own data; None infers it.
        num_workers: Processes that prepare batches; 0 prepares them in the training process, at about a
            millisecond each.
        seed: Seed of the training windows.

    Attributes:
        series: All series, once ``setup`` has run; ``series_index`` of a batch points into it.
        dataset_names: Names of their data sets; ``dataset_index`` of a batch points into it.

    Raises:
        ConfigError: A value is out of range, or more than one source is given; and from ``setup``, when the
            data do not fit the arguments.
    """

    def __init__(
        self,
        datasets: list[str] | None = None,
        path: str | None = None,
        frame: pd.DataFrame | None = None,
        id_column: str = "item_id",
        timestamp_column: str = "timestamp",
        target: str = "target",
        context_length: int = 144,
        prediction_length: int = 24,
        batch_size: int = 96,
        batches_per_epoch: int = 2000,
        season_length: int | None = None,
        frequency: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _require_one_source(datasets, path, frame, season_length, frequency)
        _require_at_least(
            1,
            context_length=context_length,
            prediction_length=prediction_length,
            batch_size=batch_size,
            batches_per_epoch=batches_per_epoch,
            season_length=1 if season_length is None else season_length,
        )
        _require_at_least(0, num_workers=num_workers, seed=seed)
        # With fewer series than ranks some ranks have nothing to evaluate. Lightning takes that for a mistake.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.datasets = datasets
        self.path = path
        self.frame = frame
        self.id_column = id_column
        self.timestamp_column = timestamp_column
        self.target = target
        self.context_length = context_length
        self.prediction_length = prediction_length
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.season_length = season_length
        self.frequency = frequency
        self.num_workers = num_workers
        self.seed = seed
        self.series: tuple[Series, ...] = ()
        self.dataset_names: tuple[str, ...] = ()

    def setup(self, stage: str) -> None:
        """Load the series, on every rank, once.

        Args:
            stage: Ignored; all stages read the same series.

        Raises:
            ConfigError: The data cannot be read or do not fit, or a horizon is longer than
                ``prediction_length``.
        """
        if self.series:
            return
        groups = self._load()
        for name, members in groups.items():
            longest = max(series.horizon for series in members)
            if longest > self.prediction_length:
                raise ConfigError(
                    "prediction_length",
                    self.prediction_length,
                    f"at least {longest}, the horizon of {name}",
                    hint="forecast that far, or leave this data set out",
                )
        self.series = tuple(series for members in groups.values() for series in members)
        self.dataset_names = tuple(groups)
        self._dataset = np.repeat(np.arange(len(groups)), [len(members) for members in groups.values()])
        self._flat = FlatSeries.concatenate([np.r_[series.values, series.test] for series in self.series])
        self._history = np.array([len(series.values) for series in self.series])
        self._horizon = np.array([series.horizon for series in self.series])
        # A history too short to give up a horizon is not validated on, so training may have all of it.
        self._validated = self._history - self._horizon >= MIN_TRAINING_LENGTH
        self._training = self._history - np.where(self._validated, self._horizon, 0)

    def train_dataloader(self) -> DataLoader[ForecastBatch]:
        """Return random windows of the training part; see :class:`~lightning_moe.data.ForecastBatch`."""
        num_replicas, rank = data_shard(self.trainer)
        dataset = TrainingWindows(
            **self._windows(self._training),
            length=self._training,
            seed=self.seed,
            samples_per_epoch=self.batches_per_epoch * self.batch_size * num_replicas,
        )
        return ResumableDataLoader(dataset, sampler=EpochSampler(dataset, num_replicas, rank), **self._loading())

    def val_dataloader(self) -> DataLoader[ForecastBatch]:
        """Return the last horizon of each history as target, for series that are long enough."""
        series = np.flatnonzero(self._validated)
        return self._fixed(self._training, series, cut=self._training[series], stop=self._history[series])

    def test_dataloader(self) -> DataLoader[ForecastBatch]:
        """Return the holdout of each series as target."""
        stop = self._history + self._horizon
        return self._fixed(self._history, np.arange(len(stop)), cut=self._history, stop=stop)

    def predict_dataloader(self) -> DataLoader[ForecastBatch]:
        """Return the end of each series, holdout included, with a target of NaN."""
        end = self._history + self._horizon
        return self._fixed(end, np.arange(len(end)), cut=end, stop=end)

    def _fixed(
        self, in_sample: Integers, series: Integers, *, cut: Integers, stop: Integers
    ) -> DataLoader[ForecastBatch]:
        dataset = FixedWindows(**self._windows(in_sample), series=series, cut=cut, stop=stop)
        return DataLoader(dataset, sampler=ShardedSampler(dataset, *data_shard(self.trainer)), **self._loading())

    def _windows(self, in_sample: Integers) -> dict[str, Any]:
        """Arguments common to all datasets; seasonal errors are those of the ``in_sample`` first values."""
        errors = [
            seasonal_error(np.r_[series.values, series.test][:length], series.season_length)
            for series, length in zip(self.series, in_sample, strict=True)
        ]
        return {
            "flat": self._flat,
            "dataset": self._dataset,
            "seasonal_error": np.array(errors),
            "context_length": self.context_length,
            "prediction_length": self.prediction_length,
        }

    def _loading(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "collate_fn": as_fetched,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
        }

    def _load(self) -> dict[str, list[Series]]:
        if self.path is not None:
            frame, name = read_frame(self.path), Path(self.path).name.split(".")[0]
        elif self.frame is not None:
            frame, name = self.frame, "frame"
        else:
            return load_competitions(self.datasets)
        members = series_from_frame(
            frame,
            prediction_length=self.prediction_length,
            dataset=name,
            id_column=self.id_column,
            timestamp_column=self.timestamp_column,
            target=self.target,
            season_length=self.season_length,
            frequency=self.frequency,
        )
        return {name: members}


def _require_one_source(
    datasets: list[str] | None,
    path: str | None,
    frame: pd.DataFrame | None,
    season_length: int | None,
    frequency: str | None,
) -> None:
    given = {"datasets": datasets, "path": path, "frame": frame}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        value = "a DataFrame" if named[1] == "frame" else given[named[1]]
        raise ConfigError(named[1], value, f"null, as {named[0]} is given", "name one source of series")
    if path is None and frame is None:
        for field, setting in {"season_length": season_length, "frequency": frequency}.items():
            if setting is not None:
                hint = "the competitions bring their own"
                raise ConfigError(field, setting, "null, unless path or frame is given", hint)


def _require_at_least(minimum: int, **arguments: object) -> None:
    for field, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ConfigError(field, value, f"an integer of at least {minimum}")
