"""``predict`` and ``predict_quantiles``: shapes, units, batching, long horizons, refusals."""

from __future__ import annotations

import warnings

import pytest
import torch

from lightning_moe.errors import ConfigError
from lightning_moe.models.chronos_moe import ChronosMoE
from tests.models.chronos_moe.configs import contexts, small_config


@pytest.fixture
def module() -> ChronosMoE:
    torch.manual_seed(0)
    return ChronosMoE(small_config())


def test_shapes_dtype_and_order(module: ChronosMoE) -> None:
    forecast = module.predict(contexts(5))
    assert forecast.shape == (5, 9, 8)
    assert forecast.dtype == torch.float32
    assert forecast.diff(dim=1).ge(0).all()
    quantiles, median = module.predict_quantiles(contexts(5), prediction_length=3, quantile_levels=[0.3, 0.5])
    assert torch.equal(quantiles, forecast[:, [2, 4], :3].transpose(1, 2))
    assert torch.equal(median, forecast[:, 4, :3])
    assert module.predict(contexts(2).double()).dtype == torch.float64


def test_one_series_and_lists_of_any_length(module: ChronosMoE) -> None:
    series = [contexts(1, length)[0] for length in (1, 7, 24, 60)]
    together = module.predict(series)
    for position, one in enumerate(series):
        torch.testing.assert_close(module.predict(one), together[position : position + 1], rtol=1e-5, atol=1e-5)


def test_integers_and_arrays_are_accepted(module: ChronosMoE) -> None:
    values = torch.arange(10)
    expected = module.predict(values.float())
    assert torch.equal(module.predict(values), expected)
    assert torch.equal(module.predict([values.numpy()]), expected)


def test_batch_size_changes_nothing(module: ChronosMoE) -> None:
    series = contexts(7, dtype=torch.float64)
    module.network().double()
    torch.testing.assert_close(module.predict(series, batch_size=2), module.predict(series), rtol=1e-12, atol=1e-12)


def test_predicting_leaves_modes_as_they_were() -> None:
    module = ChronosMoE(small_config(dropout=0.5))
    network = module.network().train()
    network.final_norm.eval()
    first, second = module.predict(contexts(2)), module.predict(contexts(2))
    assert torch.equal(first, second)  # no dropout
    assert network.training
    assert network.blocks.training
    assert not network.final_norm.training
    assert not first.requires_grad


def test_shift_and_scale_carry_over_to_the_forecast(module: ChronosMoE) -> None:
    context = contexts(6, dtype=torch.float64)
    forecast = module.predict(context)
    for factor, offset in ((1.0, 1e6), (1e9, 0.0), (1e-7, 3.0), (250.0, -40.0)):
        moved = module.predict(factor * context + offset)
        torch.testing.assert_close((moved - offset) / factor, forecast, rtol=1e-4, atol=1e-4)


def test_a_level_that_float32_cannot_hold_does_not_drown_the_signal(module: ChronosMoE) -> None:
    context = contexts(2, dtype=torch.float64)
    forecast = module.predict(context + 1e9)
    torch.testing.assert_close(forecast - 1e9, module.predict(context), rtol=0, atol=1e-4)


def test_long_horizon_feeds_the_median_back(module: ChronosMoE) -> None:
    context = contexts(3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="longer than the trained horizon 8"):
        forecast = module.predict(context, prediction_length=19)
    assert forecast.shape == (3, 9, 19)
    for start in (0, 8, 16):
        extended = torch.cat((context, forecast[:, 4, :start]), dim=1)
        expected = module.predict(extended)[..., : min(8, 19 - start)]
        torch.testing.assert_close(forecast[..., start : start + 8], expected, rtol=1e-9, atol=1e-9)


def test_trained_horizon_does_not_warn_and_shorter_ones_are_its_beginning(module: ChronosMoE) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = module.predict(contexts(2), prediction_length=8, limit_prediction_length=True)
    assert torch.equal(module.predict(contexts(2), prediction_length=5), full[..., :5])


@pytest.mark.parametrize("length", [0, -3, 2.5, True])
def test_refuses_horizons_that_are_no_number_of_steps(module: ChronosMoE, length: object) -> None:
    with pytest.raises(ConfigError, match="prediction_length"):
        module.predict(contexts(1), prediction_length=length)  # type: ignore[arg-type]


def test_refuses_long_horizons_when_limited(module: ChronosMoE) -> None:
    with pytest.raises(ConfigError, match="trained horizon 8"):
        module.predict(contexts(1), prediction_length=9, limit_prediction_length=True)


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        (torch.zeros(2, 3, 4), "inputs"),
        ([], "inputs"),
        (torch.zeros(0, 5), "inputs"),
        ([torch.zeros(3), torch.zeros(0)], r"inputs\[1\]"),
        ([torch.zeros(2, 2)], r"inputs\[0\]"),
        ([torch.zeros(2, dtype=torch.complex64)], r"inputs\[0\]"),
    ],
)
def test_refuses_malformed_inputs(module: ChronosMoE, inputs: object, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        module.predict(inputs)  # type: ignore[arg-type]


def test_refuses_an_empty_batch_size(module: ChronosMoE) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        module.predict(contexts(1), batch_size=0)
