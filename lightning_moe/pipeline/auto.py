"""The best schedule for given costs and memory, by simulation (torch-free)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.schedules.gpipe import gpipe
from lightning_moe.pipeline.schedules.one_f_one_b import interleaved_one_f_one_b, one_f_one_b
from lightning_moe.pipeline.schedules.options import ScheduleFunction, ScheduleOptions
from lightning_moe.pipeline.schedules.v_shaped import zb_v
from lightning_moe.pipeline.schedules.zero_bubble import zb_h1, zb_h1_interleaved, zb_h2
from lightning_moe.pipeline.simulate import peak_memory, simulate

_CHUNK_COUNTS = (1, 2, 4)


def auto(ranks: int, microbatches: int, options: ScheduleOptions) -> Schedule:
    """The schedule with the least makespan among those within the memory limit.

    All schedules are simulated, with 1, 2 and 4 chunks a rank where they can (or ``options.chunks``, or up to
    ``options.max_chunks``) and every lag up to ``options.max_lag``; V-Half and V-Min are ZB-V with less memory. Without
    a memory limit it is what 1F1B needs, ``ranks`` microbatches. Of equally fast ones the one with the least memory is
    taken, then the simplest.

    Raises:
        ConfigError: No schedule keeps to the limit.
    """
    memory = options.most_memory(float(ranks))
    limited = replace(options, memory_limit=float(ranks) if options.memory_limit is None else options.memory_limit)
    best: tuple[tuple[float, float], Schedule] | None = None
    least_memory = float("inf")
    for function, choice in _candidates(ranks, limited):
        schedule = function(ranks, microbatches, choice)
        peak = max(peak_memory(schedule, options.costs))
        least_memory = min(least_memory, peak)
        if peak > memory * (1 + 1e-9):
            continue
        makespan = simulate(schedule, options.costs).makespan
        # Rounded, so that sums in another order do not hide that two are equally fast.
        cost = (float(f"{makespan:.9g}"), float(f"{peak:.9g}"))
        if best is None or cost < best[0]:
            best = cost, schedule
    if best is None:
        needed = f"at least {least_memory / options.costs.activation:g}, for {ranks} ranks and these costs"
        raise ConfigError("pipeline.memory_limit", options.memory_limit, needed)
    return best[1]


def _candidates(ranks: int, options: ScheduleOptions) -> Iterator[tuple[ScheduleFunction, ScheduleOptions]]:
    """Schedules and their options, the simplest first."""
    counts = [count for count in _CHUNK_COUNTS if count <= (options.max_chunks or count)]
    for chunks in counts if options.chunks is None else [options.chunks]:
        # Factors are for the stages of one chunk count; there is no telling them for another.
        factors = options.costs.stage_factors
        if factors is not None and len(factors) != ranks * chunks:
            continue
        choice = replace(options, chunks=chunks)
        if chunks == 1:
            yield gpipe, choice
            yield one_f_one_b, choice
            yield from _by_lag(zb_h1, choice, ranks - 1)
            yield from _by_lag(zb_h2, choice, 2 * (ranks - 1))
        else:
            yield interleaved_one_f_one_b, choice
            yield from _by_lag(zb_h1_interleaved, choice, -(-(ranks - 1) // chunks))
            if chunks % 2 == 0:
                yield zb_v, choice


def _by_lag(
    function: ScheduleFunction, options: ScheduleOptions, longest: int
) -> Iterator[tuple[ScheduleFunction, ScheduleOptions]]:
    most = longest if options.max_lag is None else min(longest, options.max_lag)
    for lag in range(most + 1):
        yield function, replace(options, max_lag=lag)
