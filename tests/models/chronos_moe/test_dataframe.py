"""``predict_df``: columns, values, future timestamps, refusals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from lightning_moe.errors import ConfigError
from lightning_moe.models.chronos_moe import ChronosMoE
from tests.models.chronos_moe.configs import small_config

LEVELS = [0.1, 0.5, 0.85]


@pytest.fixture(scope="module")
def module() -> ChronosMoE:
    torch.manual_seed(0)
    return ChronosMoE(small_config())


def _series(name: object, start: str, freq: str, length: int) -> pd.DataFrame:
    stamps = pd.date_range(start, periods=length, freq=freq)
    values = np.sin(np.arange(length)) * 3 + 10
    return pd.DataFrame({"item_id": name, "timestamp": stamps, "target": values})


def _frame() -> pd.DataFrame:
    return pd.concat([_series("b", "2020-01-31", "ME", 30), _series("a", "2021-03-01", "D", 12)], ignore_index=True)


def test_columns_rows_and_values(module: ChronosMoE) -> None:
    df = _frame()
    out = module.predict_df(df, prediction_length=5, quantile_levels=LEVELS)
    assert list(out.columns) == ["item_id", "timestamp", "target_name", "predictions", "0.1", "0.5", "0.85"]
    assert out["item_id"].tolist() == ["b"] * 5 + ["a"] * 5
    assert (out["target_name"] == "target").all()
    for name in ("b", "a"):
        values = torch.tensor(df.loc[df["item_id"] == name, "target"].to_numpy())
        quantiles, median = module.predict_quantiles(values, 5, LEVELS)
        rows = out[out["item_id"] == name]
        np.testing.assert_allclose(rows["predictions"], median[0].numpy(), rtol=1e-5)
        np.testing.assert_allclose(rows[["0.1", "0.5", "0.85"]], quantiles[0].numpy(), rtol=1e-5)


def test_default_levels_and_horizon(module: ChronosMoE) -> None:
    out = module.predict_df(_series("a", "2021-01-01", "D", 10))
    assert len(out) == 8
    assert list(out.columns[4:]) == [f"0.{i}" for i in range(1, 10)]


@pytest.mark.parametrize("freq", ["h", "D", "W-WED", "MS", "ME", "QS", "QE", "YE", "15min", "B"])
def test_future_timestamps_continue_the_past(module: ChronosMoE, freq: str) -> None:
    stamps = pd.date_range("2019-01-01", periods=20, freq=freq)
    df = pd.DataFrame({"item_id": 7, "timestamp": stamps[:12], "target": np.arange(12.0)})
    out = module.predict_df(df, prediction_length=8)
    assert out["timestamp"].tolist() == stamps[12:].tolist()
    assert out["item_id"].tolist() == [7] * 8


def test_other_column_names_and_row_order(module: ChronosMoE) -> None:
    df = _frame()
    renamed = df.rename(columns={"item_id": "sku", "timestamp": "when", "target": "sales"})
    shuffled = pd.concat([renamed[renamed["sku"] == name].sample(frac=1, random_state=0) for name in ("b", "a")])
    out = module.predict_df(shuffled, "sku", "when", "sales", quantile_levels=LEVELS)
    expected = module.predict_df(df, quantile_levels=LEVELS)
    assert list(out.columns[:3]) == ["sku", "when", "target_name"]
    assert (out["target_name"] == "sales").all()
    np.testing.assert_array_equal(out[["predictions", "0.1"]], expected[["predictions", "0.1"]])


def test_timestamps_as_text_and_missing_targets(module: ChronosMoE) -> None:
    df = _series("a", "2021-01-01", "D", 12)
    df.loc[4, "target"] = np.nan
    text = df.assign(timestamp=df["timestamp"].dt.strftime("%Y-%m-%d"))
    pd.testing.assert_frame_equal(module.predict_df(text), module.predict_df(df), check_dtype=False)
    assert module.predict_df(df)["predictions"].notna().all()


def test_given_frequency_fills_gaps(module: ChronosMoE) -> None:
    df = _series("a", "2021-01-01", "D", 12)
    as_missing = df.copy()
    as_missing.loc[[3, 6], "target"] = np.nan
    with_gaps = df.drop(index=[3, 6])
    expected = module.predict_df(as_missing)
    pd.testing.assert_frame_equal(module.predict_df(with_gaps, freq="D"), expected, check_dtype=False)
    two_rows = df.iloc[:2]
    assert module.predict_df(two_rows, freq="D")["timestamp"].iloc[0] == pd.Timestamp("2021-01-03")


def _refused(module: ChronosMoE, df: pd.DataFrame, **arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        module.predict_df(df, **arguments)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("argument", ["id_column", "timestamp_column", "target"])
def test_refuses_missing_columns(module: ChronosMoE, argument: str) -> None:
    message = _refused(module, _frame(), **{argument: "nope"})
    assert message.startswith(f"{argument}: 'nope'")
    assert "item_id, timestamp, target" in message


def test_refuses_bad_timestamps(module: ChronosMoE) -> None:
    df = _series("a", "2021-01-01", "D", 12)
    assert "twice" in _refused(module, pd.concat([df, df.iloc[[3]]]))
    assert "evenly spaced" in _refused(module, df.drop(index=5))
    assert "at least 3 rows" in _refused(module, df.iloc[:2])
    assert "without missing timestamps" in _refused(module, df.assign(timestamp=df["timestamp"].where(df.index != 2)))
    assert "timestamps" in _refused(module, df.assign(timestamp="next week"))
    assert "format='%Y'" in _refused(module, df.assign(timestamp=range(1990, 2002)))


def test_refuses_bad_frequencies(module: ChronosMoE) -> None:
    df = _series("a", "2021-01-01", "D", 12)
    assert _refused(module, df, freq="fortnightly").startswith("freq: 'fortnightly'")
    assert "2021-01-02" in _refused(module, df, freq="W-FRI")


def test_refuses_bad_ids_and_targets(module: ChronosMoE) -> None:
    df = _series("a", "2021-01-01", "D", 12)
    assert "missing ids" in _refused(module, df.assign(item_id=[None] + ["a"] * 11))
    assert "numbers" in _refused(module, df.assign(target="high"))
    assert "at least one series" in _refused(module, df.iloc[:0])


def test_refuses_horizons_and_levels(module: ChronosMoE) -> None:
    assert _refused(module, _frame(), prediction_length=0).startswith("prediction_length: 0")
    assert "trained horizon" in _refused(module, _frame(), prediction_length=9, limit_prediction_length=True)
    assert _refused(module, _frame(), quantile_levels=[0.5, 2.0]).startswith("quantile_levels")
