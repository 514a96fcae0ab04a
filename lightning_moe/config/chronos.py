"""Settings of the Chronos-MoE forecasting model (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lightning_moe.config.moe import MoEConfig
from lightning_moe.config.ranges import Rule, validate
from lightning_moe.config.rules import CHRONOS_RULES


@dataclass(frozen=True, kw_only=True)
class ChronosMoEConfig:
    """Sizes, loss and feed-forward blocks of the encoder that forecasts all quantiles in one pass.

    Raises:
        ConfigError: A field has the wrong type, or the fields contradict each other (see ``CHRONOS_RULES``).
    """

    rules: ClassVar[tuple[Rule, ...]] = CHRONOS_RULES

    hidden_size: int = 64
    """Width of the residual stream."""
    num_layers: int = 2
    """Number of encoder blocks."""
    num_heads: int = 2
    """Number of attention heads in each block."""
    context_length: int = 144
    """Number of past time steps that the model sees."""
    prediction_length: int = 24
    """Number of future time steps forecast in one pass."""
    patch_length: int = 12
    """Number of time steps in one token."""
    ffn_hidden_size: int = 256
    """Inner width of the input and output blocks, and of the feed-forward blocks when ``moe`` is null."""
    quantiles: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Quantile levels that the model forecasts, in increasing order."""
    moe: MoEConfig | None = field(default_factory=MoEConfig)
    """Mixture-of-Experts layer in place of each feed-forward block; null keeps dense blocks."""
    dropout: float = 0.0
    """Probability of dropping a feature after attention and after the feed-forward block."""
    rope_theta: float = 10000.0
    """Base of the wavelengths of the rotary position encoding."""
    use_arcsinh: bool = True
    """Whether the normalised series is compressed by the inverse hyperbolic sine."""
    loss: Literal["pinball", "huber"] = "pinball"
    """Training loss over all quantiles: pinball, or the quantile Huber loss (smooth near zero)."""
    huber_delta: float = 2.0
    """Error at which the Huber loss turns from quadratic to linear, in units of the normalised series."""

    def __post_init__(self) -> None:
        validate(self, "config", self.rules)
