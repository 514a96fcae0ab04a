"""Keeping expert ranks in step while their evaluation loops have different lengths."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop

from lightning_moe.moe.participation import serve_until_idle
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.strategy.expert_layers import expert_layers


def serve_after_last_batch(trainer: pl.Trainer, mesh: ParallelMesh) -> None:
    """After this rank's last batch of a dataloader, run its experts for ranks that have more.

    Args:
        trainer: The trainer, right after an evaluation step.
        mesh: The parallel mesh.
    """
    if mesh.size(Axis.EXPERT_MODEL) > 1 and finishes_dataloader(trainer):
        serve_until_idle(expert_layers(trainer.lightning_module))


def finishes_dataloader(trainer: pl.Trainer) -> bool:
    """Whether the evaluation step that has just run was the last one of its dataloader on this rank.

    Expert layers are collective: a rank that has run out of batches must go on serving its experts to the others before
    it enters any other collective, and Lightning's epoch end holds some.

    Dataloaders without a length are only known to end when the whole loop ends; several of them with different
    numbers of batches per rank cannot be told apart and are not supported.
    """
    loop: Any = trainer.predict_loop if trainer.predicting else trainer._evaluation_loop
    sequential = not isinstance(loop, _EvaluationLoop) or loop._is_sequential
    if not sequential or any(length == float("inf") for length in loop.max_batches):
        return bool(loop.batch_progress.is_last_batch)
    # ``ready`` counts over all dataloaders of the run, so the ends of the dataloaders are the running totals.
    return loop.batch_progress.current.ready in set(accumulate(loop.max_batches))
