"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
        compute = torch.promote_types(hidden.dtype, torch.float32)
        normed = F.rms_norm(hidden.to(compute), self.weight.shape, self.weight.to(compute), self.eps)
        return normed.to(hidden.dtype)

    def extra_repr(self) -> str:
        """Show the width and eps in the module's repr."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
