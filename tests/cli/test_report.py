"""The parts of the report: baseline, means, published figures, JSON and tables."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from rich.console import Console

from lightning_moe.cli import lightning_cli
from lightning_moe.cli.report import DatasetScores, ForecastSummary, report_on
from lightning_moe.cli.report.forecast import ForecastReport, print_forecast_summary
from lightning_moe.cli.report.forecast.baseline import naive_scores
from lightning_moe.cli.report.forecast.summary import mean_datasets, published_scores, relative_score
from lightning_moe.data import SeriesDataModule
from lightning_moe.data.fcomp import load_competitions
from lightning_moe.data.time_series import Series
from lightning_moe.errors import ConfigError
from lightning_moe.metrics import BASELINE, COMPARABLE_DATASETS, PUBLISHED, Score, published_relative
from lightning_moe.metrics.base import DECILES
from lightning_moe.models.chronos_moe import ChronosMoE


def series(values: list[float], test: list[float], season_length: int) -> Series:
    return Series(item_id="x", dataset="d", values=np.array(values), test=np.array(test), season_length=season_length)


def summary(**changes: Any) -> ForecastSummary:
    names = ("m1_yearly", "m3_yearly")
    values: dict[str, Any] = {
        "command": "fit",
        "relative_mase": 0.5,
        "relative_wql": 0.25,
        "relative_datasets": names,
        "datasets": {
            "m1_yearly": DatasetScores.against(3, Score(1.0, 0.1), Score(2.0, 0.4)),
            "m3_yearly": DatasetScores.against(1234, Score(1.5, 0.1), Score(3.0, 0.4)),
        },
        "published": published_scores(names),
        "expert_load": ((0.5, 0.25, 0.125, 0.125), (0.25, 0.25, 0.25, 0.25)),
        "parameters": 408_920,
        "world_size": 2,
        "seconds": 61.4,
        "checkpoint": "/nowhere/step=2000.ckpt",
        "forecast_png": "/nowhere/forecasts.png",
    }
    return ForecastSummary(**values | changes)


def printed(one: ForecastSummary) -> str:
    console = Console(file=io.StringIO(), width=100)
    print_forecast_summary(one, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


# --- the baseline


@pytest.mark.parametrize("name", ["m1_quarterly", "tourism_monthly"])
def test_naive_scores_are_the_published_ones(name: str) -> None:
    score = naive_scores(load_competitions([name])[name], DECILES)
    assert score.mase == pytest.approx(PUBLISHED[BASELINE][name].mase, abs=0.002)
    assert score.wql == pytest.approx(PUBLISHED[BASELINE][name].wql, abs=2e-5)


def test_naive_scores_of_unlike_series() -> None:
    """Different seasons and horizons in one data set, worked by hand."""
    plain = series([1.0, 2.0, 4.0], [5.0, 4.0], 1)  # scale 1.5, forecast 4, errors 1 and 0
    seasonal = series([1.0, 5.0, 2.0, 7.0], [3.0], 2)  # scale 1.5, forecast 2, error 1
    score = naive_scores([plain, seasonal], DECILES)
    assert score.mase == pytest.approx((0.5 / 1.5 + 1.0 / 1.5) / 2, rel=1e-12)
    # Pinball losses of one value at levels that lie evenly around 0.5 add up to half the absolute error each.
    assert score.wql == pytest.approx(2.0 / 12.0, rel=1e-12)


# --- the means


def test_published_scores_over_all_sets_are_the_published_means() -> None:
    scores = published_scores(COMPARABLE_DATASETS)
    assert set(scores) == set(PUBLISHED) - {BASELINE}
    for name, score in scores.items():
        assert score == pytest.approx(published_relative(name), rel=1e-12)


def test_published_scores_need_every_set() -> None:
    assert published_scores(("m1_yearly", "m3_other")) == {}
    one = published_scores(("m1_yearly",))["TiRex"]
    assert one.mase == pytest.approx(3.7032 / 4.8943, rel=1e-9)


def test_relative_score_is_a_geometric_mean() -> None:
    model = {"a": Score(1.0, 0.2), "b": Score(4.0, 0.1), "c": Score(9.0, 9.0)}
    naive = {"a": Score(2.0, 0.1), "b": Score(2.0, 0.1), "c": Score(1.0, 1.0)}
    assert relative_score(model, naive, ("a", "b")) == pytest.approx(Score(1.0, math.sqrt(2.0)), rel=1e-12)


def test_an_undefined_score_makes_the_mean_undefined() -> None:
    mean = relative_score({"a": Score(math.nan, 0.1)}, {"a": Score(1.0, 0.1)}, ("a",))
    assert math.isnan(mean.mase)
    assert mean.wql == pytest.approx(1.0)


def test_means_run_over_comparable_sets_or_over_all() -> None:
    scores = DatasetScores.against(1, Score(1.0, 1.0), Score(1.0, 1.0))
    assert mean_datasets({"m3_other": scores, "m3_yearly": scores, "m1_yearly": scores}) == ("m1_yearly", "m3_yearly")
    assert mean_datasets({"mine": scores, "m3_other": scores}) == ("mine", "m3_other")


# --- JSON


def test_summary_survives_json() -> None:
    assert ForecastSummary.from_json(summary().as_json()) == summary()
    assert ForecastSummary.from_json(summary(expert_load=None, checkpoint=None).as_json()).expert_load is None


def test_json_is_strict_and_one_line() -> None:
    undefined = DatasetScores.against(2, Score(math.nan, 0.1), Score(1.0, 0.0))
    text = summary(relative_mase=math.nan, datasets={"m1_yearly": undefined}).as_json()

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    assert "\n" not in text
    values = json.loads(text, parse_constant=refuse)
    assert values["relative_mase"] is None
    assert values["datasets"]["m1_yearly"]["relative_wql"] is None
    back = ForecastSummary.from_json(text)
    assert math.isnan(back.relative_mase)
    assert math.isnan(back.datasets["m1_yearly"].mase)


# --- tables


def test_tables_show_every_figure() -> None:
    text = printed(summary())
    for figure in ("1.000", "2.000", "0.500", "0.1000", "0.4000", "0.250", "1,234", "408,920", "61 s", "2 ranks"):
        assert figure in text, figure
    for name in ("TiRex", "AutoTheta", "AutoETS", "Chronos-Bolt base", "Chronos-T5 large"):
        assert f"{published_scores(('m1_yearly', 'm3_yearly'))[name].mase:.3f}" in line_of(text, name)
    assert "zero-shot" in line_of(text, "TiRex")
    assert "in-domain" in line_of(text, "this model")
    assert "does not make it the better general forecaster" in " ".join(text.split())
    assert "/nowhere/step=2000.ckpt" in text
    assert "/nowhere/forecasts.png" in text


def test_sets_outside_the_means_are_marked() -> None:
    text = printed(summary(relative_datasets=("m1_yearly",)))
    assert "m3_yearly *" in text
    assert "m1_yearly *" not in text


def test_own_data_are_not_compared_with_published_figures() -> None:
    scores = DatasetScores.against(3, Score(1.0, 0.1), Score(2.0, 0.4))
    text = printed(summary(datasets={"mine": scores}, relative_datasets=("mine",), published={}))
    assert "no published figures" in text
    assert "TiRex" not in text


def test_expert_load_of_few_and_of_many_experts() -> None:
    assert line_of(printed(summary()), "0.125").split() == ["0", "0.500", "0.250", "0.125", "0.125", "2.00"]
    many = tuple([0.04] + [0.96 / 63] * 62 + [0.0])
    row = line_of(printed(summary(expert_load=(many,))), "0.040")
    assert row.split() == ["0", "0.040", "0.000", "2.56"]
    assert "Expert load" not in printed(summary(expert_load=None))


def line_of(text: str, content: str) -> str:
    return next(line for line in text.splitlines() if content in line)


# --- what can be reported


def test_only_forecasts_of_series_are_reported() -> None:
    data = SeriesDataModule(datasets=["m1_yearly"])
    assert report_on(ChronosMoE(), data) is ForecastReport
    with pytest.raises(ConfigError, match=r"report: True .*ChronosMoE or .*GPTMoE as model \(it is BoringModel\)"):
        report_on(BoringModel(), data)
    with pytest.raises(ConfigError, match=r"report: True .* as data \(it is BoringDataModule\)"):
        report_on(ChronosMoE(), BoringDataModule())
    with pytest.raises(ConfigError, match=r"as data \(it is NoneType\)"):
        report_on(ChronosMoE(), None)


# --- refused settings


@pytest.fixture
def on_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, list[int]], None]:
    """Pretend to be a rank whose parent has the given process ids, one look after the other; the last stays."""

    def pretend(rank: int, parents: list[int]) -> None:
        clock = [0.0]
        monkeypatch.setattr(lightning_cli.rank_zero_only, "rank", rank)
        monkeypatch.setattr(lightning_cli.time, "monotonic", lambda: clock[0])
        monkeypatch.setattr(lightning_cli.time, "sleep", lambda seconds: clock.append(clock.pop() + seconds))
        monkeypatch.setattr(lightning_cli.os, "getppid", lambda: parents.pop(0) if len(parents) > 1 else parents[0])

    return pretend


@pytest.mark.parametrize(
    ("rank", "parents", "expected"),
    [
        (0, [], "data.path: 'x' is not allowed; allowed: a file\n"),
        (1, [77, 1], ""),  # rank 0 has gone, so it has told
        (1, [77] * 100 + [1], ""),  # it has taken five seconds for it
        (1, [77], "rank 1: data.path: 'x' is not allowed; allowed: a file\n"),
    ],
)
def test_a_refusal_is_told_once(
    rank: int, parents: list[int], expected: str, on_rank: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    on_rank(rank, parents)
    assert lightning_cli._refuse(ConfigError("data.path", "x", "a file")) == 2
    assert capsys.readouterr().err == expected
