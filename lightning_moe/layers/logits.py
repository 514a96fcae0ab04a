"""Logits of the whole vocabulary, gathered from the ranks that share it. T tokens, D model width, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.layers.column_matmul import column_matmul
from lightning_moe.layers.token_layout import TokenLayout
from lightning_moe.parallel.collectives import slices_to_copies
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh


def whole_logits(hidden: Tensor, weight: Tensor, *, mesh: ParallelMesh, vocab_size: int, layout: TokenLayout) -> Tensor:
    """``hidden @ weight^T`` for the whole vocabulary on every rank: for sampling, and to compare models.

    Training does not need them, see :func:`~lightning_moe.layers.linear_cross_entropy`.

    Args:
        hidden: Hidden states as ``layout`` says: ``[T / tensor, D]`` with sequence parallelism, else ``[T, D]``.
        weight: This rank's rows of the output projection (see :class:`~lightning_moe.layers.VocabularyShard`).
        mesh: The parallel mesh.
        vocab_size: Size ``V`` of the whole vocabulary.
        layout: How the hidden states are laid out.

    Returns:
        ``[T, V]``, the same on all tensor ranks.
    """
    group, ranks = mesh.active_group(Axis.TENSOR), mesh.size(Axis.TENSOR)
    own = column_matmul(hidden, weight, group, sequence_parallel=layout.sequence_parallel)
    # A gather wants equal shapes: the shares, which differ by one token, are filled up and cut again.
    base, more = divmod(vocab_size, ranks)
    width = base + (more > 0)
    gathered = slices_to_copies(F.pad(own, (0, width - own.shape[1])), group, dim=-1)
    if more == 0:
        return gathered
    return torch.cat([part[:, : base + (rank < more)] for rank, part in enumerate(gathered.split(width, dim=-1))], -1)
