"""Scores per data set and expert load."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_moe.models.chronos_moe import ExpertLoad, ForecastScores

LEVELS = (0.1, 0.5, 0.9)


def _batch(dataset: list[int], error: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forecasts that miss a target of 4 by ``error`` at every level."""
    size = len(dataset)
    target = torch.full((size, 2), 4.0, dtype=torch.float64)
    quantiles = target[:, None].expand(size, 3, 2) + error
    return quantiles, target, torch.full((size,), 0.5, dtype=torch.float64), torch.tensor(dataset)


def test_scores_of_each_data_set_and_their_means() -> None:
    scores = ForecastScores(["a", "b", "nothing"], LEVELS)
    scores.update(*_batch([0, 1, 0], error=1.0))
    scores.update(*_batch([1, 1, 1], error=3.0))
    scores.loss.update(torch.tensor(30.0), torch.tensor(30))
    scores.loss.update(torch.tensor(40.0), torch.tensor(10))
    result = {name: value.item() for name, value in scores.compute().items()}
    assert result["loss"] == pytest.approx(1.75)
    assert result["mase/a"] == pytest.approx(2.0)
    assert result["mase/b"] == pytest.approx((2.0 + 3 * 6.0) / 4)
    assert result["mase"] == pytest.approx(math.sqrt(2.0 * 5.0))
    # A point forecast at symmetric levels: sum of errors over sum of targets.
    assert result["wql/a"] == pytest.approx(1 / 4)
    assert result["wql/b"] == pytest.approx((1 + 9) / 16)
    assert result["wql"] == pytest.approx(math.sqrt(1 / 4 * 10 / 16))
    assert result["coverage"] == 0.0
    assert result["smape/a"] == pytest.approx(2 / 9)
    assert all(math.isnan(result[f"{name}/nothing"]) for name in ("mase", "wql", "smape", "coverage"))


def test_reset_forgets() -> None:
    scores = ForecastScores(["a"], LEVELS)
    scores.update(*_batch([0], error=3.0))
    scores.reset()
    scores.update(*_batch([0], error=1.0))
    assert scores.compute()["mase"].item() == pytest.approx(2.0)


def test_a_single_level_has_no_interval() -> None:
    scores = ForecastScores(["a"], (0.5,))
    quantiles, *rest = _batch([0], error=1.0)
    scores.update(quantiles[:, 1:2], *rest)
    assert "coverage" not in scores.compute()


def test_casting_the_module_keeps_sums_in_float64() -> None:
    scores = ForecastScores(["a"], LEVELS).to(torch.bfloat16)
    for _ in range(400):
        scores.update(*_batch([0], error=1.0))
    assert scores.compute()["mase/a"].item() == pytest.approx(2.0, rel=1e-12)


def test_expert_load_adds_up() -> None:
    load = ExpertLoad(2, 3)
    counts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    load.update(counts)
    load.update(counts)
    assert torch.equal(load.compute(), 2 * counts)
