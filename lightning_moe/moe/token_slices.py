"""Sharing tokens that every tensor rank has a copy of: each rank works on a slice of them.

T tokens, D model width, P ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.parallel.collectives import copies_to_slices, slices_to_copies


class TokenSlice(NamedTuple):
    """One rank's tokens."""

    tokens: Tensor
    """``[ceil(T / P), D]``."""
    mask: Tensor | None
    """Bool ``[ceil(T / P)]``: False for tokens that are not real, and for those that only fill up the slices."""
    sequence: Tensor | None
    """Sequence of each token, int64 ``[ceil(T / P)]``."""


def take_slice(hidden: Tensor, mask: Tensor | None, sequence: Tensor | None, group: dist.ProcessGroup) -> TokenSlice:
    """Cut tokens, copies on all ranks of a group, into equal slices, and keep this rank's.

    Args:
        hidden: ``[..., D]`` with ``T`` tokens.
        mask: Bool ``[...]``, True for real tokens; None when all are.
        sequence: int64 ``[...]``; None when nobody asks.
        group: The tensor group.
    """
    tokens = hidden.flatten(0, -2)
    missing = -tokens.shape[0] % dist.get_world_size(group)
    if missing:
        mask = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device) if mask is None else mask
        tokens = F.pad(tokens, (0, 0, 0, missing))
    return TokenSlice(copies_to_slices(tokens, group), _part(mask, missing, group), _part(sequence, missing, group))


def gather_slices(tokens: Tensor, like: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Undo :func:`take_slice`: the ranks' slices ``[ceil(T / P), D]`` as copies in the shape of ``like``."""
    return slices_to_copies(tokens, group)[: like.shape[:-1].numel()].view_as(like)


def _part(values: Tensor | None, missing: int, group: dist.ProcessGroup) -> Tensor | None:
    """This rank's slice of values per token, filled up with False or 0."""
    return None if values is None else copies_to_slices(F.pad(values.flatten(), (0, missing)), group)
