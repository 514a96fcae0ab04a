"""A schedule as a picture: a row for each rank, time from left to right (torch-free)."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from math import ceil, log10
from types import MappingProxyType

from lightning_moe.pipeline.actions import Kind
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.simulate import Simulation, TimedAction

COLOURS: Mapping[Kind, str] = MappingProxyType(
    {Kind.F: "#7aa6da", Kind.B: "#8bc98b", Kind.W: "#f0c36d", Kind.BW: "#b3a2d6"}
)
"""Fill of each kind of action."""

_MEANINGS: Mapping[Kind, str] = MappingProxyType(
    {Kind.F: "forward", Kind.B: "input gradient", Kind.W: "weight gradient", Kind.BW: "both gradients"}
)
_ROW, _BOX, _LEFT, _TOP, _LEGEND = 30, 24, 64, 28, 150
_SHORTEST, _WIDEST = 26.0, 16000.0
"""Pixels that the shortest action gets, and that the picture has at most."""
_TICK = 60.0
"""Least distance of two numbers on the axis."""

_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 24px; color: #222; background: #fff; }
.scroll { overflow-x: auto; }
pre { background: #f6f6f6; padding: 12px; overflow-x: auto; }
svg text { font: 11px system-ui, sans-serif; fill: #222; }
"""


def schedule_svg(schedule: Schedule, simulation: Simulation) -> str:
    """An ``<svg>`` with one ``<rect class="action">`` for each action, its times in a ``<title>``.

    Later chunks of a rank have darker frames.
    """
    scale = _pixels_per_unit(simulation)
    width = max(_LEFT + scale * simulation.makespan + 16, _LEFT + len(Kind) * _LEGEND)
    legend = _TOP + _ROW * len(simulation.timeline) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{legend + 28}" role="img" '
        f'aria-label="{escape(schedule.name)}: what each rank does">'
    ]
    for rank, actions in enumerate(simulation.timeline):
        top = _TOP + _ROW * rank
        parts.append(f'<text x="4" y="{top + 16}">rank {rank}</text>')
        parts.append(
            f'<line x1="{_LEFT}" x2="{_LEFT + scale * simulation.makespan:.2f}" y1="{top + _BOX}" y2="{top + _BOX}" '
            'stroke="#ddd"/>'
        )
        parts += [_box(schedule, rank, timed, top, scale) for timed in actions]
    parts += _axis(simulation.makespan, scale, legend - 26)
    parts += _legend(schedule, legend)
    parts.append("</svg>")
    return "\n".join(parts)


def schedule_page(schedule: Schedule, simulation: Simulation, *, title: str, report: str = "") -> str:
    """A whole HTML page, also well-formed XML, that needs nothing from elsewhere.

    Args:
        schedule: The schedule.
        simulation: Its times.
        title: Heading of the page.
        report: Text under the picture, set as it is.
    """
    summary = f"{schedule.name}: bubble {simulation.bubble:.1%}, makespan {simulation.makespan:g}"
    text = f"<pre>{escape(report)}</pre>\n" if report else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(summary)}</p>\n"
        f'<div class="scroll">\n{schedule_svg(schedule, simulation)}\n</div>\n{text}</body>\n</html>\n'
    )


def _pixels_per_unit(simulation: Simulation) -> float:
    lengths = [timed.end - timed.start for actions in simulation.timeline for timed in actions]
    shortest = min((length for length in lengths if length > 0), default=1.0)
    return min(_SHORTEST / shortest, _WIDEST / simulation.makespan)


def _box(schedule: Schedule, rank: int, timed: TimedAction, top: int, scale: float) -> str:
    action = timed.action
    left, width = _LEFT + scale * timed.start, scale * (timed.end - timed.start)
    frame = "#fff" if action.chunk == 0 else "#333"
    stage = schedule.placement.stage(rank, action.chunk)
    title = (
        f"{action}: {_MEANINGS[action.kind]} of microbatch {action.microbatch}, stage {stage} "
        f"(rank {rank}, chunk {action.chunk}), from {timed.start:g} to {timed.end:g}"
    )
    label = f'<text x="{left + width / 2:.2f}" y="{top + 16}" text-anchor="middle">{action}</text>'
    return (
        f'<g><title>{title}</title><rect class="action" x="{left:.2f}" y="{top}" width="{width:.2f}" height="{_BOX}" '
        f'fill="{COLOURS[action.kind]}" stroke="{frame}"/>{label if width >= _SHORTEST - 0.5 else ""}</g>'
    )


def _axis(makespan: float, scale: float, y: int) -> list[str]:
    power = 10.0 ** ceil(log10(_TICK / scale))
    step = next(power / part for part in (5, 2, 1) if power / part * scale >= _TICK)
    return [
        f'<text x="{_LEFT + scale * step * i:.2f}" y="{y + 12}" text-anchor="middle">{step * i:g}</text>'
        for i in range(int(makespan / step) + 1)
    ]


def _legend(schedule: Schedule, y: int) -> list[str]:
    used = {action.kind for actions in schedule.ranks for action in actions}
    items, x = [], _LEFT
    for kind in (kind for kind in Kind if kind in used):
        items.append(f'<rect class="legend" x="{x}" y="{y}" width="18" height="14" fill="{COLOURS[kind]}"/>')
        items.append(f'<text x="{x + 24}" y="{y + 11}">{kind}: {_MEANINGS[kind]}</text>')
        x += _LEGEND
    return items
