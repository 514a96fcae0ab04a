"""Activation checkpointing of code with MoE layers: the recomputation repeats the routing of the first run.

[Note: why routing is saved]
A checkpointed function runs twice. If its second run decided anew, a rounding difference could send a token to another
expert, and the gradients would be those of two different functions. It would also exchange row counts again, for which
the host waits, and count every token twice for the expert bias. So whatever a layer *decides* (anything that is not
differentiated: choices, plans, reduced counts) passes through a tape: the first run writes it down, every later run
reads it. What is differentiated is computed again by the same operations in the same order, as
:func:`torch.utils.checkpoint.checkpoint` demands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


class RoutingTape:
    """What the MoE layers inside a checkpointed function decided, in the order of their calls.

    The order identifies a decision, so a layer may be called several times.
    """

    def __init__(self) -> None:
        self._decisions: list[Any] = []
        self._runs = 0
        self._next = 0

    @property
    def replaying(self) -> bool:
        """Whether the function runs again: what it reports has been reported before."""
        return self._runs > 1

    def rewind(self) -> None:
        """Begin a run of the function: the first one records, every later one replays from the start."""
        # A recomputation ends as soon as the last tensor that backward needs is there, so the end of a run is no sign.
        self._runs += 1
        self._next = 0

    def once(self, decide: Callable[[], T]) -> T:
        """The value of ``decide()``, called in the first run only.

        Args:
            decide: Works out what must not change or be repeated, e.g. an exchange. It must not record operations
                for autograd, which would be missing in the later runs.

        Raises:
            RuntimeError: A later run asks for more decisions than the first one made.
        """
        if not self.replaying:
            self._decisions.append(decide())
        elif self._next == len(self._decisions):
            raise RuntimeError(
                "a checkpointed function calls more MoE layers when it is run again than it did at first; what it "
                "does must not depend on anything that changes in between"
            )
        self._next += 1
        value: T = self._decisions[self._next - 1]
        return value


def once(saved: RoutingTape | None, decide: Callable[[], T]) -> T:
    """``decide()``, or what it gave in the first run of a checkpointed function."""
    return decide() if saved is None else saved.once(decide)


def checkpoint_with_routing(function: Callable[..., T], *args: Any) -> T:
    """Call a function, keeping its arguments instead of its activations; backward computes them again.

    Decisions of the MoE layers inside are kept as well (see the note at the head of this file). The exchanges of
    tokens are repeated. Ranks that share experts must therefore checkpoint the same functions.

    Args:
        function: Called as ``function(*args, saved=tape)``; hands ``saved`` on to every :class:`MoELayer` inside.
        *args: Its arguments.

    Returns:
        What the function returns.
    """
    tape = RoutingTape()

    def run(*args: Any) -> T:
        tape.rewind()
        return function(*args, saved=tape)

    out: T = checkpoint(run, *args, use_reentrant=False)
    return out
