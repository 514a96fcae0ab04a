"""How a pipeline is run (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import ClassVar, Literal

from lightning_moe.config.ranges import Rule, above, at_least, exclusive, validate
from lightning_moe.errors import ConfigError


def _depths_are_positive(config: PipelineConfig) -> ConfigError | None:
    depths = config.blocks_per_stage
    if depths is None or (depths and all(depth >= 0 for depth in depths) and sum(depths) > 0):
        return None
    return ConfigError("blocks_per_stage", list(depths), "a number of blocks for each stage, in order")


def _costs_are_positive(config: PipelineConfig) -> ConfigError | None:
    if all(0 < cost < inf for cost in config.costs):
        return None
    return ConfigError("costs", list(config.costs), "three positive times: of F, B and W")


def _block_costs_are_positive(config: PipelineConfig) -> ConfigError | None:
    costs = config.block_costs
    if costs is None or (costs and all(0 < cost < inf for cost in costs)):
        return None
    return ConfigError("block_costs", list(costs), "a positive number for each block", "leave it out to ask the model")


def _communication_is_finite(config: PipelineConfig) -> ConfigError | None:
    if isfinite(config.communication):
        return None
    return ConfigError("communication", config.communication, "a time in the units of costs")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Schedule and microbatches of a pipeline; ``ParallelConfig.pipeline`` says over how many ranks it goes.

    Raises:
        ConfigError: A value is out of range.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        at_least("num_microbatches", 1),
        at_least("chunks", 1),
        at_least("max_lag", 0, "0 computes weight gradients together with input gradients"),
        above("memory_limit", 0.0),
        above("weight_grad_megabytes", 0.0),
        at_least("communication", 0.0),
        exclusive("blocks_per_stage", "block_costs"),
        _depths_are_positive,
        _costs_are_positive,
        _block_costs_are_positive,
        _communication_is_finite,
    )

    schedule: str = "zb-h1"
    """gpipe, 1f1b, interleaved-1f1b, zb-h1, zb-h1-interleaved, zb-h2, zb-v, v-half, v-min, auto, or
    ``package.module:function`` for one of your own."""
    num_microbatches: int | None = None
    """Number of parts that a rank's batch is cut into; null is twice the number of pipeline ranks."""
    chunks: int | None = None
    """Number of stages that each rank holds; null takes the schedule's own (2 for interleaved and V, else 1)."""
    max_lag: int | None = None
    """Most microbatches that weight gradients lag behind; null is what the schedule gains from. 1 keeps about 60 % of
    the gain, and is right with full activation checkpointing, where it bounds the activations that are kept."""
    blocks_per_stage: tuple[int, ...] | None = None
    """Number of blocks of each stage; null divides by cost. ``auto`` makes as many stages as there are numbers."""
    block_costs: tuple[float, ...] | None = None
    """Relative cost of each block, for dividing them; null asks the model."""
    costs: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Times of F, B and W relative to each other, for ``auto`` and ``plan``."""
    communication: float = 0.0
    """Time that a tensor takes to the next rank, in the units of ``costs``, for ``auto`` and ``plan``."""
    memory_limit: float | None = None
    """Most activation memory of a rank, in microbatches, with all stages taken to be alike. ``auto``, ``zb-v``,
    ``v-half`` and ``v-min`` keep to it, others are refused if they need more; null is the schedule's own, for ``auto``
    what 1F1B needs."""
    weight_grad_megabytes: float | None = None
    """Most memory in MiB that deferred weight gradients may hold on to; what exceeds it is computed early."""
    dynamic_shapes: bool = False
    """Whether shapes between stages differ between microbatches of equal shape."""
    transport: Literal["auto", "p2p", "copy"] = "auto"
    """How tensors get from stage to stage: by send and receive, or by the copy engines of GPUs that reach each other's
    memory; auto takes what is faster where it can."""

    def __post_init__(self) -> None:
        validate(self, "pipeline", self.rules)

    def microbatches(self, ranks: int) -> int:
        """Number of microbatches for a pipeline over ``ranks`` ranks."""
        return self.num_microbatches or 2 * ranks
