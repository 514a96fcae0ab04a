"""Schedules by name: ours, and those that users bring."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from lightning_moe.errors import ConfigError
from lightning_moe.pipeline import registry
from lightning_moe.pipeline.costs import Costs
from lightning_moe.pipeline.registry import make_schedule, schedule_names
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.schedules.gpipe import gpipe
from lightning_moe.pipeline.schedules.options import ScheduleOptions
from lightning_moe.pipeline.schedules.zero_bubble import zb_h1
from lightning_moe.pipeline.validate import ScheduleError


def lag_of_one(ranks: int, microbatches: int, options: ScheduleOptions) -> Schedule:
    assert options.costs.forward == 3.0
    return zb_h1(ranks, microbatches, ScheduleOptions(max_lag=1))


def without_weight_gradients(ranks: int, microbatches: int, options: ScheduleOptions) -> Schedule:
    schedule = zb_h1(ranks, microbatches, options)
    return Schedule("mine", schedule.placement, microbatches, tuple(actions[:-1] for actions in schedule.ranks))


def too_small(ranks: int, microbatches: int, options: ScheduleOptions) -> Schedule:
    return gpipe(ranks, microbatches - 1, options)


def no_schedule(ranks: int, microbatches: int, options: ScheduleOptions) -> list[int]:
    return [ranks]


def test_names() -> None:
    ours = "gpipe 1f1b interleaved-1f1b zb-h1 zb-h1-interleaved zb-h2 zb-v v-half v-min auto"
    assert schedule_names() == tuple(ours.split())


def test_a_function_of_ones_own() -> None:
    schedule = make_schedule(f"{__name__}:lag_of_one", 4, 8, costs=Costs(forward=3.0))
    assert schedule == make_schedule("zb-h1", 4, 8, max_lag=1)


def test_what_it_returns_is_validated() -> None:
    with pytest.raises(ScheduleError, match="rank 0: F3 has no backward"):
        make_schedule(f"{__name__}:without_weight_gradients", 2, 4)
    with pytest.raises(ConfigError, match="a schedule for 2 ranks and 4 microbatches, not 2 and 3"):
        make_schedule(f"{__name__}:too_small", 2, 4)
    with pytest.raises(ConfigError, match="a function that returns a Schedule, not list"):
        make_schedule(f"{__name__}:no_schedule", 2, 4)


def test_an_installed_package_offers_a_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("one-lag", f"{__name__}:lag_of_one", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda *, group: [entry] if group == registry.ENTRY_POINTS else [])
    assert schedule_names()[-1] == "one-lag"
    assert make_schedule("one-lag", 4, 8, costs=Costs(forward=3.0)) == make_schedule("zb-h1", 4, 8, max_lag=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zbh1", "did you mean 'zb-h1'"),
        ("1F1B", "did you mean '1f1b'"),
        (":x", "one of gpipe, 1f1b, .*, or package.module:function"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("os.path:no_such_function", "no attribute 'no_such_function'"),
        ("os:sep", "it is not callable"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_schedule(name, 2, 2)
    assert caught.value.field == "pipeline.schedule"


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"parallel.pipeline: 0"):
        make_schedule("1f1b", 0, 4)
    with pytest.raises(ConfigError, match=r"pipeline.num_microbatches: 0"):
        make_schedule("1f1b", 4, 0)
    with pytest.raises(ConfigError, match=r"pipeline.max_lag: -1"):
        make_schedule("zb-h1", 4, 8, max_lag=-1)
    with pytest.raises(ConfigError, match=r"pipeline.memory_limit: nan"):
        make_schedule("zb-h1", 4, 8, memory_limit=float("nan"))


def test_a_memory_limit_holds_for_all() -> None:
    make_schedule("1f1b", 4, 8, memory_limit=4.0)
    make_schedule("1f1b", 4, 8, memory_limit=4.0, costs=Costs(activation=300.0))
    with pytest.raises(ConfigError, match=r"pipeline.memory_limit: 4.0 .* at least the 7 that zb-h2 needs"):
        make_schedule("zb-h2", 4, 8, memory_limit=4.0)
