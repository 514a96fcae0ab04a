"""Settings of the time-series data (torch-free)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from lightning_moe.config.ranges import Rule, at_least, distinct, exclusive, validate
from lightning_moe.errors import ConfigError

DatasetName = Literal[
    "m1_yearly",
    "m1_quarterly",
    "m1_monthly",
    "m3_yearly",
    "m3_quarterly",
    "m3_monthly",
    "m3_other",
    "tourism_yearly",
    "tourism_quarterly",
    "tourism_monthly",
]

HORIZONS: Mapping[str, int] = MappingProxyType(
    {
        "m1_yearly": 6,
        "m1_quarterly": 8,
        "m1_monthly": 18,
        "m3_yearly": 6,
        "m3_quarterly": 8,
        "m3_monthly": 18,
        "m3_other": 8,
        "tourism_yearly": 4,
        "tourism_quarterly": 8,
        "tourism_monthly": 24,
    }
)
"""Length of the official holdout of each data set."""


def reaches_all_holdouts(config: SeriesConfig) -> ConfigError | None:
    """The forecasts are at least as long as the longest official holdout."""
    if config.path is not None:
        return None
    longest = max(HORIZONS if config.datasets is None else config.datasets, key=lambda name: HORIZONS[name])
    if config.prediction_length >= HORIZONS[longest]:
        return None
    return ConfigError(
        "prediction_length",
        config.prediction_length,
        f"at least {HORIZONS[longest]}, the horizon of {longest}",
        "forecast that far, or leave this data set out of datasets",
    )


def belongs_to_own_data(field: str) -> Rule:
    """Make the rule that a setting describes data read from ``path``."""

    def rule(config: SeriesConfig) -> ConfigError | None:
        value = getattr(config, field)
        if value is None or config.path is not None:
            return None
        return ConfigError(field, value, "null, unless path is given", "the bundled data sets have their own")

    return rule


@dataclass(frozen=True, kw_only=True)
class SeriesConfig:
    """Which series a ``SeriesDataModule`` reads, and how it cuts them into batches.

    Raises:
        ConfigError: A field has the wrong type or lies outside its range.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        exclusive("path", "datasets"),
        distinct("datasets"),
        at_least("context_length", 1),
        at_least("prediction_length", 1),
        at_least("batch_size", 1),
        at_least("batches_per_epoch", 1),
        reaches_all_holdouts,
        at_least("season_length", 1),
        belongs_to_own_data("season_length"),
        belongs_to_own_data("frequency"),
        at_least("num_workers", 0),
        at_least("seed", 0),
    )

    datasets: list[DatasetName] | None = None
    """Names of the bundled data sets; null takes all of them."""
    path: str | None = None
    """CSV or Parquet file in long format to read instead of the bundled data sets."""
    frame: None = None
    """A DataFrame in long format, which only Python code can give."""
    id_column: str = "item_id"
    """Column that names the series of a row."""
    timestamp_column: str = "timestamp"
    """Column with the time of a row."""
    target: str = "target"
    """Column with the value of a row."""
    context_length: int = 144
    """Number of past time steps in a window."""
    prediction_length: int = 24
    """Number of future time steps in a window."""
    batch_size: int = 96
    """Number of windows in a batch of one rank."""
    batches_per_epoch: int = 2000
    """Number of training batches per rank and epoch."""
    season_length: int | None = None
    """Number of time steps in a season of your own series; null takes the customary one for the frequency."""
    frequency: str | None = None
    """Frequency of your own series as a pandas alias; null infers it from the timestamps."""
    num_workers: int = 0
    """Number of processes that prepare batches."""
    seed: int = 0
    """Seed of the windows drawn for training."""

    def __post_init__(self) -> None:
        validate(self, "data", self.rules)
