"""Schedules by name (torch-free)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType

from lightning_moe.config.typecheck import closest
from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.auto import auto
from lightning_moe.pipeline.costs import Costs
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.schedules.gpipe import gpipe
from lightning_moe.pipeline.schedules.one_f_one_b import interleaved_one_f_one_b, one_f_one_b
from lightning_moe.pipeline.schedules.options import ScheduleFunction, ScheduleOptions
from lightning_moe.pipeline.schedules.v_shaped import v_half, v_min, zb_v
from lightning_moe.pipeline.schedules.zero_bubble import zb_h1, zb_h1_interleaved, zb_h2
from lightning_moe.pipeline.simulate import peak_memory
from lightning_moe.pipeline.validate import check_schedule

ENTRY_POINTS = "lightning_moe.schedules"
"""Group of entry points under which an installed package offers schedules of its own."""

_BUILT_IN: Mapping[str, ScheduleFunction] = MappingProxyType(
    {
        "gpipe": gpipe,
        "1f1b": one_f_one_b,
        "interleaved-1f1b": interleaved_one_f_one_b,
        "zb-h1": zb_h1,
        "zb-h1-interleaved": zb_h1_interleaved,
        "zb-h2": zb_h2,
        "zb-v": zb_v,
        "v-half": v_half,
        "v-min": v_min,
        "auto": auto,
    }
)


def schedule_names() -> tuple[str, ...]:
    """All names that :func:`make_schedule` knows: ours, then those of installed packages."""
    installed = sorted(entry.name for entry in entry_points(group=ENTRY_POINTS))
    return tuple(dict.fromkeys([*_BUILT_IN, *installed]))


def make_schedule(
    name: str,
    ranks: int,
    microbatches: int,
    *,
    chunks: int | None = None,
    max_lag: int | None = None,
    costs: Costs = Costs(),  # noqa: B008 - frozen
    memory_limit: float | None = None,
    max_chunks: int | None = None,
) -> Schedule:
    """Make the schedule of a name.

    Args:
        name: One of :func:`schedule_names`, or ``package.module:function`` for a function of your own, which is given
            ``(ranks, microbatches, options)`` and returns a :class:`Schedule`; what it returns is validated.
        ranks: Number of ranks.
        microbatches: Number of microbatches.
        chunks: Number of stages that each rank holds; None takes the schedule's own.
        max_lag: Most microbatches that weight gradients may lag behind; None is what the schedule gains from.
        costs: What the work costs, for schedules that choose their order by it.
        memory_limit: Most activation memory of a rank, in microbatches of an average rank; None is the schedule's own.
        max_chunks: Most stages that each rank can hold, for ``auto``: the number of blocks by that of ranks.

    Raises:
        ConfigError: There is no such schedule, or it cannot be had with these sizes.
    """
    if ranks < 1:
        raise ConfigError("parallel.pipeline", ranks, "at least 1")
    if microbatches < 1:
        raise ConfigError("pipeline.num_microbatches", microbatches, "at least 1")
    if max_lag is not None and max_lag < 0:
        raise ConfigError("pipeline.max_lag", max_lag, "at least 0")
    if memory_limit is not None and not memory_limit > 0:
        raise ConfigError("pipeline.memory_limit", memory_limit, "greater than 0")
    options = ScheduleOptions(
        chunks=chunks, max_chunks=max_chunks, max_lag=max_lag, costs=costs, memory_limit=memory_limit
    )
    schedule = _function(name)(ranks, microbatches, options)
    _check_size(schedule, name, ranks, microbatches)
    check_schedule(schedule)
    peak = max(peak_memory(schedule, costs)) / costs.activation
    if memory_limit is not None and peak > memory_limit * (1 + 1e-9):
        hint = "auto finds the best schedule within a limit"
        raise ConfigError("pipeline.memory_limit", memory_limit, f"at least the {peak:g} that {name} needs", hint)
    return schedule


def _check_size(schedule: object, name: str, ranks: int, microbatches: int) -> None:
    """Refuse what is not the schedule that was asked for; only functions of others can give that."""
    if not isinstance(schedule, Schedule):
        raise ConfigError(
            "pipeline.schedule", name, f"a function that returns a Schedule, not {type(schedule).__name__}"
        )
    if (schedule.placement.ranks, schedule.microbatches) != (ranks, microbatches):
        returned = f"{schedule.placement.ranks} and {schedule.microbatches}"
        allowed = f"a schedule for {ranks} ranks and {microbatches} microbatches, not {returned}"
        raise ConfigError("pipeline.schedule", name, allowed)


def _function(name: str) -> ScheduleFunction:
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    installed = [entry for entry in entry_points(group=ENTRY_POINTS) if entry.name == name]
    # A path is an entry point that no package has declared.
    if not installed and re.fullmatch(r"[\w.]+:[\w.]+", name):
        installed = [EntryPoint(name, name, ENTRY_POINTS)]
    if not installed:
        known = schedule_names()
        allowed = "one of " + ", ".join(known) + ", or package.module:function"
        raise ConfigError("pipeline.schedule", name, allowed, closest(name, known))
    return _loaded(installed[0])


def _loaded(entry: EntryPoint) -> ScheduleFunction:
    """The function that an entry point names."""
    problem = "it is not callable"
    try:
        function: ScheduleFunction = entry.load()
        if callable(function):
            return function
    except (ImportError, AttributeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise ConfigError(
        "pipeline.schedule", entry.value, "the import path of a function, package.module:function", problem
    )
