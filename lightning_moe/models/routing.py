"""What the routers of a model's layers report together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_moe.moe.layer import RoutingInfo

# L MoE layers, E experts.


def auxiliary_loss(routing: Sequence[RoutingInfo]) -> Tensor:
    """Sum of the load-balancing and z-losses of all layers, scalar; to be added to the model's loss."""
    return torch.stack([routed.auxiliary_loss + routed.z_loss for routed in routing]).sum()


def tokens_per_expert(routing: Sequence[RoutingInfo]) -> Tensor:
    """Tokens that this rank sent to each expert of each layer, int64 ``[L, E]``."""
    return torch.stack([routed.tokens_per_expert for routed in routing])


def load_imbalance(routing: Sequence[RoutingInfo]) -> Tensor:
    """Tokens of the busiest expert over the mean, averaged over layers: float32 scalar, 1 when even."""
    tokens = tokens_per_expert(routing).float()
    return (tokens.amax(-1) / tokens.mean(-1).clamp(min=1e-9)).mean()
