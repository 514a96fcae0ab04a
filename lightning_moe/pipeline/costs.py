"""What the work of a pipeline costs, for simulation (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass


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
    """

    forward: float = 1.0
    backward: float = 1.0
    weight: float = 1.0
    communication: float = 0.0
    activation: float = 1.0
    weight_activation: float = 1.0
    stage_factors: tuple[float, ...] | None = None
