"""List scheduling foresees what the simulator then says of the schedules that it finds."""

from __future__ import annotations

import pytest

from lightning_moe.pipeline.costs import Costs
from lightning_moe.pipeline.placement import Placement
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.schedules.list_scheduling import Policy, list_schedule
from lightning_moe.pipeline.simulate import simulate

FACTORS = (0.5, 1.0, 1.25, 1.0, 1.25, 0.75, 1.25, 1.0)


@pytest.mark.parametrize("factors", [None, FACTORS])
@pytest.mark.parametrize("communication", [0.0, 0.4])
@pytest.mark.parametrize("patience", [0.0, 0.9])
@pytest.mark.parametrize("memory", [2.5, 4.0])
def test_time_and_memory_are_the_simulators(
    factors: tuple[float, ...] | None, communication: float, patience: float, memory: float
) -> None:
    costs = Costs(1.0, 1.3, 0.8, communication, 1.0, 0.6, factors)
    placement = Placement(4, 2, "v")
    found = list_schedule(placement, 9, costs, Policy(memory=memory, patience=patience))
    simulation = simulate(Schedule("found", placement, 9, found.ranks), costs)
    assert found.makespan == pytest.approx(simulation.makespan, rel=1e-12)
    assert found.peak == pytest.approx(max(simulation.peak), rel=1e-12)
    assert found.peak <= memory * (1 + 1e-9)
