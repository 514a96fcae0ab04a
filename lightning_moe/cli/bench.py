"""``lightning-moe bench NAME``: hands over to the measurements, and simulates pipelines without torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from math import inf
from types import MappingProxyType
from typing import Any

from lightning_moe.config.typecheck import closest
from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.costs import Costs
from lightning_moe.pipeline.registry import make_schedule, schedule_names
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.simulate import simulate

MODULES: Mapping[str, str] = MappingProxyType(
    {
        "pipeline": "lightning_moe.bench.pipeline",
        "moe": "lightning_moe.bench.moe",
        "gpt": "lightning_moe.bench.gpt",
        "checkpoint": "lightning_moe.bench.checkpoint",
    }
)
"""Module of each measurement; its ``main`` takes the arguments that follow the name."""

USAGE = """usage: lightning-moe bench NAME [OPTIONS]

  pipeline               schedules of pipelines, ours and torch's, on this machine's devices
  pipeline --simulate    bubble, makespan and peak of every schedule, by simulation and without torch
  moe                    expert layers that overlap communication, and Megatron-core's, on this machine's devices
  gpt                    tokens per second of a GPT-MoE
  checkpoint             how long saving holds up training

`lightning-moe bench NAME --help` tells more. gpt and checkpoint on several ranks are started with torchrun:
torchrun --nproc-per-node=N -m lightning_moe.bench.gpt.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command; ``argv`` is what follows ``bench``. Returns the exit code."""
    name = argv[0] if argv else ""
    if name in ("--help", "-h"):
        print(USAGE, end="")
        return 0
    if name not in MODULES:
        hint = closest(name, MODULES)
        problem = f"unknown measurement {name!r}" + (f"; {hint}" if hint else "") if name else "no measurement named"
        print(problem, USAGE, sep="\n\n", end="", file=sys.stderr)
        return 2
    arguments = list(argv[1:])
    if name == "pipeline" and "--simulate" in arguments:
        return simulate_pipelines(arguments)
    try:
        # Imported by name: it loads torch, which the other commands do without.
        return int(import_module(MODULES[name]).main(arguments) or 0)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except ConfigError as problem:
        print(problem, file=sys.stderr)
        return 2


def simulate_pipelines(argv: Sequence[str]) -> int:
    """Simulate every schedule for one size; ``argv`` is what follows ``bench pipeline``. Returns the exit code."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        costs = _costs(options)
        schedules = {name: _schedule(name, options, costs) for name in schedule_names()}
    except ConfigError as problem:
        print(problem, file=sys.stderr)
        return 2
    results = {
        name: {"error": str(schedule)} if isinstance(schedule, ConfigError) else _figures(schedule, costs)
        for name, schedule in schedules.items()
    }
    _print_table(results, schedules)
    if options.json:
        size = {
            "stages": options.stages,
            "microbatches": options.microbatches,
            "costs": [costs.forward, costs.backward, costs.weight],
            "communication": costs.communication,
            "memory": [costs.activation, costs.weight_activation],
            "memory_limit": options.memory_limit,
        }
        print(json.dumps(size | {"schedules": results}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-moe bench pipeline --simulate",
        description="Bubble, makespan and peak memory of every schedule, by simulation. Times are of all of a rank's "
        "work on one microbatch, in any unit; memory is that of one microbatch on one rank.",
        allow_abbrev=False,
    )
    parser.add_argument("--simulate", action="store_true", required=True)
    parser.add_argument("--stages", type=int, default=4, help="ranks of the pipeline")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--costs", default="1,1,1", help="times of F, B (input gradient) and W (weight gradient)")
    parser.add_argument("--communication", type=float, default=0.0, help="time of a tensor from rank to rank")
    parser.add_argument("--memory", default="1,1", help="memory from F to B, and from B to W")
    parser.add_argument("--chunks", type=int, help="chunks of a rank, for the schedules that can have that many")
    parser.add_argument("--max-lag", type=int, help="most microbatches that weight gradients lag behind")
    parser.add_argument("--memory-limit", type=float, help="schedules that need more are left out")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _costs(options: argparse.Namespace) -> Costs:
    forward, backward, weight = _numbers("--costs", options.costs, "F,B,W")
    activation, weight_activation = _numbers("--memory", options.memory, "M_B,M_W")
    for name in ("stages", "microbatches", "chunks", "max_lag", "memory_limit", "communication"):
        value, least = getattr(options, name), 0 if name in ("max_lag", "memory_limit", "communication") else 1
        if value is not None and not least <= value < inf:
            raise ConfigError(f"--{name.replace('_', '-')}", value, f"at least {least}")
    return Costs(forward, backward, weight, options.communication, activation, weight_activation)


def _numbers(option: str, text: str, form: str) -> list[float]:
    """Positive numbers with commas between them, as many as ``form`` has names."""
    count = form.count(",") + 1
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(0 < number < inf for number in numbers):
        raise ConfigError(option, text, f"{count} positive numbers {form}", "for instance " + ",".join("1" * count))
    return numbers


def _schedule(name: str, options: argparse.Namespace, costs: Costs) -> Schedule | ConfigError:
    """The schedule, with the number of chunks that was asked for if it can have it; else why there is none."""
    refused: ConfigError | None = None
    for chunks in dict.fromkeys((options.chunks, None)):
        try:
            return make_schedule(
                name,
                options.stages,
                options.microbatches,
                chunks=chunks,
                max_lag=options.max_lag,
                costs=costs,
                memory_limit=options.memory_limit,
            )
        except ConfigError as problem:
            refused = problem
    assert refused is not None
    return refused


def _figures(schedule: Schedule, costs: Costs) -> dict[str, Any]:
    simulation = simulate(schedule, costs)
    return {
        "schedule": schedule.name,
        "chunks": schedule.placement.chunks,
        "bubble": simulation.bubble,
        "span_bubble": simulation.span_bubble,
        "makespan": simulation.makespan,
        "peak": max(simulation.peak),
    }


def _print_table(results: Mapping[str, Mapping[str, Any]], schedules: Mapping[str, Schedule | ConfigError]) -> None:
    labels = {
        name: name if result.get("schedule", name) == name else f"{name}: {result['schedule']}"
        for name, result in results.items()
    }
    width = max(map(len, labels.values()))
    print(f"{'schedule':<{width}} {'chunks':>6} {'bubble':>8} {'span bubble':>12} {'makespan':>10} {'peak':>8}")
    for name, result in results.items():
        refused = schedules[name]
        if isinstance(refused, ConfigError):
            print(f"{name:<{width}} {refused.field}: {refused.value}; allowed: {refused.allowed}")
            continue
        print(
            f"{labels[name]:<{width}} {result['chunks']:>6} {result['bubble']:>8.1%} {result['span_bubble']:>12.1%} "
            f"{result['makespan']:>10.2f} {result['peak']:>8.2f}"
        )
