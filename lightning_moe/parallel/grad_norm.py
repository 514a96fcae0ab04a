"""The norm of the whole model's gradient."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh


def global_grad_norm(
    grads: list[tuple[Tensor, int]], mesh: ParallelMesh, device: torch.device, norm_type: float = 2.0
) -> Tensor:
    """Norm of the whole model's gradient, each element counted once; a collective call on all ranks.

    Args:
        grads: The reduced gradients that this rank answers for, each with the number of ranks that answer for
            the same elements (see :meth:`~lightning_moe.parallel.gradients.GradientReducer.own_grad`).
        mesh: The parallel mesh.
        device: Where to compute; needed because a rank may have no gradient at all.
        norm_type: Order of the norm; ``inf`` for the largest absolute value.

    Returns:
        Scalar of float64, equal on all ranks.
    """
    largest = math.isinf(norm_type)
    alike: dict[tuple[int, torch.dtype], list[Tensor]] = defaultdict(list)
    for grad, copies in grads:
        if grad.numel():
            dtype = torch.promote_types(grad.dtype.to_real(), torch.float32)
            alike[copies, dtype].append(grad.abs() if grad.is_complex() else grad)
    # Always the same dtype: a rank without any gradient takes part in the same all-reduce.
    total = torch.zeros((), dtype=torch.float64, device=device)
    for (copies, dtype), members in alike.items():
        norms = torch.stack(torch._foreach_norm(members, norm_type, dtype)).to(total)
        total = torch.maximum(total, norms.max()) if largest else total + norms.pow(norm_type).sum() / copies
    if (group := mesh.active_group(Axis.WORLD)) is not None:
        dist.all_reduce(total, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
    return total if largest else total.pow(1.0 / norm_type)
