"""The report of a forecasting run as tables for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lightning_moe.cli.report.forecast.summary import ForecastSummary
from lightning_moe.cli.report.tables import print_run, shown_path, styled_ratio, styled_table
from lightning_moe.metrics import COMPARABLE_DATASETS

_FITTED = ("AutoETS", "AutoTheta")
"""Published forecasters that are fitted to each series; the others are pretrained."""


def print_forecast_summary(summary: ForecastSummary, console: Console) -> None:
    """Print the scores by data set, their means beside published ones, the expert load and the files."""
    console.print(_dataset_table(summary))
    console.print()
    console.print(_comparison_table(summary))
    console.print(_explain(summary), highlight=False)
    console.print()
    picture = summary.forecast_png
    none = "no picture: pip install 'lightning-moe[chronos]'"
    print_run(summary, console, forecasts=shown_path(picture) if picture else none)


def _dataset_table(summary: ForecastSummary) -> Table:
    table = styled_table("Holdout of each series, model against seasonal naive (lower is better)")
    table.add_column("data set")
    for column in ("series", "MASE", "naive", "ratio", "WQL", "naive", "ratio"):
        table.add_column(column, justify="right")
    for name, one in summary.datasets.items():
        mark = "" if name in summary.relative_datasets else " *"
        mase = (f"{one.mase:.3f}", f"{one.naive_mase:.3f}", styled_ratio(one.relative_mase))
        wql = (f"{one.wql:.4f}", f"{one.naive_wql:.4f}", styled_ratio(one.relative_wql))
        table.add_row(name + mark, f"{one.series:,}", *mase, *wql)
    if len(summary.relative_datasets) < len(summary.datasets):
        table.caption = "* no comparable published scores, not in the means below"
    return table


def _comparison_table(summary: ForecastSummary) -> Table:
    number = len(summary.relative_datasets)
    over = f"{number} data sets" if number > 1 else "one data set"
    table = styled_table(f"Relative to seasonal naive, geometric mean over {over}")
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


def _explain(summary: ForecastSummary) -> str:
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
