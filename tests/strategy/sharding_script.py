"""Trains with and without a sharded optimizer: ``torchrun ... -m tests.strategy.sharding_script EXPERT OUTPUT``."""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from lightning_moe import ParallelConfig
from tests.strategy.test_optimizer_sharding import WINDOWS, Model, run

CASES = [
    ("32-true", "adamw-fused"),
    ("32-true", "sgd"),
    ("bf16-true", "adamw-fused"),
    ("bf16-true", "lion"),
    ("bf16-mixed", "adamw"),
    ("16-mixed", "sgd"),
    ("16-mixed", "adamw-fused"),
]


def main() -> None:
    """Rank 0 writes for each case whether all ranks have the same losses and weights, bit for bit."""
    warnings.filterwarnings("ignore")
    expert, output = int(sys.argv[1]), sys.argv[2]
    world_size = int(os.environ["WORLD_SIZE"])
    same: dict[tuple[str, str], bool] = {}
    for precision, optimizer in CASES:
        settings = {**WINDOWS, "accelerator": "gpu"}
        if (precision, optimizer) == ("16-mixed", "adamw-fused"):
            del settings["gradient_clip_val"]  # the optimizer unscales by itself
        model = partial(Model, optimizer, overflow=precision == "16-mixed", unscales=precision == "16-mixed")
        runs = [
            run(world_size, ParallelConfig(expert=expert), sharding, precision, model, settings)
            for sharding in (True, False)
        ]
        (losses, weights, scales), (expected_losses, expected, expected_scales) = runs
        equal = scales == expected_scales and all(torch.equal(weights[name], expected[name]) for name in expected)
        equal = equal and all(a == b or (a != a and b != b) for a, b in zip(losses, expected_losses, strict=True))
        everywhere: list[Any] = [None] * world_size
        dist.all_gather_object(everywhere, equal and len(set(losses)) > 2)
        same[precision, optimizer] = all(everywhere)
    if dist.get_rank() == 0:
        torch.save(same, output)


if __name__ == "__main__":
    main()
