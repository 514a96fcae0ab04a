"""Series from tables in long format: one row per series and time."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lightning_moe.data.frequency import infer_frequency, offset_of, season_length_of
from lightning_moe.data.time_series import Series
from lightning_moe.errors import ConfigError

MIN_HISTORY = 2
"""Observations that a series must have before its holdout: one to look at and one to learn from."""


def read_frame(path: str | Path) -> pd.DataFrame:
    """Read a table.

    Args:
        path: A ``.csv`` file, possibly compressed as ``.csv.gz``, or a ``.parquet`` file.

    Raises:
        ConfigError: There is no such file, its type is unknown, or the package for Parquet is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError("path", str(path), "an existing file", hint=f"looked in {path.absolute().parent}")
    if path.name.endswith((".csv", ".csv.gz")):
        return pd.read_csv(path)
    if path.suffix == ".parquet":
        try:
            return pd.read_parquet(path)
        except ImportError as error:
            allowed = "a Parquet file, once the package pyarrow is installed"
            raise ConfigError("path", str(path), allowed, hint="pip install pyarrow") from error
    raise ConfigError("path", str(path), "a file that ends in .csv, .csv.gz or .parquet")


def series_from_frame(
    frame: pd.DataFrame,
    *,
    prediction_length: int,
    dataset: str = "frame",
    id_column: str = "item_id",
    timestamp_column: str = "timestamp",
    target: str = "target",
    season_length: int | None = None,
    frequency: str | None = None,
) -> list[Series]:
    """Split a table into series, each with its last ``prediction_length`` observations held out.

    Rows may come in any order, and targets may be missing. All series must have one sampling frequency.

    Args:
        frame: The table, in long format.
        prediction_length: Number of observations to hold out.
        dataset: Name that the series get as their data set.
        id_column: Column that tells the series apart.
        timestamp_column: Column of times: datetimes, or strings that pandas can parse.
        target: Column of values.
        season_length: Observations per season; None takes the one customary for the frequency.
        frequency: pandas offset alias; None infers it from the longest series. When it is given, times that a
            series skips become missing values; when it is inferred, a skipped time is an error.

    Returns:
        The series in the order in which they first appear.

    Raises:
        ConfigError: Columns are missing or of the wrong type, times are missing, repeated or irregular,
            values are infinite, or series are too short; the message names the series.
    """
    table = _checked(frame, id_column, timestamp_column, target)
    ids, times = table["id"], pd.DatetimeIndex(table["time"])
    values = table["value"].to_numpy(dtype=np.float64)
    bounds = [*np.flatnonzero(~table["order"].duplicated()).tolist(), len(table)]
    spans = [slice(start, stop) for start, stop in pairwise(bounds)]
    names = ids.iloc[bounds[:-1]].tolist()

    if frequency is None:
        lengths = [span.stop - span.start for span in spans]
        _require_length(names, lengths, prediction_length)  # at least three: fewer have no frequency
        longest = int(np.argmax(lengths))
        alias = infer_frequency(times[spans[longest]])
        if alias is None:
            raise _irregular(timestamp_column, [names[longest]], frequency)
    else:
        alias = offset_of(frequency).freqstr
    season = season_length_of(alias) if season_length is None else season_length

    histories: list[NDArray[np.float64]] = []
    irregular = []
    for name, span in zip(names, spans, strict=True):
        regular = _on_grid(times[span], values[span], alias, fill=frequency is not None)
        if regular is None:
            irregular.append(name)
        else:
            histories.append(regular)
    if irregular:
        raise _irregular(timestamp_column, irregular, alias)
    _require_length(names, [len(history) for history in histories], prediction_length)
    empty = [
        name for name, history in zip(names, histories, strict=True) if np.isnan(history[:-prediction_length]).all()
    ]
    if empty:
        allowed = "at least one value before the holdout in every series"
        raise ConfigError("target", target, allowed, hint=f"drop or extend {_listed(empty)}")
    return [
        Series(
            item_id=str(name),
            dataset=dataset,
            values=history[:-prediction_length],
            test=history[-prediction_length:],
            season_length=season,
            frequency=alias,
            start=times[span.start],
        )
        for name, history, span in zip(names, histories, spans, strict=True)
    ]


def _checked(frame: pd.DataFrame, id_column: str, timestamp_column: str, target: str) -> pd.DataFrame:
    """Columns ``id``, ``time`` and ``value``, sorted by first appearance of the id and then by time."""
    fields = {"id_column": id_column, "timestamp_column": timestamp_column, "target": target}
    for field, column in fields.items():
        if column not in frame.columns:
            raise ConfigError(field, column, f"a column of the data: {', '.join(map(str, frame.columns))}")
    if frame.empty:
        raise ConfigError("target", target, "a column with values", hint="the data have no rows")
    ids = frame[id_column]
    if ids.isna().any():
        hint = f"{int(ids.isna().sum())} rows have no id"
        raise ConfigError("id_column", id_column, "a column without missing values", hint=hint)
    times = _times(frame[timestamp_column], ids, timestamp_column)
    values = _values(frame[target], ids, target)
    table = pd.DataFrame({"id": ids, "time": times, "value": values, "order": pd.factorize(ids)[0]})
    repeated = table.duplicated(["order", "time"])
    if repeated.any():
        hint = (
            f"repeated times in {_listed(table['id'][repeated])}; drop them, or aggregate them with "
            f"df.groupby([{id_column!r}, {timestamp_column!r}]).mean()"
        )
        raise ConfigError("timestamp_column", timestamp_column, "distinct times within a series", hint=hint)
    return table.sort_values(["order", "time"])


def _times(column: pd.Series, ids: pd.Series, name: str) -> pd.Series:
    if pd.api.types.is_numeric_dtype(column):
        hint = f'convert numbers first, years for instance by pd.to_datetime(df[{name!r}], format="%Y")'
        raise ConfigError("timestamp_column", name, "a column of datetimes or of strings", hint=hint)
    if isinstance(column.dtype, pd.PeriodDtype):
        column = column.dt.to_timestamp()
    times = pd.to_datetime(column, errors="coerce")
    if times.isna().any():
        hint = f"missing or unreadable times in {_listed(ids[times.isna()])}"
        raise ConfigError("timestamp_column", name, "a time in every row", hint=hint)
    return times


def _values(column: pd.Series, ids: pd.Series, name: str) -> pd.Series:
    values = pd.to_numeric(column, errors="coerce")
    wrong = values.isna() & column.notna()
    if wrong.any():
        hint = f"not a number: {column[wrong].iloc[0]!r}, among others in {_listed(ids[wrong])}"
        raise ConfigError("target", name, "a column of numbers, empty where missing", hint=hint)
    infinite = np.isinf(values)
    if infinite.any():
        hint = f"infinite values in {_listed(ids[infinite])}; leave missing values empty"
        raise ConfigError("target", name, "a column of finite numbers", hint=hint)
    return values


def _on_grid(
    times: pd.DatetimeIndex, values: NDArray[np.float64], frequency: str, *, fill: bool
) -> NDArray[np.float64] | None:
    """Values at every time of the frequency, or None when the times do not follow it."""
    grid = pd.date_range(times[0], times[-1], freq=frequency)
    if len(grid) == len(times) and (grid == times).all():
        return values
    position = grid.get_indexer(times)
    if not fill or (position < 0).any():
        return None
    filled = np.full(len(grid), np.nan)
    filled[position] = values
    return filled


def _require_length(names: list[Hashable], lengths: list[int], prediction_length: int) -> None:
    needed = prediction_length + MIN_HISTORY
    short = [name for name, length in zip(names, lengths, strict=True) if length < needed]
    if short:
        raise ConfigError(
            "prediction_length",
            prediction_length,
            f"at most {MIN_HISTORY} less than the observations of every series",
            hint=f"{_listed(short)} have fewer than {needed} observations; drop them or shorten the horizon",
        )


def _irregular(timestamp_column: str, names: list[Hashable], frequency: str | None) -> ConfigError:
    expected = "one sampling frequency" if frequency is None else f"the frequency {frequency!r}"
    return ConfigError(
        "timestamp_column",
        timestamp_column,
        f"times that follow {expected} without gaps",
        hint=f"irregular: {_listed(names)}; set `frequency` to fill skipped times with missing values, or "
        'resample each series first, for instance by df.resample("D").mean()',
    )


def _listed(names: Iterable[Hashable]) -> str:
    distinct = list(dict.fromkeys(names))
    shown = ", ".join(repr(name) for name in distinct[:5])
    return f"series {shown}" + (f" and {len(distinct) - 5} more" if len(distinct) > 5 else "")
