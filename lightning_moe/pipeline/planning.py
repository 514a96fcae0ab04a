"""From the settings of a pipeline to its schedule and to what each stage holds (torch-free)."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_moe.config.pipeline import PipelineConfig
from lightning_moe.pipeline.costs import Costs
from lightning_moe.pipeline.division import blocks_by_hand, divide_blocks
from lightning_moe.pipeline.parts import ModelPart
from lightning_moe.pipeline.registry import make_schedule
from lightning_moe.pipeline.schedule import Schedule


def costs_of(config: PipelineConfig, stage_factors: tuple[float, ...] | None = None) -> Costs:
    """The times that a configuration gives, for all stages alike or with a factor for each."""
    forward, backward, weight = config.costs
    return Costs(forward, backward, weight, config.communication, stage_factors=stage_factors)


def schedule_of(config: PipelineConfig, ranks: int, num_blocks: int | None = None) -> Schedule:
    """The schedule that a configuration asks for.

    Args:
        config: The configuration.
        ranks: Number of pipeline ranks.
        num_blocks: Number of blocks of the model, where it is known: ``auto`` makes no more stages.

    Raises:
        ConfigError: There is no such schedule, or it is not made for these sizes.
    """
    chunks, depths = config.chunks, config.blocks_per_stage
    # Depths that are given are those of a number of stages, which auto would otherwise choose itself.
    if config.schedule == "auto" and chunks is None and depths is not None and len(depths) % ranks == 0:
        chunks = len(depths) // ranks
    return make_schedule(
        config.schedule,
        ranks,
        config.microbatches(ranks),
        chunks=chunks,
        max_lag=config.max_lag,
        costs=costs_of(config),
        memory_limit=config.memory_limit,
        max_chunks=None if num_blocks is None else max(1, num_blocks // ranks),
    )


def parts_of(
    config: PipelineConfig,
    num_stages: int,
    num_blocks: int,
    *,
    block_costs: Sequence[float] | None = None,
    embed_cost: float = 0.0,
    head_cost: float = 0.0,
) -> tuple[ModelPart, ...]:
    """What each stage holds: as the configuration says, or divided by cost.

    Args:
        config: May give depths, or costs of blocks that replace the model's.
        num_stages: Number of stages.
        num_blocks: Number of blocks of the model.
        block_costs: Relative cost of each block; None if all are alike.
        embed_cost: Cost of what comes before the blocks, relative to an average block.
        head_cost: Cost of what comes after them, likewise.

    Raises:
        ConfigError: The blocks cannot be divided so.
    """
    if config.blocks_per_stage is not None:
        return blocks_by_hand(config.blocks_per_stage, num_blocks, num_stages)
    return divide_blocks(
        num_blocks,
        num_stages,
        block_costs=relative(config.block_costs or block_costs),
        embed_cost=embed_cost,
        head_cost=head_cost,
    )


def stage_factors(
    parts: Sequence[ModelPart],
    *,
    block_costs: Sequence[float] | None = None,
    embed_cost: float = 0.0,
    head_cost: float = 0.0,
) -> tuple[float, ...]:
    """Cost of each stage relative to the average stage; the costs are those of :func:`parts_of`."""
    blocks = relative(block_costs)
    costs = [
        (sum(blocks[block] for block in part.blocks) if blocks else len(part.blocks))
        + (embed_cost if part.first else 0.0)
        + (head_cost if part.last else 0.0)
        for part in parts
    ]
    mean = sum(costs) / len(costs)
    return tuple(cost / mean for cost in costs)


def relative(block_costs: Sequence[float] | None) -> tuple[float, ...] | None:
    """Costs whose mean is 1, the unit in which embedding and head are given."""
    if block_costs is None:
        return None
    mean = sum(block_costs) / len(block_costs)
    return tuple(cost / mean for cost in block_costs)
