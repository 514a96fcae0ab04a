"""Quantile losses against loops over points and levels."""

from __future__ import annotations

import pytest
import torch

from lightning_moe.models.chronos_moe.loss import quantile_loss_sum

LEVELS = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)


def _case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    target = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    observed = torch.rand(4, 5, generator=generator) > 0.4
    return predicted, target, observed


def _loop(kind: str, delta: float = 1.0) -> float:
    predicted, target, observed = _case()
    total = 0.0
    for b in range(4):
        for h in range(5):
            if not observed[b, h]:
                continue
            for i, tau in enumerate(LEVELS.tolist()):
                y, q = target[b, h].item(), predicted[b, i, h].item()
                if kind == "pinball":
                    total += 2 * abs((y - q) * ((y <= q) - tau))
                else:
                    error = abs(y - q)
                    huber = 0.5 * error**2 if error < delta else delta * (error - 0.5 * delta)
                    total += 2 * abs((y <= q) - tau) * huber / delta
    return total


def test_pinball_equals_loop() -> None:
    loss = quantile_loss_sum(*_case(), LEVELS)
    assert loss.item() == pytest.approx(_loop("pinball"), rel=1e-13)


@pytest.mark.parametrize("delta", [0.3, 2.0])
def test_huber_equals_loop(delta: float) -> None:
    loss = quantile_loss_sum(*_case(), LEVELS, "huber", delta)
    assert loss.item() == pytest.approx(_loop("huber", delta), rel=1e-13)


def test_huber_tends_to_pinball() -> None:
    pinball = quantile_loss_sum(*_case(), LEVELS)
    huber = quantile_loss_sum(*_case(), LEVELS, "huber", 1e-9)
    assert huber.item() == pytest.approx(pinball.item(), rel=1e-7)


def test_minimum_is_the_quantile() -> None:
    sample = torch.randn(1, 10001, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for tau in (0.1, 0.8):
        quantile = sample.quantile(tau).requires_grad_()
        loss = quantile_loss_sum(
            quantile.expand(1, 1, 10001),
            sample,
            torch.ones_like(sample, dtype=torch.bool),
            torch.tensor([tau]),
        )
        (gradient,) = torch.autograd.grad(loss, quantile)
        assert abs(gradient.item()) / 10001 < 1e-3


def test_masked_points_carry_nothing_even_if_infinite() -> None:
    predicted, target, observed = _case()
    expected = quantile_loss_sum(predicted, target, observed, LEVELS)
    target[~observed] = torch.inf
    predicted.requires_grad_()
    loss = quantile_loss_sum(predicted, target, observed, LEVELS)
    loss.backward()
    assert loss.item() == expected.item()
    assert predicted.grad is not None
    assert predicted.grad.isfinite().all()
    assert predicted.grad.transpose(1, 2)[~observed].eq(0).all()


def test_bfloat16_predictions_are_compared_in_float32() -> None:
    predicted, target, observed = _case()
    low = predicted.bfloat16()
    loss = quantile_loss_sum(low, target.float(), observed, LEVELS)
    assert loss.dtype == torch.float32
    exact = quantile_loss_sum(low.double(), target.float().double(), observed, LEVELS)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
