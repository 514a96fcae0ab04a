"""What a forecasting run came to, as it is written to ``summary.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_moe.metrics import BASELINE, COMPARABLE_DATASETS, PUBLISHED, RelativeScore, Score


@dataclass(frozen=True, kw_only=True)
class DatasetScores:
    """Scores on one data set; NaN where one is undefined."""

    series: int
    """Number of series."""
    mase: float
    """MASE of the model."""
    wql: float
    """WQL of the model."""
    naive_mase: float
    """MASE of the seasonal naive forecast."""
    naive_wql: float
    """WQL of the seasonal naive forecast."""
    relative_mase: float
    """``mase / naive_mase``."""
    relative_wql: float
    """``wql / naive_wql``."""

    @classmethod
    def against(cls, series: int, model: Score, naive: Score) -> DatasetScores:
        """Compare the model's scores with the baseline's."""
        return cls(
            series=series,
            mase=model.mase,
            wql=model.wql,
            naive_mase=naive.mase,
            naive_wql=naive.wql,
            relative_mase=model.mase / naive.mase if naive.mase else math.nan,
            relative_wql=model.wql / naive.wql if naive.wql else math.nan,
        )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A whole run; the fields are the keys of ``summary.json``, where NaN is null."""

    command: str
    """The command: ``fit`` or ``test``."""
    relative_mase: float
    """Geometric mean of the relative MASE over ``relative_datasets``."""
    relative_wql: float
    """Geometric mean of the relative WQL over ``relative_datasets``."""
    relative_datasets: tuple[str, ...]
    """The data sets of the means: those with published scores, or all of them when there is none."""
    datasets: Mapping[str, DatasetScores]
    """Scores by data set."""
    published: Mapping[str, Score]
    """The same means of published forecasters; empty where they are not comparable."""
    expert_load: tuple[tuple[float, ...], ...] | None
    """Share of the test set's choices that each expert received, by layer; null for a dense model."""
    parameters: int
    """Number of parameters of the whole model."""
    world_size: int
    """Number of ranks."""
    seconds: float
    """Wall time of the training, validation included; of the test for the command ``test``."""
    checkpoint: str | None
    """The checkpoint that was tested; null when there is none."""
    forecast_png: str | None
    """The picture with forecasts; null without matplotlib."""

    def as_json(self, indent: int | None = None) -> str:
        """Return the summary as JSON, on one line unless an indent is given."""
        values = asdict(self)
        values["published"] = {name: score._asdict() for name, score in self.published.items()}
        return json.dumps(_without_nan(values), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Summary:
        """Rebuild a summary from :meth:`as_json`."""
        values = json.loads(text)
        datasets = {name: DatasetScores(**_with_nan(scores)) for name, scores in values["datasets"].items()}
        published = {name: Score(**_with_nan(scores)) for name, scores in values["published"].items()}
        load = values["expert_load"]
        values |= {
            "datasets": datasets,
            "published": published,
            "relative_datasets": tuple(values["relative_datasets"]),
            "expert_load": None if load is None else tuple(tuple(layer) for layer in load),
        }
        return cls(**values | _with_nan({name: values[name] for name in ("relative_mase", "relative_wql")}))

    def write(self, path: Path) -> None:
        """Write ``summary.json``."""
        path.write_text(self.as_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Summary:
        """Read what :meth:`write` wrote."""
        return cls.from_json(path.read_text(encoding="utf-8"))


def mean_datasets(datasets: Mapping[str, DatasetScores]) -> tuple[str, ...]:
    """The data sets that the geometric means run over: those with published scores, or all when none has."""
    return tuple(name for name in COMPARABLE_DATASETS if name in datasets) or tuple(datasets)


def relative_score(model: Mapping[str, Score], baseline: Mapping[str, Score], datasets: tuple[str, ...]) -> Score:
    """Geometric means over data sets of the model's scores over the baseline's; NaN where one is undefined."""
    means = []
    for part in ("mase", "wql"):
        # The scores are those of all ranks, and only rank 0 is here.
        mean = RelativeScore(datasets, sync_on_compute=False)
        for name in datasets:
            mean.update(name, getattr(model[name], part), getattr(baseline[name], part))
        means.append(float(mean.compute()))
    return Score(*means)


def published_scores(datasets: tuple[str, ...]) -> dict[str, Score]:
    """Relative scores of the published forecasters over the given data sets; empty where any has no such score."""
    if not set(datasets) <= set(COMPARABLE_DATASETS):
        return {}
    return {
        name: relative_score(scores, PUBLISHED[BASELINE], datasets)
        for name, scores in PUBLISHED.items()
        if name != BASELINE
    }


def _without_nan(value: Any) -> Any:
    """Replace NaN, which strict JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return [_without_nan(entry) for entry in value] if isinstance(value, list | tuple) else value


def _with_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in values.items()}
