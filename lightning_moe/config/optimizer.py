"""Settings of the optimizer and its learning-rate schedule (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_moe.config.ranges import Rule, validate
from lightning_moe.config.rules import OPTIMIZER_RULES


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a linear warm-up followed by a cosine decay.

    Raises:
        ConfigError: A field has the wrong type or lies outside its range (see ``OPTIMIZER_RULES``).
    """

    rules: ClassVar[tuple[Rule, ...]] = OPTIMIZER_RULES

    learning_rate: float = 2e-3
    """Peak learning rate, reached at the end of the warm-up."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of Adam's first and second moments."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    warmup_steps: int = 100
    """Number of optimizer steps over which the learning rate rises linearly from zero."""
    min_learning_rate_ratio: float = 0.02
    """Learning rate at the last step, as a fraction of the peak."""

    def __post_init__(self) -> None:
        validate(self, "optimizer", self.rules)
