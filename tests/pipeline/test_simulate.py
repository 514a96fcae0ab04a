"""The simulator, against one that watches a clock tick."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.actions import Action, Kind
from lightning_moe.pipeline.costs import Costs
from lightning_moe.pipeline.placement import Placement
from lightning_moe.pipeline.registry import make_schedule
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.simulate import simulate


def watch_the_clock(schedule: Schedule, price: Costs) -> tuple[list[list[tuple[int, int]]], list[float]]:
    """When the actions of each rank begin and end, and each rank's peak memory, for times that are whole ticks.

    At every tick each idle rank looks whether what its next action needs has arrived.
    """
    placement, chunks, count = schedule.placement, schedule.placement.chunks, len(schedule.ranks)
    factors = price.stage_factors or (1.0,) * placement.num_stages
    finished: dict[tuple[str, int, int], tuple[int, int]] = {}  # (letter, microbatch, stage): (tick, rank)
    spans: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    held, peaks = [0.0] * count, [0.0] * count
    tick = 0
    while any(len(span) < len(actions) for span, actions in zip(spans, schedule.ranks, strict=True)):
        for rank, actions in enumerate(schedule.ranks):
            if len(spans[rank]) == len(actions) or (spans[rank] and spans[rank][-1][1] > tick):
                continue
            action = actions[len(spans[rank])]
            stage = placement.stage(rank, action.chunk)
            key: tuple[str, int, int] | None = None
            if action.kind is Kind.F and stage > 0:
                key = ("F", action.microbatch, stage - 1)
            if action.kind in (Kind.B, Kind.BW) and stage < placement.num_stages - 1:
                key = ("B", action.microbatch, stage + 1)
            if key is not None:
                ready, sender = finished.get(key, (10**9, rank))
                if ready + (price.communication if sender != rank else 0) > tick:
                    continue
            time = {"F": price.forward, "B": price.backward, "W": price.weight, "BW": price.backward + price.weight}
            end = tick + round(time[action.kind] / chunks * factors[stage])
            spans[rank].append((tick, end))
            finished[action.kind[0], action.microbatch, stage] = (end, rank)
            memory = {"F": price.activation, "BW": -price.activation, "W": -price.weight_activation}
            memory["B"] = -memory["W"] - memory["F"]
            held[rank] += memory[action.kind] / chunks * factors[stage]
            peaks[rank] = max(peaks[rank], held[rank])
        tick += 1
    return spans, peaks


NAMES = [("1f1b", 1), ("gpipe", 1), ("zb-h1", 1), ("zb-h2", 1), ("interleaved-1f1b", 2), ("zb-v", 2)]
TICKS = st.integers(1, 4).map(lambda ticks: 2.0 * ticks)


@pytest.mark.slow
@settings(max_examples=150)
@given(st.data(), st.sampled_from(NAMES), st.integers(1, 4), st.integers(1, 6), TICKS, TICKS, TICKS, st.integers(0, 3))
def test_a_clock_says_the_same(
    data: st.DataObject,
    named: tuple[str, int],
    ranks: int,
    microbatches: int,
    forward: float,
    backward: float,
    weight: float,
    communication: int,
) -> None:
    name, chunks = named
    stages = ranks * chunks
    factors = data.draw(st.none() | st.tuples(*[st.sampled_from([1.0, 2.0, 3.0])] * stages))
    price = Costs(forward, backward, weight, communication, 1.0, 0.5, factors)
    schedule = make_schedule(name, ranks, microbatches)
    spans, peaks = watch_the_clock(schedule, price)
    simulation = simulate(schedule, price)
    assert [[(timed.start, timed.end) for timed in timeline] for timeline in simulation.timeline] == spans
    assert [tuple(timed.action for timed in timeline) for timeline in simulation.timeline] == list(schedule.ranks)
    assert list(simulation.peak) == peaks
    assert simulation.makespan == max(span[-1][1] for span in spans)
    busy = [sum(end - start for start, end in span) for span in spans]
    assert simulation.work == max(busy)
    assert simulation.bubble == pytest.approx(1 - max(busy) / simulation.makespan, abs=1e-12)
    longest = max(span[-1][1] - span[0][0] for span in spans)
    assert simulation.span_bubble == pytest.approx(1 - max(busy) / longest, abs=1e-12)


def test_times_by_hand() -> None:
    """Two ranks, one microbatch, TF 2, TB 3, TW 1, communication 0.5."""
    split = (Action(Kind.F, 0), Action(Kind.B, 0), Action(Kind.W, 0))
    schedule = Schedule("by hand", Placement(2), 1, ((Action(Kind.F, 0), Action(Kind.BW, 0)), split))
    simulation = simulate(schedule, Costs(2, 3, 1, 0.5))
    assert [timed[1:] for timed in simulation.timeline[0]] == [(0.0, 2.0), (8.0, 12.0)]
    assert [timed[1:] for timed in simulation.timeline[1]] == [(2.5, 4.5), (4.5, 7.5), (7.5, 8.5)]
    assert (simulation.makespan, simulation.work, simulation.bubble) == (12.0, 6.0, 0.5)


def test_chunks_of_one_rank_hand_on_without_delay() -> None:
    schedule = make_schedule("zb-v", 1, 3)
    assert simulate(schedule, Costs(communication=5.0)).bubble == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"forward": 0.0}, "forward"),
        ({"weight": float("nan")}, "weight"),
        ({"communication": float("inf")}, "communication"),
        ({"activation": -1.0}, "activation"),
        ({"stage_factors": (0.0, 0.0)}, "stage_factors"),
        ({"stage_factors": (1.0, -1.0)}, "stage_factors"),
    ],
)
def test_costs_that_there_are_not(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"costs\.{field}: "):
        Costs(**wrong)


def test_factors_of_other_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"costs.stage_factors: .* 4 numbers, one for each stage"):
        simulate(make_schedule("1f1b", 4, 4), Costs(stage_factors=(1.0, 1.0)))
