"""The schedules on a V: zb-v, v-half and v-min differ in how much memory they may use (torch-free)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product

from lightning_moe.pipeline.actions import Kind
from lightning_moe.pipeline.placement import Placement
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.schedules.building_blocks import building_blocks
from lightning_moe.pipeline.schedules.list_scheduling import Listed, Policy, list_schedule
from lightning_moe.pipeline.schedules.options import ScheduleOptions
from lightning_moe.pipeline.validate import runs

_EVEN_CHUNKS = range(2, 1025, 2)
_PATIENCE = 0.5
"""Of all policies at first, as a share of the time of a W."""
_REFINED = 6
"""Number of policies that are also tried with other patience."""


def zb_v(ranks: int, microbatches: int, options: ScheduleOptions) -> Schedule:
    """ZB-V (Qi et al. 2023, arXiv:2401.10241, section 6): no more memory than 1F1B, ``ranks`` microbatches.

    At equal times the bubble is the last rank's wait for its first microbatch, ``(ranks - 1) TF / 2``; with 4 chunks a
    rank it is half of that on up to 6 ranks, and somewhat more on more of them. A ``memory_limit`` replaces the usual
    one.
    """
    return _best_on_a_v("zb-v", ranks, microbatches, options, float(ranks))


def v_half(ranks: int, microbatches: int, options: ScheduleOptions) -> Schedule:
    """V-Half (Qi et al. 2024, arXiv:2405.15362): half the memory of 1F1B, ``ranks / 2 + 1`` microbatches.

    At equal times the bubble is about half of that of 1F1B.
    """
    return _best_on_a_v("v-half", ranks, microbatches, options, ranks / 2 + 1)


def v_min(ranks: int, microbatches: int, options: ScheduleOptions) -> Schedule:
    """V-Min (Qi et al. 2024, arXiv:2405.15362): a third of the memory of 1F1B, ``(ranks + 4) / 3`` microbatches.

    At equal times the bubble is about two thirds of that of 1F1B.
    """
    return _best_on_a_v("v-min", ranks, microbatches, options, (ranks + 4) / 3)


def _best_on_a_v(name: str, ranks: int, microbatches: int, options: ScheduleOptions, usual_memory: float) -> Schedule:
    """The fastest of many schedules within the memory, or the one that goes least beyond it."""
    placement = Placement(ranks, options.chunks_of(name, _EVEN_CHUNKS, 2), "v")
    memory = options.most_memory(usual_memory)

    def merit(found: tuple[Listed, Policy]) -> tuple[float, float, float]:
        """Less is better: memory beyond the limit, then time."""
        listed, _ = found
        return max(listed.peak, memory * (1 + 1e-9)), listed.makespan, listed.peak

    def attempt(policies: Iterable[Policy]) -> list[tuple[Listed, Policy]]:
        return [(list_schedule(placement, microbatches, options.costs, policy), policy) for policy in policies]

    found = attempt([*_greedy(options, memory), *_repeating(placement, microbatches, options, memory)])
    # How long to wait rather than begin a W depends on the costs; trying it with all policies would take too long.
    best = [policy for _, policy in sorted(found, key=merit)[:_REFINED]]
    found += attempt(replace(policy, patience=patience) for policy in best for patience in (0.0, 0.9))
    schedules = (Schedule(name, placement, microbatches, listed.ranks) for listed, _ in sorted(found, key=merit))
    # What was found with unbounded sends may need more tensors on the way than the validator allows.
    return next(schedule for schedule in schedules if runs(schedule))


def _greedy(options: ScheduleOptions, memory: float) -> Iterator[Policy]:
    """Policies that take what is ready: best with much memory, and with more than two chunks a rank."""
    for forward_first, oldest_first in product((True, False), repeat=2):
        yield Policy(
            forward_first=forward_first,
            oldest_first=oldest_first,
            patience=_PATIENCE,
            memory=memory,
            max_lag=options.max_lag,
        )
    # One microbatch at a time: slow, but it needs the least memory and has no more than one tensor on the way.
    yield Policy(memory=0.0, max_lag=options.max_lag)


def _repeating(placement: Placement, microbatches: int, options: ScheduleOptions, memory: float) -> Iterator[Policy]:
    """Policies that follow a building block: best with little memory, where taking what is ready fills it too early."""
    blocks = [(block.lifespan * options.costs.activation, block) for block in building_blocks(placement)]
    # Blocks that live longer are cut short by the memory; much longer or shorter ones are never the best.
    near = [block for lifespan, block in blocks if 0.6 * memory <= lifespan <= memory + options.costs.activation]
    near = near or [block for _, block in sorted(blocks, key=lambda entry: entry[0])[:1]]
    backward = Kind.BW if options.max_lag == 0 else Kind.B
    # On few ranks, and for few microbatches, many blocks give the same order.
    orders = dict.fromkeys(block.orders(microbatches, backward) for block in near)
    for order in orders:
        yield Policy(order=order, patience=_PATIENCE, memory=memory, max_lag=options.max_lag)
