"""The report of a forecasting run: scores beside the baseline and published figures, and a picture."""

from lightning_moe.cli.report.forecast.callback import ForecastReport
from lightning_moe.cli.report.forecast.summary import DatasetScores, ForecastSummary
from lightning_moe.cli.report.forecast.tables import print_forecast_summary

__all__ = ["DatasetScores", "ForecastReport", "ForecastSummary", "print_forecast_summary"]
