"""Which report fits a model and its data."""

from __future__ import annotations

from typing import Any

from lightning_moe.cli.report.callback import Report, not_reportable
from lightning_moe.cli.report.forecast.callback import ForecastReport
from lightning_moe.cli.report.text.callback import TextReport


def report_on(model: object, data: object) -> type[Report[Any, Any, Any]]:
    """Return the kind of report on a model and its data.

    Raises:
        ConfigError: There is none.
    """
    kinds: tuple[type[Report[Any, Any, Any]], ...] = (ForecastReport, TextReport)
    for kind in kinds:
        if isinstance(model, kind.model_type):
            kind.check(model, data)
            return kind
    raise not_reportable("model", model, *(kind.model_type for kind in kinds))
