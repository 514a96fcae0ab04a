from __future__ import annotations

import warnings

import pandas as pd
import pytest

from lightning_moe.data import infer_frequency, season_length_of
from lightning_moe.errors import ConfigError


@pytest.mark.parametrize(
    ("frequency", "season_length"),
    [
        ("s", 3600),
        ("min", 1440),
        ("15min", 96),
        ("7min", 1),
        ("h", 24),
        ("2h", 12),
        ("D", 7),
        ("B", 5),
        ("W-SUN", 1),
        ("MS", 12),
        ("ME", 12),
        ("3MS", 4),
        ("QS-JAN", 4),
        ("QE-DEC", 4),
        ("YS-JAN", 1),
        ("YE-DEC", 1),
    ],
)
def test_customary_seasons_and_inference_of_the_same_frequency(frequency: str, season_length: int) -> None:
    assert season_length_of(frequency) == season_length
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inferred = infer_frequency(pd.date_range("2021-03-01", periods=12, freq=frequency))
    assert inferred is not None
    assert season_length_of(inferred) == season_length


def test_irregular_times_have_no_frequency() -> None:
    assert infer_frequency(pd.DatetimeIndex(["2021-01-01", "2021-01-02", "2021-01-05", "2021-01-06"])) is None


def test_unknown_alias_is_refused() -> None:
    with pytest.raises(ConfigError, match='"MS"') as caught:
        season_length_of("monthly-ish")
    assert caught.value.field == "frequency"
