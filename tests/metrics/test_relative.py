from __future__ import annotations

import math

import pytest
import torch

from lightning_moe.errors import ConfigError
from lightning_moe.metrics import RelativeScore
from tests.distributed import RankPool

SCORES = {"a": (2.0, 4.0), "b": (3.0, 1.0), "c": (0.7, 0.9)}
EXPECTED = (0.5 * 3.0 * (0.7 / 0.9)) ** (1.0 / 3.0)


def test_is_the_geometric_mean_of_the_ratios() -> None:
    metric = RelativeScore(SCORES.keys())  # type: ignore[arg-type]
    for name, (score, baseline) in SCORES.items():
        metric.update(name, torch.tensor(score), baseline)
    assert metric.compute().dtype == torch.float64
    assert float(metric.compute()) == pytest.approx(EXPECTED, rel=1e-7)


def value_on_rank(reports: list[list[str]]) -> float:
    metric = RelativeScore(tuple(SCORES))
    for name in reports[torch.distributed.get_rank()]:
        metric.update(name, *SCORES[name])
    return float(metric.compute())


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("reports", [["abc", "abc"], ["ab", "c"], ["abc", ""], ["abca", "bb"]])
def test_who_reports_what_does_not_matter(ranks: RankPool, reports: list[str]) -> None:
    for value in ranks.run(2, value_on_rank, [list(names) for names in reports]):
        assert value == pytest.approx(EXPECTED, rel=1e-12)


def test_a_missing_data_set_is_not_passed_over() -> None:
    metric = RelativeScore(tuple(SCORES))
    metric.update("a", 1.0, 1.0)
    assert math.isnan(metric.compute())


def test_unknown_and_repeated_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="one of a, b, c"):
        RelativeScore(tuple(SCORES)).update("d", 1.0, 1.0)
    with pytest.raises(ConfigError, match="distinct names"):
        RelativeScore(("a", "a"))
    with pytest.raises(ConfigError, match="distinct names"):
        RelativeScore(())
