"""Sampling frequency and season length of timestamps."""

from __future__ import annotations

import warnings

import pandas as pd
from pandas.tseries.frequencies import to_offset

from lightning_moe.errors import ConfigError


def infer_frequency(timestamps: pd.DatetimeIndex) -> str | None:
    """Find the pandas offset alias of regular timestamps.

    Args:
        timestamps: At least three timestamps in ascending order.

    Returns:
        An alias such as ``"MS"`` or ``"15min"``, or None when the timestamps are irregular.
    """
    with warnings.catch_warnings():
        # pandas 3 announces that a later version returns an offset where it returns a string; both work here.
        warnings.simplefilter("ignore", DeprecationWarning)
        inferred: object = pd.infer_freq(timestamps)
    return None if inferred is None else offset_of(inferred).freqstr


def offset_of(frequency: object) -> pd.offsets.BaseOffset:
    """Parse a frequency.

    Args:
        frequency: A pandas offset alias or offset.

    Raises:
        ConfigError: pandas does not know it.
    """
    try:
        return to_offset(frequency)  # type: ignore[no-any-return, call-overload]
    except ValueError as error:
        raise ConfigError(
            "frequency", frequency, 'a pandas offset alias such as "h", "D", "W", "MS", "QS" or "YS"'
        ) from error


def season_length_of(frequency: str) -> int:
    """Observations per season that are customary for a sampling frequency.

    A day for frequencies of an hour or minutes, an hour for seconds, a week for days, a year for months and
    quarters; weeks and years have no season.

    Args:
        frequency: A pandas offset alias; a multiple such as ``"15min"`` divides the season.

    Returns:
        The season length, 1 where there is no season or the multiple does not divide it.
    """
    offset = offset_of(frequency)
    match offset.rule_code.split("-")[0]:
        case "s":
            season = 3600
        case "min":
            season = 24 * 60
        case "h":
            season = 24
        case "D":
            season = 7
        case "B":
            season = 5
        case "MS" | "ME" | "BMS" | "BME":
            season = 12
        case "QS" | "QE" | "BQS" | "BQE":
            season = 4
        case _:
            season = 1
    return season // offset.n if season % offset.n == 0 else 1
