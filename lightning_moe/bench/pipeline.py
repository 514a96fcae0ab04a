"""Pipeline schedules on equal blocks, against torch.distributed.pipelining in the same run.

    lightning-moe bench pipeline --ranks 4 --microbatches 8 --json
    lightning-moe bench pipeline --ranks 4 --sleep 20,20,20 --json      # on CPUs, stages that only sleep

Times are of forward and backward of all microbatches, without an optimizer. The bubble-free time of a rank is what its
blocks take for the same microbatches alone, without communication; that of a run is that of its slowest rank, with
torch's linear layers or ours, whichever is faster.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_moe.bench.pipeline_blocks import BlockParts, Sleep, TransformerBlock, mean_product, weight_sinks
from lightning_moe.bench.pipeline_peer import PEERS, torch_step
from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.actions import Kind
from lightning_moe.pipeline.copy_transport import CopyTransport, can_map_peers
from lightning_moe.pipeline.costs import Costs
from lightning_moe.pipeline.division import divide_blocks
from lightning_moe.pipeline.engine import PipelineEngine
from lightning_moe.pipeline.registry import make_schedule
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.simulate import simulate
from lightning_moe.pipeline.spec import Microbatch
from lightning_moe.pipeline.transport import P2PTransport, Transport
from lightning_moe.weight_grad.queue import WeightGradQueue


class _NoListener:
    def start_pass(self, chunk: int, *, final: bool) -> None:
        """Nothing is reduced here."""


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

        return statistics.median(self.time(step))

    def parts(self) -> tuple[float, float, float]:
        """Seconds of F, B and W of one rank's blocks for one microbatch, the median of several, slowest rank."""
        blocks = self.blocks(self.options.blocks // self.ranks, ours=True)
        queue = WeightGradQueue()
        weight_sinks(blocks, queue)
        times: list[list[float]] = [[], [], []]
        for _ in range(self.options.steps + 2):
            hidden = self.input[:1].clone().requires_grad_()
            marks = [self.now()]
            out = hidden
            for block in blocks:
                out = block(out)
            marks.append(self.now())
            with queue.capture(0):
                out.backward(torch.ones_like(out))
            marks.append(self.now())
            queue.pop(0)
            marks.append(self.now())
            for series, begin, end in zip(times, marks, marks[1:], strict=False):
                series.append(self.seconds(begin, end))
        forward, backward, weight = (self.slowest(statistics.median(series[2:])) for series in times)
        return forward, backward, weight

    def ours(self, schedule: Schedule, kind: str) -> tuple[list[float], float]:
        """Seconds of each step, and the largest peak memory of a rank in GiB."""
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
        times = self.time(lambda: engine.train_step(schedule.ranks[self.rank], data, one, listener) and None)
        return times, self.peak()

    def peer(self, name: str) -> tuple[list[float], float]:
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

    def time(self, step: Callable[[], Any]) -> list[float]:
        """Seconds of each of several steps after a warm-up, of the slowest rank."""
        for _ in range(self.options.warmup):
            step()
        times = []
        for _ in range(self.options.steps):
            self.synchronize()
            begin = self.now()
            step()
            end = self.now()
            self.synchronize()
            times.append(self.slowest(self.seconds(begin, end)))
        return times

    def now(self) -> Any:
        """A point in time of the device."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Seconds between two points."""
        if self.device.type == "cpu":
            return float(end - begin)
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

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


def measure(options: argparse.Namespace, microbatches: int) -> dict[str, Any]:
    """All contestants of one number of microbatches."""
    contest = Contest(options, microbatches)
    kinds = ["p2p"]
    if options.transport != "p2p" and can_map_peers(None, contest.device):
        kinds = ["copy"] if options.transport == "copy" else ["p2p", "copy"]
    contest.forget()
    ideals = {"ours": contest.ideal(ours=True)}
    if not options.sleep:
        ideals["torch"] = contest.ideal(ours=False)
    ideal = min(ideals.values())
    forward, backward, weight = contest.parts()
    costs = Costs(forward, backward, weight)
    rows = []
    for name in options.schedules:
        try:
            schedule = contest.schedule(name, costs)
        except ConfigError as problem:
            rows.append({"name": name, "refused": str(problem)})
            continue
        expected = simulate(schedule, costs).makespan
        for kind in kinds:
            contest.forget()
            if contest.rank == 0:
                print(f"# {name} {kind}", file=sys.stderr, flush=True)
            times, peak = contest.ours(schedule, kind)
            median = statistics.median(times)
            rows.append(
                {
                    "name": name,
                    "chosen": f"{schedule.name}/{schedule.placement.chunks}",
                    "transport": kind,
                    **_times(times),
                    "of_bubble_free": ideal / median,
                    "simulated_of_bubble_free": microbatches * (forward + backward + weight) / expected,
                    "prediction_error": median / expected - 1.0,
                    "peak_gib": peak,
                    "splits": any(a.kind is Kind.W for a in schedule.ranks[-1]),
                }
            )
    for name in options.peers:
        contest.forget()
        times, peak = contest.peer(name)
        rows.append(
            {
                "name": f"torch {name}",
                **_times(times),
                "of_bubble_free": ideal / statistics.median(times),
                "peak_gib": peak,
            }
        )
    return {
        "microbatches": microbatches,
        "ranks": contest.ranks,
        "bubble_free_milliseconds": {name: 1e3 * value for name, value in ideals.items()},
        "f_b_w_milliseconds": [1e3 * forward, 1e3 * backward, 1e3 * weight],
        "results": rows,
    }


def _times(times: list[float]) -> dict[str, float]:
    return {"milliseconds": 1e3 * statistics.median(times), "min": 1e3 * min(times), "max": 1e3 * max(times)}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="lightning-moe bench pipeline", description=__doc__)
    parser.add_argument("--ranks", type=int, default=4, help="processes to start when no launcher has")
    parser.add_argument("--microbatches", type=_integers, default=[8], help="one or more numbers: 4,8,16")
    parser.add_argument(
        "--schedules",
        type=_words,
        default=["1f1b", "interleaved-1f1b", "zb-h1", "zb-h2", "zb-v", "zb-h1-interleaved/4", "auto"],
        help="names, or name/chunks",
    )
    parser.add_argument(
        "--peers", type=_words, default=None, help=f"of torch: {','.join(PEERS)}; none to leave them out"
    )
    parser.add_argument("--blocks", type=int, default=16, help="blocks of the whole model")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a microbatch")
    parser.add_argument("--transport", choices=["both", "p2p", "copy"], default="both")
    parser.add_argument("--memory-limit", type=float, help="for the schedule auto, in microbatches of one rank")
    parser.add_argument("--sleep", type=_milliseconds, help="F,B,W of a rank in ms: blocks that only sleep, on CPUs")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available() and not options.sleep
    options.device, options.dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    if options.sleep:
        options.hidden = options.tokens = 8
    if options.peers is None:
        options.peers = [] if options.sleep else list(PEERS)
    options.peers = [name for name in options.peers if name != "none"]
    return options


def _integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _words(text: str) -> list[str]:
    return text.split(",")


def _milliseconds(text: str) -> tuple[float, ...]:
    forward, backward, weight = (float(word) / 1e3 for word in text.split(","))
    return forward, backward, weight


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, and print a table, or one JSON object as the last line of rank 0."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
        return subprocess.call([*command, "-m", "lightning_moe.bench.pipeline", *arguments])
    torch.set_num_threads(1)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if options.device == "cuda" else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device is not None else "gloo", device_id=device)
    results = [measure(options, count) for count in options.microbatches]
    report = {
        "device": torch.cuda.get_device_name() if device is not None else "cpu",
        "torch": torch.__version__,
        "blocks": options.blocks,
        "hidden": options.hidden,
        "tokens_per_microbatch": options.tokens,
        "dtype": str(options.dtype),
        "steps": options.steps,
        "runs": results,
    }
    if dist.get_rank() == 0:
        _print_tables(results)
        if options.json:
            print(json.dumps(report), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _print_tables(results: list[dict[str, Any]]) -> None:
    for run in results:
        ideal = ", ".join(f"{name} {value:.1f}" for name, value in run["bubble_free_milliseconds"].items())
        parts = " : ".join(f"{value:.2f}" for value in run["f_b_w_milliseconds"])
        print(
            f"{run['ranks']} ranks, {run['microbatches']} microbatches; bubble-free ms: {ideal}; F : B : W {parts} ms"
        )
        for row in run["results"]:
            if "refused" in row:
                print(f"  {row['name']:32} refused: {row['refused']}")
                continue
            name = row["name"] + (f" ({row['transport']})" if "transport" in row else "")
            expected = f"  simulated {row['simulated_of_bubble_free']:.3f}" if "simulated_of_bubble_free" in row else ""
            span = f"{row['milliseconds']:8.2f} ms ({row['min']:.1f}-{row['max']:.1f})"
            print(f"  {name:32} {span}  {row['of_bubble_free']:.3f}{expected}  {row['peak_gib']:.2f} GiB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
