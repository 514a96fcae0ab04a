"""What the validator refuses, and which cell it points at."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.actions import Action, Actions, Kind, parse_actions
from lightning_moe.pipeline.placement import Placement
from lightning_moe.pipeline.registry import make_schedule
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.validate import ScheduleError, check_schedule, format_grid, runs


def written(*ranks: str, microbatches: int = 2, chunks: int = 1) -> Schedule:
    return Schedule("by hand", Placement(len(ranks), chunks), microbatches, parse_actions("\n".join(ranks)))


def refusal(schedule: Schedule, in_flight: int | None = None) -> tuple[str, list[tuple[int, int, str]]]:
    """What is wrong, and the marked cells as (rank, step, text)."""
    with pytest.raises(ScheduleError) as caught:
        check_schedule(schedule, in_flight=in_flight)
    problem, *grid = str(caught.value).splitlines()
    assert len(grid) == len(schedule.ranks)
    cells = [(rank, step, cell) for rank, row in enumerate(grid) for step, cell in enumerate(row.split()[2:])]
    return problem, [(rank, step, cell[1:-1]) for rank, step, cell in cells if cell.startswith(">")]


GOOD = ("F0 F1 BW0 BW1", "F0 B0 F1 B1 W0 W1")


def test_a_good_schedule_passes() -> None:
    check_schedule(written(*GOOD), in_flight=1)
    assert runs(written(*GOOD))


@pytest.mark.parametrize(
    ("rank", "actions", "problem", "cell"),
    [
        (1, "F0 B0 F1 B1 W0", "rank 1: B1 has no W1", (1, 3, "B1")),
        (1, "F0 B0 F1 B1 W1", "rank 1: B0 has no W0", (1, 1, "B0")),
        (0, "F0 F1 BW0", "rank 0: F1 has no backward, neither BW1 nor B1", (0, 1, "F1")),
        (0, "F0 BW0", "rank 0: F1 is missing", (0, 2, "F1?")),
        (0, "F0 F1 BW0 BW1 BW1", "rank 0, step 4: BW1 comes a second time", (0, 4, "BW1")),
        (0, "F0 F1 B0 BW0 W0 BW1", "step 3: BW0 comes after B0, which has computed the input gradient", (0, 3, "BW0")),
        (0, "F0 F1 BW0 W0 BW1", "rank 0, step 3: W0 comes before B0", (0, 3, "W0")),
        (1, "F0 W0 B0 F1 B1 W1", "rank 1, step 1: W0 comes before B0", (1, 1, "W0")),
        (1, "F0 B1 F1 B0 W0 W1", "rank 1, step 1: B1 comes before F1", (1, 1, "B1")),
        (0, "F0 F1.1 BW0 BW1", "rank 0, step 1: F1.1 is of chunk 1, but the rank has 1", (0, 1, "F1.1")),
        (0, "F0 F1 F2 BW0 BW1", "rank 0, step 2: F2 is of microbatch 2, but there are 2", (0, 2, "F2")),
        (1, "F1 B1 F0 B0 W1 W0", "rank 1, step 0: F1 needs microbatch 1 from stage 0", (1, 0, "F1")),
        (1, "F0 F1 B1 B0 W0 W1", "rank 0, step 2: BW0 needs microbatch 0 from stage 1", (0, 2, "BW0")),
        (1, "F0 B0 F1 B1 W1 W0", "rank 1, step 5: W0 comes after microbatch 1", (1, 5, "W0")),
    ],
)
def test_what_is_wrong_with_one_rank(rank: int, actions: str, problem: str, cell: tuple[int, int, str]) -> None:
    ranks = list(GOOD)
    ranks[rank] = actions
    message, cells = refusal(written(*ranks))
    assert problem in message
    assert cells == [cell]


def test_an_order_that_all_ranks_swap_is_refused() -> None:
    """It would run, but sums of gradients would differ from those of other schedules by rounding."""
    message, cells = refusal(written("F1 F0 BW1 BW0", "F1 BW1 F0 BW0"))
    assert "rank 0, step 1: F0 comes after microbatch 1, but chunks go by ascending microbatch" in message
    assert cells == [(0, 1, "F0")]


def test_ranks_that_wait_for_each_other() -> None:
    message, cells = refusal(written("F0 BW0 F1 BW1", "F0 F1 BW0 BW1"))
    assert "deadlock: rank 0 waits at BW0 for stage 1; rank 1 waits at F1 for stage 0" in message
    assert cells == [(0, 1, "BW0"), (1, 1, "F1")]


def test_a_chunk_whose_input_comes_from_a_later_action_of_its_own_rank() -> None:
    message, cells = refusal(written("F0.1 F0 BW0.1 BW0", microbatches=1, chunks=2))
    assert "deadlock: rank 0 waits at F0.1 for stage 0" in message
    assert cells == [(0, 0, "F0.1")]


def test_sends_are_bounded() -> None:
    """Rank 0 runs three microbatches ahead on chunk 0, and rank 1 cannot hand them back one by one."""
    ranks = ["F0 F1 F2 F0.1 BW0.1 F1.1 BW1.1 F2.1 BW2.1 BW0 BW1 BW2"] * 2
    schedule = written(*ranks, microbatches=3, chunks=2)
    check_schedule(schedule, in_flight=3)
    message, cells = refusal(schedule, in_flight=1)
    assert "rank 1 cannot send what F2 gave to stage 2, which has not taken the 1 before it" in message
    assert cells == [(0, 4, "BW0.1"), (1, 2, "F2")]


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "zb-h2"])
def test_every_dropped_action_is_noticed(name: str) -> None:
    schedule = make_schedule(name, 3, 4)
    for rank, actions in enumerate(schedule.ranks):
        for step in range(len(actions)):
            ranks = list(schedule.ranks)
            ranks[rank] = actions[:step] + actions[step + 1 :]
            _, cells = refusal(replace(schedule, ranks=tuple(ranks)))
            assert cells[0][0] == rank


def test_every_swap_of_two_microbatches_is_noticed() -> None:
    schedule = make_schedule("zb-h1", 3, 4)
    for rank, actions in enumerate(schedule.ranks):
        for first, second in zip(range(len(actions)), range(1, len(actions)), strict=False):
            if actions[first].kind is not actions[second].kind:
                continue
            swapped = list(actions)
            swapped[first], swapped[second] = swapped[second], swapped[first]
            ranks = list(schedule.ranks)
            ranks[rank] = tuple(swapped)
            assert not runs(replace(schedule, ranks=tuple(ranks)))


@pytest.mark.parametrize(
    ("actions", "problem"),
    [
        ((Action("F", 0), Action(Kind.BW, 0)), "F0 is made of 'F', 0 and 0, not of a Kind"),  # type: ignore[arg-type]
        ((Action(Kind.F, 0.0), Action(Kind.BW, 0)), "F0.0 is made of <Kind.F"),  # type: ignore[arg-type]
        ((Action(Kind.F, False), Action(Kind.BW, 0)), "FFalse is made of <Kind.F"),
        ((("F", 0, 0),), "('F', 0, 0) is no Action"),
    ],
)
def test_what_only_looks_like_an_action(actions: Actions, problem: str) -> None:
    """``"F" == Kind.F`` and ``0.0 == 0``: they would pass every other check, and fail in the engine."""
    with pytest.raises(ScheduleError, match=re.escape(f"rank 0, step 0: {problem}")):
        check_schedule(Schedule("by hand", Placement(1), 1, (actions,)))


def test_no_microbatches() -> None:
    with pytest.raises(ScheduleError, match="there are 0 microbatches"):
        check_schedule(Schedule("by hand", Placement(1), 0, ((),)))


def test_actions_for_other_ranks() -> None:
    schedule = replace(written(*GOOD), placement=Placement(3))
    with pytest.raises(ScheduleError, match="there are actions for 2 ranks of 3"):
        check_schedule(schedule)


def test_the_message_is_a_grid() -> None:
    schedule = written("F0 F1 BW0 BW1", "F0 B0 F1 B1 W0")
    assert format_grid(schedule, {(1, 3): ""}) == (
        "rank 0: F0   F1   BW0  BW1\n"
        "rank 1: F0   B0   F1   >B1< W0"
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match=re.escape("pipeline.schedule: by hand cannot run: rank 1: B1 has no W1\nrank 0: F0 ")
    ):
        check_schedule(schedule)
