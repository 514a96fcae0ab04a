"""Callbacks of Lightning that take one rank for the whole run, and ours in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks

from lightning_moe.callbacks.model_summary import ShardedModelSummary, ShardedRichModelSummary
from lightning_moe.callbacks.throughput import ShardedThroughputMonitor
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh


def substitute_callbacks(trainer: pl.Trainer, mesh: ParallelMesh) -> None:
    """Let summaries show the whole model, and throughput monitors true rates; harmless when called again.

    Lightning's own callback objects stay as they are, and work with another Trainer. Classes that users derive from
    them stay in place.

    Args:
        trainer: The trainer, before any callback's ``setup``.
        mesh: The parallel mesh.
    """
    makers: dict[type[pl.Callback], Callable[[Any], pl.Callback]] = {}
    if any(mesh.size(axis) > 1 for axis in (Axis.PIPELINE, Axis.TENSOR, Axis.EXPERT_MODEL)):
        makers |= _SUMMARIES
    if mesh.size(Axis.DATA) < mesh.world_size:
        makers |= _MONITORS
    present = trainer.callbacks  # type: ignore[attr-defined]
    present[:] = [makers[type(callback)](callback) if type(callback) in makers else callback for callback in present]


_SUMMARIES: Mapping[type[pl.Callback], Callable[[Any], pl.Callback]] = {
    callbacks.ModelSummary: lambda own: ShardedModelSummary(own._max_depth, **own._summarize_kwargs),
    callbacks.RichModelSummary: lambda own: ShardedRichModelSummary(own._max_depth, **own._summarize_kwargs),
}
_MONITORS: Mapping[type[pl.Callback], Callable[[Any], pl.Callback]] = {
    callbacks.ThroughputMonitor: lambda own: ShardedThroughputMonitor(own.batch_size_fn, own.length_fn, **own.kwargs),
}
