"""What the work of a pipeline costs, for simulation (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from lightning_moe.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Costs:
    """Time and memory of the work of one rank on one microbatch, through all of its chunks.

    Times and memory may be in any units, the same for all. Each chunk takes its share of a rank's costs: all chunks of
    a rank the same, unless ``stage_factors`` says otherwise.

    Attributes:
        forward: Time of F.
        backward: Time of B, the gradient with respect to the input.
        weight: Time of W, the gradient with respect to the weights. BW takes ``backward + weight``.
        communication: Time that a tensor takes from one rank to the next, during which both may compute.
        activation: Memory that a microbatch holds from its F to its B (or BW).
        weight_activation: Memory that it holds from B to W.
        stage_factors: For each stage, its times and memory relative to the average stage; None for equal stages.

    Raises:
        ConfigError: A time or a size is not positive and finite; the communication and a factor may be 0.
    """

    forward: float = 1.0
    backward: float = 1.0
    weight: float = 1.0
    communication: float = 0.0
    activation: float = 1.0
    weight_activation: float = 1.0
    stage_factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("forward", "backward", "weight", "activation", "weight_activation"):
            if not 0 < getattr(self, name) < inf:
                raise ConfigError(f"costs.{name}", getattr(self, name), "a positive number")
        if not 0 <= self.communication < inf:
            raise ConfigError("costs.communication", self.communication, "a number of at least 0")
        factors = self.stage_factors
        if factors is not None and not (all(0 <= factor < inf for factor in factors) and any(factors)):
            raise ConfigError("costs.stage_factors", factors, "numbers of at least 0, not all of them 0")
