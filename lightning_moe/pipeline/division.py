"""Which blocks of a model go to which stage (torch-free)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from math import frexp, inf, ldexp

from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.parts import ModelPart


def divide_blocks(
    num_blocks: int,
    num_stages: int,
    *,
    block_costs: Sequence[float] | None = None,
    embed_cost: float = 0.0,
    head_cost: float = 0.0,
) -> tuple[ModelPart, ...]:
    """Give each stage consecutive blocks, so that the dearest stage is as cheap as can be.

    Of several such divisions the most even one is taken (least sum of squared costs), then the one with the fewest
    blocks in the first and last stage together, where the embedding and the head are, then the one with fewer blocks
    in early stages, which hold on to more microbatches. Only the first and the last stage may be without blocks, and
    only if the embedding or the head costs something there.

    Args:
        num_blocks: Number of blocks.
        num_stages: Number of stages.
        block_costs: Relative cost of each block; None if all are alike.
        embed_cost: Cost of what comes before the blocks, in the units of ``block_costs``, or in blocks.
        head_cost: Cost of what comes after the blocks, likewise.

    Raises:
        ConfigError: There are more stages than there is something to put, or not one cost for each block.
    """
    costs = [1.0] * num_blocks if block_costs is None else list(block_costs)
    if len(costs) != num_blocks:
        raise ConfigError("pipeline.block_costs", tuple(costs), f"{num_blocks} numbers, one for each block")
    most_stages = num_blocks + (embed_cost > 0) + (head_cost > 0)
    if num_stages > max(1, most_stages):
        what = f"{num_blocks} blocks" + " and embedding" * (embed_cost > 0) + " and head" * (head_cost > 0)
        hint = "lower parallel.pipeline or pipeline.chunks"
        raise ConfigError("pipeline stages", num_stages, f"at most {most_stages}, for {what}", hint)
    # In whole numbers, of which sums in any order are the same: rounding must not tell equal divisions apart.
    _, exponent = frexp(sum(costs) + embed_cost + head_cost)
    embed, head, *blocks = (round(ldexp(cost, 40 - exponent)) for cost in (embed_cost, head_cost, *costs))
    sums = list(accumulate(blocks, initial=0))
    has_extra = {0: embed_cost > 0, num_stages - 1: head_cost > 0} if num_stages > 1 else {0: True}

    def stage_cost(stage: int, start: int, stop: int) -> float:
        """Cost of the stage with blocks ``start .. stop - 1``; infinite if it may not be without blocks."""
        if start == stop and not has_extra.get(stage):
            return inf
        return sums[stop] - sums[start] + embed * (stage == 0) + head * (stage == num_stages - 1)

    return _parts([*_cheapest_starts(num_blocks, num_stages, stage_cost), num_blocks])


def _cheapest_starts(num_blocks: int, num_stages: int, stage_cost: Callable[[int, int, int], float]) -> list[int]:
    """The first block of every stage, by dynamic programming from the last stage to the first."""
    last = num_stages - 1
    bounds = range(num_blocks + 1)
    # dearest[i]: the dearest of the stages from here on, at best, when they have the blocks from i on.
    dearest = [stage_cost(last, start, num_blocks) for start in bounds]
    for stage in reversed(range(last)):
        dearest = [
            min(max(stage_cost(stage, start, stop), dearest[stop]) for stop in bounds[start:]) for start in bounds
        ]
    limit = dearest[0]

    def burden(stage: int, start: int, stop: int) -> tuple[float, int]:
        cost = stage_cost(stage, start, stop)
        return (cost**2 if cost <= limit else inf), (stop - start if stage in (0, last) else 0)

    best = [(*burden(last, start, num_blocks), num_blocks) for start in bounds]
    stops = []
    for stage in reversed(range(last)):
        best = [
            min(
                (squares + best[stop][0], at_ends + best[stop][1], stop)
                for stop in bounds[start:]
                for squares, at_ends in [burden(stage, start, stop)]
            )
            for start in bounds
        ]
        stops.append([stop for _, _, stop in best])
    starts = [0]
    for next_starts in reversed(stops):
        starts.append(next_starts[starts[-1]])
    return starts


def blocks_by_hand(depths: Sequence[int], num_blocks: int, num_stages: int) -> tuple[ModelPart, ...]:
    """Give each stage the number of blocks that the user wants it to have.

    Raises:
        ConfigError: Not one number for each stage, not as many blocks as the model has, or a stage between the first
            and the last without blocks.
    """
    field = "pipeline.blocks_per_stage"
    if len(depths) != num_stages:
        hint = "pipeline.chunks says how many stages each rank holds; leave the numbers out to divide by cost"
        raise ConfigError(field, list(depths), f"{num_stages} numbers, one for each stage", hint)
    if sum(depths) != num_blocks or min(depths) < 0:
        raise ConfigError(field, list(depths), f"numbers that add up to the {num_blocks} blocks of the model")
    if 0 in depths[1:-1]:
        raise ConfigError(field, list(depths), "at least one block for each stage between the first and the last")
    return _parts(list(accumulate(depths, initial=0)))


def _parts(bounds: Sequence[int]) -> tuple[ModelPart, ...]:
    last = len(bounds) - 2
    return tuple(
        ModelPart(range(start, stop), first=stage == 0, last=stage == last)
        for stage, (start, stop) in enumerate(pairwise(bounds))
    )
