"""Trains pipelines on GPUs: ``torchrun --nproc_per_node=N -m tests.strategy.pipeline_script OUTPUT``.

With one rank it trains the reference of each case, with more a pipeline over all of them.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from tests.strategy.chains import train_chain
from tests.strategy.tiny import Run

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("zb-h1", {"model": {"experts": {}}, "steps": 3}),
    "accumulated": ("interleaved-1f1b", {"model": {"checkpointed": True}, "accumulate": 3, "length": 32, "steps": 3}),
    "bf16-mixed": ("zb-v", {"precision": "bf16-mixed", "batch": 7, "model": {"experts": {}}, "steps": 3}),
    "16-mixed": ("1f1b", {"precision": "16-mixed", "steps": 3}),
    "64-true": ("zb-h2", {"precision": "64-true", "gradient_clip_val": 0.05, "steps": 3}),
}
"""Cases with a schedule for each: connecting the ranks takes seconds, so not every case has every schedule."""
TRANSPORTS = ("p2p", "copy")


class Allocations(pl.Callback):
    """How often the allocator has asked CUDA for memory, after each step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.counts.append(torch.cuda.memory_stats()["num_device_alloc"])


def to_host(run: Run) -> Run:
    grads = [{name: None if grad is None else grad.cpu() for name, grad in step.items()} for step in run.grads]
    return Run(run.losses, grads, {name: value.cpu() for name, value in run.weights.items()}, run.metrics)


def main() -> None:
    """Run on every rank; rank 0 writes what all have."""
    warnings.filterwarnings("ignore")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    results: dict[Any, Any] = {}
    for name, (schedule, case) in CASES.items():
        if world_size == 1:
            results[name] = [to_host(train_chain(accelerator="gpu", **case))]
            continue
        for transport in TRANSPORTS:
            run = train_chain(world_size, schedule, accelerator="gpu", config={"transport": transport}, **case)
            everybody: list[Any] = [None] * world_size
            dist.all_gather_object(everybody, to_host(run))
            results[name, transport, schedule] = everybody
            print(name, transport, schedule, "trained", file=sys.stderr, flush=True)
    if world_size > 1:
        allocations = Allocations()
        train_chain(world_size, "zb-h1", accelerator="gpu", steps=8, callbacks=[allocations], keep_grads=False)
        results["allocations"] = allocations.counts
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(results, sys.argv[1])


if __name__ == "__main__":
    main()
