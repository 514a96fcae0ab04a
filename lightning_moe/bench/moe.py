"""Expert layers that overlap communication and computation, against all-to-alls and Megatron-core in the same run.

    lightning-moe bench moe --ranks 2 --json
    NCCL_P2P_DISABLE=1 lightning-moe bench moe --ranks 2 --json      # as on GPUs that cannot reach each other
    lightning-moe bench moe --ranks 2 --fluid --json                 # two blocks in the setting of FluidMoE
    lightning-moe bench moe --ranks 2 --device cpu --json            # small, over a simulated link

Each rank has its own tokens, all contestants the same weights and the same routing. Times are those of the slowest
rank; contestants take turns. What the cost model predicts is fed with rates that are measured in the same run.

NCCL takes the way between GPUs that it finds. To see what the layer does without direct access between them, set
NCCL_P2P_DISABLE=1 for the whole run: NCCL then goes through the host's shared memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_moe.bench.moe_contest import CONTESTANTS, SIZES, Contest, LayerSize
from lightning_moe.bench.moe_limits import hidden_fractions, limit_milliseconds, predicted_milliseconds
from lightning_moe.bench.moe_report import environment, print_fluid, print_run
from lightning_moe.bench.moe_timeline import draw_timeline
from lightning_moe.bench.ranks import join_ranks, start_ranks
from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.config.typecheck import closest
from lightning_moe.errors import ConfigError
from lightning_moe.parallel.mesh import ParallelMesh

_SIZE_OPTIONS = ("hidden", "expert_hidden", "experts", "top_k", "tokens", "activation")


def measure(size: LayerSize, options: argparse.Namespace, mesh: ParallelMesh, device: torch.device) -> dict[str, Any]:
    """All contestants on a layer of one size."""
    contest = Contest(size, options, mesh, device)
    contestants = contest.contestants()
    found = contest.rounds.run(contestants, warmup=options.warmup, steps=options.steps)
    errors, equal = contest.compare(contestants)
    run: dict[str, Any] = {
        "shape": asdict(size),
        "load": contest.load(),
        "rates": None if contest.rates is None else asdict(contest.rates),
        "reference": contestants[0].name,
        "simulated_link": contest.link is not None,
        "bitwise_equal": equal,
        "hidden_fraction": None,
        "results": [{"name": name} | series.summary() | errors.get(name, {}) for name, series in found.items()],
    }
    rates, chunking = contest.rates, contest.chunking("p2p")
    if rates is not None:
        for row in run["results"]:
            if row["name"] == "megatron":
                continue
            cut = contest.chunking(row["name"])
            waits = row["name"] == "waiting"
            row["sm_margin"] = contest.sm_margin(row["name"])
            row["chunking"] = None if cut is None else cut._asdict()
            row["predicted_milliseconds"] = predicted_milliseconds(
                contest.shape, rates, cut, options.save, wait_at_once=waits
            )
    if rates is not None and chunking is not None:
        run["limit_milliseconds"] = limit_milliseconds(contest.shape, rates, chunking, options.save)
        if {"p2p", "waiting"} <= found.keys():
            hiding = hidden_fractions(found, contest.shape, rates, chunking, options.save)
            run["hiding"] = hiding
            run["hidden_fraction"] = {name: one["hidden_fraction"] for name, one in hiding.items()}
    if options.timeline is not None and mesh.world_size > 1:
        path = options.timeline
        if len(options.sizes) > 1:
            path = path.with_stem(f"{path.stem}-{size.name}")
        draw_timeline(contest, path)
        run["timeline"] = str(path)
    return run


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: A value cannot work.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-moe bench moe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes to start when no launcher has")
    parser.add_argument("--shapes", type=_words, help=f"of {','.join(SIZES)}; those before small, on CPUs small alone")
    parser.add_argument("--hidden", type=int, help="width of the tokens; this and the next five change every shape")
    parser.add_argument("--expert-hidden", type=int, help="inner width of an expert")
    parser.add_argument("--experts", type=int, help="experts on all ranks")
    parser.add_argument("--top-k", type=int, help="experts that a token visits")
    parser.add_argument("--tokens", type=int, help="tokens of each rank")
    parser.add_argument("--activation", choices=["swiglu", "gelu", "relu"])
    parser.add_argument("--contestants", type=_words, help=f"of {','.join(CONTESTANTS)}; errors are those to the first")
    parser.add_argument("--chunk", choices=["auto", "source", "expert"], default="auto", help="what a message holds")
    parser.add_argument(
        "--expert-groups", type=int, help="groups that experts are exchanged in; the model's if left out"
    )
    parser.add_argument("--save", choices=["fc1", "recompute", "redispatch"], default="fc1", help="kept for backward")
    routing = parser.add_mutually_exclusive_group()
    routing.add_argument("--balanced", action="store_true", help="as many tokens for every expert")
    routing.add_argument("--skew", type=float, default=0.0, help="spread of popularities, where 1 is that of choices")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="bf16 on CUDA, fp32 on CPUs if left out")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="CUDA where there is one")
    parser.add_argument("--link-gigabytes", type=float, help="GB/s of the simulated link, on CPUs; 0.1 if left out")
    parser.add_argument("--warmup", type=int, default=3, help="rounds that do not count")
    parser.add_argument("--steps", type=int, default=10, help="rounds that do")
    parser.add_argument(
        "--main-grads", action="store_true", help="sum experts' gradients in float32 buffers, in training"
    )
    parser.add_argument("--timeline", type=Path, metavar="FILE.svg", help="picture of one step of p2p on rank 0")
    parser.add_argument("--fluid", action="store_true", help="measure two transformer blocks instead of one layer")
    parser.add_argument(
        "--sm-margin",
        type=int,
        help="multiprocessors that products leave to messages, on CUDA; as the strategy does if left out",
    )
    parser.add_argument(
        "--attention-chunks", type=int, default=2, help="parts that heads are exchanged in, with --fluid"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cpu = options.device == "cpu"
    options.dtype = torch.bfloat16 if (options.dtype or ("fp32" if cpu else "bf16")) == "bf16" else torch.float32
    options.ranks = int(os.environ.get("WORLD_SIZE", options.ranks))
    if options.contestants is None:
        peer = not cpu and options.dtype is torch.bfloat16
        options.contestants = [name for name in CONTESTANTS if peer or name != "megatron"]
    if cpu and options.link_gigabytes is None:
        options.link_gigabytes = 0.1
    _check(options)
    options.sizes = [] if options.fluid else _sizes(options)
    return options


def _check(options: argparse.Namespace) -> None:
    """Refuse now what would otherwise fail on all ranks.

    Raises:
        ConfigError: A value cannot work.
    """
    if options.ranks < 2:
        raise ConfigError("--ranks", options.ranks, "at least 2", "a single rank has nothing to exchange")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", "cuda", "cpu on this machine", "torch finds no CUDA device")
    if options.device == "cuda" and "RANK" not in os.environ and options.ranks > torch.cuda.device_count():
        raise ConfigError("--ranks", options.ranks, f"at most {torch.cuda.device_count()}, the GPUs of this machine")
    for name, least in (("warmup", 0), ("steps", 1), ("expert_groups", 1), ("attention_chunks", 1), ("sm_margin", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')}", value, f"at least {least}")
    if options.skew < 0:
        raise ConfigError("--skew", options.skew, "at least 0")
    if options.link_gigabytes is not None and (options.device == "cuda" or options.link_gigabytes <= 0):
        hint = "on GPUs the link is what it is; NCCL_P2P_DISABLE=1 makes it slower"
        raise ConfigError("--link-gigabytes", options.link_gigabytes, "above 0, with --device cpu", hint)
    for name in options.contestants:
        if name not in CONTESTANTS:
            raise ConfigError("--contestants", name, "of " + ", ".join(CONTESTANTS), closest(name, CONTESTANTS))
    if len(set(options.contestants)) < len(options.contestants):
        raise ConfigError("--contestants", ",".join(options.contestants), "each of them once")
    if "megatron" in options.contestants and (options.device, options.dtype) != ("cuda", torch.bfloat16):
        hint = "its dispatcher needs CUDA streams and its grouped experts bfloat16; leave it out here"
        raise ConfigError("--contestants", "megatron", "with --device cuda and --dtype bf16", hint)


def _sizes(options: argparse.Namespace) -> list[LayerSize]:
    """The shapes of the command line.

    Raises:
        ConfigError: One is unknown, or does not suit the ranks.
    """
    given = {name: value for name in _SIZE_OPTIONS if (value := getattr(options, name)) is not None}
    for name, value in given.items():
        if name != "activation" and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}", value, "at least 1")
    if options.shapes is None and set(_SIZE_OPTIONS) - {"activation"} <= set(given):
        sizes = [LayerSize("own", **given)]
    else:
        names = options.shapes or (
            ["small"] if options.device == "cpu" else [name for name in SIZES if name != "small"]
        )
        for name in names:
            if name not in SIZES:
                raise ConfigError("--shapes", name, "of " + ", ".join(SIZES), closest(name, SIZES))
        sizes = [replace(SIZES[name], **given) for name in names]
    for size in sizes:
        if size.top_k > size.experts:
            raise ConfigError("--top-k", size.top_k, f"at most the {size.experts} experts")
        if size.experts % options.ranks:
            raise ConfigError("--experts", size.experts, f"a multiple of the {options.ranks} ranks")
        if options.balanced and size.experts > size.hidden:
            raise ConfigError("--balanced", True, "with --hidden of at least the number of experts")
    return sizes


def _words(text: str) -> list[str]:
    return text.split(",")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, and print tables, and JSON as the last line of rank 0."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parse(arguments)
    except ConfigError as problem:
        print(problem, file=sys.stderr)
        return 2
    code = start_ranks("lightning_moe.bench.moe", options.ranks, arguments)
    if code is not None:
        return code
    device = join_ranks(options.device)
    report = environment(options, device)
    if options.fluid:
        from lightning_moe.bench.moe_fluid import measure_fluid  # loads the models

        report["fluid"] = measure_fluid(options, device)
        _on_first(print_fluid, report["fluid"])
    else:
        mesh = ParallelMesh.build(ParallelConfig(expert=dist.get_world_size()))
        report["runs"] = []
        for size in options.sizes:
            report["runs"].append(measure(size, options, mesh, device))
            _on_first(print_run, report["runs"][-1])
            gc.collect()  # weights in cycles of references
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if options.json and dist.get_rank() == 0:
        print(json.dumps(report), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _on_first(show: Any, figures: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        show(figures)


if __name__ == "__main__":
    sys.exit(main())
