"""Trains and predicts on GPUs: ``torchrun --nproc_per_node=N -m tests.strategy.gpu_script EXPERT PRECISION OUTPUT``."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Subset

from tests.strategy.test_checkpoint import fit
from tests.strategy.tiny import Sequences, TinyMoE, train, trainer

DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16}
"""Dtype of the data; float32 for the other precisions."""


def predict(world_size: int, expert: int) -> dict[int, Any]:
    """Predict with Lightning's sampler: 9 samples leave the ranks with different numbers of batches."""
    run = trainer(world_size, expert, accelerator="gpu")
    outputs: Any = run.predict(TinyMoE(), DataLoader(Subset(Sequences(64), range(9)), batch_size=4))
    own = {int(i): out for b in outputs for i, out in zip(b["index"], b["output"], strict=True)}
    parts: list[Any] = [own] * world_size
    if world_size > 1:
        dist.all_gather_object(parts, own)
    return {index: out for part in parts for index, out in part.items()}


def resume(world_size: int, expert: int, folder: str) -> list[list[float]]:
    """Losses of a run of four steps, and of one that resumes from its checkpoint after two."""
    gpu: dict[str, Any] = {"accelerator": "gpu"}
    whole = fit(world_size, expert, f"{folder}/whole", 4, **gpu)
    rest = fit(world_size, expert, f"{folder}/rest", 4, f"{folder}/whole/step=2.ckpt", **gpu)
    return [whole["losses"], rest["losses"]]


def main() -> None:
    """Run on every rank; rank 0 writes the result."""
    warnings.filterwarnings("ignore")
    expert, precision, output = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    settings: dict[str, Any] = {
        "dtype": DTYPES.get(precision, torch.float32),
        "precision": precision,
        "accelerator": "gpu",
    }
    if "16" in precision:  # one step of SGD: AdamW's first step is the sign of each gradient, rounded or not
        settings |= {"steps": 1, "model": {"optimizer": "sgd"}}
    else:
        settings |= {"steps": 6}
    run = train(world_size, expert, accumulate=2, gradient_clip_val=0.05, **settings)
    predictions = predict(world_size, expert) if precision == "32-true" else {}
    resumed = resume(world_size, expert, f"{output}.checkpoints") if precision == "64-true" else []
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save({"run": run, "predictions": predictions, "resumed": resumed}, output)


if __name__ == "__main__":
    main()
