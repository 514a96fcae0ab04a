"""Whether a schedule can run, and gives each parameter its gradients in the order of microbatches (torch-free)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import NoReturn

from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.actions import Action, Kind
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.waits import Message, received, sent

Cell = tuple[int, int]
"""A rank, and the position of one of its actions."""


class ScheduleError(ConfigError):
    """A schedule that cannot run.

    Args:
        field: The setting that asked for it.
        value: Its name.
        allowed: What is wrong, in words.
        hint: The actions as a grid, ranks as rows, with the failing ones marked.
        location: As for :class:`ConfigError`.
    """

    def __str__(self) -> str:
        where = f"{self.location}: " if self.location else ""
        return f"{where}{self.field}: {self.value} cannot run: {self.allowed}\n{self.hint}"


def check_schedule(schedule: Schedule, *, in_flight: int | None = None) -> None:
    """Refuse a schedule that is incomplete, out of order, or that would come to a standstill.

    Every microbatch must go through every chunk once, by F and then either BW, or B and later W. Each stage must take
    microbatches in the order in which its neighbours send them, and every chunk must visit them in ascending order, so
    that sums of gradients are the same in all schedules, bit by bit.

    Args:
        schedule: The schedule.
        in_flight: Most tensors on the way from one stage to the next: a rank with one more to send waits until the
            neighbour takes one, which it does when it comes to the action that needs it. None allows as many as there
            are ranks, which is what interleaved schedules can need; those of one chunk a rank need one.

    Raises:
        ScheduleError: The message prints the actions of all ranks, and marks those that fail.
    """
    if schedule.microbatches < 1:
        _fail(schedule, f"there are {schedule.microbatches} microbatches", [])
    if len(schedule.ranks) != schedule.placement.ranks:
        _fail(schedule, f"there are actions for {len(schedule.ranks)} ranks of {schedule.placement.ranks}", [])
    for rank in range(schedule.placement.ranks):
        _check_complete(schedule, rank)
    _check_runs(schedule, schedule.placement.ranks if in_flight is None else in_flight)
    for rank in range(schedule.placement.ranks):
        _check_ascending(schedule, rank)


def runs(schedule: Schedule, *, in_flight: int | None = None) -> bool:
    """Whether :func:`check_schedule` would pass a schedule."""
    try:
        check_schedule(schedule, in_flight=in_flight)
    except ScheduleError:
        return False
    return True


def format_grid(schedule: Schedule, marked: Mapping[Cell, str] | None = None) -> str:
    """The actions as a table with ranks as rows and steps as columns.

    Args:
        schedule: The schedule.
        marked: Cells to be put between ``>`` and ``<``, and what to write into those that lie past a row's end.
    """
    marked = marked or {}
    rows = []
    for rank, actions in enumerate(schedule.ranks):
        row = [str(action) for action in actions]
        for (_, step), text in sorted((cell, text) for cell, text in marked.items() if cell[0] == rank):
            if step >= len(row):
                row.append(text)
            row[step] = f">{row[step]}<"
        rows.append(row)
    width = max((len(cell) for row in rows for cell in row), default=0)
    head = max((len(str(rank)) for rank in range(len(rows))), default=1)
    return "\n".join(
        f"rank {rank:>{head}}: " + " ".join(cell.ljust(width) for cell in row).rstrip() for rank, row in enumerate(rows)
    )


def _fail(schedule: Schedule, problem: str, cells: list[Cell], missing: str = "") -> NoReturn:
    grid = format_grid(schedule, dict.fromkeys(cells, missing))
    raise ScheduleError("pipeline.schedule", schedule.name, problem, grid)


def _check_complete(schedule: Schedule, rank: int) -> None:
    """Each microbatch goes through each chunk of the rank once: F, then BW or B, and W after B."""
    chunks = schedule.placement.chunks
    position: dict[Action, int] = {}
    for step, action in enumerate(schedule.ranks[rank]):
        if not isinstance(action, Action):
            _fail(schedule, f"rank {rank}, step {step}: {action!r} is no Action", [(rank, step)])
        kind, microbatch, chunk = action.kind, action.microbatch, action.chunk

        def refuse(problem: str, step: int = step, action: Action = action) -> NoReturn:
            _fail(schedule, f"rank {rank}, step {step}: {action} {problem}", [(rank, step)])

        # "F" equals Kind.F, and 1.0 equals 1, but neither can stand in for it everywhere.
        if not (isinstance(kind, Kind) and type(microbatch) is int and type(chunk) is int):
            refuse(f"is made of {kind!r}, {microbatch!r} and {chunk!r}, not of a Kind and two integers")
        if not 0 <= chunk < chunks:
            refuse(f"is of chunk {chunk}, but the rank has {chunks} (from 0)")
        if not 0 <= microbatch < schedule.microbatches:
            refuse(f"is of microbatch {microbatch}, but there are {schedule.microbatches} (from 0)")
        if action in position:
            refuse("comes a second time")
        before = {Kind.F: None, Kind.B: Kind.F, Kind.BW: Kind.F, Kind.W: Kind.B}[kind]
        if before is not None and Action(before, microbatch, chunk) not in position:
            refuse(f"comes before {Action(before, microbatch, chunk)}")
        other = {Kind.B: Kind.BW, Kind.BW: Kind.B}.get(kind)
        if other is not None and Action(other, microbatch, chunk) in position:
            refuse(f"comes after {Action(other, microbatch, chunk)}, which has computed the input gradient")
        position[action] = step
    end = len(schedule.ranks[rank])
    for microbatch in range(schedule.microbatches):
        for chunk in range(chunks):
            forward, fused = Action(Kind.F, microbatch, chunk), Action(Kind.BW, microbatch, chunk)
            split, weight = Action(Kind.B, microbatch, chunk), Action(Kind.W, microbatch, chunk)
            if forward not in position:
                _fail(schedule, f"rank {rank}: {forward} is missing", [(rank, end)], f"{forward}?")
            if fused not in position and split not in position:
                problem = f"rank {rank}: {forward} has no backward, neither {fused} nor {split}"
                _fail(schedule, problem, [(rank, position[forward])])
            if split in position and weight not in position:
                _fail(schedule, f"rank {rank}: {split} has no {weight}", [(rank, position[split])])


def _check_ascending(schedule: Schedule, rank: int) -> None:
    """The forwards, the backwards and the weight gradients of each chunk go by ascending microbatch."""
    latest: dict[tuple[str, int], int] = {}
    for step, action in enumerate(schedule.ranks[rank]):
        for letter in action.kind:
            before = latest.get((letter, action.chunk), -1)
            if action.microbatch < before:
                problem = f"{action} comes after microbatch {before}, but chunks go by ascending microbatch"
                _fail(schedule, f"rank {rank}, step {step}: {problem}", [(rank, step)])
            latest[letter, action.chunk] = action.microbatch


def _check_runs(schedule: Schedule, in_flight: int) -> None:
    """Every action gets its input, first in, first out, and finds room for its output."""
    placement = schedule.placement
    # Edges within a rank need no room: nothing is sent.
    ways: dict[tuple[int, int], deque[int]] = {}
    steps = [0] * placement.ranks
    unsent: list[Message | None] = [None] * placement.ranks
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(schedule.ranks):
            while True:
                message = unsent[rank]
                if message is not None:
                    way = ways.setdefault(message[:2], deque())
                    if len(way) >= in_flight and placement.location(message.target)[0] != rank:
                        break
                    way.append(message.microbatch)
                    unsent[rank] = None
                    progress = True
                if steps[rank] == len(actions):
                    break
                awaited = received(placement, rank, actions[steps[rank]])
                if awaited is not None:
                    way = ways.setdefault(awaited[:2], deque())
                    if not way:
                        break
                    _check_first(schedule, (rank, steps[rank]), awaited, way[0])
                    way.popleft()
                unsent[rank] = sent(placement, rank, actions[steps[rank]])
                steps[rank] += 1
                progress = True
    stuck = list(_standstill(schedule, steps, unsent, in_flight))
    if stuck:
        _fail(schedule, "deadlock: " + "; ".join(why for _, why in stuck), [cell for cell, _ in stuck])


def _check_first(schedule: Schedule, cell: Cell, awaited: Message, first: int) -> None:
    if awaited.microbatch == first:
        return
    rank, step = cell
    action = schedule.ranks[rank][step]
    problem = f"rank {rank}, step {step}: {action} needs microbatch {awaited.microbatch} from stage {awaited.source}, "
    _fail(schedule, problem + f"which sends microbatch {first} before it", [cell])


def _standstill(
    schedule: Schedule, steps: list[int], unsent: list[Message | None], in_flight: int
) -> Iterator[tuple[Cell, str]]:
    """The cells at which ranks have come to a standstill, and what each waits for."""
    for rank, actions in enumerate(schedule.ranks):
        message, step = unsent[rank], steps[rank]
        if message is not None:
            yield (
                (rank, step - 1),
                f"rank {rank} cannot send what {actions[step - 1]} gave to stage {message.target}, which has not taken "
                f"the {in_flight} before it",
            )
        elif step < len(actions):
            awaited = received(schedule.placement, rank, actions[step])
            assert awaited is not None
            yield (rank, step), f"rank {rank} waits at {actions[step]} for stage {awaited.source}"
