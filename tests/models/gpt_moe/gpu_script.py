"""Trains on GPUs, every topology of N: ``torchrun --nproc_per_node=N -m tests.models.gpt_moe.gpu_script OUTPUT``."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from tests.models.gpt_moe.test_parallel import topologies
from tests.models.gpt_moe.training import Case, assemble, topology_name, train
from tests.strategy.tiny import Run

CASES = {
    "64-true": Case("untied", steps=6, accelerator="gpu", precision="64-true"),
    "32-true": Case("untied", steps=3, learning_rate=1e-12, accelerator="gpu", precision="32-true"),
    "bf16-mixed": Case("untied", steps=1, learning_rate=1e-12, accelerator="gpu", precision="bf16-mixed"),
}
"""Where nothing but rounding differs, AdamW must not blow it up: only float64 moves the weights."""


def main() -> None:
    """Run on every rank; rank 0 writes the runs by topology and precision."""
    warnings.filterwarnings("ignore")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    runs: dict[tuple[str, str], Run] = {}
    for world, parallel in topologies():
        if world != world_size:
            continue
        for precision, case in CASES.items():
            local = train(world, replace(case, parallel=parallel))
            ranks: list[Any] = [local] * world
            if world > 1:
                dist.all_gather_object(ranks, local)
            runs[topology_name(parallel), precision] = assemble(ranks)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(runs, sys.argv[1])


if __name__ == "__main__":
    main()
