from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lightning_moe.data import read_frame, series_from_frame
from lightning_moe.errors import ConfigError

NAMES = {"id_column": "item_id", "timestamp_column": "timestamp", "target": "target"}


def long_frame(lengths: dict[Any, int] | None = None, frequency: str = "MS") -> pd.DataFrame:
    """Values count up from 100 times the series' number."""
    parts = []
    for number, (name, length) in enumerate((lengths or {"b": 12, "a": 9}).items()):
        times = pd.date_range(f"202{number}-01-01", periods=length, freq=frequency)
        values = 100.0 * number + np.arange(length)
        parts.append(pd.DataFrame({"item_id": name, "timestamp": times, "target": values}))
    return pd.concat(parts)  # the index repeats, as it does in practice


def test_splits_off_the_holdout() -> None:
    first, second = series_from_frame(long_frame(), prediction_length=4, dataset="mine")
    assert (first.item_id, second.item_id) == ("b", "a")
    np.testing.assert_array_equal(first.values, np.arange(8.0))
    np.testing.assert_array_equal(first.test, np.arange(8.0, 12.0))
    np.testing.assert_array_equal(second.test, 100.0 + np.arange(5.0, 9.0))
    assert first.dataset == second.dataset == "mine"
    assert (first.frequency, first.season_length, second.horizon) == ("MS", 12, 4)
    assert second.start == pd.Timestamp("2021-01-01")


def test_rows_in_any_order_strings_and_other_names() -> None:
    shuffled = long_frame().sample(frac=1.0, random_state=0)
    shuffled["timestamp"] = shuffled["timestamp"].dt.strftime("%Y-%m-%d")
    shuffled["target"] = shuffled["target"].astype(str)
    shuffled.columns = pd.Index(["shop", "month", "sales"])
    series = series_from_frame(
        shuffled, prediction_length=4, id_column="shop", timestamp_column="month", target="sales"
    )
    expected = {one.item_id: one for one in series_from_frame(long_frame(), prediction_length=4)}
    assert {one.item_id for one in series} == {"a", "b"}
    for one in series:
        np.testing.assert_array_equal(one.values, expected[one.item_id].values)
        np.testing.assert_array_equal(one.test, expected[one.item_id].test)


def test_the_frame_is_left_as_it_was() -> None:
    frame = long_frame().sample(frac=1.0, random_state=0)
    before = frame.copy(deep=True)
    series_from_frame(frame, prediction_length=4)
    pd.testing.assert_frame_equal(frame, before)


def test_missing_targets_stay_missing() -> None:
    frame = long_frame({"a": 10})
    frame.loc[[2, 9], "target"] = None
    (series,) = series_from_frame(frame, prediction_length=3)
    np.testing.assert_array_equal(series.values, [0.0, 1.0, np.nan, 3.0, 4.0, 5.0, 6.0])
    np.testing.assert_array_equal(series.test, [7.0, 8.0, np.nan])


def test_a_given_frequency_fills_skipped_times() -> None:
    frame = long_frame({"a": 10}, "D").iloc[[0, 1, 2, 4, 5, 6, 7, 9]]
    (series,) = series_from_frame(frame, prediction_length=3, frequency="D")
    np.testing.assert_array_equal(series.values, [0.0, 1.0, 2.0, np.nan, 4.0, 5.0, 6.0])
    np.testing.assert_array_equal(series.test, [7.0, np.nan, 9.0])


def test_settings_override_what_the_times_say() -> None:
    (series,) = series_from_frame(long_frame({"a": 10}, "D"), prediction_length=3, frequency="D", season_length=2)
    assert series.season_length == 2


@pytest.mark.parametrize("frequency", ["15min", "h", "D", "W-WED", "ME", "QS-JAN", "YS-JAN"])
def test_frequencies(frequency: str) -> None:
    (series,) = series_from_frame(long_frame({"a": 10}, frequency), prediction_length=3)
    assert series.frequency == frequency


def test_time_zones_and_periods() -> None:
    frame = long_frame({"a": 40}, "h")
    frame["timestamp"] = frame["timestamp"].dt.tz_localize("Europe/Berlin")
    assert series_from_frame(frame, prediction_length=3)[0].frequency == "h"
    frame = long_frame({"a": 12})
    frame["timestamp"] = frame["timestamp"].dt.to_period("M")
    assert series_from_frame(frame, prediction_length=3)[0].frequency == "MS"


def with_column(name: str, position: int, value: object) -> pd.DataFrame:
    frame = long_frame().reset_index(drop=True)
    frame[name] = frame[name].astype(object)
    frame.loc[position, name] = value  # type: ignore[call-overload]
    return frame


@pytest.mark.parametrize(
    ("frame", "field", "message"),
    [
        (lambda: long_frame().drop(columns="item_id"), "id_column", "timestamp, target"),
        (lambda: long_frame().drop(columns="timestamp"), "timestamp_column", "item_id, target"),
        (lambda: long_frame().drop(columns="target"), "target", "item_id, timestamp"),
        (lambda: long_frame().iloc[:0], "target", "no rows"),
        (lambda: with_column("item_id", 3, None), "id_column", "1 rows have no id"),
        (lambda: with_column("timestamp", 14, None), "timestamp_column", "series 'a'"),
        (lambda: with_column("timestamp", 14, "soon"), "timestamp_column", "unreadable times in series 'a'"),
        (lambda: long_frame().assign(timestamp=range(21)), "timestamp_column", "pd.to_datetime"),
        (lambda: with_column("target", 14, "many"), "target", "'many', among others in series 'a'"),
        (lambda: with_column("target", 14, np.inf), "target", "infinite values in series 'a'"),
        (lambda: pd.concat([long_frame(), long_frame({"b": 1})]), "timestamp_column", r"repeated .* 'b'"),
        (lambda: long_frame({"a": 12, "c": 5, "d": 3}), "prediction_length", r"'c', 'd' have fewer than 6"),
        (lambda: long_frame(dict.fromkeys(range(8), 2)), "prediction_length", "0, 1, 2, 3, 4 and 3 more"),
        (lambda: long_frame().drop(index=4), "timestamp_column", "irregular: series 'b'"),
        (lambda: long_frame({"a": 20, "b": 12}).iloc[:-2].pipe(skip_last), "timestamp_column", "'MS'.*'b'"),
        (lambda: long_frame().assign(target=np.nan), "target", "series 'b', 'a'"),
    ],
)
def test_data_that_cannot_work_are_refused_by_name(frame: Callable[[], pd.DataFrame], field: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        series_from_frame(frame(), prediction_length=4)
    assert caught.value.field == field
    assert caught.value.value == (4 if field == "prediction_length" else NAMES[field])


def skip_last(frame: pd.DataFrame) -> pd.DataFrame:
    """Take out the last but one row."""
    return frame.iloc[[*range(len(frame) - 2), len(frame) - 1]]


def test_times_off_the_given_grid_are_refused() -> None:
    frame = long_frame()
    frame["timestamp"] += pd.Timedelta(days=14)
    with pytest.raises(ConfigError, match="follow the frequency 'MS'"):
        series_from_frame(frame, prediction_length=4, frequency="MS")


def test_a_constant_distance_that_is_no_calendar_frequency_is_refused_not_guessed() -> None:
    frame = long_frame()
    frame["timestamp"] += pd.Timedelta(days=14)
    with pytest.raises(ConfigError, match="resample"):
        series_from_frame(frame, prediction_length=4)


@pytest.mark.parametrize("name", ["data.csv", "data.csv.gz", "data.parquet"])
def test_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    frame = long_frame().reset_index(drop=True)
    if name.endswith(".parquet"):
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False)
    series = series_from_frame(read_frame(path), prediction_length=4)
    for one, expected in zip(series, series_from_frame(frame, prediction_length=4), strict=True):
        np.testing.assert_array_equal(one.values, expected.values)
        assert one.start == expected.start


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="an existing file"):
        read_frame(tmp_path / "nothing.csv")
    (tmp_path / "data.xlsx").touch()
    with pytest.raises(ConfigError, match=r"\.parquet"):
        read_frame(tmp_path / "data.xlsx")
