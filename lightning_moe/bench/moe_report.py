"""What the expert-layer benchmark prints: the machine, and tables."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch

from lightning_moe.bench.moe_rounds import PARTS

_VARIABLES = (
    "NCCL_P2P_DISABLE",
    "NCCL_P2P_LEVEL",
    "NCCL_SHM_DISABLE",
    "NCCL_NVLS_ENABLE",
    "NCCL_MIN_CTAS",
    "NCCL_MAX_CTAS",
    "NCCL_MAX_P2P_NCHANNELS",
    "CUDA_DEVICE_MAX_CONNECTIONS",
)
"""Variables that change how ranks communicate."""


def environment(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The head of the report: machine, versions, and what holds for all runs."""
    cuda = device.type == "cuda"
    disabled = os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0")
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "ranks": options.ranks,
        "dtype": str(options.dtype).removeprefix("torch."),
        "nccl_p2p_disabled": disabled if cuda else None,
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "link_gigabytes_per_second": options.link_gigabytes,
        "routing": "balanced" if options.balanced else f"skew {options.skew:g}" if options.skew else "random",
        "save": options.save,
        "main_grads": options.main_grads or options.fluid,
        "warmup": options.warmup,
        "steps": options.steps,
    }


def print_run(run: dict[str, Any]) -> None:
    """One shape: a row for each contestant, and what the model says."""
    shape, load = run["shape"], run["load"]
    sizes = ", ".join(f"{name} {value}" for name, value in shape.items() if name != "name")
    print(f"\n{shape['name']}: {sizes}; busiest expert {load['busiest_expert']:.2f}, rank {load['busiest_rank']:.2f}")
    if run["rates"] is not None:
        rates = run["rates"]
        table = ", ".join(f"{rows:g}: {rate / 1e12:.3g}" for rows, rate in rates["gemm"])
        print(
            f"  link {rates['link_bytes_per_second'] / 1e9:.3g} GB/s, {1e6 * rates['latency']:.0f} us a message; "
            f"TFLOP/s by rows of an expert: {table}"
        )
    _print_head(("predicted", "error"))
    for row in run["results"]:
        predicted = row.get("predicted_milliseconds")
        cells = ["" if predicted is None else f"{predicted['step']:.2f}"]
        cells.append(f"{row['relative_error']:.1e} ({row['worst']})" if "relative_error" in row else "reference")
        _print_row(row, cells)
        if row.get("chunking"):
            print(f"      by {row['chunking']['by']}, {row['chunking']['groups']} groups")
    if run["simulated_link"]:
        print("  the all-to-alls of blocking do not cross the simulated link")
    if "limit_milliseconds" in run:
        spans = ", ".join(f"{name} {value:.2f}" for name, value in run["limit_milliseconds"].items())
        print(f"  perfect overlap, ms: {spans}")
    for name, one in run.get("hiding", {}).items():
        share = ""
        if one["hidden_fraction"] is not None:
            share = f": {one['hidden_fraction']:.2f}, of the fastest rounds {one['fastest_hidden_fraction']:.2f}"
        hidden, most = one["hidden_milliseconds"], one["hideable_milliseconds"]
        print(f"  {name}: {hidden:.2f} ms hidden of {most:.2f} that can be{share}")
    if run["bitwise_equal"] is not None:
        _print_equality("p2p and waiting", run["bitwise_equal"])


def print_fluid(run: dict[str, Any]) -> None:
    """The two blocks: a row for each contestant."""
    sizes = ", ".join(f"{name} {value}" for name, value in run["shape"].items())
    print(f"\ntwo blocks: {sizes}")
    _print_head(("over blocking: inference, forward, training", "error"))
    for row in run["results"]:
        over = row["over_blocking"]
        cells = [", ".join(f"{over[part]:.3f}" for part in ("inference", "forward", "step"))]
        cells.append(f"{row['relative_error']:.1e} ({row['worst']})" if "relative_error" in row else "reference")
        _print_row(row, cells)
    for name, equal in run["bitwise_equal"].items():
        _print_equality("waiting and a second run of it" if name == "waiting" else f"{name} and waiting", equal)


def _print_equality(pair: str, equal: dict[str, Any]) -> None:
    unequal = f": NOT {', '.join(equal['unequal'])}" if equal["unequal"] else ""
    print(f"  {pair} are equal bit for bit{unequal}", flush=True)


def _print_head(more: Sequence[str]) -> None:
    spans = "".join(f"{part + ', ms':>26}" for part in PARTS)
    print(f"  {'':18}{spans}{'peak, GiB':>12}  " + "  ".join(more))


def _print_row(row: dict[str, Any], more: Sequence[str]) -> None:
    spans = ""
    for part in PARTS:
        figures = row[part]
        text = f"{figures['milliseconds']:.2f} ({figures['min']:.2f}-{figures['max']:.2f})"
        spans += f"{text:>26}"
    peak = "" if row["step_peak_gib"] is None else f"{row['step_peak_gib']:.2f}"
    print(f"  {row['name']:18}{spans}{peak:>12}  " + "  ".join(more), flush=True)
