"""Chronos-MoE: an encoder-only probabilistic forecaster with mixture-of-experts layers."""

from __future__ import annotations

from lightning_moe.metrics import ExpertLoad
from lightning_moe.models.chronos_moe.model import ChronosMoEModel, ChronosMoEOutput
from lightning_moe.models.chronos_moe.module import ChronosMoE
from lightning_moe.models.chronos_moe.plot import plot_forecast, plot_forecast_grid
from lightning_moe.models.chronos_moe.scores import ForecastScores

__all__ = [
    "ChronosMoE",
    "ChronosMoEModel",
    "ChronosMoEOutput",
    "ExpertLoad",
    "ForecastScores",
    "plot_forecast",
    "plot_forecast_grid",
]
