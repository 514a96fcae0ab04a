"""The Mixture-of-Experts layer: router, dispatch, experts, combine, one after the other.

T tokens, K top-k, E experts, D model width, B batch, S sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_moe.config.moe import MoEConfig
from lightning_moe.config.placement import ExpertPlacement
from lightning_moe.errors import ConfigError
from lightning_moe.moe import balance
from lightning_moe.moe.capacity import expert_capacity, within_capacity
from lightning_moe.moe.choices import count_choices
from lightning_moe.moe.dispatch import RowCounts, combine, dispatch, plan_dispatch
from lightning_moe.moe.experts import GroupedExperts, compute_dtype
from lightning_moe.moe.participation import announce_call
from lightning_moe.moe.router import Routing, TopKRouter
from lightning_moe.moe.shared_expert import SharedExpert
from lightning_moe.parallel.mesh import ParallelMesh


class RoutingInfo(NamedTuple):
    """What a layer reports beside its output."""

    auxiliary_loss: Tensor
    """Load-balancing loss with its coefficient, to be added to the model's loss; 0 when it is off."""
    z_loss: Tensor
    """Router z-loss with its coefficient, likewise."""
    tokens_per_expert: Tensor
    """This rank's choices of real tokens per logical expert, before any are dropped, int64 ``[E]``."""
    dropped: Tensor
    """How many of them exceeded the capacity, int64 scalar; 0 for a dropless layer."""


class MoELayer(nn.Module):
    """A feed-forward layer of which each token uses ``top_k`` of ``num_experts`` parts.

    Without a mesh the layer holds all experts and communicates with no one. With a mesh it holds this rank's
    experts; every rank of the axis ``expert`` must then call it equally often (see
    :mod:`lightning_moe.moe.participation` for evaluation), on any number of tokens, also none.

    Args:
        hidden_size: Width ``D`` of the tokens.
        config: The layer's settings.
        mesh: This rank's place; None for a layer of a single process, which :meth:`shard_` can spread later.

    Attributes:
        router: The :class:`TopKRouter`.
        experts: The :class:`GroupedExperts` of this rank.
        shared_expert: The :class:`SharedExpert`, or None.
        placement: Which expert lives where.
        layer_index: Position among the layers that share the expert group.
        header_slots: Most experts of any layer that shares the expert group.

    Raises:
        ConfigError: The expert ranks do not divide the experts.
    """

    slot_of_expert: Tensor

    def __init__(self, hidden_size: int, config: MoEConfig, mesh: ParallelMesh | None = None) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.config = config
        self.mesh = _supported(mesh if mesh is not None else ParallelMesh.single())
        self.layer_index = 0
        self.header_slots = config.num_experts
        self.placement = self._place(self.mesh)
        self.router = TopKRouter(hidden_size, config)
        self.experts = GroupedExperts(
            hidden_size,
            config.expert_hidden_size,
            config.activation,
            config.num_experts,
            self.placement.local_experts(self.mesh.rank("expert")),
            config.grouped_gemm,
        )
        self.shared_expert = None
        if config.shared_expert_hidden_size:
            self.shared_expert = SharedExpert(
                hidden_size, config.shared_expert_hidden_size, config.activation, config.shared_expert_gate
            )
        slots = torch.tensor(self.placement.slot_of_expert)
        self.register_buffer("slot_of_expert", slots, persistent=False)

    @property
    def expert_group(self) -> dist.ProcessGroup | None:
        """The ranks that the experts are spread over; None when this rank holds them all."""
        if self.mesh.size("expert") == 1:
            return None
        group = self.mesh.group("expert")
        # A pickled mesh comes back without groups: sending nothing would look like a layer that lost most
        # experts.
        assert group is not None, "this mesh has lost its process groups"
        return group

    def shard_(self, mesh: ParallelMesh) -> None:
        """Spread a layer that was built whole: keep only this rank's experts, and communicate from now on.

        The parameters stay the same objects (an optimizer may hold them) and lose their gradients. A layer
        that is already spread in this way is left as it is.

        Raises:
            ConfigError: The expert ranks do not divide the experts, or the layer is already spread in another
                way.
        """
        placement = self._place(_supported(mesh))
        self.experts.keep_(placement.local_experts(mesh.rank("expert")))
        self.mesh, self.placement = mesh, placement

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, RoutingInfo]:
        """Apply the layer.

        Args:
            hidden: ``[B, S, D]`` or ``[T, D]``; float32, float64, bfloat16 or float16.
            mask: Bool ``[B, S]`` or ``[T]``, True for real tokens. The others are not routed, count nowhere
                and get zeros. None when all are real.

        Returns:
            The output, in the shape and dtype of ``hidden``, and the :class:`RoutingInfo`.

        Raises:
            ConfigError: The shapes do not fit.
        """
        self._check_shapes(hidden, mask)
        if mask is not None:
            # Zeroed as well as left out: a NaN in a padded position would reach the router's weight gradient.
            hidden = hidden.masked_fill(~mask[..., None], 0)
        routing = self.router(hidden, mask)
        tokens = hidden.flatten(0, -2)
        sent, sizes = self._limit(routing, None if mask is None else mask.flatten())
        out = self._apply_experts(tokens, routing, sent, sizes)
        if self.shared_expert is not None:
            out = out + self.shared_expert(tokens).to(out.dtype)
        return out.view_as(hidden), self._report(routing, sent, hidden, mask)

    @torch.no_grad()
    def serve(self, dtype: torch.dtype, counts: RowCounts) -> None:
        """Compute this rank's experts for the other ranks' tokens, with none of its own.

        Args:
            dtype: Dtype of the rows.
            counts: Rows that each rank sends to each slot, as announced.
        """
        weight = self.router.weight
        tokens = weight.new_empty((0, self.hidden_size), dtype=dtype)
        choices = torch.empty((0, self.config.top_k), dtype=torch.int64, device=weight.device)
        plan = plan_dispatch(choices, counts, self.mesh.rank("expert"))
        rows = dispatch(tokens, plan, self.expert_group)
        # Autocast is decided by the ranks that call, and the dtype they announced already says so.
        with torch.autocast(weight.device.type, enabled=False):
            rows = self.experts(rows, plan.expert_counts, plan.expert_offsets)
        combine(rows, torch.empty_like(choices, dtype=torch.float32), plan, self.expert_group, dtype)

    def _apply_experts(self, tokens: Tensor, routing: Routing, sent: Tensor | None, sizes: Tensor) -> Tensor:
        """Output ``[T, D]`` of the routed experts."""
        group, dtype = self.expert_group, compute_dtype(tokens)
        counts = announce_call(self.layer_index, dtype, sizes, self.header_slots, group)
        plan = plan_dispatch(
            self.slot_of_expert[routing.experts],
            counts,
            self.mesh.rank("expert"),
            sent,
            padded=self.config.pad_to_capacity,
        )
        rows = dispatch(tokens.to(dtype), plan, group)
        rows = self.experts(rows, plan.expert_counts, plan.expert_offsets)
        return combine(rows, routing.weights, plan, group, tokens.dtype)

    def _limit(self, routing: Routing, mask: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Choices that are sent, bool ``[T, K]`` or None for all, and rows to each slot, int64 ``[E]``."""
        config, experts = self.config, routing.experts
        sent = None if mask is None else mask[:, None].expand_as(experts)
        if config.capacity_factor is None:
            counts = routing.tokens_per_expert
        else:
            num_tokens = routing.tokens_per_expert.sum() // config.top_k
            capacity = expert_capacity(num_tokens, config)
            sent = within_capacity(experts, routing.weights, capacity, config, sent)
            if config.pad_to_capacity:
                return sent, capacity.expand(config.num_experts)
            counts = count_choices(experts, config.num_experts, sent)
        return sent, torch.empty_like(counts).scatter_(0, self.slot_of_expert, counts)

    def _report(self, routing: Routing, sent: Tensor | None, hidden: Tensor, mask: Tensor | None) -> RoutingInfo:
        config, counts = self.config, routing.tokens_per_expert
        off = routing.logits.new_zeros(())
        z_loss = off
        if config.z_loss_coefficient:
            flat_mask = None if mask is None else mask.flatten()
            z_loss = config.z_loss_coefficient * balance.z_loss(routing.logits, flat_mask)
        auxiliary_loss = off
        if config.load_balancing != "none" and config.auxiliary_loss_coefficient:
            auxiliary_loss = config.auxiliary_loss_coefficient * self._auxiliary_loss(routing, hidden, mask)
        dropped = counts.new_zeros(())
        if config.capacity_factor is not None and sent is not None:
            dropped = counts.sum() - sent.sum()
        return RoutingInfo(auxiliary_loss, z_loss, counts, dropped)

    def _auxiliary_loss(self, routing: Routing, hidden: Tensor, mask: Tensor | None) -> Tensor:
        config = self.config
        if config.load_balancing == "sequence":
            if hidden.dim() != 3:
                raise ConfigError(
                    "moe.load_balancing",
                    "sequence",
                    f"with tokens [B, S, D], not {tuple(hidden.shape)}",
                    'use "auxiliary" or "global"',
                )
            scores = routing.scores.view(*hidden.shape[:2], config.num_experts)
            experts = routing.experts.view(*hidden.shape[:2], config.top_k)
            return balance.sequence_auxiliary_loss(scores, experts, mask)
        flat_mask = None if mask is None else mask.flatten()
        arguments = (routing.scores, routing.tokens_per_expert, config.top_k, flat_mask)
        # In evaluation the ranks may call a layer different numbers of times, so no rank may wait for the
        # others' counts: each reports the loss of its own tokens.
        if config.load_balancing == "auxiliary" or not self.training:
            return balance.auxiliary_loss(*arguments)
        return balance.global_auxiliary_loss(*arguments, group=self.mesh.group("data_context"))

    def _check_shapes(self, hidden: Tensor, mask: Tensor | None) -> None:
        if hidden.dim() not in (2, 3) or hidden.shape[-1] != self.hidden_size:
            raise ConfigError(
                "hidden.shape", tuple(hidden.shape), f"[B, S, {self.hidden_size}] or [T, {self.hidden_size}]"
            )
        if mask is not None and (mask.shape != hidden.shape[:-1] or mask.dtype != torch.bool):
            raise ConfigError(
                "mask",
                f"{mask.dtype} {tuple(mask.shape)}",
                f"torch.bool {tuple(hidden.shape[:-1])}, True for real tokens",
            )

    def _place(self, mesh: ParallelMesh) -> ExpertPlacement:
        return ExpertPlacement(self.config.num_experts, mesh.size("expert"), self.config.expert_placement)


def _supported(mesh: ParallelMesh) -> ParallelMesh:
    size = mesh.size("expert_tensor")
    if size != 1:
        raise ConfigError("parallel.expert_tensor", size, "1 with this layer", "raise parallel.expert instead")
    return mesh
