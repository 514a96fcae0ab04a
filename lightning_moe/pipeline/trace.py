"""A schedule as a trace for Perfetto (https://ui.perfetto.dev) or chrome://tracing (torch-free)."""

from __future__ import annotations

from typing import Any

from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.simulate import Simulation


def chrome_trace(schedule: Schedule, simulation: Simulation, *, milliseconds: float = 1.0) -> dict[str, Any]:
    """The trace as an object for ``json.dump``: a thread for each rank, a complete event for each action.

    See the "Trace Event Format" of Chromium's trace-viewer.

    Args:
        schedule: The schedule.
        simulation: Its times.
        milliseconds: How long a unit of the simulation's times is.
    """
    microseconds = 1000.0 * milliseconds
    events: list[dict[str, Any]] = [_named("process_name", 0, f"{schedule.name}, {schedule.microbatches} microbatches")]
    for rank, actions in enumerate(simulation.timeline):
        events.append(_named("thread_name", rank, f"rank {rank}"))
        events += [
            {
                "ph": "X",
                "name": str(timed.action),
                "cat": str(timed.action.kind),
                "pid": 0,
                "tid": rank,
                "ts": microseconds * timed.start,
                "dur": microseconds * (timed.end - timed.start),
                "args": {
                    "microbatch": timed.action.microbatch,
                    "chunk": timed.action.chunk,
                    "stage": schedule.placement.stage(rank, timed.action.chunk),
                },
            }
            for timed in actions
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _named(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": 0, "tid": thread, "args": {"name": name}}
