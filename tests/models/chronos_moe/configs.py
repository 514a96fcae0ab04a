"""Small configurations and data that the tests of the model share."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moe.config import ChronosMoEConfig, MoEConfig


def small_config(**changes: object) -> ChronosMoEConfig:
    """Two layers of width 16 with four experts; horizon 8, context 24, patches of 4."""
    values: dict[str, object] = {
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "context_length": 24,
        "prediction_length": 8,
        "patch_length": 4,
        "ffn_hidden_size": 32,
        "moe": MoEConfig(num_experts=4, expert_hidden_size=16, shared_expert_hidden_size=16, shared_expert_gate=True),
    }
    return ChronosMoEConfig(**{**values, **changes})  # type: ignore[arg-type]


def contexts(batch: int, length: int = 24, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random walks ``[batch, length]`` whose first values are missing, row ``i`` from ``3 * i`` on."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, length, generator=generator, dtype=torch.float64).cumsum(1) + 5
    for row in range(batch):
        values[row, : min(3 * row, length - 1)] = torch.nan
    return values.to(dtype)


def batch_of(batch: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Rising and falling lines as a data module makes them; the last two steps of odd rows are missing."""
    generator = torch.Generator().manual_seed(seed)
    slope = torch.randn(batch, 1, generator=generator) / 8
    series = 2 + slope * torch.arange(32) + 0.05 * torch.randn(batch, 32, generator=generator)
    target = series[:, 24:].clone()
    target[1::2, -2:] = torch.nan
    return {
        "context": series[:, :24].to(dtype),
        "target": target.to(dtype),
        "scale": torch.full((batch,), 10.0, dtype=torch.float64),
        "seasonal_error": torch.full((batch,), 2.0, dtype=torch.float64),
        "series_index": torch.arange(batch),
        "dataset_index": torch.arange(batch) % 2,
    }
