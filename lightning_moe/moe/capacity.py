"""Capacity limits: how many rows one rank may send to one expert, and which choices are dropped beyond that.

T tokens, K top-k, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moe.config.moe import MoEConfig
from lightning_moe.moe.choices import position_in_expert


def expert_capacity(num_tokens: Tensor, config: MoEConfig) -> Tensor:
    """Rows that one rank may send to one expert: ``ceil(T * K / E * capacity_factor)``, as in Megatron-core.

    Args:
        num_tokens: Number of real tokens ``T`` of this rank, int64 scalar. It stays on its device: the number
            is needed there, and reading it back would stall the host.
        config: Gives ``K``, ``E`` and the capacity factor, which must be set.

    Returns:
        int64 scalar.
    """
    assert config.capacity_factor is not None, "a dropless layer has no capacity"
    balanced = num_tokens.double() * config.top_k / config.num_experts
    return torch.ceil(balanced * config.capacity_factor).long()


def within_capacity(
    experts: Tensor, weights: Tensor, capacity: Tensor, config: MoEConfig, sent: Tensor | None = None
) -> Tensor:
    """Which choices are kept when no expert may receive more than ``capacity`` of them.

    With ``drop_policy="probability"`` each expert keeps its largest weights (the earlier choice on a tie),
    with ``"position"`` its earliest choices in token order. Dropped choices contribute 0 to the output; the
    weights of the choices that are left do not grow.

    Args:
        experts: Chosen experts, int64 ``[T, K]``.
        weights: Their weights, ``[T, K]``.
        capacity: Limit per expert, int64 scalar tensor.
        config: Gives ``E`` and the policy.
        sent: Bool ``[T, K]``: choices of real tokens; None for all.

    Returns:
        Bool ``[T, K]``, a subset of ``sent``.
    """
    if config.drop_policy == "position":
        kept = position_in_expert(experts, config.num_experts, sent) < capacity
    else:
        order = torch.argsort(weights.detach().flatten(), descending=True, stable=True)
        sent_in_order = None if sent is None else sent.flatten()[order]
        position = position_in_expert(experts.flatten()[order], config.num_experts, sent_in_order)
        kept = torch.empty_like(position, dtype=torch.bool)
        kept[order] = position < capacity
        kept = kept.view_as(experts)
    return kept if sent is None else kept & sent
