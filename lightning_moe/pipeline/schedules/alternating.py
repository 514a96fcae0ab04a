"""The pattern of 1F1B and its relatives: forwards, then forward and backward in turn, then backwards (torch-free)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice

from lightning_moe.pipeline.actions import Action, Actions, Kind

Visit = tuple[int, int]
"""A microbatch in a chunk: (microbatch, chunk)."""


def alternate(forwards: Sequence[Visit], backwards: Sequence[Visit], *, warm_up: int, lag: int = 0) -> Actions:
    """What one rank does.

    Args:
        forwards: The visits in the order of their forwards.
        backwards: The same visits in the order of their backwards.
        warm_up: Number of forwards before the first pair of forward and backward.
        lag: Number of input gradients that are computed before the weight gradients of the first; 0 computes both
            at once.
    """
    actions = [Action(Kind.F, *visit) for visit in forwards[:warm_up]]
    later = iter(forwards[warm_up:])
    deferred: deque[Visit] = deque()
    for visit in backwards:
        actions.extend(Action(Kind.F, *forward) for forward in islice(later, 1))
        actions.append(Action(Kind.B if lag else Kind.BW, *visit))
        if lag:
            deferred.append(visit)
        if len(deferred) > lag:
            actions.append(Action(Kind.W, *deferred.popleft()))
    actions.extend(Action(Kind.W, *visit) for visit in deferred)
    return tuple(actions)


def capped(lag: int, max_lag: int | None) -> int:
    """``lag``, or ``max_lag`` where that is less."""
    return lag if max_lag is None else min(lag, max_lag)
