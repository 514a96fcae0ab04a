"""Times of training steps, and which kernels they were spent on."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch._C._autograd import DeviceType

# The first match counts; names are those of CUDA kernels as of torch 2.11 to 2.13.
_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("communication", ("nccl",)),
    ("attention", ("flash", "fmha", "attention")),
    ("optimizer", ("multi_tensor_apply", "fused_adam", "adam")),
    ("grouped_gemm", ("grouped", "groupproblemshape", "ptrarray")),
    ("gemm", ("gemm", "nvjet", "cutlass", "xmma", "cublas")),
    ("sort_and_index", ("sort", "index", "gather", "scatter", "topk", "scan", "cumsum")),
    ("copy", ("memcpy", "memset", "copy", "cat", "fill")),
)


@dataclass(frozen=True)
class Times:
    """Seconds of repeated measurements of one thing."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Times:
        """Summarise measurements, at least one."""
        values = list(seconds)
        return cls(statistics.median(values), min(values), max(values), len(values))


class DeviceClock:
    """Points in time of a device, taken without making the host wait for it.

    Args:
        device: Where the work runs; CUDA events on a GPU, the host's clock elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Any:
        """The point at which the work that has been given to the device is done."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Seconds between two points; waits for the device."""
        if self._device.type != "cuda":
            return float(end - begin)
        torch.cuda.synchronize(self._device)
        return float(begin.elapsed_time(end)) / 1e3


class StepClock:
    """Marks the ends of steps without making the host wait for the device.

    Args:
        device: Where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = DeviceClock(device)
        self._marks: list[Any] = []

    def mark(self) -> None:
        """End one step and begin the next."""
        self._marks.append(self._clock.now())

    def times(self) -> Times:
        """The steps between the marks so far; waits for the device."""
        return Times.of(self._clock.seconds(first, second) for first, second in pairwise(self._marks))


def kind_of_kernel(name: str) -> str:
    """What a CUDA kernel is for, by its name; ``elementwise`` when nothing else fits."""
    lowered = name.lower()
    return next((kind for kind, words in _KINDS if any(word in lowered for word in words)), "elementwise")


def kernel_seconds(profile: torch.profiler.profile, steps: int) -> dict[str, float]:
    """Seconds per step that the device spent on each kind of kernel, with those that ran at once each counted in full.

    Args:
        profile: A finished profile with CUDA activity.
        steps: Number of steps in it.

    Returns:
        Kinds in descending order of time.
    """
    total: dict[str, float] = defaultdict(float)
    for event in profile.events() or ():
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            total[kind_of_kernel(event.name)] += event.device_time_total / 1e6 / steps
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def occupancy_seconds(profile: torch.profiler.profile, steps: int) -> dict[str, float]:
    """Seconds per step in which the device computed, only communicated (exposed communication), or did nothing.

    Args:
        profile: A finished profile with CUDA activity of one device.
        steps: Number of steps in it; what lies before its first kernel and behind its last one does not count.
    """
    kernels = [
        (event.time_range.start, event.time_range.end, kind_of_kernel(event.name) == "communication")
        for event in profile.events() or ()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return {kind: total / 1e6 / steps for kind, total in occupancy(kernels).items()}


def occupancy(kernels: Iterable[tuple[float, float, bool]]) -> dict[str, float]:
    """Divide the time from the first start to the last end among computing, only communicating, and idleness.

    Args:
        kernels: Start and end of each kernel, and whether it communicates; they may overlap.
    """
    changes: list[tuple[float, int, int]] = []
    for start, end, communicates in kernels:
        changes += [(start, int(communicates), 1), (end, int(communicates), -1)]
    time_in = {"computing": 0.0, "only_communicating": 0.0, "idle": 0.0}
    running = [0, 0]
    changes.sort()
    for (now, kind, change), (later, *_) in pairwise([*changes, *changes[-1:]]):
        running[kind] += change
        state = "computing" if running[0] else "only_communicating" if running[1] else "idle"
        time_in[state] += later - now
    return time_in


def slowest_kernels(profile: torch.profiler.profile, steps: int, count: int) -> dict[str, tuple[float, int]]:
    """The kernels that took most time, by name: seconds and launches per step."""
    seconds: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    for event in profile.events() or ():
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            seconds[event.name] += event.device_time_total / 1e6 / steps
            launches[event.name] += 1
    slowest = sorted(seconds, key=lambda name: -seconds[name])[:count]
    return {name: (seconds[name], launches[name] // steps) for name in slowest}
