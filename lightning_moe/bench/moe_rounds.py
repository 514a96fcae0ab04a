"""Contestants that take turns: each round runs every one of them once, so that drift of the machine hits all alike."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_moe.bench.timing import DeviceClock, Times

PARTS = ("inference", "forward", "backward", "step")
"""What is timed: forward without gradients, then forward, backward, and both, of one training step."""


@dataclass(frozen=True)
class Contestant:
    """One way to run layers.

    Attributes:
        name: Name in the report.
        module: The layers, which contestants may share.
        forward: From the input to the output.
        backward: From the output and its gradient; every gradient is in its place when it returns.
        gradients: Those that a backward pass has left, by names that all contestants share.
        forget: Drops them.
    """

    name: str
    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], None]
    gradients: Callable[[], Mapping[str, Tensor]]
    forget: Callable[[], None]


@dataclass
class Series:
    """What rounds have measured of one contestant, always the slowest or fullest rank.

    Attributes:
        seconds: Of each part, one for each round.
        step_bytes: Most memory that a training step took above what there was at its start; gradients count.
        inference_bytes: The same of a forward pass without gradients.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    step_bytes: float = 0.0
    inference_bytes: float = 0.0

    def times(self, part: str) -> Times:
        """Summary of one part."""
        return Times.of(self.seconds[part])

    def summary(self) -> dict[str, Any]:
        """For the report, in milliseconds and GiB; on CPUs, where memory is not watched, the latter are None."""
        spans = {part: self.times(part) for part in PARTS}
        figures: dict[str, Any] = {
            part: {"milliseconds": 1e3 * span.median, "min": 1e3 * span.low, "max": 1e3 * span.high}
            for part, span in spans.items()
        }
        return figures | {
            "step_peak_gib": self.step_bytes / 2**30 or None,
            "inference_peak_gib": self.inference_bytes / 2**30 or None,
        }


class Rounds:
    """Runs contestants on one input.

    Args:
        hidden: The input.
        grad: Gradient of the output.
    """

    def __init__(self, hidden: Tensor, grad: Tensor) -> None:
        self.hidden, self.grad = hidden, grad
        self.device = hidden.device
        self.clock = DeviceClock(self.device)

    def run(self, contestants: Sequence[Contestant], *, warmup: int, steps: int) -> dict[str, Series]:
        """Measure all contestants, in an order that moves on by one with each round.

        Args:
            contestants: Those that take part.
            warmup: Rounds that do not count.
            steps: Rounds that do.
        """
        gc.collect()
        found = {one.name: Series() for one in contestants}
        for number in range(warmup + steps):
            first = number % len(contestants)
            for one in (*contestants[first:], *contestants[:first]):
                self._measure(one, found[one.name] if number >= warmup else Series())
        return found

    def results(self, one: Contestant) -> dict[str, Tensor]:
        """Output and all gradients of one step, which the caller may keep."""
        one.module.train()
        one.forget()
        hidden = self.hidden.detach().requires_grad_()
        out = one.forward(hidden)
        one.backward(out, self.grad)
        assert hidden.grad is not None
        found = {"output": out.detach(), "input": hidden.grad, **one.gradients()}
        one.forget()
        return found

    def step(self, one: Contestant) -> None:
        """One training step, of which nothing is kept."""
        one.module.train()
        one.forget()
        out = one.forward(self.hidden.detach().requires_grad_())
        one.backward(out, self.grad)

    def synchronize(self) -> None:
        """Wait until all ranks are here, and their devices idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _measure(self, one: Contestant, series: Series) -> None:
        one.forget()
        one.module.eval()
        base = self._start()
        marks = [self.clock.now()]
        with torch.no_grad():
            one.forward(self.hidden)
        marks.append(self.clock.now())
        inference_bytes = self._above(base)
        one.module.train()
        hidden = self.hidden.detach().requires_grad_()
        base = self._start()
        marks.append(self.clock.now())
        out = one.forward(hidden)
        marks.append(self.clock.now())
        one.backward(out, self.grad)
        marks.append(self.clock.now())
        del out, hidden
        step_bytes = self._above(base)
        one.forget()  # others may use the memory
        pairs = ((0, 1), (2, 3), (3, 4), (2, 4))
        seconds = [self.clock.seconds(marks[a], marks[b]) for a, b in pairs]
        *slowest, inference_bytes, step_bytes = largest((*seconds, inference_bytes, step_bytes), self.device)
        for part, value in zip(PARTS, slowest, strict=True):
            series.seconds[part].append(value)
        series.inference_bytes = max(series.inference_bytes, inference_bytes)
        series.step_bytes = max(series.step_bytes, step_bytes)

    def _start(self) -> int:
        """Bring all ranks together, and begin to watch the memory; returns the bytes that are in use."""
        self.synchronize()
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def _above(self, base: int) -> float:
        if self.device.type != "cuda":
            return 0.0
        return float(torch.cuda.max_memory_allocated(self.device) - base)


def largest(values: Iterable[float], device: torch.device) -> list[float]:
    """The largest of each value over all ranks."""
    box = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    found: list[float] = box.tolist()
    return found


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], device: torch.device) -> dict[str, Any]:
    """How much a contestant's results differ from another's, over all ranks and tensors.

    Args:
        found: Tensors by name.
        expected: The same names and shapes.
        device: That of the collectives.

    Returns:
        The largest difference over the largest value, and the norm of the difference over the norm, both of the worst
        tensor, and which one that is by norm.
    """
    assert found.keys() == expected.keys()
    names = sorted(found)
    ratios = [_ratios(found[name], expected[name]) for name in names]
    worst = largest([value for pair in ratios for value in pair], device)
    by_value, by_norm = worst[::2], worst[1::2]
    return {
        "max_relative_error": max(by_value),
        "relative_error": max(by_norm),
        "worst": names[by_norm.index(max(by_norm))],
    }


def equality(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], device: torch.device) -> dict[str, Any]:
    """Which of a contestant's results are another's, bit for bit, on all ranks.

    Arguments as for :func:`differences`.

    Returns:
        Whether ``output`` is, whether all ``gradients`` are, and the names of those that are ``unequal``.
    """
    assert found.keys() == expected.keys()
    names = sorted(found)
    flags = largest((float(not _same(found[name], expected[name])) for name in names), device)
    unequal = [name for name, flag in zip(names, flags, strict=True) if flag]
    return {"output": "output" not in unequal, "gradients": set(unequal) <= {"output"}, "unequal": unequal}


def _same(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found, expected)


def _ratios(found: Tensor, expected: Tensor) -> tuple[float, float]:
    if expected.numel() == 0:
        return 0.0, 0.0
    wide = torch.promote_types(expected.dtype, torch.float32)
    distance, size = (found.to(wide) - expected.to(wide)), expected.to(wide)
    pairs = ((distance.abs().max(), size.abs().max()), (distance.norm(), size.norm()))
    by_value, by_norm = (float(a / b) if float(b) else float(a) for a, b in pairs)
    return by_value, by_norm
