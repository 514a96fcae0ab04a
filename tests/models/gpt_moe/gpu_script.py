"""Trains on NCCL ranks: ``torchrun --nproc_per_node=N -m tests.models.gpt_moe.gpu_script FOLDER``.

Every rank writes its :class:`LocalRun` of each case to ``FOLDER/RANK.pt``. Without GPUs it trains on gloo ranks.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import replace

import torch

from lightning_moe import ParallelConfig
from tests.models.gpt_moe.training import Case, LocalRun, train_all

PRECISIONS = {
    "64-true": Case(dtype=torch.float64, steps=6),
    # Weights that stay where they are, so that every step compares gradients alone.
    "32-true": Case(dtype=torch.float32, steps=3, learning_rate=1e-12),
    "bf16-mixed": Case(dtype=torch.float32, steps=3, learning_rate=1e-12, precision="bf16-mixed"),
}
TOPOLOGIES: dict[int, list[ParallelConfig | None]] = {
    1: [None],
    2: [
        ParallelConfig(expert=2),
        ParallelConfig(tensor=2, expert=2),
        ParallelConfig(tensor=2, sequence_parallel=False, expert_tensor=2),
        ParallelConfig(context=2, expert=2),
    ],
    4: [
        ParallelConfig(tensor=2, expert=2, expert_tensor=2),
        ParallelConfig(context=2, tensor=2, expert=4),
        ParallelConfig(context=2, tensor=2, sequence_parallel=False, expert=2),
        ParallelConfig(expert=4),
    ],
}
"""By world size; None is one GPU under Lightning's own strategy."""


def cases_on(world_size: int) -> list[tuple[str, ParallelConfig | None, Case]]:
    """Precision, topology and training run of each case."""
    return [
        (precision, parallel, replace(case, parallel=parallel))
        for precision, case in PRECISIONS.items()
        for parallel in TOPOLOGIES[world_size]
    ]


def main() -> None:
    """Run on every rank."""
    warnings.filterwarnings("ignore")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    cases = [replace(case, accelerator=accelerator) for _, _, case in cases_on(world_size)]
    runs: list[LocalRun] = train_all(world_size, cases)
    torch.save(runs, os.path.join(sys.argv[1], f"{rank}.pt"))


if __name__ == "__main__":
    main()
