"""Plots: what is drawn, and the PNG grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from lightning_moe.errors import ConfigError
from lightning_moe.models.chronos_moe import plot_forecast, plot_forecast_grid

QUANTILES = np.linspace(-1, 1, 9)[None] + np.arange(6)[:, None]
HISTORY = np.array([1.0, np.nan, 3.0, 2.0])


def test_draws_bands_median_history_and_outcome() -> None:
    ax = Figure().add_subplot()
    assert plot_forecast(HISTORY, QUANTILES, np.arange(4.0), title="sales", ax=ax) is ax
    lines = {str(line.get_label()): line for line in ax.lines}
    np.testing.assert_array_equal(lines["median"].get_xdata(), np.arange(-1, 6))
    np.testing.assert_array_equal(lines["median"].get_ydata(), [2.0, *QUANTILES[:, 4]])
    np.testing.assert_array_equal(lines["actual"].get_ydata(), [2.0, 0, 1, 2, 3])
    np.testing.assert_array_equal(lines["history"].get_ydata(), HISTORY)
    bands = {str(band.get_label()): band.get_paths()[0].vertices for band in ax.collections}
    assert set(bands) == {"10% to 90%", "20% to 80%"}
    last = bands["10% to 90%"][bands["10% to 90%"][:, 0] == 5][:, 1]
    assert (last.min(), last.max()) == (QUANTILES[5, 0], QUANTILES[5, 8])
    assert ax.get_title(loc="left") == "sales"


def test_bands_without_their_levels_are_left_out_and_history_is_cut() -> None:
    ax = Figure().add_subplot()
    plot_forecast(HISTORY, QUANTILES[:, [0, 4, 8]], quantile_levels=[0.1, 0.5, 0.9], max_history=2, ax=ax)
    assert [band.get_label() for band in ax.collections] == ["10% to 90%"]
    history = next(line for line in ax.lines if line.get_label() == "history")
    np.testing.assert_array_equal(history.get_xydata(), [[-2, 3], [-1, 2]])


def test_makes_its_own_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    from matplotlib import pyplot

    ax = plot_forecast(HISTORY, QUANTILES)
    assert ax.figure.number in pyplot.get_fignums()  # type: ignore[union-attr]
    pyplot.close("all")


def test_grid_writes_a_png(tmp_path: Path) -> None:
    path = tmp_path / "new" / "grid.png"
    written = plot_forecast_grid(
        path, [HISTORY] * 5, [QUANTILES] * 5, [None, [1.0], None, None, None], titles=list("abcde"), columns=2
    )
    assert written == path
    assert path.read_bytes().startswith(b"\x89PNG")


def test_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantiles"):
        plot_forecast(HISTORY, QUANTILES[:, :3])
    with pytest.raises(ConfigError, match=r"contain 0\.5"):
        plot_forecast(HISTORY, QUANTILES[:, :2], quantile_levels=[0.1, 0.9])
    with pytest.raises(ConfigError, match="titles"):
        plot_forecast_grid(tmp_path / "x.png", [HISTORY], [QUANTILES], titles=["a", "b"])
    with pytest.raises(ConfigError, match="at least one series"):
        plot_forecast_grid(tmp_path / "x.png", [], [])


def test_names_the_extra_when_matplotlib_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(ConfigError, match=r"lightning-moe\[chronos\]"):
        plot_forecast(HISTORY, QUANTILES)
