"""The settings of rotary scaling: what is refused, and under which name."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from lightning_moe.config.rope import RopeScaling
from lightning_moe.errors import ConfigError

LENGTH = {"original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"type": "dynamic", "factor": 2.0}, "type"),
        ({"type": "linear", "factor": 0.5}, "factor"),
        ({"type": "linear", "factor": "2"}, "factor"),
        ({"type": "llama3", "factor": 2.0}, "original_max_position_embeddings"),
        ({"type": "yarn", "factor": 2.0}, "original_max_position_embeddings"),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({"type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, **LENGTH}, "high_freq_factor"),
        ({"type": "llama3", "factor": 2.0, "low_freq_factor": 0.0, **LENGTH}, "low_freq_factor"),
        ({"type": "yarn", "factor": 2.0, "beta_slow": 32.0, **LENGTH}, "beta_fast"),
        ({"type": "yarn", "factor": 2.0, "beta_slow": 0.0, **LENGTH}, "beta_slow"),
        ({"type": "yarn", "factor": 2.0, "attention_factor": 0.0, **LENGTH}, "attention_factor"),
    ],
)
def test_refuses(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RopeScaling(**settings)
    assert caught.value.field == f"rope_scaling.{field}"


def test_fields_of_another_kind_are_not_checked() -> None:
    """A published config may carry all fields."""
    RopeScaling(type="linear", factor=2.0, beta_fast=1.0, beta_slow=2.0, low_freq_factor=9.0)


def test_is_frozen() -> None:
    scaling = RopeScaling(type="yarn", factor=4, original_max_position_embeddings=4096)
    with pytest.raises(FrozenInstanceError):
        scaling.factor = 2.0  # type: ignore[misc]
