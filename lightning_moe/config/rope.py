"""Scaling of rotary positions for longer sequences than a model was trained on first (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lightning_moe.config.ranges import Rule, above, at_least, validate
from lightning_moe.errors import ConfigError


def llama3_factors_increase(config: RopeScaling) -> ConfigError | None:
    """The band between low and high frequencies has a width."""
    if config.type != "llama3" or config.low_freq_factor < config.high_freq_factor:
        return None
    return ConfigError(
        "high_freq_factor", config.high_freq_factor, f"greater than low_freq_factor = {config.low_freq_factor}"
    )


def yarn_betas_decrease(config: RopeScaling) -> ConfigError | None:
    """Fast rotations are those with more turns than slow ones."""
    if config.type != "yarn" or config.beta_fast > config.beta_slow:
        return None
    return ConfigError("beta_fast", config.beta_fast, f"greater than beta_slow = {config.beta_slow}")


def original_length_is_given(config: RopeScaling) -> ConfigError | None:
    """Which wavelengths are long depends on the length of the first training."""
    if config.type == "linear" or config.original_max_position_embeddings is not None:
        return None
    return ConfigError(
        "original_max_position_embeddings",
        None,
        f"the sequence length of the first training, for type {config.type}",
        "the field of the same name in the model's published config",
    )


ROPE_RULES: tuple[Rule, ...] = (
    at_least("factor", 1.0),
    at_least("original_max_position_embeddings", 1),
    original_length_is_given,
    above("low_freq_factor", 0.0),
    llama3_factors_increase,
    above("beta_slow", 0.0),
    yarn_betas_decrease,
    above("attention_factor", 0.0),
)


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the wavelengths of rotary positions are stretched; fields are named as in Hugging Face's configs.

    Raises:
        ConfigError: A field has the wrong type, or the fields contradict each other (see ``ROPE_RULES``).
    """

    rules: ClassVar[tuple[Rule, ...]] = ROPE_RULES

    type: Literal["linear", "llama3", "yarn"]
    """Kind of scaling: all wavelengths alike, or only the long ones (Llama 3; YaRN, arXiv:2309.00071)."""
    factor: float
    """How many times longer the sequences become."""
    original_max_position_embeddings: int | None = None
    """Sequence length of the first training; llama3 and yarn need it."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above the original length divided by this are stretched in full."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below the original length divided by this stay as they are."""
    beta_fast: float = 32.0
    """yarn: pairs that turn more often than this over the original length stay as they are."""
    beta_slow: float = 1.0
    """yarn: pairs that turn less often than this over the original length are stretched in full."""
    attention_factor: float | None = None
    """yarn: factor on cosines and sines; null takes ``0.1 ln(factor) + 1``."""

    def __post_init__(self) -> None:
        validate(self, "rope_scaling", self.rules)
