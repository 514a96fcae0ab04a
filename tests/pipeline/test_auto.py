"""The choice of a schedule."""

from __future__ import annotations

import pytest

from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.costs import Costs
from lightning_moe.pipeline.registry import make_schedule, schedule_names
from lightning_moe.pipeline.simulate import simulate

MEASURED = Costs(7.8, 9.8, 6.8, weight_activation=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("price", [Costs(), MEASURED, Costs(1, 1, 1, communication=0.2)])
def test_no_schedule_within_the_limit_is_faster(price: Costs) -> None:
    best = simulate(make_schedule("auto", 4, 8, costs=price), price)
    assert max(best.peak) <= 4 + 1e-9
    for name in schedule_names():
        other = simulate(make_schedule(name, 4, 8, costs=price), price)
        assert max(other.peak) > 4 + 1e-9 or best.makespan <= other.makespan + 1e-9


def test_more_memory_is_used_and_less_is_kept_to() -> None:
    makespans = []
    for limit in (1.0, 2.0, 3.0, 4.0, 6.0):
        schedule = make_schedule("auto", 4, 8, costs=MEASURED, memory_limit=limit)
        simulation = simulate(schedule, MEASURED)
        assert max(simulation.peak) <= limit + 1e-9
        makespans.append(simulation.makespan)
    assert makespans == sorted(makespans, reverse=True)
    assert makespans[-1] < makespans[0] / 2


def test_the_simplest_of_equals_is_taken() -> None:
    assert make_schedule("auto", 1, 4).ranks == make_schedule("1f1b", 1, 4).ranks
    assert make_schedule("auto", 4, 8, max_lag=0, chunks=1).name == "1f1b"


def test_with_memory_to_spare_it_runs_further_ahead() -> None:
    """ZB-H2 hides communication, but only with its weight gradients deferred."""
    price = Costs(communication=0.2)
    best = make_schedule("auto", 4, 8, costs=price, memory_limit=8.0, max_chunks=1)
    makespans = [simulate(make_schedule("zb-h2", 4, 8, max_lag=lag), price).makespan for lag in (0, None)]
    assert best.name == "zb-h2"
    assert simulate(best, price).makespan <= makespans[1] < makespans[0]


def test_chunks_are_as_asked_for() -> None:
    assert make_schedule("auto", 4, 8, costs=MEASURED).placement.chunks == 4
    assert make_schedule("auto", 4, 8, costs=MEASURED, max_chunks=3).placement.chunks == 2
    assert make_schedule("auto", 4, 8, costs=MEASURED, max_chunks=1).name == "zb-h1"
    assert make_schedule("auto", 4, 8, costs=MEASURED, chunks=3).name == "zb-h1-interleaved"


def test_factors_are_for_one_number_of_chunks() -> None:
    price = Costs(stage_factors=(0.5, 1.0, 1.0, 1.5, 0.5, 1.0, 1.0, 1.5))
    assert make_schedule("auto", 4, 8, costs=price).placement.chunks == 2


def test_a_limit_that_nothing_keeps_to() -> None:
    with pytest.raises(
        ConfigError, match=r"pipeline.memory_limit: 0.5 is not allowed; allowed: at least 1, for 4 ranks"
    ):
        make_schedule("auto", 4, 8, memory_limit=0.5)
