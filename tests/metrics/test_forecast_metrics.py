"""Every forecast metric against a plain numpy loop, and against itself split over batches and over ranks."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.regression import SymmetricMeanAbsolutePercentageError

from lightning_moe.errors import ConfigError
from lightning_moe.metrics import MASE, SMAPE, IntervalCoverage, PinballLoss, WeightedQuantileLoss
from tests.distributed import RankPool

LEVELS = (0.1, 0.25, 0.5, 0.9)
MEDIAN = 2


def forecasts(num_series: int = 23, horizon: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Quantile forecasts, targets with gaps, and scales, of series whose units differ by orders of magnitude.

    The second series has no target at all; the scales of the third and fourth are zero and undefined.
    """
    rng = np.random.default_rng(seed)
    unit = 10.0 ** rng.integers(-2, 6, size=(num_series, 1))
    target = unit * (1.0 + rng.normal(size=(num_series, horizon)))
    quantiles = np.sort(unit[:, None] * (1.0 + rng.normal(size=(num_series, len(LEVELS), horizon))), axis=1)
    target[rng.random(target.shape) < 0.2] = np.nan
    target[1] = np.nan
    scale = (unit * rng.uniform(0.5, 2.0, size=unit.shape))[:, 0]
    scale[2], scale[3] = 0.0, np.nan
    target[4, 0], quantiles[4, :, 0] = 0.0, 0.0
    return torch.from_numpy(quantiles), torch.from_numpy(target), torch.from_numpy(scale)


def numpy_mase(quantiles: np.ndarray, target: np.ndarray, scale: np.ndarray) -> float:
    scores = []
    for forecast, truth, denominator in zip(quantiles[:, MEDIAN], target, scale, strict=True):
        errors = [abs(f - y) for f, y in zip(forecast, truth, strict=True) if not math.isnan(y)]
        if errors and denominator > 0.0:
            scores.append(sum(errors) / len(errors) / denominator)
    return sum(scores) / len(scores)


def numpy_level_losses(quantiles: np.ndarray, target: np.ndarray) -> list[float]:
    """Summed GluonTS quantile loss of each level: 2 |(y - q) ((y <= q) - tau)|."""
    truth = target[:, None]
    tau = np.array(LEVELS)[:, None]
    return list(np.nansum(2.0 * np.abs((truth - quantiles) * ((truth <= quantiles) - tau)), axis=(0, 2)))


def numpy_wql(quantiles: np.ndarray, target: np.ndarray, _: np.ndarray) -> float:
    return float(np.mean(np.array(numpy_level_losses(quantiles, target)) / np.nansum(np.abs(target))))


def numpy_pinball(quantiles: np.ndarray, target: np.ndarray, _: np.ndarray) -> float:
    return sum(numpy_level_losses(quantiles, target)) / 2.0 / len(LEVELS) / int((~np.isnan(target)).sum())


def numpy_coverage(quantiles: np.ndarray, target: np.ndarray, _: np.ndarray) -> float:
    low, high, truth = quantiles[:, 1].ravel(), quantiles[:, 3].ravel(), target.ravel()
    inside = [a <= y <= b for a, y, b in zip(low, truth, high, strict=True) if not math.isnan(y)]
    return sum(inside) / len(inside)


def numpy_smape(quantiles: np.ndarray, target: np.ndarray, _: np.ndarray) -> float:
    points = [(f, y) for f, y in zip(quantiles[:, MEDIAN].ravel(), target.ravel(), strict=True) if y == y]
    terms = [0.0 if f == y == 0.0 else 2.0 * abs(f - y) / (abs(f) + abs(y)) for f, y in points]
    return sum(terms) / len(terms)


METRICS: dict[str, tuple[Callable[[], Metric], Callable[..., float]]] = {
    "mase": (partial(MASE, LEVELS), numpy_mase),
    "wql": (partial(WeightedQuantileLoss, LEVELS), numpy_wql),
    "pinball": (partial(PinballLoss, LEVELS), numpy_pinball),
    "coverage": (partial(IntervalCoverage, 0.25, 0.9, LEVELS), numpy_coverage),
    "smape": (partial(SMAPE, LEVELS), numpy_smape),
}
every_metric = pytest.mark.parametrize("name", list(METRICS))


def update(metric: Metric, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    quantiles, target, scale = batch
    metric.update(*((quantiles, target, scale) if isinstance(metric, MASE) else (quantiles, target)))


def whole(name: str) -> float:
    metric = METRICS[name][0]()
    update(metric, forecasts())
    return float(metric.compute())


@every_metric
def test_equals_numpy(name: str) -> None:
    expected = METRICS[name][1](*(tensor.numpy() for tensor in forecasts()))
    assert math.isfinite(expected)
    assert whole(name) == pytest.approx(expected, rel=1e-13)


@every_metric
def test_float32_forecasts_are_summed_in_float64(name: str) -> None:
    metric = METRICS[name][0]()
    quantiles, target, scale = (tensor.float() for tensor in forecasts())
    update(metric, (quantiles, target, scale))
    expected = METRICS[name][1](*(tensor.double().numpy() for tensor in (quantiles, target, scale)))
    assert metric.compute().dtype == torch.float64
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-13)


@every_metric
def test_module_casts_leave_the_sums_in_float64(name: str) -> None:
    # Precision "bf16-true": built under a bfloat16 default dtype, then cast as a part of the module.
    torch.set_default_dtype(torch.bfloat16)
    try:
        metric = METRICS[name][0]()
    finally:
        torch.set_default_dtype(torch.float32)
    module = torch.nn.ModuleList([metric]).to(torch.bfloat16)
    update(metric, tuple(tensor[:9] for tensor in forecasts()))
    module.to(torch.bfloat16).half().to(dtype=torch.float16, device="cpu")
    update(metric, tuple(tensor[9:] for tensor in forecasts()))
    assert float(metric.compute()) == pytest.approx(whole(name), rel=1e-13)


@every_metric
def test_batches_add_up_and_merge(name: str) -> None:
    batches = list(zip(*(tensor.split([1, 9, 13]) for tensor in forecasts()), strict=True))
    one, other = METRICS[name][0](), METRICS[name][0]()
    for batch in batches[:2]:
        update(one, batch)
    update(other, batches[2])
    one.merge_state(other)
    assert float(one.compute()) == pytest.approx(whole(name), rel=1e-13)


@every_metric
def test_forward_returns_the_batch_value_and_accumulates(name: str) -> None:
    metric = METRICS[name][0]()
    batches = list(zip(*(tensor.split([10, 13]) for tensor in forecasts()), strict=True))
    for quantiles, target, scale in batches:
        arguments: tuple[Tensor, ...] = (quantiles, target, scale)
        value = metric(*(arguments if isinstance(metric, MASE) else arguments[:2]))
        expected = METRICS[name][1](*(tensor.numpy() for tensor in arguments))
        assert float(value) == pytest.approx(expected, rel=1e-13)
    assert float(metric.compute()) == pytest.approx(whole(name), rel=1e-13)


def every_value_on_rank(bounds: list[int]) -> dict[str, float]:
    """Values on this rank, which sees series ``bounds[rank]:bounds[rank + 1]`` in batches of five."""
    rank = torch.distributed.get_rank()
    values = {}
    for name, (build, _) in METRICS.items():
        metric = build()
        start, stop = bounds[rank], bounds[rank + 1]
        for first in range(start, stop, 5):
            update(metric, tuple(tensor[first : min(first + 5, stop)] for tensor in forecasts()))
        values[name] = float(metric.compute())
    return values


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("bounds", [[0, 6, 23], [0, 23, 23], [0, 1, 2]], ids=["unequal", "empty", "unobserved"])
def test_ranks_with_unequal_shares_equal_one_process(ranks: RankPool, bounds: list[int]) -> None:
    results = ranks.run(2, every_value_on_rank, bounds)
    for name, (build, _) in METRICS.items():
        metric = build()
        update(metric, tuple(tensor[: bounds[-1]] for tensor in forecasts()))
        expected = float(metric.compute())
        for result in results:
            assert result[name] == pytest.approx(expected, rel=1e-12)


@every_metric
def test_missing_targets_do_not_look_at_the_forecast(name: str) -> None:
    quantiles, target, scale = forecasts()
    metric = METRICS[name][0]()
    hidden = torch.where(torch.isnan(target)[:, None], torch.nan, quantiles)
    update(metric, (hidden, target, scale))
    assert float(metric.compute()) == whole(name)


@pytest.mark.parametrize("name", ["mase", "wql", "pinball", "smape"])
def test_a_forecast_that_is_not_a_number_is_not_hidden(name: str) -> None:
    quantiles, target, scale = forecasts()
    quantiles[0, :, ~torch.isnan(target[0])] = torch.nan
    metric = METRICS[name][0]()
    update(metric, (quantiles, target, scale))
    assert math.isnan(metric.compute())


@every_metric
def test_nothing_observed_is_not_a_number(name: str) -> None:
    metric = METRICS[name][0]()
    update(metric, tuple(tensor[1:2] for tensor in forecasts()))
    assert math.isnan(metric.compute())


@every_metric
def test_pickle_and_reset(name: str) -> None:
    metric = METRICS[name][0]()
    update(metric, forecasts())
    copy = pickle.loads(pickle.dumps(metric))
    assert float(copy.compute()) == whole(name)
    copy.reset()
    update(copy, forecasts())
    assert float(copy.compute()) == whole(name)


def test_sums_follow_the_module_to_its_device() -> None:
    metric = MASE(LEVELS).to("meta")
    assert metric.device.type == metric.scaled_error_sum.device.type == "meta"


def test_smape_equals_torchmetrics_on_complete_data() -> None:
    quantiles, target, _ = forecasts()
    target = torch.nan_to_num(target, nan=1.5)
    metric, reference = SMAPE(LEVELS), SymmetricMeanAbsolutePercentageError().set_dtype(torch.float64)
    metric.update(quantiles, target)
    reference.update(quantiles[:, MEDIAN].contiguous(), target)
    assert float(metric.compute()) == pytest.approx(float(reference.compute()), rel=1e-12)


def test_repeated_point_forecast_scores_the_normalised_deviation() -> None:
    quantiles, target, _ = forecasts()
    levels = (0.1, 0.3, 0.5, 0.7, 0.9)
    metric = WeightedQuantileLoss(levels)
    point = quantiles[:, MEDIAN]
    metric.update(point[:, None].expand(-1, len(levels), -1), target)
    expected = float((point - target).abs().nansum() / target.abs().nansum())
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-13)


def test_coverage_includes_its_bounds() -> None:
    metric = IntervalCoverage(0.1, 0.9, (0.1, 0.9))
    bounds = torch.tensor([[[1.0] * 4, [2.0] * 4]])
    metric.update(bounds, torch.tensor([[1.0, 2.0, 0.9, 2.1]]))
    assert float(metric.compute()) == 0.5


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: MASE((0.1, 0.9)), "quantile_levels"),
        (lambda: SMAPE((0.4, 0.6)), "quantile_levels"),
        (lambda: WeightedQuantileLoss(()), "quantile_levels"),
        (lambda: PinballLoss((0.5, 1.0)), "quantile_levels"),
        (lambda: PinballLoss((0.5, 0.5)), "quantile_levels"),
        (lambda: IntervalCoverage(0.05, 0.9), "lower"),
        (lambda: IntervalCoverage(0.1, 0.95), "upper"),
        (lambda: IntervalCoverage(0.9, 0.1), "lower"),
    ],
)
def test_levels_that_cannot_work_are_refused(build: Callable[[], Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build()
    assert caught.value.field == field


@every_metric
@pytest.mark.parametrize("shape", [(23, 4, 6), (23, 3, 7), (22, 4, 7), (23, 7)])
def test_shapes_that_do_not_belong_together_are_refused(name: str, shape: tuple[int, ...]) -> None:
    _, target, scale = forecasts()
    with pytest.raises(ValueError, match="expected forecasts of shape"):
        update(METRICS[name][0](), (torch.zeros(shape), target, scale))


def test_mase_refuses_a_scale_per_point() -> None:
    quantiles, target, scale = forecasts()
    with pytest.raises(ValueError, match="one scale per series"):
        MASE(LEVELS).update(quantiles, target, scale[:, None])
