"""Pipeline schedules on equal blocks, against torch.distributed.pipelining in the same run.

    lightning-moe bench pipeline --ranks 4 --microbatches 8 --json
    lightning-moe bench pipeline --ranks 4 --sleep 20,20,20 --json      # on CPUs, stages that only sleep

Times are of forward and backward of all microbatches, without an optimizer. The bubble-free time of a rank is what its
blocks take for the same microbatches alone, without communication; that of a run is that of its slowest rank, with
torch's linear layers or ours, whichever is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from lightning_moe.bench.pipeline_contest import Contest
from lightning_moe.bench.pipeline_peer import PEERS
from lightning_moe.bench.ranks import join_ranks, start_ranks
from lightning_moe.bench.timing import Times
from lightning_moe.config.typecheck import closest
from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.copy_transport import can_map_peers
from lightning_moe.pipeline.costs import Costs
from lightning_moe.pipeline.simulate import simulate


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
            rows.append(
                {
                    "name": name,
                    "chosen": f"{schedule.name}/{schedule.placement.chunks}",
                    "transport": kind,
                    **_times(times),
                    "of_bubble_free": ideal / times.median,
                    "simulated_of_bubble_free": microbatches * (forward + backward + weight) / expected,
                    "prediction_error": times.median / expected - 1.0,
                    "peak_gib": peak,
                    "splits": schedule.splits_backward,
                }
            )
    for name in options.peers:
        contest.forget()
        times, peak = contest.peer(name)
        rows.append(
            {
                "name": f"torch {name}",
                **_times(times),
                "of_bubble_free": ideal / times.median,
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


def _times(times: Times) -> dict[str, float]:
    return {"milliseconds": 1e3 * times.median, "min": 1e3 * times.low, "max": 1e3 * times.high}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: A value cannot work.
    """
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
        options.hidden = options.tokens = options.heads = 8
    if options.peers is None:
        options.peers = [] if options.sleep else list(PEERS)
    options.peers = [name for name in options.peers if name != "none"]
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    """Refuse now what would otherwise fail on all ranks, some of it after minutes.

    Raises:
        ConfigError: A value cannot work.
    """
    for name, least in (("ranks", 1), ("blocks", 1), ("heads", 1), ("hidden", 1), ("tokens", 1), ("steps", 1)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name}", getattr(options, name), f"at least {least}")
    if options.warmup < 0:
        raise ConfigError("--warmup", options.warmup, "at least 0")
    if options.hidden % options.heads:
        raise ConfigError("--heads", options.heads, f"a divisor of --hidden {options.hidden}")
    ranks = int(os.environ.get("WORLD_SIZE", options.ranks))
    if options.blocks % ranks:
        hint = "the bubble-free time is that of the blocks of one rank"
        raise ConfigError("--blocks", options.blocks, f"a multiple of the {ranks} ranks", hint)
    for name in options.peers:
        if name not in PEERS:
            raise ConfigError("--peers", name, "of " + ", ".join((*PEERS, "none")), closest(name, PEERS))
    if options.blocks % (2 * ranks) and set(options.peers) - {"1F1B", "InterleavedZeroBubble"}:
        allowed = f"a multiple of {2 * ranks}, for torch's schedules of two chunks on {ranks} ranks"
        raise ConfigError("--blocks", options.blocks, allowed, "or leave those out of --peers")
    for name in options.schedules:
        _, slash, chunks = name.partition("/")
        if slash and not (chunks.isdecimal() and int(chunks)):
            raise ConfigError("--schedules", name, "names, or name/chunks such as zb-v/4")


def _not_allowed(text: str, allowed: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: {allowed}")


def _integers(text: str) -> list[int]:
    numbers = [int(word) if word.isdecimal() else 0 for word in text.split(",")]
    if min(numbers) < 1:
        raise _not_allowed(text, "positive integers with commas between them: 4,8,16")
    return numbers


def _words(text: str) -> list[str]:
    return text.split(",")


def _milliseconds(text: str) -> tuple[float, ...]:
    try:
        forward, backward, weight = (float(word) / 1e3 for word in text.split(","))
        costs = Costs(forward, backward, weight)
    except ValueError:
        raise _not_allowed(text, "three positive times F,B,W in milliseconds: 20,20,20") from None
    return costs.forward, costs.backward, costs.weight


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, and print a table, or one JSON object as the last line of rank 0."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parse(arguments)
    except ConfigError as problem:
        print(problem, file=sys.stderr)
        return 2
    code = start_ranks("lightning_moe.bench.pipeline", options.ranks, arguments)
    if code is not None:
        return code
    device = join_ranks(options.device)
    results = [measure(options, count) for count in options.microbatches]
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
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
