"""Time series and text, what is cut out of them, and the data modules that hand it to a Trainer."""

from lightning_moe.data.datasets import ForecastBatch
from lightning_moe.data.fcomp import DATASETS, load_competitions
from lightning_moe.data.frame import read_frame, series_from_frame
from lightning_moe.data.frequency import infer_frequency, season_length_of
from lightning_moe.data.series import SeriesDataModule
from lightning_moe.data.text import TextDataModule
from lightning_moe.data.time_series import Series

__all__ = [
    "DATASETS",
    "ForecastBatch",
    "Series",
    "SeriesDataModule",
    "TextDataModule",
    "infer_frequency",
    "load_competitions",
    "read_frame",
    "season_length_of",
    "series_from_frame",
]
