"""Rotary positions: norm, relativity, independence of the model's dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lightning_moe.config.rope import RopeScaling
from lightning_moe.layers import apply_rope, rope_frequencies, rope_tables, rope_tables_at

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


def test_gradients_of_a_strided_view() -> None:
    """Heads are views into a fused projection; the gradient turns them back."""
    cos, sin = (table[:, None] for table in rope_tables(3, 4, 100.0, torch.float64, CPU))
    fused = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: apply_rope(x[:, :, 1:3], cos, sin), fused)
    torch.autograd.gradgradcheck(lambda x: apply_rope(x[:, :, 1:3] ** 2, cos, sin), fused)


SCALINGS: list[dict[str, Any]] = [
    {"type": "linear", "factor": 4.0},
    {"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
    {
        "type": "llama3",
        "factor": 32.0,
        "original_max_position_embeddings": 256,
        "low_freq_factor": 0.5,
        "high_freq_factor": 7.0,
    },
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {
        "type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.5,
    },
    {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "beta_fast": 1.01, "beta_slow": 1.0},
    {"type": "yarn", "factor": 3.0, "original_max_position_embeddings": 10**7},
]


@pytest.mark.parametrize("settings", SCALINGS, ids=lambda settings: f"{settings['type']}-{settings['factor']}")
@pytest.mark.parametrize(("head_size", "theta"), [(128, 1e6), (64, 10000.0), (16, 500.0)])
def test_scaling_equals_transformers(
    head_size: int, theta: float, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling = RopeScaling(**settings)
    parameters = {name: value for name, value in vars(scaling).items() if value is not None and name != "type"}
    config = LlamaConfig(
        hidden_size=2 * head_size,
        num_attention_heads=2,
        max_position_embeddings=int(1e5),
        rope_parameters={"rope_type": scaling.type, "rope_theta": theta, **parameters},
    )
    # transformers computes in float32, by name: a comparison to 1e-12 needs that name to mean float64.
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    expected, attention_factor = ROPE_INIT_FUNCTIONS[scaling.type](config, CPU)
    frequencies, factor = rope_frequencies(head_size, theta, scaling)
    torch.testing.assert_close(frequencies, expected, rtol=1e-12, atol=0)
    assert factor == pytest.approx(attention_factor, rel=1e-15)


def test_tables_of_given_positions() -> None:
    """Without scaling they are rows of the tables of all positions; the factor multiplies both."""
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 30, 31, 32, 33]])
    tables = rope_tables(40, 8, 10000.0, torch.float64, CPU)
    for table, expected in zip(
        rope_tables_at(positions, *rope_frequencies(8, 1e4), torch.float64), tables, strict=True
    ):
        torch.testing.assert_close(table, expected[positions], rtol=0, atol=1e-14)
    scaled = rope_tables_at(positions, rope_frequencies(8, 1e4)[0], 1.5, torch.float64)
    for table, expected in zip(scaled, tables, strict=True):
        torch.testing.assert_close(table, 1.5 * expected[positions], rtol=0, atol=1e-14)


def test_far_positions_keep_float32_precision() -> None:
    """Angles are computed in float64: in float32 the cosine at position 1,000,000 would be off by more than 0.01."""
    positions = torch.tensor([1_000_000])
    cos, _ = rope_tables_at(positions, *rope_frequencies(16, 500.0), torch.bfloat16)
    assert cos.dtype == torch.float32
    for pair in range(8):
        assert cos[0, pair].item() == pytest.approx(math.cos(1e6 * 500.0 ** (-pair / 8)), abs=1e-6)
