"""The tables that all reports have, and their style."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_moe.cli.report.summary import ExpertShares, RunSummary

_MOST_COLUMNS: Final = 16
"""Number of experts up to which each one's share is shown."""


def styled_table(title: str) -> Table:
    """Return an empty table in the style of the reports."""
    return Table(title=title, title_justify="left", title_style="bold", caption_justify="left", box=SIMPLE_HEAD)


def styled_ratio(value: float) -> str:
    """Return a ratio in the colour of good (below 1) or bad."""
    style = "green" if value < 1 else "red"
    return f"[{style}]{value:.3f}[/]"


def print_run(summary: RunSummary, console: Console, **more: str) -> None:
    """Print the expert load and the facts of a run.

    Args:
        summary: The run.
        console: Where to print.
        more: Further facts by name.
    """
    if summary.expert_load is not None:
        console.print(_load_table(summary.expert_load))
    what = "training" if summary.command == "fit" else "test"
    facts = {
        "model": f"{summary.parameters:,} parameters on {summary.world_size} rank" + "s" * (summary.world_size > 1),
        what: f"{summary.seconds:.0f} s",
        "checkpoint": shown_path(summary.checkpoint) if summary.checkpoint else "none was written",
    }
    for name, value in (facts | more).items():
        console.print(f"{name:<12}{value}", soft_wrap=True, highlight=False, markup=False)


def shown_path(path: str) -> str:
    """Return a path relative to the working directory where it lies below it."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


def _load_table(load: ExpertShares) -> Table:
    table = styled_table(f"Expert load: share of the test set's choices (even: {1 / len(load[0]):.3f})")
    table.add_column("layer", justify="right")
    each = len(load[0]) <= _MOST_COLUMNS
    columns = [str(expert) for expert in range(len(load[0]))] if each else ["busiest", "idlest"]
    for column in [*columns, "max/mean"]:
        table.add_column(column, justify="right")
    for layer, shares in enumerate(load):
        shown = shares if each else (max(shares), min(shares))
        table.add_row(str(layer), *(f"{share:.3f}" for share in shown), f"{max(shares) * len(shares):.2f}")
    return table
