"""Ulysses (Jacobs et al. 2023, arXiv:2309.14509): attention over a sequence that context ranks share.

B batch, S sequence, C context ranks, N query heads, M key and value heads (both of one tensor rank), H head width.

[Note: heads for tokens]
Attention is the only layer that needs other tokens, and treats every head alike. Before it, each context rank gives
away its tokens of most heads and receives all tokens of its own share of the heads; after it, the exchange is undone.
Both directions are one all-to-all. Where there are fewer key and value heads than ranks, or a number that they do not
divide, each is sent to several ranks; the backward pass adds the gradients up.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.parallel.collectives import all_to_all


def heads_from_tokens(
    query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange all heads of this rank's tokens for all tokens of this rank's heads, in one all-to-all.

    Args:
        query: ``[B, S / C, N, H]``, a contiguous chunk of every sequence, in rank order.
        key: ``[B, S / C, M, H]``; ``M`` divides ``N``.
        value: Likewise.
        group: The context ranks, whose number divides ``N``; None for a world of one.

    Returns:
        Query ``[B, S, N / C, H]`` and key and value ``[B, S, lcm(M, C) / C, H]``: contiguous shares of the heads, in
        rank order, each query head together with its key and value head.
    """
    if group is None:
        return query, key, value
    ranks = dist.get_world_size(group)
    copies = math.lcm(key.shape[2], ranks) // key.shape[2]
    if copies > 1:
        key, value = (heads.repeat_interleave(copies, dim=2) for heads in (key, value))
    # Each rank's heads side by side: [B, S / C, C, heads of one rank, H].
    shares = [heads.unflatten(2, (ranks, -1)) for heads in (query, key, value)]
    widths = [share.shape[3] for share in shares]
    received = _exchange(torch.cat(shares, dim=3).movedim(2, 0), group)  # [C, B, S / C, heads, H]
    query, key, value = received.movedim(0, 1).flatten(1, 2).split(widths, dim=2)
    return query, key, value


def tokens_from_heads(attended: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Exchange all tokens of this rank's query heads for all query heads of this rank's tokens.

    Args:
        attended: ``[B, S, N / C, H]``.
        group: The context ranks, whose number divides ``S``; None for a world of one.

    Returns:
        ``[B, S / C, N, H]``.
    """
    if group is None:
        return attended
    chunks = attended.unflatten(1, (dist.get_world_size(group), -1))  # [B, C, S / C, N / C, H]
    received = _exchange(chunks.movedim(1, 0), group)
    return received.movedim(0, 2).flatten(2, 3)


def _exchange(blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send block ``i`` of ``[C, ...]`` to rank ``i``; block ``j`` of the result comes from rank ``j``."""
    splits = [1] * blocks.shape[0]
    return all_to_all(blocks, splits, splits, group)
