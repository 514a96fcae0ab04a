"""The schedules themselves: their orders, and what the papers say of their bubbles and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed.pipelining.schedules as torch_schedules
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.actions import Action, Kind, format_actions
from lightning_moe.pipeline.costs import Costs
from lightning_moe.pipeline.registry import make_schedule
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.simulate import peak_memory, simulate
from lightning_moe.pipeline.validate import check_schedule
from tests.pipeline.random_schedules import costs

RANKS = st.integers(1, 8)
MICROBATCHES = st.integers(1, 24)
BY_SEARCH = ("zb-v", "v-half", "v-min", "auto")
BY_RULE = ("gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-h1-interleaved", "zb-h2")


def makespan(name: str, ranks: int, microbatches: int, price: Costs, **options: Any) -> float:
    return simulate(make_schedule(name, ranks, microbatches, **options), price).makespan


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("gpipe", {}, ["F0 F1 F2 F3 BW0 BW1 BW2 BW3"] * 3),
        (
            "1f1b",
            {},
            ["F0 F1 F2 BW0 F3 BW1 BW2 BW3", "F0 F1 BW0 F2 BW1 F3 BW2 BW3", "F0 BW0 F1 BW1 F2 BW2 F3 BW3"],
        ),
        (
            "zb-h1",
            {},
            [
                "F0 F1 F2 BW0 F3 BW1 BW2 BW3",
                "F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3",
                "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3",
            ],
        ),
        (
            "zb-h1",
            {"max_lag": 1},
            [
                "F0 F1 F2 BW0 F3 BW1 BW2 BW3",
                "F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3",
                "F0 B0 F1 B1 W0 F2 B2 W1 F3 B3 W2 W3",
            ],
        ),
        (
            "zb-h2",
            {},
            [
                "F0 F1 F2 F3 BW0 BW1 BW2 BW3",
                "F0 F1 F2 B0 F3 B1 B2 W0 B3 W1 W2 W3",
                "F0 B0 F1 B1 F2 B2 F3 B3 W0 W1 W2 W3",
            ],
        ),
        (
            "interleaved-1f1b",
            {"ranks": 2},
            [
                "F0 F1 F0.1 F1.1 F2 BW0.1 F3 BW1.1 F2.1 BW0 F3.1 BW1 BW2.1 BW3.1 BW2 BW3",
                "F0 F1 F0.1 BW0.1 F1.1 BW1.1 F2 BW0 F3 BW1 F2.1 BW2.1 F3.1 BW3.1 BW2 BW3",
            ],
        ),
        (
            "zb-h1-interleaved",
            {"ranks": 2},
            [
                "F0 F1 F0.1 F1.1 BW0.1 F2 BW1.1 F3 BW0 F2.1 BW1 F3.1 BW2.1 BW3.1 BW2 BW3",
                "F0 F1 F0.1 B0.1 F1.1 B1.1 W0.1 F2 B0 W1.1 F3 B1 W0 F2.1 B2.1 W1 F3.1 B3.1 W2.1 B2 W3.1 B3 W2 W3",
            ],
        ),
    ],
)
def test_orders(name: str, options: dict[str, int], expected: list[str]) -> None:
    schedule = make_schedule(name, options.get("ranks", 3), 4, max_lag=options.get("max_lag"))
    assert format_actions(schedule.ranks).splitlines() == expected
    assert schedule.name == name


def computed(schedule: Schedule, rank: int) -> list[tuple[str, int, int]]:
    """The actions of a rank as (letter, microbatch, stage), BW as a B and a W."""
    return [
        (letter, action.microbatch, schedule.placement.stage(rank, action.chunk))
        for action in schedule.ranks[rank]
        for letter in action.kind
    ]


@pytest.mark.parametrize("microbatches", [4, 8, 16])
@pytest.mark.parametrize(
    ("ours", "chunks", "theirs"),
    [
        ("interleaved-1f1b", 2, "ScheduleInterleaved1F1B"),
        ("interleaved-1f1b", 3, "ScheduleInterleaved1F1B"),
        ("zb-h1", 1, "ScheduleInterleavedZeroBubble"),
        ("zb-h1-interleaved", 2, "ScheduleInterleavedZeroBubble"),
        ("zb-h1-interleaved", 3, "ScheduleInterleavedZeroBubble"),
    ],
)
def test_orders_are_those_of_torch(ours: str, chunks: int, theirs: str, microbatches: int) -> None:
    """Where microbatches are a multiple of ranks, the only case that torch has."""
    ranks = 4
    peer_class = getattr(torch_schedules, theirs)
    peer = peer_class.__new__(peer_class)
    peer.pp_group_size, peer.n_local_stages, peer._n_microbatches = ranks, chunks, microbatches
    peer.number_of_rounds = microbatches // ranks
    peer.microbatches_per_round = ranks
    letters = {"FORWARD": "F", "FULL_BACKWARD": "BW", "BACKWARD_INPUT": "B", "BACKWARD_WEIGHT": "W"}
    schedule = make_schedule(ours, ranks, microbatches, chunks=chunks)
    for rank in range(ranks):
        expected = [
            (letter, action.microbatch_index, action.stage_index)
            for action in peer._calculate_single_rank_operations(rank)
            if action is not None
            for letter in letters[action.computation_type.name]
        ]
        assert computed(schedule, rank) == expected


def check(schedule: Schedule, max_lag: int | None, in_flight: int | None = None) -> None:
    """The schedule passes the validator, computes everything once, and keeps W within the lag."""
    check_schedule(schedule, in_flight=in_flight)
    chunks = schedule.placement.chunks
    for actions in schedule.ranks:
        visits = {(microbatch, chunk) for microbatch in range(schedule.microbatches) for chunk in range(chunks)}
        for letter in "FBW":
            done = [(action.microbatch, action.chunk) for action in actions if letter in action.kind]
            assert len(done) == len(visits)
            assert set(done) == visits
        if max_lag is not None:
            assert longest_lag(actions) <= max_lag * chunks


def longest_lag(actions: tuple[Action, ...]) -> int:
    """Most input gradients that are computed between one and its weight gradients."""
    inputs = [(action.microbatch, action.chunk) for action in actions if action.kind is Kind.B]
    lags, count = [0], 0
    for action in actions:
        count += action.kind is Kind.B
        if action.kind is Kind.W:
            lags.append(count - 1 - inputs.index((action.microbatch, action.chunk)))
    return max(lags)


def test_no_schedule_on_a_v_needs_more_tensors_on_the_way_than_there_are_ranks() -> None:
    """With cheap forwards and much memory, the fastest policies would send 13 of them before one is taken."""
    check_schedule(make_schedule("zb-v", 2, 13, costs=Costs(0.1, 1, 3, 5, 1, 0.1), memory_limit=50.0))


def test_the_longest_lag_is_in_microbatches_of_a_whole_rank() -> None:
    """With two chunks a rank, one microbatch is two visits."""
    schedule = make_schedule("zb-h1-interleaved", 4, 8, max_lag=1)
    assert [longest_lag(actions) for actions in schedule.ranks] == [0, 1, 2, 2]


@pytest.mark.slow
@settings(max_examples=1300)
@given(st.sampled_from(BY_RULE), RANKS, MICROBATCHES, st.integers(2, 5), st.none() | st.integers(0, 4))
def test_schedules_by_rule_are_valid(
    name: str, ranks: int, microbatches: int, chunks: int, max_lag: int | None
) -> None:
    interleaved = "interleaved" in name
    schedule = make_schedule(name, ranks, microbatches, chunks=chunks if interleaved else None, max_lag=max_lag)
    check(schedule, max_lag, in_flight=None if interleaved else 1)


@pytest.mark.slow
@settings(max_examples=60)
@given(st.sampled_from(BY_SEARCH), RANKS, st.integers(1, 12), costs(), st.none() | st.integers(0, 4), st.booleans())
def test_schedules_by_search_are_valid(
    name: str, ranks: int, microbatches: int, price: Costs, max_lag: int | None, four_chunks: bool
) -> None:
    chunks = None if name == "auto" else 4 if four_chunks else 2
    check(make_schedule(name, ranks, microbatches, chunks=chunks, max_lag=max_lag, costs=price), max_lag)


@pytest.mark.slow
@settings(max_examples=300)
@given(RANKS, MICROBATCHES, costs(), st.none() | st.integers(0, 8))
def test_zb_h1_is_never_slower_than_1f1b(ranks: int, microbatches: int, price: Costs, max_lag: int | None) -> None:
    zb_h1 = makespan("zb-h1", ranks, microbatches, price, max_lag=max_lag)
    assert zb_h1 <= makespan("1f1b", ranks, microbatches, price) + 1e-9


@pytest.mark.slow
@settings(max_examples=200)
@given(RANKS, st.integers(0, 16), costs(communication=False))
def test_zb_h1_bubble(ranks: int, more: int, price: Costs) -> None:
    """(p-1)(TF+TB-TW) with twice as many microbatches as ranks, or more."""
    assume(price.weight <= min(price.forward, price.backward))
    microbatches = 2 * ranks + more
    work = microbatches * (price.forward + price.backward + price.weight)
    bubble = (ranks - 1) * (price.forward + price.backward - price.weight)
    assert makespan("zb-h1", ranks, microbatches, price) == pytest.approx(work + bubble, rel=1e-12)


@pytest.mark.slow
@settings(max_examples=100)
@given(RANKS, MICROBATCHES, costs(communication=False))
def test_1f1b_bubble(ranks: int, microbatches: int, price: Costs) -> None:
    """(p-1)(TF+TB+TW), with any number of microbatches."""
    passes = price.forward + price.backward + price.weight
    expected = (microbatches + ranks - 1) * passes
    assert makespan("1f1b", ranks, microbatches, price) == pytest.approx(expected, rel=1e-12)
    assert makespan("gpipe", ranks, microbatches, price) == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
@settings(max_examples=100)
@given(RANKS, st.integers(0, 16), costs())
def test_peak_memory(ranks: int, more: int, price: Costs) -> None:
    """Of 1F1B and ZB-H1 from as many microbatches as ranks, of ZB-H2 from twice as many less one."""
    held, deferred = price.activation, price.weight_activation
    few, many = ranks + more, 2 * ranks - 1 + more
    in_1f1b = [(ranks - rank) * held for rank in range(ranks)]
    in_zb_h1 = [(ranks - rank) * held + rank * deferred for rank in range(ranks)]
    in_zb_h2 = [(2 * ranks - 2 * rank - 1) * held + 2 * rank * deferred for rank in range(ranks)]
    assert list(peak_memory(make_schedule("1f1b", ranks, few), price)) == in_1f1b
    assert list(peak_memory(make_schedule("zb-h1", ranks, few), price)) == in_zb_h1
    assert list(peak_memory(make_schedule("zb-h2", ranks, many), price)) == in_zb_h2


@settings(max_examples=25)
@given(RANKS, MICROBATCHES)
def test_without_lag_zb_h1_is_1f1b(ranks: int, microbatches: int) -> None:
    assert (
        make_schedule("zb-h1", ranks, microbatches, max_lag=0).ranks == make_schedule("1f1b", ranks, microbatches).ranks
    )


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 8), (4, 8), (4, 16), (6, 12)])
def test_interleaving_divides_the_bubble(ranks: int, microbatches: int) -> None:
    price = Costs(weight=0.75)
    for chunks in (2, 4):
        work = 2.75 * microbatches
        interleaved = makespan("interleaved-1f1b", ranks, microbatches, price, chunks=chunks)
        assert interleaved == pytest.approx(work + (ranks - 1) * 2.75 / chunks, rel=1e-12)
        zb_h1 = makespan("zb-h1-interleaved", ranks, microbatches, price, chunks=chunks)
        assert zb_h1 == pytest.approx(work + (ranks - 1) * 1.25 / chunks, rel=1e-12)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (6, 12)])
def test_schedules_on_a_v_keep_what_their_papers_promise(ranks: int, microbatches: int) -> None:
    """Memory always; the bubble, at equal times, but for one pass, which must give way where two would meet."""
    bubble_of_1f1b = 3 * (ranks - 1)
    promises = {"zb-v": (ranks, 1 / 6), "v-half": (ranks / 2 + 1, 1 / 2), "v-min": ((ranks + 4) / 3, 2 / 3)}
    for name, (memory, share) in promises.items():
        simulation = simulate(make_schedule(name, ranks, microbatches), Costs())
        assert max(simulation.peak) <= memory + 1e-9
        assert simulation.makespan - simulation.work <= share * bubble_of_1f1b + 0.5 * (name == "v-min") + 1e-9


def test_what_is_reached_on_four_ranks() -> None:
    """At times measured for dense blocks, within 1F1B's memory."""
    price = Costs(7.8, 9.8, 6.8)
    reached = {}
    for name, chunks in [("1f1b", 1), ("zb-h1", 1), ("zb-h1-interleaved", 2), ("zb-v", 2), ("zb-h1-interleaved", 4)]:
        simulation = simulate(make_schedule(name, 4, 8, chunks=chunks, costs=price), price)
        assert max(simulation.peak) <= 4 + 1e-9
        reached[name, chunks] = round(1 - simulation.bubble, 3)
    assert list(reached.values()) == [0.727, 0.858, 0.923, 0.93, 0.96]


@pytest.mark.parametrize(
    ("name", "chunks", "allowed"),
    [("1f1b", 2, "1 for 1f1b"), ("interleaved-1f1b", 1, "at least 2"), ("zb-v", 3, "at least 2, in steps of 2")],
)
def test_chunks_that_a_schedule_cannot_have(name: str, chunks: int, allowed: str) -> None:
    with pytest.raises(ConfigError, match=rf"pipeline.chunks: {chunks} is not allowed; allowed: {allowed}"):
        make_schedule(name, 2, 4, chunks=chunks)
