"""A picture of one training step: what a rank computes and what it communicates, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, log10
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_moe.bench.moe_contest import Contest
from lightning_moe.bench.moe_rounds import Contestant, Rounds
from lightning_moe.bench.timing import kind_of_kernel
from lightning_moe.moe.overlap.transport import SimulatedLink

COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "communication": "#e08e79",
        "grouped_gemm": "#7aa6da",
        "gemm": "#a5c4e7",
        "elementwise": "#8bc98b",
        "sort_and_index": "#f0c36d",
        "copy": "#c9c9c9",
    }
)
"""Fill of each kind of work; the others are drawn as elementwise."""

_ROW, _BOX, _LEFT, _TOP, _LEGEND = 40, 32, 130, 40, 120
_WIDTH = 1600.0
"""Pixels of the step."""
_TICK = 60.0
"""Least distance of two numbers on the axis."""
_THINNEST = 0.4
"""Pixels that the shortest work gets."""
_SHORTEST = 2e-5
"""Seconds of the shortest operation that is recorded on CPUs."""


@dataclass(frozen=True)
class Span:
    """Something that ran.

    Attributes:
        lane: Row of the picture.
        start: When it began, in seconds.
        end: When it ended.
        name: What it was.
        kind: A key of :data:`COLOURS`, or anything else.
    """

    lane: str
    start: float
    end: float
    name: str
    kind: str


def draw_timeline(contest: Contest, path: Path) -> None:
    """Record one step of ``p2p``, and draw what the first rank did; a collective call.

    Args:
        contest: The contestants, measured and therefore warm.
        path: Where to write the SVG.
    """
    record = _record_cuda if contest.device.type == "cuda" else _record_cpu
    spans, forward_end = record(contest)
    if dist.get_rank() == 0:
        path.write_text(timeline_svg(spans, forward_end, title=f"{contest.size.name}: one step of p2p on rank 0"))


def timeline_svg(spans: Sequence[Span], forward_end: float | None, *, title: str) -> str:
    """A self-contained ``<svg>`` with one ``<rect class="span">`` for each span, its times in a ``<title>``.

    Args:
        spans: What ran, at least one; lanes are drawn in the order in which they come.
        forward_end: Where forward ends and backward begins, in seconds; None to mark nothing.
        title: Heading.
    """
    begin, end = min(span.start for span in spans), max(span.end for span in spans)
    scale = _WIDTH / max(end - begin, 1e-9)
    lanes = list(dict.fromkeys(span.lane for span in spans))
    bottom = _TOP + _ROW * len(lanes)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 16:.0f}" height="{bottom + 60}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="4" y="18" font-size="14">{escape(title)}, {1e3 * (end - begin):.2f} ms</text>',
    ]
    for i, lane in enumerate(lanes):
        top = _TOP + _ROW * i
        parts.append(f'<text x="4" y="{top + 20}">{escape(lane)}</text>')
        parts.append(
            f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH:.0f}" y1="{top + _BOX}" y2="{top + _BOX}" stroke="#ddd"/>'
        )
        parts += [_box(span, begin, scale, top) for span in spans if span.lane == lane]
    if forward_end is not None:
        x = _LEFT + scale * (forward_end - begin)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 12}" y2="{bottom}" stroke="#555" stroke-dasharray="3 3"/>'
            f'<text x="{x - 4:.1f}" y="{_TOP - 4}" text-anchor="end">forward</text>'
            f'<text x="{x + 4:.1f}" y="{_TOP - 4}">backward</text>'
        )
    parts += _axis(1e3 * (end - begin), scale / 1e3, bottom + 14)
    parts += _legend({span.kind for span in spans}, bottom + 34)
    return "\n".join([*parts, "</svg>", ""])


def _box(span: Span, begin: float, scale: float, top: int) -> str:
    left, width = _LEFT + scale * (span.start - begin), max(_THINNEST, scale * (span.end - span.start))
    times = f"{1e3 * (span.start - begin):.3f} to {1e3 * (span.end - begin):.3f} ms"
    return (
        f'<rect class="span" x="{left:.2f}" y="{top}" width="{width:.2f}" height="{_BOX}" '
        f'fill="{COLOURS.get(span.kind, COLOURS["elementwise"])}"><title>{escape(span.name)}: {times}</title></rect>'
    )


def _axis(milliseconds: float, scale: float, y: int) -> list[str]:
    """Numbers under the lanes; ``scale`` is in pixels per millisecond."""
    power = 10.0 ** ceil(log10(_TICK / scale))
    step = next(power / part for part in (5, 2, 1) if power / part * scale >= _TICK)
    return [
        f'<text x="{_LEFT + scale * step * i:.1f}" y="{y}" text-anchor="middle">{step * i:g}</text>'
        for i in range(int(milliseconds / step) + 1)
    ]


def _legend(kinds: set[str], y: int) -> list[str]:
    drawn = [kind for kind in COLOURS if kind in kinds or (kind == "elementwise" and kinds - set(COLOURS))]
    items = []
    for i, kind in enumerate(drawn):
        x = _LEFT + _LEGEND * i
        items.append(f'<rect x="{x}" y="{y}" width="14" height="12" fill="{COLOURS[kind]}"/>')
        items.append(f'<text x="{x + 20}" y="{y + 10}">{kind.replace("_", " ")}</text>')
    return items


def _record_cuda(contest: Contest) -> tuple[list[Span], float | None]:
    """The kernels of a profiled step."""
    one, rounds = contest.overlapped(contest.link), contest.rounds
    rounds.step(one)  # the profiler's first events come late without work before them
    rounds.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        _marked_step(rounds, one, torch.profiler.record_function)
        torch.cuda.synchronize()
    one.forget()
    events = [event for event in profile.events() or () if event.device_type == DeviceType.CUDA]
    return spans_of_kernels(events)


def spans_of_kernels(events: Iterable[Any]) -> tuple[list[Span], float | None]:
    """Spans of profiled kernels, computing streams first, and where the annotated forward pass ends.

    Args:
        events: CUDA events of a profile.
    """
    forward_end = None
    found: dict[tuple[bool, int], list[Span]] = {}
    for event in events:
        start, end = 1e-6 * event.time_range.start, 1e-6 * event.time_range.end
        if getattr(event, "is_user_annotation", False):
            forward_end = end if event.name == _FORWARD else forward_end
            continue
        kind = kind_of_kernel(event.name)
        stream = int(event.device_resource_id)
        communicates = kind == "communication"
        lane = f"{'communication' if communicates else 'computation'} ({stream})"
        found.setdefault((communicates, stream), []).append(Span(lane, start, end, event.name, kind))
    return [span for key in sorted(found) for span in found[key]], forward_end


_FORWARD = "forward of the layer"


def _marked_step(rounds: Rounds, one: Contestant, mark: Callable[[str], Any]) -> None:
    one.module.train()
    one.forget()
    with mark(_FORWARD):
        out = one.forward(rounds.hidden.detach().requires_grad_())
    one.backward(out, rounds.grad)


def _record_cpu(contest: Contest) -> tuple[list[Span], float | None]:
    """Operations of the calling thread, and transfers over the simulated link."""
    assert contest.link is not None
    link = _RecordedLink(1e9 * contest.options.link_gigabytes)
    one, rounds = contest.overlapped(link), contest.rounds
    rounds.synchronize()
    operations = _Operations()
    with operations:
        mark = _Mark()
        _marked_step(rounds, one, lambda _: mark)
    one.forget()
    return [*operations.spans, *link.spans], mark.end


class _Mark:
    """Remembers when a block of code ended."""

    end = 0.0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.end = time.perf_counter()


class _RecordedLink(SimulatedLink):
    def __init__(self, bytes_per_second: float) -> None:
        super().__init__(bytes_per_second)
        self.spans: list[Span] = []

    def cross(self, nbytes: int) -> float:
        before, end = self.busy, super().cross(nbytes)
        start = end - (self.busy - before)
        self.spans.append(Span("communication", start, end, f"{nbytes} bytes", "communication"))
        return end


class _Operations(TorchDispatchMode):
    """Records every operation that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.spans: list[Span] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        end = time.perf_counter()
        # Those of c10d only post messages, or wait for them; views take no time.
        if func.namespace != "c10d" and end - start > _SHORTEST:
            name = func.name().removeprefix("aten::")
            kind = "gemm" if name.split(".")[0].rstrip("_") in ("mm", "addmm", "bmm") else kind_of_kernel(name)
            self.spans.append(Span("computation", start, end, name, kind))
        return out
