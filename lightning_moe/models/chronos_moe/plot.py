"""Pictures of forecasts: history, median, interval bands and what really happened."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_moe.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HISTORY, _FORECAST, _ACTUAL, _GRID = "#3b4252", "#2f6fde", "#d9822b", "#e5e9f0"
_BANDS = ((0.1, 0.9, 0.18), (0.2, 0.8, 0.28))
"""Lower level, upper level and opacity of each interval band, widest first."""


def plot_forecast(
    history: ArrayLike,
    quantiles: ArrayLike,
    actual: ArrayLike | None = None,
    *,
    quantile_levels: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    title: str = "",
    max_history: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one forecast: the 10-90 % and 20-80 % bands, the median, the history and what happened.

    Args:
        history: ``[T]`` past values, oldest first, NaN where missing.
        quantiles: ``[H, Q]`` forecast, as ``predict_quantiles`` returns it for one series.
        actual: ``[<= H]`` values that followed.
        quantile_levels: The ``Q`` levels; needs 0.5, and a band is drawn where both of its levels are there.
        title: Title above the axes.
        max_history: Draw only the last steps of the history.
        ax: Axes to draw into; new ones when left out.

    Returns:
        The axes; time is counted in steps from the first forecast step.

    Raises:
        ConfigError: matplotlib is not installed, or the shapes or levels do not fit.
    """
    past = np.asarray(history, dtype=np.float64).reshape(-1)
    forecast = np.asarray(quantiles, dtype=np.float64)
    levels = [round(float(level), 6) for level in quantile_levels]
    if forecast.ndim != 2 or forecast.shape[1] != len(levels):
        raise ConfigError("quantiles", f"shape {forecast.shape}", f"shape [H, {len(levels)}], one column per level")
    if 0.5 not in levels:
        raise ConfigError("quantile_levels", levels, "levels that contain 0.5")
    if ax is None:
        ax = _matplotlib("pyplot").figure(figsize=(7.0, 3.2), layout="constrained").add_subplot()
    if max_history is not None:
        past = past[-max_history:] if max_history > 0 else past[:0]

    steps, median = np.arange(len(forecast)), forecast[:, levels.index(0.5)]
    for low, high, opacity in _BANDS:
        if low in levels and high in levels:
            x, lower = _joined(past, steps, forecast[:, levels.index(low)])
            _, upper = _joined(past, steps, forecast[:, levels.index(high)])
            label = f"{low:.0%} to {high:.0%}"
            ax.fill_between(x, lower, upper, color=_FORECAST, alpha=opacity, linewidth=0, label=label)
    ax.plot(np.arange(-len(past), 0), past, color=_HISTORY, linewidth=1.3, label="history")
    ax.plot(*_joined(past, steps, median), color=_FORECAST, linewidth=1.8, label="median")
    if actual is not None:
        outcome = np.asarray(actual, dtype=np.float64).reshape(-1)
        line = _joined(past, np.arange(len(outcome)), outcome)
        first = len(line[0]) - len(outcome)  # no marker on the value that belongs to the history
        style: dict[str, Any] = {"linewidth": 1.3, "marker": "o", "markersize": 2.6, "markevery": (first, 1)}
        ax.plot(*line, color=_ACTUAL, label="actual", **style)
    _decorate(ax, title)
    return ax


def plot_forecast_grid(
    path: str | Path,
    histories: Sequence[ArrayLike],
    quantiles: Sequence[ArrayLike],
    actuals: Sequence[ArrayLike | None] | None = None,
    *,
    titles: Sequence[str] | None = None,
    quantile_levels: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    columns: int = 3,
    max_history: int | None = None,
) -> Path:
    """Draw several forecasts side by side into a PNG file (or another format, by the suffix).

    Args:
        path: File to write; its folder is created.
        histories: Past values of each series.
        quantiles: Forecast ``[H, Q]`` of each series.
        actuals: What followed, for each series.
        titles: Title of each panel.
        quantile_levels: See :func:`plot_forecast`.
        columns: Panels per row.
        max_history: See :func:`plot_forecast`.

    Returns:
        The path.

    Raises:
        ConfigError: matplotlib is not installed, the lists differ in length or are empty.
    """
    number = len(histories)
    lengths = {
        "quantiles": len(quantiles),
        "actuals": len(actuals or histories),
        "titles": len(titles or histories),
    }
    for name, length in lengths.items():
        if number == 0 or length != number:
            raise ConfigError(name, f"{length} entries", f"one entry per series, and at least one series ({number})")
    columns = max(1, min(columns, number))
    rows = -(-number // columns)
    # Not by pyplot: that would open a window on a desktop and keep every figure alive.
    figure: Figure = _matplotlib("figure").Figure(figsize=(4.6 * columns, 2.6 * rows + 0.4), layout="constrained")
    for position in range(number):
        ax = figure.add_subplot(rows, columns, position + 1)
        plot_forecast(
            histories[position],
            quantiles[position],
            None if actuals is None else actuals[position],
            quantile_levels=quantile_levels,
            title="" if titles is None else titles[position],
            max_history=max_history,
            ax=ax,
        )
        legend = ax.get_legend()
        if legend is not None:
            legend.remove()
    entries: dict[str, Any] = {}
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=len(entries),
        frameon=False,
        fontsize=8,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _joined(past: NDArray[Any], steps: NDArray[Any], values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Start a line at the last observed value, so that it leaves the history without a gap."""
    if not len(past) or np.isnan(past[-1]):
        return steps, values
    return np.concatenate(([-1], steps)), np.concatenate((past[-1:], values))


def _decorate(ax: Axes, title: str) -> None:
    ax.axvline(-0.5, color=_HISTORY, linewidth=0.8, linestyle=(0, (2, 3)), alpha=0.7)
    ax.grid(axis="y", color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(length=0, labelsize=8)
    ax.margins(x=0.01)
    if title:
        ax.set_title(title, loc="left", fontsize=9, fontweight="bold")
    ax.legend(fontsize=7, frameon=False, loc="upper left", ncols=2)


def _matplotlib(part: str) -> Any:
    try:
        return import_module(f"matplotlib.{part}")
    except ImportError as error:
        raise ConfigError(
            "plot",
            "matplotlib is not installed",
            "an environment with it",
            "pip install 'lightning-moe[chronos]'",
        ) from error
