"""Times work on a device, so that all ranks of a group find the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
import torch.distributed as dist

_REPEATS = 3

Work = Callable[[], object]


@dataclass(frozen=True)
class Stopwatch:
    """Times work on one rank, and agrees with the others.

    Attributes:
        device: Where the work is done.
        group: Ranks that take part in it; None for this one alone.
    """

    device: torch.device
    group: dist.ProcessGroup | None

    def seconds(self, work: Work, beside: Callable[[], Work] | None = None) -> float:
        """The shortest time of some that work takes this rank; every rank runs it equally often.

        Args:
            work: Queues something on the device.
            beside: Begins something else before each time, and returns what waits for its end. That is not timed.
        """
        best = inf
        for repeat in range(1 + _REPEATS):
            self._wait()
            end = None if beside is None else beside()
            start = time.perf_counter()
            work()
            self._wait()
            seconds = time.perf_counter() - start
            if end is not None:
                end()
            if repeat:  # the first time may connect ranks and load kernels
                best = min(best, seconds)
        return best

    def agree(self, seconds: Sequence[float]) -> list[float]:
        """The slowest rank's times."""
        if self.group is None:
            return list(seconds)
        times = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.all_reduce(times, dist.ReduceOp.MAX, self.group)
        slowest: list[float] = times.tolist()
        return slowest

    def _wait(self) -> None:
        """Wait for the current stream alone: messages have one of their own, which may stay busy."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
