"""Cutting windows out of series, drawn or at fixed places, as pure functions.

Shapes: B windows, C context length, H prediction length, N series. Everything here is numpy on plain arrays:
a window depends on the series, the seed and its own number alone, never on ranks, workers or batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Windows(NamedTuple):
    """A batch of windows, divided by their scale so that float32 holds them."""

    context: NDArray[np.float32]
    """Observations before the cut, [B, C]; NaN on the left where the series is shorter, and where missing."""
    target: NDArray[np.float32]
    """Observations from the cut on, [B, H]; NaN on the right past the end, and where missing."""
    scale: Floats
    """What context and target must be multiplied by to be in original units again, [B]; positive."""


@dataclass(frozen=True, eq=False)
class FlatSeries:
    """All series end to end in one array, so that a batch of windows is one gather instead of a loop."""

    values: Floats
    """Observations of all series."""
    start: Integers
    """Position in ``values`` of each series' first observation, [N]."""

    @classmethod
    def concatenate(cls, series: Sequence[Floats]) -> FlatSeries:
        """Lay the series end to end.

        Args:
            series: One array of observations per series, at least one in all.
        """
        lengths = np.array([len(values) for values in series], dtype=np.int64)
        return cls(np.concatenate(series).astype(np.float64), np.cumsum(lengths) - lengths)

    def windows(
        self, series: Integers, cut: Integers, stop: Integers, context_length: int, prediction_length: int
    ) -> Windows:
        """Cut one window per row.

        Args:
            series: Index of the series, [B].
            cut: Number of observations before the window's target, [B].
            stop: Number of observations that may be looked at, [B]: the target ends here at the latest.
            context_length: C.
            prediction_length: H.

        Returns:
            The windows. Their scale is the mean absolute value of the observed context, or 1 where that is
            zero or nothing is observed.
        """
        position = cut[:, None] + np.arange(-context_length, prediction_length)
        inside = (position >= 0) & (position < stop[:, None])
        gathered = self.values[self.start[series, None] + np.where(inside, position, 0)]
        gathered[~inside] = np.nan
        context = gathered[:, :context_length]
        observed = ~np.isnan(context)
        total = np.abs(context).sum(axis=1, where=observed)
        scale = total / np.maximum(observed.sum(axis=1), 1)
        scale = np.where(scale > 0.0, scale, 1.0)
        scaled = (gathered / scale[:, None]).astype(np.float32)
        return Windows(scaled[:, :context_length], scaled[:, context_length:], scale)


def uniforms(seed: int, indices: Integers, count: int) -> Floats:
    """Random numbers that belong to a sample's index, whoever asks for them and in whichever order.

    Row i are the first numbers of the Philox4x64-10 stream (Salmon et al., "Parallel random numbers: as easy
    as 1, 2, 3", SC 2011) with key ``seed`` and counter ``indices[i]``. One run of the generator over the span
    of the indices is much faster than a generator per index, and gives the same numbers: one counter value is
    one block.

    Args:
        seed: Key of the stream, at least 0.
        indices: Sample numbers, [B], at least 0.
        count: Numbers per sample, at most the 4 of one counter value.

    Returns:
        Uniform numbers in [0, 1), [B, count].
    """
    assert 1 <= count <= 4, count
    first = int(indices.min())
    blocks = int(indices.max()) - first + 1
    raw = np.random.Philox(key=seed, counter=first).random_raw(4 * blocks).reshape(blocks, 4)
    chosen = raw[indices - first, :count]
    return (chosen >> np.uint64(11)).astype(np.float64) * 2.0**-53  # a double holds 53 bits


class WindowSampler:
    """Draws where training windows are cut.

    A data set is drawn with probability proportional to the square root of its number of series, so that
    large data sets count for more but do not drown small ones; then one of its series; then the cut,
    uniformly from a quarter of the series on, so that most windows have some context.

    Args:
        dataset: Data set of each series, [N], as ascending indices without gaps: 0, 0, 1, 1, 1, 2, ...
        length: Observations of each series that training may see, [N], each at least 2.
        seed: Seed of all draws, at least 0.
    """

    def __init__(self, dataset: Integers, length: Integers, seed: int) -> None:
        assert (length >= 2).all(), "a window needs an observation on either side of its cut"
        assert (np.diff(dataset) >= 0).all(), "the series of a data set must lie together"
        self._sizes = np.bincount(dataset)
        self._first = np.cumsum(self._sizes) - self._sizes
        weights = np.sqrt(self._sizes)
        self._thresholds = (np.cumsum(weights) / weights.sum())[:-1]
        self._length = length
        self._seed = seed

    def draw(self, indices: Integers) -> tuple[Integers, Integers]:
        """Draw the windows with the given numbers.

        Args:
            indices: Sample numbers, [B], at least 0.

        Returns:
            Index of the series [B] and number of observations before the cut [B].
        """
        which, member, place = uniforms(self._seed, indices, 3).T
        dataset = np.searchsorted(self._thresholds, which, side="right")
        series = self._first[dataset] + (member * self._sizes[dataset]).astype(np.int64)
        length = self._length[series]
        earliest = np.minimum(np.maximum(4, length // 4), length - 1)
        return series, earliest + (place * (length - earliest)).astype(np.int64)
