"""Drawing tokens from logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_moe.errors import ConfigError
from lightning_moe.models.gpt_moe import Sampling

LOGITS = torch.tensor([[0.1, 2.0, -1.0, 1.5, 0.0], [3.0, 0.0, 2.9, -2.0, 1.0]], dtype=torch.float64)


def by_hand(row: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """The definition, one row at a time."""
    weights = torch.tensor(row, dtype=torch.float64).div(temperature).exp().tolist()
    order = sorted(range(len(row)), key=lambda i: -weights[i])[:top_k]
    total, kept, reached = sum(weights[i] for i in order), [], 0.0
    for i in order:
        kept.append(i)
        reached += weights[i] / total
        if top_p is not None and reached >= top_p:
            break
    whole = sum(weights[i] for i in kept)
    return [weights[i] / whole if i in kept else 0.0 for i in range(len(row))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 9])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.6, 0.95, 1.0])
def test_distribution(temperature: float, top_k: int | None, top_p: float | None) -> None:
    found = Sampling(temperature, top_k, top_p).probabilities(LOGITS)
    expected = torch.tensor([by_hand(row, temperature, top_k, top_p) for row in LOGITS.tolist()], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_draws_follow_the_distribution() -> None:
    sampling = Sampling(1.3, top_k=4, top_p=0.9)
    drawn = sampling.draw(LOGITS[:1].expand(20_000, -1), torch.Generator().manual_seed(0))
    frequency = torch.bincount(drawn, minlength=5) / len(drawn)
    assert float((frequency - sampling.probabilities(LOGITS)[0]).abs().max()) < 0.015  # over four standard deviations


def test_temperature_zero_takes_the_most_likely() -> None:
    assert Sampling(0.0, top_k=3, top_p=0.5).draw(LOGITS, torch.Generator()).tolist() == [1, 0]


def test_sixteen_bit_logits_are_drawn_from_in_float32() -> None:
    probabilities = Sampling().probabilities(LOGITS.to(torch.bfloat16))
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_refuses(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Sampling(**arguments)
    assert raised.value.field == field
