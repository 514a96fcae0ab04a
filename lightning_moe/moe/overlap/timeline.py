"""When the remote chunks of a pass arrive, are computed and are back (torch-free).

[Note: link and computation]
A rank has one link and one computation. The link carries messages in the order in which they are posted, as NCCL's
stream does: first all dispatches, then each chunk's results once they are computed. The computation waits for a chunk
where it has not arrived. What it waits is idle time; everything else that the link does is hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple


class Step(NamedTuple):
    """A remote chunk, in seconds: two messages that come, what is computed after each, and one that goes back."""

    rows: float
    """Of the rows, where backward exchanges them again."""
    project: float
    """Of what needs the rows alone."""
    dispatch: float
    compute: float
    give_back: float


def pipelined(head: float, steps: Sequence[Step], tail: float, contention: float) -> tuple[float, tuple[float, ...]]:
    """Seconds of the whole, and the waits before each step and before the end, where the link works on by itself.

    Args:
        head: Seconds of what is computed before the first step.
        steps: Remote chunks, in order.
        tail: Seconds of what is computed after the last.
        contention: Share of its speed that computation loses while the link is in use; less than 1.
    """
    rows_arrive = list(accumulate(step.rows for step in steps))
    link = rows_arrive[-1] if steps else 0.0  # when all that is posted has arrived
    arrive = [link + sent for sent in accumulate(step.dispatch for step in steps)]
    link = arrive[-1] if steps else 0.0
    now, idle = _compute(0.0, head, link, contention), []
    for step, rows_arrival, arrival in zip(steps, rows_arrive, arrive, strict=True):
        ready = _compute(max(now, rows_arrival), step.project, link, contention)
        idle.append(max(0.0, rows_arrival - now) + max(0.0, arrival - ready))
        now = _compute(max(ready, arrival), step.compute, link, contention)
        link = max(link, now) + step.give_back
    now = _compute(now, tail, link, contention)
    return max(now, link), (*idle, max(0.0, link - now))


def one_after_the_other(head: float, steps: Sequence[Step], tail: float) -> tuple[float, tuple[float, ...]]:
    """The same as :func:`pipelined`, where every message is waited for as it is posted."""
    idle = [step.rows + step.dispatch for step in steps] + [sum(step.give_back for step in steps)]
    return head + sum(step.project + step.compute for step in steps) + tail + sum(idle), tuple(idle)


def _compute(now: float, work: float, link: float, contention: float) -> float:
    """When work is done that starts now, slowed down for as long as the link is in use."""
    beside = min(work / (1.0 - contention), max(0.0, link - now))
    return now + beside + (work - beside * (1.0 - contention))
