"""The gradient norm of a model that is spread over ranks."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh


def global_grad_norm(
    grads: list[tuple[Tensor, Axis | None]], mesh: ParallelMesh, device: torch.device, norm_type: float = 2.0
) -> Tensor:
    """Norm of the whole model's gradient, each parameter counted once; a collective call on all ranks.

    Args:
        grads: This rank's gradients, already reduced, with the axis that each is spread along (see
            :func:`~lightning_moe.parallel.sharding.shard_axis_of`; None for those that every rank holds whole).
        mesh: The parallel mesh.
        device: Where to compute; needed because a rank may have no gradient at all.
        norm_type: Order of the norm; ``inf`` for the largest absolute value.

    Returns:
        Scalar of at least float32, equal on all ranks.
    """
    largest = math.isinf(norm_type)
    reduce_op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
    dtype = torch.float32
    for grad, _ in grads:
        dtype = torch.promote_types(dtype, grad.dtype.to_real())
    total = torch.zeros((), dtype=dtype, device=device)
    # The same axes on every rank, whatever gradients it has: otherwise the all-reduces would not match.
    for axis in (None, Axis.TENSOR, Axis.EXPERT, Axis.EXPERT_TENSOR, Axis.EXPERT_MODEL):
        own = [grad.abs() if grad.is_complex() else grad for grad, sharded_over in grads if sharded_over == axis]
        norms = torch.stack(torch._foreach_norm(own, norm_type, dtype)) if own else torch.zeros(1, dtype=dtype)
        part = norms.to(device, dtype)
        part = part.max() if largest else part.pow(norm_type).sum()
        if axis is not None and mesh.size(axis) > 1:
            dist.all_reduce(part, op=reduce_op, group=mesh.group(axis))
        total = torch.maximum(total, part) if largest else total + part
    if mesh.size(Axis.PIPELINE) > 1:
        dist.all_reduce(total, op=reduce_op, group=mesh.group(Axis.PIPELINE))
    return total if largest else total.pow(1.0 / norm_type)
