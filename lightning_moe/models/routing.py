"""What the routers of a model's layers report together. L MoE layers of the whole model, E experts."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lightning_moe.moe.layer import RoutingInfo


def auxiliary_loss(routing: Collection[RoutingInfo]) -> Tensor:
    """Sum of the load-balancing and z-losses of some layers, scalar; to be added to the model's loss.

    In float64 (float32 where the device has none), in which sums over the layers of each stage of a pipeline add up to
    the sum over all layers.
    """
    losses = torch.stack([routed.auxiliary_loss + routed.z_loss for routed in routing])
    return losses.sum(dtype=sum_dtype(losses.device))


def routing_metrics(routing: Mapping[int, RoutingInfo], num_layers: int, weight: float) -> dict[str, Tensor]:
    """What a part of a model reports of its routers, to be added up over parts and microbatches.

    Args:
        routing: Reports of the part's MoE layers, by their position among those of the whole model.
        num_layers: How many the whole model has, ``L``.
        weight: The microbatch's share of the samples of its batch.

    Returns:
        ``auxiliary``, the losses in float64, and ``tokens_per_expert``, int64 ``[L, E]``: tokens that this rank sent to
        each expert, zeros for the layers of other parts. Nothing for a part without MoE layers.
    """
    if not routing:
        return {}
    counts = next(iter(routing.values())).tokens_per_expert
    tokens = counts.new_zeros(num_layers, len(counts))
    for layer, routed in routing.items():
        tokens[layer] = routed.tokens_per_expert
    return {"auxiliary": weight * as_metric(auxiliary_loss(routing.values())), "tokens_per_expert": tokens}


def as_metric(value: Tensor) -> Tensor:
    """Detached, and in float64 (float32 where the device has none): a metric has the same dtype in every step."""
    return value.detach().to(sum_dtype(value.device))


def sum_dtype(device: torch.device) -> torch.dtype:
    """In what losses and metrics are added up: float64, or float32 where the device has none."""
    return torch.float64 if device.type != "mps" else torch.float32


def load_imbalance(tokens_per_expert: Tensor) -> Tensor:
    """Tokens ``[L, E]`` of the busiest expert over the mean, averaged over layers: float32 scalar, 1 when even."""
    tokens = tokens_per_expert.float()
    return (tokens.amax(-1) / tokens.mean(-1).clamp(min=1e-9)).mean()
