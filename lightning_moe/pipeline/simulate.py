"""How long a schedule takes, and how much memory, for given costs (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.actions import Action, Kind
from lightning_moe.pipeline.costs import Costs
from lightning_moe.pipeline.placement import Placement
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.waits import Message, received, sent


class TimedAction(NamedTuple):
    """An action with the times at which it begins and ends."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a schedule costs, in the units of its :class:`Costs`.

    Attributes:
        makespan: Time from the first start to the last end.
        work: Time that the busiest rank computes.
        bubble: Share of the makespan in which the busiest rank does not compute, ``1 - work / makespan``.
        span_bubble: The same over the longest time from a rank's own first start to its own last end: what is left of
            the bubble in a run of steps if each rank may begin the next step on its own.
        peak: Most activation memory of each rank.
        timeline: The actions of each rank with their times.
    """

    makespan: float
    work: float
    bubble: float
    span_bubble: float
    peak: tuple[float, ...]
    timeline: tuple[tuple[TimedAction, ...], ...]


def durations(costs: Costs, placement: Placement) -> list[dict[Kind, float]]:
    """Time of each kind of action at each stage.

    Raises:
        ConfigError: ``costs.stage_factors`` has not one entry for each stage.
    """
    return [
        {
            Kind.F: share * costs.forward,
            Kind.B: share * costs.backward,
            Kind.W: share * costs.weight,
            Kind.BW: share * (costs.backward + costs.weight),
        }
        for share in stage_shares(costs, placement)
    ]


def stage_shares(costs: Costs, placement: Placement) -> list[float]:
    """What each stage costs, as a share of the costs of an average rank.

    Raises:
        ConfigError: ``costs.stage_factors`` has not one entry for each stage.
    """
    factors = costs.stage_factors
    if factors is None:
        return [1 / placement.chunks] * placement.num_stages
    if len(factors) != placement.num_stages:
        allowed = f"{placement.num_stages} numbers, one for each stage"
        raise ConfigError("costs.stage_factors", factors, allowed)
    return [factor / placement.chunks for factor in factors]


def simulate(schedule: Schedule, costs: Costs) -> Simulation:
    """Run a schedule on paper.

    Each rank takes its actions in order, each as soon as its rank is free and its input has arrived. Tensors travel
    beside the computation, and take ``costs.communication`` from rank to rank and no time within a rank.

    Args:
        schedule: A valid schedule (see :func:`lightning_moe.pipeline.validate.check_schedule`).
        costs: Times and sizes.

    Raises:
        ConfigError: ``costs.stage_factors`` has not one entry for each stage.
    """
    timeline = _timeline(schedule, costs)
    spans = [actions[-1].end - actions[0].start for actions in timeline]
    work = max(sum(timed.end - timed.start for timed in actions) for actions in timeline)
    makespan = max(actions[-1].end for actions in timeline)
    return Simulation(
        makespan=makespan,
        work=work,
        bubble=1 - work / makespan,
        span_bubble=1 - work / max(spans),
        peak=peak_memory(schedule, costs),
        timeline=timeline,
    )


def _timeline(schedule: Schedule, costs: Costs) -> tuple[tuple[TimedAction, ...], ...]:
    placement = schedule.placement
    times = durations(costs, placement)
    arrivals: dict[Message, float] = {}
    waiting: dict[Message, int] = {}
    timeline: list[list[TimedAction]] = [[] for _ in schedule.ranks]
    runnable = list(range(placement.ranks))
    while runnable:
        rank = runnable.pop()
        done = timeline[rank]
        clock = done[-1].end if done else 0.0
        for action in schedule.ranks[rank][len(done) :]:
            awaited = received(placement, rank, action)
            if awaited is not None and awaited not in arrivals:
                waiting[awaited] = rank
                break
            start = clock if awaited is None else max(clock, arrivals.pop(awaited))
            clock = start + times[placement.stage(rank, action.chunk)][action.kind]
            done.append(TimedAction(action, start, clock))
            message = sent(placement, rank, action)
            if message is not None:
                target, _ = placement.location(message.target)
                arrivals[message] = clock + (costs.communication if target != rank else 0.0)
                if message in waiting:
                    runnable.append(waiting.pop(message))
    assert not waiting, "check_schedule refuses what cannot run to its end"
    return tuple(map(tuple, timeline))


def memory_growth(costs: Costs, placement: Placement) -> list[dict[Kind, float]]:
    """Memory that each kind of action adds at each stage; negative for what it frees.

    Raises:
        ConfigError: ``costs.stage_factors`` has not one entry for each stage.
    """
    return [
        {
            Kind.F: share * costs.activation,
            Kind.B: share * (costs.weight_activation - costs.activation),
            Kind.W: -share * costs.weight_activation,
            Kind.BW: -share * costs.activation,
        }
        for share in stage_shares(costs, placement)
    ]


def peak_memory(schedule: Schedule, costs: Costs) -> tuple[float, ...]:
    """Most activation memory of each rank.

    A microbatch holds ``costs.activation`` from F to B or BW, and ``costs.weight_activation`` from B to W.

    Raises:
        ConfigError: ``costs.stage_factors`` has not one entry for each stage.
    """
    placement = schedule.placement
    growth = memory_growth(costs, placement)
    peaks = []
    for rank, actions in enumerate(schedule.ranks):
        held = accumulate((growth[placement.stage(rank, action.chunk)][action.kind] for action in actions), initial=0.0)
        peaks.append(max(held))
    return tuple(peaks)
