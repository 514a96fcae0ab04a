"""Long-format frames in and out of the forecaster: what ``predict_df`` reads and returns."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lightning_moe.errors import ConfigError


@dataclass(frozen=True)
class FrameSeries:
    """One series of a long-format frame, in order of time."""

    item_id: Any
    """What the id column says."""
    values: NDArray[np.float64]
    """``[T]``, NaN where missing."""
    last: pd.Timestamp
    """Time of the last value."""
    freq: str
    """Distance between values, as a pandas alias."""


def split_series(
    df: pd.DataFrame, id_column: str, timestamp_column: str, target: str, freq: str | None = None
) -> list[FrameSeries]:
    """Split a frame into its series, in order of first appearance, each sorted by time.

    Args:
        df: One row per observation.
        id_column: Column that tells the series apart.
        timestamp_column: Column of timestamps.
        target: Column of values.
        freq: Frequency of all series; inferred for each when None.

    Raises:
        ConfigError: See :meth:`~lightning_moe.models.chronos_moe.forecast.ForecastMixin.predict_df`.
    """
    for argument, column in (
        ("id_column", id_column),
        ("timestamp_column", timestamp_column),
        ("target", target),
    ):
        if column not in df.columns:
            raise ConfigError(argument, column, "a column of the frame: " + ", ".join(map(str, df.columns)))
    if df.empty:
        raise ConfigError("df", "a frame without rows", "at least one series")
    if df[id_column].isna().any():
        raise ConfigError("id_column", id_column, "a column without missing ids")
    clean = pd.DataFrame(
        {
            "item_id": df[id_column].array,
            "timestamp": _timestamps(df[timestamp_column], timestamp_column),
            "target": _numbers(df[target], target),
        }
    ).sort_values("timestamp", kind="stable")
    groups = dict(iter(clean.groupby("item_id", sort=False, observed=True)))
    offset = _checked_freq(freq) if freq is not None else None
    return [_one_series(item_id, groups[item_id], offset) for item_id in df[id_column].unique()]


def forecast_frame(
    series: Sequence[FrameSeries],
    quantiles: NDArray[Any],
    median: NDArray[Any],
    levels: Sequence[float],
    columns: tuple[str, str, str],
) -> pd.DataFrame:
    """Lay out forecasts in long format.

    Args:
        series: The ``B`` series that were forecast.
        quantiles: ``[B, H, len(levels)]``.
        median: ``[B, H]``.
        levels: Quantile levels, which name the columns.
        columns: Names of the id and timestamp columns and of the target.
    """
    id_column, timestamp_column, target = columns
    horizon = median.shape[1]
    stamps = [pd.Series(pd.date_range(one.last, periods=horizon + 1, freq=one.freq)[1:]) for one in series]
    frame = pd.DataFrame(
        {
            id_column: pd.Series([one.item_id for one in series]).repeat(horizon).reset_index(drop=True),
            timestamp_column: pd.concat(stamps, ignore_index=True),
            "target_name": target,
            "predictions": median.reshape(-1),
        }
    )
    for position, level in enumerate(levels):
        frame[str(level)] = quantiles[..., position].reshape(-1)
    return frame


def _timestamps(column: pd.Series[Any], name: str) -> Any:
    # pandas would read the year 1990 as 1990 nanoseconds after 1970.
    if pd.api.types.is_numeric_dtype(column):
        raise ConfigError(
            "timestamp_column",
            name,
            f"a column of timestamps (this one holds {column.dtype})",
            "convert it, e.g. pd.to_datetime(df[column], format='%Y')",
        )
    try:
        stamps = pd.to_datetime(column)
    except (ValueError, TypeError) as error:
        raise ConfigError("timestamp_column", name, f"a column of timestamps ({error})") from error
    if stamps.isna().any():
        raise ConfigError("timestamp_column", name, "a column without missing timestamps")
    return stamps.array


def _numbers(column: pd.Series[Any], name: str) -> NDArray[np.float64]:
    if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        raise ConfigError("target", name, f"a column of numbers (this one holds {column.dtype})")
    return column.to_numpy(dtype=np.float64, na_value=np.nan)


def _checked_freq(freq: str) -> str:
    try:
        pd.tseries.frequencies.to_offset(freq)
    except ValueError as error:
        raise ConfigError("freq", freq, "a pandas frequency alias, e.g. 'h', 'D', 'W', 'ME', 'QE' or 'YE'") from error
    return freq


def _one_series(item_id: Any, group: pd.DataFrame, freq: str | None) -> FrameSeries:
    stamps = pd.DatetimeIndex(group["timestamp"])
    values = pd.Series(group["target"].to_numpy(dtype=np.float64), index=stamps)
    if stamps.has_duplicates:
        twice = stamps[stamps.duplicated()][0]
        raise ConfigError(
            "timestamp_column",
            str(twice),
            "one row per series and timestamp",
            f"series {item_id!r} has it twice",
        )
    if freq is not None:
        values = _on_grid(item_id, values, freq)
        return FrameSeries(item_id, np.array(values, np.float64), values.index[-1], freq)
    if len(stamps) < 3:
        raise ConfigError(
            "df",
            f"series {item_id!r} with {len(stamps)} rows",
            "at least 3 rows per series, to infer its frequency",
            "pass freq= to forecast shorter series",
        )
    inferred = _inferred_freq(stamps)
    if inferred is None:
        raise ConfigError(
            "timestamp_column",
            f"irregular timestamps in series {item_id!r}",
            "evenly spaced timestamps",
            "pass freq= to have the missing steps filled in as missing values",
        )
    return FrameSeries(item_id, np.array(values, np.float64), stamps[-1], inferred)


def _inferred_freq(stamps: pd.DatetimeIndex) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas 3 announces that pandas 4 will return an offset here
        inferred: Any = pd.infer_freq(stamps)
    return inferred if inferred is None or isinstance(inferred, str) else str(inferred.freqstr)


def _on_grid(item_id: Any, values: pd.Series[float], freq: str) -> pd.Series[float]:
    """Insert the steps that are missing from an evenly spaced grid, with NaN."""
    grid = values.asfreq(freq)
    off_grid = values.index.difference(grid.index)
    if len(off_grid):
        raise ConfigError(
            "freq", freq, f"a frequency that holds every timestamp of series {item_id!r} (not {off_grid[0]})"
        )
    return grid
