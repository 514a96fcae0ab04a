"""Where a LightningModule stands among the ranks, under any strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.pipeline.spec import PipelineRunner

if TYPE_CHECKING:
    import lightning.pytorch as pl


def mesh_of(module: pl.LightningModule) -> ParallelMesh | None:
    """The mesh of the module's strategy, while it has one."""
    strategy = module._trainer.strategy if module._trainer is not None else None
    try:
        mesh = getattr(strategy, "mesh", None)
    except RuntimeError:  # the strategy has one, but not in this process (the main process of spawn)
        return None
    return mesh if isinstance(mesh, ParallelMesh) else None


def pipeline_of(module: pl.LightningModule) -> PipelineRunner | None:
    """The module's strategy, if it builds and runs models by parts; None for those that hold a model whole."""
    if mesh_of(module) is None:  # no strategy of ours, or the main process of spawn, which runs no schedules
        return None
    strategy = module.trainer.strategy
    return cast(PipelineRunner, strategy) if getattr(strategy, "is_pipelined", False) else None


def on_first_stage(module: pl.LightningModule, counts: Tensor) -> Tensor:
    """Counts that all stages of a pipeline know, on one of them, and zeros on the others: ranks then add up to them."""
    mesh = mesh_of(module)
    return counts if mesh is None or mesh.rank(Axis.PIPELINE) == 0 else torch.zeros_like(counts)


def mean_over_data_ranks(module: pl.LightningModule, values: Tensor) -> Tensor:
    """Mean over the ranks that see different samples, or different parts of them; a collective call.

    Gradients are averaged over these ranks. Dividing each local sum of losses by the *mean* number of its terms makes
    that average the gradient of the global sum over the global number, however unevenly the terms are spread.

    Args:
        module: The module whose strategy knows the ranks.
        values: Any shape; numbers of terms or sums of losses.

    Returns:
        The shape of ``values``, float64 (float32 where the device has no float64).
    """
    values = values.to(torch.float64 if values.device.type != "mps" else torch.float32, copy=True)
    mesh = mesh_of(module)
    if mesh is not None:
        group = mesh.active_group(Axis.DATA_CONTEXT)
        if group is not None:
            dist.all_reduce(values, group=group)
            values /= mesh.size(Axis.DATA_CONTEXT)
        return values
    if module._trainer is not None and module._trainer.world_size > 1:
        mean: Tensor = module._trainer.strategy.reduce(values, reduce_op="mean")
        return mean
    return values
