"""Root-mean-square normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.parallel.collectives import copies_to_summands, summands_to_copies
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import ShardSpec, set_shard_spec


class RMSNorm(nn.Module):
    """Scale each vector to unit root mean square, then by a learned gain.

    Zhang & Sennrich 2019, arXiv:1910.07467. The statistics are taken in float32 at least: squares of bf16 or
    fp16 activations lose all small terms of the sum, and overflow in fp16.

    Args:
        size: Width ``D`` of the vectors.
        eps: Added to the mean square.
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise ``hidden`` ``[..., D]``; the result has its shape and dtype."""
        return rms_norm(hidden, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Show the width and eps in the module's repr."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What :class:`RMSNorm` computes: ``hidden`` ``[..., D]``, with the gain ``weight`` ``[D]``."""
    if hidden.dtype == weight.dtype:  # torch itself takes the statistics of 16-bit vectors in float32
        return F.rms_norm(hidden, weight.shape, weight, eps)
    compute = torch.promote_types(hidden.dtype, torch.float32)
    return F.rms_norm(hidden.to(compute), weight.shape, weight.to(compute), eps).to(hidden.dtype)


class ParallelRMSNorm(nn.Module):
    """:class:`RMSNorm` over vectors whose features are split over the axis ``tensor``.

    Args:
        size: Width of the whole vectors.
        mesh: The parallel mesh.
        index: Features of the whole vectors that this rank holds, in local order.
        eps: Added to the mean square.

    Attributes:
        weight: ``[len(index)]``.
    """

    def __init__(self, size: int, mesh: ParallelMesh, index: Sequence[int], eps: float = 1e-6) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(len(index)))
        self._mesh = mesh
        set_shard_spec(self, "weight", ShardSpec(Axis.TENSOR, 0, size, tuple(index)))

    def forward(self, features: Tensor) -> Tensor:
        """Normalise ``features`` ``[..., len(index)]``; the result has their shape and dtype."""
        compute = torch.promote_types(features.dtype, torch.float32)
        group = self._mesh.active_group(Axis.TENSOR)
        x = features.to(compute)
        squares = summands_to_copies(x.square().sum(dim=-1, keepdim=True), group)
        # Each rank scales its own features with the sum, so its gradient is a sum over ranks too.
        scale = (copies_to_summands(squares, group) / self.size + self.eps).rsqrt()
        return (x * scale * self.weight.to(compute)).to(features.dtype)

    def extra_repr(self) -> str:
        """Show the widths and eps in the module's repr."""
        return f"{self.size}, local={self.weight.shape[0]}, eps={self.eps}"
