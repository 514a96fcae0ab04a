"""Windows as map-style datasets that fetch a whole batch at once.

Shapes: B windows, C context length, H prediction length, N series.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_moe.data.windows import FlatSeries, WindowSampler

Integers = NDArray[np.int64]


class ForecastBatch(TypedDict):
    """What every data loader yields; a single item of a dataset is the same without the first dimension."""

    context: Tensor
    """Observations to forecast from, divided by ``scale``: float32 [B, C], NaN on the left and where
    missing."""
    target: Tensor
    """Observations to forecast, divided by ``scale``: float32 [B, H], NaN on the right and where missing."""
    scale: Tensor
    """Factor back to original units, float64 [B]."""
    seasonal_error: Tensor
    """In-sample seasonal naive error in original units, float64 [B]; NaN where undefined."""
    series_index: Tensor
    """Position in ``SeriesDataModule.series``, int64 [B]."""
    dataset_index: Tensor
    """Position in ``SeriesDataModule.dataset_names``, int64 [B]."""


class WindowDataset(Dataset[ForecastBatch]):
    """Base of the datasets below: cuts the windows that a subclass locates.

    Args:
        flat: All series.
        dataset: Data set of each series, [N].
        seasonal_error: In-sample error of each series, float64 [N].
        context_length: C.
        prediction_length: H.
    """

    def __init__(
        self,
        flat: FlatSeries,
        dataset: Integers,
        seasonal_error: NDArray[np.float64],
        context_length: int,
        prediction_length: int,
    ) -> None:
        self._flat = flat
        self._dataset = dataset
        self._seasonal_error = seasonal_error
        self._context_length = context_length
        self._prediction_length = prediction_length

    def _locate(self, indices: Integers) -> tuple[Integers, Integers, Integers]:
        """Series, first target and end of the visible part of the windows with the given indices."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> ForecastBatch:
        batch = self.__getitems__([index])
        return ForecastBatch(
            context=batch["context"][0],
            target=batch["target"][0],
            scale=batch["scale"][0],
            seasonal_error=batch["seasonal_error"][0],
            series_index=batch["series_index"][0],
            dataset_index=batch["dataset_index"][0],
        )

    def __getitems__(self, indices: list[int]) -> ForecastBatch:
        """Return a finished batch; torch's data loader calls this with a batch of indices where it exists."""
        series, cut, stop = self._locate(np.asarray(indices, dtype=np.int64))
        windows = self._flat.windows(series, cut, stop, self._context_length, self._prediction_length)
        return ForecastBatch(
            context=torch.from_numpy(windows.context),
            target=torch.from_numpy(windows.target),
            scale=torch.from_numpy(windows.scale),
            seasonal_error=torch.from_numpy(self._seasonal_error[series]),
            series_index=torch.from_numpy(series),
            dataset_index=torch.from_numpy(self._dataset[series]),
        )


class TrainingWindows(WindowDataset):
    """An endless supply of randomly cut windows: item i is a function of the seed and of i, for every i >= 0.

    The length is that of one epoch, but any index is served: epoch e starts at index e * length.

    Args:
        flat: All series.
        dataset: Data set of each series, [N], ascending.
        seasonal_error: In-sample error of each series, float64 [N].
        context_length: C.
        prediction_length: H.
        length: Observations of each series that may be looked at, [N].
        seed: Seed of the draws.
        samples_per_epoch: Length of the dataset.
    """

    def __init__(
        self,
        flat: FlatSeries,
        dataset: Integers,
        seasonal_error: NDArray[np.float64],
        context_length: int,
        prediction_length: int,
        *,
        length: Integers,
        seed: int,
        samples_per_epoch: int,
    ) -> None:
        super().__init__(flat, dataset, seasonal_error, context_length, prediction_length)
        self._sampler = WindowSampler(dataset, length, seed)
        self._length = length
        self._samples_per_epoch = samples_per_epoch

    def __len__(self) -> int:
        return self._samples_per_epoch

    def _locate(self, indices: Integers) -> tuple[Integers, Integers, Integers]:
        series, cut = self._sampler.draw(indices)
        return series, cut, self._length[series]


class FixedWindows(WindowDataset):
    """One window of each of some series.

    Args:
        flat: All series.
        dataset: Data set of each series, [N].
        seasonal_error: In-sample error of each series, float64 [N].
        context_length: C.
        prediction_length: H.
        series: Indices of the series that have a window, [M].
        cut: Observations before the target, for each of these [M].
        stop: Observations before the end of the target, for each of these [M]; equal to ``cut`` for no
            target.
    """

    def __init__(
        self,
        flat: FlatSeries,
        dataset: Integers,
        seasonal_error: NDArray[np.float64],
        context_length: int,
        prediction_length: int,
        *,
        series: Integers,
        cut: Integers,
        stop: Integers,
    ) -> None:
        super().__init__(flat, dataset, seasonal_error, context_length, prediction_length)
        self._series = series
        self._cut = cut
        self._stop = stop

    def __len__(self) -> int:
        return len(self._series)

    def _locate(self, indices: Integers) -> tuple[Integers, Integers, Integers]:
        return self._series[indices], self._cut[indices], self._stop[indices]
