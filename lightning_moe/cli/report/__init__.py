"""The reports that ``report: true`` asks for: how the trained model does on held-out data, beside known figures."""

from lightning_moe.cli.report.callback import Report
from lightning_moe.cli.report.forecast.summary import DatasetScores, ForecastSummary
from lightning_moe.cli.report.kinds import report_on
from lightning_moe.cli.report.summary import SUMMARY_NAME, RunSummary
from lightning_moe.cli.report.text.summary import TextSummary

__all__ = ["SUMMARY_NAME", "DatasetScores", "ForecastSummary", "Report", "RunSummary", "TextSummary", "report_on"]
