"""A plan in words and as plain values (torch-free)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning_moe.cli.plan.planned import Plan, PlannedSchedule
from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.errors import ConfigError
from lightning_moe.parallel.layout import Axis, axis_size, rank_lists
from lightning_moe.pipeline.parts import ModelPart

_AXES = (Axis.PIPELINE, Axis.DATA, Axis.CONTEXT, Axis.TENSOR, Axis.EXPERT_DATA, Axis.EXPERT, Axis.EXPERT_TENSOR)
_MEMORY = ("weights", "gradients", "optimizer", "activations", "temporary", "total")
_MOST_PIPELINES = 8
"""Number of pipelines whose ranks are listed."""


def report_lines(plan: Plan) -> Iterator[str]:
    """The plan as text: mesh, stages, memory, schedules."""
    world = axis_size(plan.parallel, Axis.WORLD)
    yield f"mesh: {world} rank{'s' * (world > 1)}, {_sizes(plan.parallel)}"
    if plan.parallel.pipeline > 1:
        yield f"pipelines: {_pipelines(plan.parallel)}"
    yield f"schedule: {_description(plan)}"
    yield ""
    yield from table(["stage", "pipeline rank", "chunk", "holds", "cost"], _stages(plan.chosen))
    if plan.chosen.memory is not None:
        yield ""
        yield "memory of each rank (an estimate)"
        rows = [
            [str(rank), *(megabytes(getattr(memory, part)) for part in _MEMORY)]
            for rank, memory in enumerate(plan.chosen.memory)
        ]
        yield from table(["pipeline rank", *_MEMORY], rows)
    if not plan.others:
        return
    yield ""
    forward, backward, weight = plan.config.costs
    yield f"schedules at F:B:W = {forward:g}:{backward:g}:{weight:g}, communication {plan.config.communication:g}"
    possible = {name: other for name, other in plan.others.items() if isinstance(other, PlannedSchedule)}
    rows = [_row("*", plan.chosen.schedule.name, plan.chosen), *(_row("", *each) for each in possible.items())]
    yield from table(["", "schedule", "chunks", "bubble", "span bubble", "makespan", "activations"], rows)
    for name, other in plan.others.items():
        if isinstance(other, ConfigError):
            yield f"   {name}: not here, {other.field} {other.value} (allowed: {other.allowed})"


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as values that JSON can hold; memory in bytes."""
    chosen = plan.chosen
    return {
        "world_size": axis_size(plan.parallel, Axis.WORLD),
        "axes": {str(axis): axis_size(plan.parallel, axis) for axis in _AXES},
        "pipelines": [list(ranks) for ranks in rank_lists(plan.parallel, Axis.PIPELINE)],
        "schedule": chosen.schedule.name,
        "microbatches": chosen.schedule.microbatches,
        "batch_size": plan.batch_size,
        "stages": [
            {
                "stage": stage,
                "pipeline_rank": chosen.schedule.placement.location(stage)[0],
                "chunk": chosen.schedule.placement.location(stage)[1],
                "blocks": None if part is None else list(part.blocks),
                "embedding": None if part is None else part.first,
                "head": None if part is None else part.last,
                "cost": 1.0 if chosen.factors is None else chosen.factors[stage],
            }
            for stage, part in enumerate(_parts(chosen))
        ],
        "memory": None
        if chosen.memory is None
        else [{part: round(getattr(memory, part)) for part in _MEMORY} for memory in chosen.memory],
        "schedules": {chosen.schedule.name: figures(chosen)}
        | {
            name: {"error": str(other)} if isinstance(other, ConfigError) else figures(other)
            for name, other in plan.others.items()
        },
    }


def figures(planned: PlannedSchedule) -> dict[str, Any]:
    """What a schedule costs; ``peak`` in microbatches of an average rank, ``activations`` in bytes."""
    simulation = planned.simulation
    return {
        "chunks": planned.schedule.placement.chunks,
        "bubble": simulation.bubble,
        "span_bubble": simulation.span_bubble,
        "makespan": simulation.makespan,
        "peak": max(simulation.peak),
        "activations": None if planned.memory is None else round(max(memory.activations for memory in planned.memory)),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines with columns of equal width."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def megabytes(count: float) -> str:
    """Bytes in words, with three digits."""
    if count == 0:
        return "0"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.{max(0, 2 - (count >= 10 * size) - (count >= 100 * size))}f} {unit}"
    return f"{count / 2**10:.1f} KiB"


def _sizes(parallel: ParallelConfig) -> str:
    dense, expert = _AXES[:4], _AXES[4:]
    return "; ".join(", ".join(f"{axis} {axis_size(parallel, axis)}" for axis in view) for view in (dense, expert))


def _pipelines(parallel: ParallelConfig) -> str:
    groups = rank_lists(parallel, Axis.PIPELINE)
    shown = ", ".join(" > ".join(map(str, ranks)) for ranks in groups[:_MOST_PIPELINES])
    return shown + (f", and {len(groups) - _MOST_PIPELINES} more" if len(groups) > _MOST_PIPELINES else "")


def _description(plan: Plan) -> str:
    schedule = plan.chosen.schedule
    asked = "" if schedule.name == plan.config.schedule else f" (asked for as {plan.config.schedule})"
    text = f"{schedule.name}{asked}, {schedule.microbatches} microbatch{'es' * (schedule.microbatches > 1)}"
    if plan.batch_size is None:
        return text
    samples, rest = divmod(plan.batch_size, schedule.microbatches)
    if rest:
        return (
            f"{text} of {samples} or {samples + 1} samples; {schedule.microbatches} does not divide {plan.batch_size}"
        )
    return f"{text} of {samples} sample{'s' * (samples > 1)}"


def _parts(planned: PlannedSchedule) -> tuple[ModelPart | None, ...]:
    return planned.parts or (None,) * planned.schedule.placement.num_stages


def _stages(planned: PlannedSchedule) -> list[list[str]]:
    placement = planned.schedule.placement
    return [
        [
            str(stage),
            str(placement.location(stage)[0]),
            str(placement.location(stage)[1]),
            "known when the model is built" if part is None else _holds(part),
            "" if planned.factors is None else f"{planned.factors[stage]:.2f}",
        ]
        for stage, part in enumerate(_parts(planned))
    ]


def _holds(part: ModelPart) -> str:
    blocks = ""
    if part.blocks:
        first, last = part.blocks[0], part.blocks[-1]
        blocks = f"block {first}" if first == last else f"blocks {first}-{last}"
    return ", ".join(filter(None, ["embedding" * part.first, blocks, "head" * part.last]))


def _row(mark: str, name: str, planned: PlannedSchedule) -> list[str]:
    values = figures(planned)
    peak = f"{values['peak']:.2f} microbatches" if values["activations"] is None else megabytes(values["activations"])
    return [
        mark,
        name,
        str(values["chunks"]),
        f"{values['bubble']:.1%}",
        f"{values['span_bubble']:.1%}",
        f"{values['makespan']:.2f}",
        peak,
    ]
