"""The report as tables for people."""

from __future__ import annotations

import os
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_moe.cli.report.summary import Summary
from lightning_moe.metrics import COMPARABLE_DATASETS

_FITTED = ("AutoETS", "AutoTheta")
"""Published forecasters that are fitted to each series; the others are pretrained."""

_MOST_COLUMNS = 16
"""Number of experts up to which each one's share is shown."""


def print_summary(summary: Summary, console: Console) -> None:
    """Print the scores by data set, their means beside published ones, the expert load and the files."""
    console.print(_dataset_table(summary))
    console.print()
    console.print(_comparison_table(summary))
    console.print(_explain(summary), highlight=False)
    console.print()
    if summary.expert_load is not None:
        console.print(_load_table(summary.expert_load))
    for name, value in _facts(summary).items():
        console.print(f"{name:<12}{value}", soft_wrap=True, highlight=False, markup=False)


def _dataset_table(summary: Summary) -> Table:
    table = _table("Holdout of each series, model against seasonal naive (lower is better)")
    table.add_column("data set")
    for column in ("series", "MASE", "naive", "ratio", "WQL", "naive", "ratio"):
        table.add_column(column, justify="right")
    for name, one in summary.datasets.items():
        mark = "" if name in summary.relative_datasets else " *"
        mase = (f"{one.mase:.3f}", f"{one.naive_mase:.3f}", _ratio(one.relative_mase))
        wql = (f"{one.wql:.4f}", f"{one.naive_wql:.4f}", _ratio(one.relative_wql))
        table.add_row(name + mark, f"{one.series:,}", *mase, *wql)
    if len(summary.relative_datasets) < len(summary.datasets):
        table.caption = "* no comparable published scores, not in the means below"
    return table


def _comparison_table(summary: Summary) -> Table:
    number = len(summary.relative_datasets)
    over = f"{number} data sets" if number > 1 else "one data set"
    table = _table(f"Relative to seasonal naive, geometric mean over {over}")
    table.add_column("forecaster")
    table.add_column("MASE", justify="right")
    table.add_column("WQL", justify="right")
    table.add_column("saw the histories of these series")
    table.add_row(
        "[bold]this model[/]",
        f"[bold]{summary.relative_mase:.3f}[/]",
        f"[bold]{summary.relative_wql:.3f}[/]",
        "in training (in-domain)",
    )
    for name, score in sorted(summary.published.items(), key=lambda item: item[1].mase):
        seen = "one series at a time (fitted to each)" if name in _FITTED else "no (zero-shot)"
        table.add_row(name, f"{score.mase:.3f}", f"{score.wql:.3f}", seen)
    return table


def _explain(summary: Summary) -> str:
    if not summary.published:
        return "There are no published figures for these data sets and quantile levels to compare with."
    subset = (
        ""
        if len(summary.relative_datasets) == len(COMPARABLE_DATASETS)
        else f" All means are over the {len(summary.relative_datasets)} of {len(COMPARABLE_DATASETS)} comparable data "
        "sets that were tested."
    )
    return (
        "This model is in-domain: it was trained on the histories of the very series it is tested on, while "
        "Chronos-Bolt, Chronos-T5 and TiRex are zero-shot and had never seen them, so a lower figure here does not "
        f"make it the better general forecaster.{subset}"
    )


def _load_table(load: tuple[tuple[float, ...], ...]) -> Table:
    table = _table(f"Expert load: share of the test set's choices (even: {1 / len(load[0]):.3f})")
    table.add_column("layer", justify="right")
    each = len(load[0]) <= _MOST_COLUMNS
    columns = [str(expert) for expert in range(len(load[0]))] if each else ["busiest", "idlest"]
    for column in [*columns, "max/mean"]:
        table.add_column(column, justify="right")
    for layer, shares in enumerate(load):
        shown = shares if each else (max(shares), min(shares))
        table.add_row(str(layer), *(f"{share:.3f}" for share in shown), f"{max(shares) * len(shares):.2f}")
    return table


def _facts(summary: Summary) -> dict[str, str]:
    what = "training" if summary.command == "fit" else "test"
    return {
        "model": f"{summary.parameters:,} parameters on {summary.world_size} rank" + "s" * (summary.world_size > 1),
        what: f"{summary.seconds:.0f} s",
        "checkpoint": _shown(summary.checkpoint) if summary.checkpoint else "none was written",
        "forecasts": _shown(summary.forecast_png)
        if summary.forecast_png
        else "no picture: pip install 'lightning-moe[chronos]'",
    }


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", caption_justify="left", box=SIMPLE_HEAD)


def _ratio(value: float) -> str:
    style = "green" if value < 1 else "red"
    return f"[{style}]{value:.3f}[/]"


def _shown(path: str) -> str:
    """Return a path relative to the working directory where it lies below it."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path
