"""Rotary positions: norm, relativity, independence of the model's dtype."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_moe.layers import apply_rope, rope_tables

CPU = torch.device("cpu")


def _rotated(x: torch.Tensor, length: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return apply_rope(x, *rope_tables(length, x.shape[-1], 10000.0, dtype, CPU))


def test_score_depends_on_distance_alone() -> None:
    torch.manual_seed(0)
    length, width = 40, 16
    query, key = torch.randn(2, width, dtype=torch.float64)
    scores = _rotated(query.expand(length, -1), length) @ _rotated(key.expand(length, -1), length).T
    for distance in range(-length + 1, length):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-12)
    assert scores[0].std() > 0.1  # and it does depend on the distance


def test_rotation_of_each_pair() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 6, dtype=torch.float64)
    out = _rotated(x, 7)
    for position in range(7):
        for pair in range(3):
            angle = position * 10000.0 ** (-2 * pair / 6)
            first, second = x[position, pair].item(), x[position, pair + 3].item()
            assert out[position, pair].item() == pytest.approx(
                first * math.cos(angle) - second * math.sin(angle), abs=1e-13
            )
            assert out[position, pair + 3].item() == pytest.approx(
                second * math.cos(angle) + first * math.sin(angle), abs=1e-13
            )


def test_tables_are_float32_for_a_bfloat16_model() -> None:
    cos, sin = rope_tables(1000, 8, 10000.0, torch.bfloat16, CPU)
    assert cos.dtype == sin.dtype == torch.float32
    assert not torch.equal(cos[999], cos[998])  # positions that bfloat16 cannot tell apart
    assert apply_rope(torch.randn(1000, 8, dtype=torch.bfloat16), cos, sin).dtype == torch.bfloat16
