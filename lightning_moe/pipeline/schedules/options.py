"""What a schedule may be asked for beyond its size (torch-free)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.costs import Costs
from lightning_moe.pipeline.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleOptions:
    """Options of a schedule.

    Attributes:
        chunks: Number of stages that each rank holds; None leaves it to the schedule.
        max_chunks: Most stages that each rank can hold, for schedules that choose; None sets no limit.
        max_lag: Most microbatches that weight gradients may lag behind; None leaves it to the schedule.
        costs: What the work costs, for schedules that choose their order by it.
        memory_limit: Most activation memory of a rank, in microbatches of an average rank; None leaves it to the
            schedule.
    """

    chunks: int | None = None
    max_chunks: int | None = None
    max_lag: int | None = None
    costs: Costs = field(default_factory=Costs)
    memory_limit: float | None = None

    def chunks_of(self, schedule: str, allowed: range, default: int) -> int:
        """Number of chunks for a schedule that can do with the ``allowed`` numbers, ``default`` if none was asked for.

        Raises:
            ConfigError: Another number was asked for.
        """
        chunks = default if self.chunks is None else self.chunks
        if chunks not in allowed:
            words = str(allowed[0]) if len(allowed) == 1 else f"at least {allowed[0]}"
            if allowed.step > 1:
                words += f", in steps of {allowed.step}"
            hint = "leave it out, or take another schedule"
            raise ConfigError("pipeline.chunks", chunks, f"{words} for {schedule}", hint)
        return chunks

    def most_memory(self, usual: float) -> float:
        """The memory limit in the units of ``costs``; ``usual``, in microbatches, if there is none."""
        return self.costs.activation * (usual if self.memory_limit is None else self.memory_limit)


ScheduleFunction = Callable[[int, int, ScheduleOptions], Schedule]
"""Makes a schedule for a number of ranks and a number of microbatches."""
