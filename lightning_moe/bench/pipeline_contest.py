"""The contestants of the pipeline benchmark: schedules of ours and of torch, on the same blocks."""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_moe.bench.pipeline_blocks import BlockParts, Sleep, TransformerBlock, mean_product, weight_sinks
from lightning_moe.bench.pipeline_peer import torch_step
from lightning_moe.bench.timing import DeviceClock, Times
from lightning_moe.pipeline.copy_transport import CopyTransport
from lightning_moe.pipeline.costs import Costs
from lightning_moe.pipeline.division import divide_blocks
from lightning_moe.pipeline.engine import PipelineEngine
from lightning_moe.pipeline.registry import make_schedule
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.spec import Microbatch
from lightning_moe.pipeline.transport import P2PTransport, Transport
from lightning_moe.weight_grad.queue import WeightGradQueue


class _NoListener:
    def start_pass(self, chunk: int, *, final: bool) -> None:
        """Nothing is reduced here."""

    def end_pass(self) -> None:
        """As above."""


class Contest:
    """Measures schedules of one number of microbatches, one after the other.

    Args:
        options: The command line.
        microbatches: Number of microbatches.
    """

    def __init__(self, options: argparse.Namespace, microbatches: int) -> None:
        self.options, self.microbatches = options, microbatches
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(options.device, self.rank) if options.device == "cuda" else torch.device("cpu")
        self.clock = DeviceClock(self.device)
        self.transports: dict[tuple[Any, str], Transport] = {}
        shape = (microbatches, options.tokens, options.hidden)
        generator = torch.Generator(self.device).manual_seed(0)
        self.input = torch.randn(shape, generator=generator, device=self.device).to(options.dtype)
        self.target = torch.randn(shape, generator=generator, device=self.device)

    def data(self) -> list[Microbatch]:
        """The microbatches."""
        count = self.microbatches
        return [
            Microbatch((self.input[k : k + 1], self.target[k : k + 1]), k, count, 1.0 / count) for k in range(count)
        ]

    def blocks(self, count: int, *, ours: bool) -> nn.ModuleList:
        """Blocks on the device, all with the same weights on every rank."""
        torch.manual_seed(0)
        if self.options.sleep:
            return nn.ModuleList(
                Sleep(*(seconds * self.ranks / self.options.blocks for seconds in self.options.sleep))
                for _ in range(count)
            )
        with torch.device(self.device):
            blocks = [TransformerBlock(self.options.hidden, self.options.heads, ours=ours) for _ in range(count)]
        return nn.ModuleList(blocks).to(self.options.dtype)

    def ideal(self, *, ours: bool) -> float:
        """Seconds that one rank's blocks take for all microbatches alone."""
        blocks = self.blocks(self.options.blocks // self.ranks, ours=ours)
        queue = WeightGradQueue()
        weight_sinks(blocks, queue)

        def step() -> None:
            for k in range(self.microbatches):
                hidden = self.input[k : k + 1].clone().requires_grad_()
                out = hidden
                for block in blocks:
                    out = block(out)
                out.backward(torch.ones_like(out))

        return self.time(step).median

    def parts(self) -> tuple[float, float, float]:
        """Seconds of F, B and W of one rank's blocks for one microbatch, the median of several, slowest rank."""
        blocks = self.blocks(self.options.blocks // self.ranks, ours=True)
        queue = WeightGradQueue()
        weight_sinks(blocks, queue)
        times: list[list[float]] = [[], [], []]
        for _ in range(self.options.steps + 2):
            hidden = self.input[:1].clone().requires_grad_()
            marks = [self.clock.now()]
            out = hidden
            for block in blocks:
                out = block(out)
            marks.append(self.clock.now())
            with queue.capture(0):
                out.backward(torch.ones_like(out))
            marks.append(self.clock.now())
            queue.pop(0)
            marks.append(self.clock.now())
            for series, (begin, end) in zip(times, pairwise(marks), strict=True):
                series.append(self.clock.seconds(begin, end))
        forward, backward, weight = (self.slowest(statistics.median(series[2:])) for series in times)
        return forward, backward, weight

    def ours(self, schedule: Schedule, kind: str) -> tuple[Times, float]:
        """Seconds of a step, and the largest peak memory of a rank in GiB."""
        placement, options = schedule.placement, self.options
        depth = divide_blocks(options.blocks, placement.num_stages)
        parts = [depth[placement.stage(self.rank, chunk)] for chunk in range(placement.chunks)]
        blocks = [self.blocks(len(part.blocks), ours=True) for part in parts]
        queue = WeightGradQueue()
        weight_sinks(nn.ModuleList(blocks), queue)
        engine = PipelineEngine(
            BlockParts(parts, blocks),
            self.rank,
            placement,
            self.transport(schedule, kind),
            queue,
            self.device,
            forward_context=nullcontext,
        )
        listener, one = _NoListener(), torch.ones((), device=self.device)
        data = self.data()

        def step() -> None:
            for each in blocks:
                each.zero_grad()
            engine.train_step(schedule.ranks[self.rank], data, one, listener)

        return self.time(step), self.peak()

    def peer(self, name: str) -> tuple[Times, float]:
        """The same of torch's schedule ``name``."""
        step = torch_step(name, self.options.blocks, self.blocks, self.input, self.target, mean_product)
        return self.time(step), self.peak()

    def schedule(self, name: str, costs: Costs) -> Schedule:
        """A schedule by its name, or ``name/chunks``."""
        name, _, chunks = name.partition("/")
        return make_schedule(
            name,
            self.ranks,
            self.microbatches,
            chunks=int(chunks) if chunks else None,
            costs=costs,
            memory_limit=self.options.memory_limit if name == "auto" else None,
            max_chunks=max(1, self.options.blocks // self.ranks),
        )

    def transport(self, schedule: Schedule, kind: str) -> Transport:
        """A transport for a placement; connected once."""
        key = (schedule.placement, kind)
        if key not in self.transports:
            everybody, timeout = [tuple(range(self.ranks))], timedelta(seconds=300)
            world = dist.group.WORLD
            assert world is not None
            if kind == "copy":
                self.transports[key] = CopyTransport(schedule.placement, everybody, self.device, timeout, world)
            else:
                self.transports[key] = P2PTransport(schedule.placement, everybody, self.device, timeout)
        return self.transports[key]

    # ---- clocks

    def time(self, step: Callable[[], Any]) -> Times:
        """Seconds of each of several steps after a warm-up, of the slowest rank."""
        for _ in range(self.options.warmup):
            step()
        times = []
        for _ in range(self.options.steps):
            self.synchronize()
            begin = self.clock.now()
            step()
            end = self.clock.now()
            self.synchronize()
            times.append(self.slowest(self.clock.seconds(begin, end)))
        return Times.of(times)

    def synchronize(self) -> None:
        """Wait until all ranks are here, and their devices idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def slowest(self, value: float) -> float:
        """The largest value of all ranks."""
        box = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return float(box)

    def peak(self) -> float:
        """Most GiB that any rank has allocated since :meth:`forget`."""
        return self.slowest(torch.cuda.max_memory_allocated() / 2**30) if self.device.type == "cuda" else 0.0

    def forget(self) -> None:
        """Free what the last contestant has left."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
