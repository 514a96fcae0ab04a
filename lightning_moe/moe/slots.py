"""The slots of a mesh: where the experts live, and how the parts of one expert are addressed.

E experts, P ranks of the axis expert, X ranks of the axis expert_tensor.

[Note: experts that are split]
With ``expert_tensor`` = X > 1 each expert's inner width is cut into X parts, held by X ranks. A part is treated as an
expert of its own: the exchange runs over all ``P * X`` ranks of ``expert_model``, a choice becomes X choices with the
same weight, and the sum over a token's choices, in its fixed order, adds the parts up. So every rank brings its own
tokens, dispatch and combine know nothing of X, and no collective runs between the two projections; the price is that
X rows instead of one travel for each choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moe.config.moe import MoEConfig
from lightning_moe.config.placement import ExpertPlacement
from lightning_moe.errors import ConfigError
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh


def place_experts(config: MoEConfig, mesh: ParallelMesh) -> ExpertPlacement:
    """Where the experts of a layer live on a mesh.

    Raises:
        ConfigError: The mesh does not suit the layer: the ranks do not divide the experts or their inner width, or
            share the tokens of a series that is to be routed as one.
    """
    shards = mesh.size(Axis.EXPERT_TENSOR)
    if config.expert_hidden_size % shards:
        raise ConfigError(
            "moe.expert_hidden_size",
            config.expert_hidden_size,
            f"a multiple of parallel.expert_tensor = {shards}",
            "every rank holds the same share of each expert",
        )
    if config.routing_granularity == "series" and mesh.size(Axis.CONTEXT_TENSOR) > 1:
        raise ConfigError(
            "moe.routing_granularity",
            "series",
            '"token" with parallel.context or parallel.tensor above 1',
            "these ranks share the tokens of each series, and none of them sees its mean",
        )
    return ExpertPlacement(config.num_experts, mesh.size(Axis.EXPERT), config.expert_placement)


def slots_of_experts(placement: ExpertPlacement, shards: int) -> Tensor:
    """Slots of the parts of each logical expert.

    Args:
        placement: Where the experts live.
        shards: Number of ranks ``X`` that share an expert; they are neighbours in the group of all expert ranks.

    Returns:
        int64 ``[E, X]`` on the CPU: each of ``0 .. E*X - 1`` once. Slots are rank-major, as in
        :class:`~lightning_moe.config.placement.ExpertPlacement`.
    """
    slot = torch.tensor(placement.slot_of_expert, device="cpu")[:, None]
    rank, local = slot // placement.slots_per_rank, slot % placement.slots_per_rank
    return (rank * shards + torch.arange(shards, device="cpu")) * placement.slots_per_rank + local
