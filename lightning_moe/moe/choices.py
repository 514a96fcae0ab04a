"""Arithmetic on routing choices: a *choice* is one of the K experts that one token was routed to.

T tokens, K top-k, E experts, N = T*K choices in token-major order: choice ``n`` belongs to token ``n // K``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count_choices(experts: Tensor, num_experts: int, sent: Tensor | None = None) -> Tensor:
    """Number of choices per expert, without reading anything back to the host.

    Args:
        experts: Expert of each choice, int64 of any shape, in ``[0, num_experts)``.
        num_experts: Number of experts ``E``.
        sent: Bool of the same shape: which choices count; None for all.

    Returns:
        int64 ``[E]``.
    """
    # torch.bincount would do, but on CUDA it waits for the maximum to reach the host.
    keys = _keys(experts, num_experts, sent)
    counts = keys.new_zeros(num_experts + 1)
    return counts.scatter_add_(0, keys, torch.ones_like(keys))[:num_experts]


def order_of_choices(experts: Tensor, num_experts: int, sent: Tensor | None = None) -> Tensor:
    """Choices sorted by expert, those of one expert in their own order; those that do not count come last.

    Args:
        experts: Expert of each choice, int64 of any shape, in ``[0, num_experts)``.
        num_experts: Number of experts ``E``.
        sent: Bool of the same shape: which choices count; None for all.

    Returns:
        int64 ``[N]``.
    """
    keys = _keys(experts, num_experts, sent)
    # CUDA sorts digit by digit: a quarter of the bits is a quarter of the passes.
    return torch.argsort(keys.to(torch.int16 if num_experts < 2**15 else torch.int32), stable=True)


def position_in_expert(experts: Tensor, num_experts: int, sent: Tensor | None = None) -> Tensor:
    """Position of each choice among the choices of the same expert, in the order of the flattened input.

    Args:
        experts: Expert of each choice, int64 of any shape, in ``[0, num_experts)``.
        num_experts: Number of experts ``E``.
        sent: Bool of the same shape: which choices count; None for all. The others get meaningless positions.

    Returns:
        int64 of the shape of ``experts``, from 0 for each expert.
    """
    keys, order = _keys(experts, num_experts, sent), order_of_choices(experts, num_experts, sent)
    counts = keys.new_zeros(num_experts + 1).scatter_add_(0, keys, torch.ones_like(keys))
    first = counts.cumsum(0) - counts
    position = torch.empty_like(keys)
    position[order] = torch.arange(keys.numel(), device=keys.device) - first[keys[order]]
    return position.view_as(experts)


def _keys(experts: Tensor, num_experts: int, sent: Tensor | None) -> Tensor:
    """Flat expert ids, with ``num_experts`` for choices that do not count."""
    return (experts if sent is None else experts.masked_fill(~sent, num_experts)).reshape(-1)
