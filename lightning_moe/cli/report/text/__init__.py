"""The report of a language model: bits per byte beside those of compressors, and a sample."""

from lightning_moe.cli.report.text.callback import TextReport
from lightning_moe.cli.report.text.summary import TextSummary
from lightning_moe.cli.report.text.tables import print_text_summary

__all__ = ["TextReport", "TextSummary", "print_text_summary"]
