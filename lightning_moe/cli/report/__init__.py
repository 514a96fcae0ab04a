"""The report of a forecasting run: scores beside the baseline and published figures, expert load, a picture."""

from lightning_moe.cli.report.callback import ForecastReport
from lightning_moe.cli.report.summary import DatasetScores, Summary
from lightning_moe.cli.report.tables import print_summary

__all__ = ["DatasetScores", "ForecastReport", "Summary", "print_summary"]
