"""The Mixture-of-Experts layer: router, dispatch, experts, combine, one after the other.

T tokens, K top-k, E experts, D model width, B batch, S sequence, X ranks that share an expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_moe.config.moe import MoEConfig
from lightning_moe.errors import ConfigError
from lightning_moe.moe.capacity import expert_capacity, within_capacity
from lightning_moe.moe.choices import count_choices
from lightning_moe.moe.dispatch import DispatchPlan, RowCounts, combine, dispatch, plan_dispatch
from lightning_moe.moe.experts import GroupedExperts
from lightning_moe.moe.losses import RouterLosses
from lightning_moe.moe.overlap.executor import ExpertOverlap
from lightning_moe.moe.participation import AnnouncedCall, OwnCall, announce_call
from lightning_moe.moe.router import Routing, TopKRouter
from lightning_moe.moe.routing_tape import RoutingTape, once
from lightning_moe.moe.rows_to_send import RowsToSend
from lightning_moe.moe.shared_expert import SharedExpert
from lightning_moe.moe.slots import place_experts, slots_of_experts
from lightning_moe.moe.token_slices import gather_slices, take_slice
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import even_slice, set_partial_grad
from lightning_moe.weight_grad import compute_dtype


class RoutingInfo(NamedTuple):
    """What a layer reports beside its output."""

    auxiliary_loss: Tensor
    """Load-balancing loss with its coefficient, to be added to the model's loss; 0 when it is off. In training its
    value is the sum over the axis ``tensor``; its gradient is that of the tokens that this rank worked on."""
    z_loss: Tensor
    """Router z-loss with its coefficient, likewise."""
    tokens_per_expert: Tensor
    """This rank's choices of real tokens per logical expert, before any are dropped, int64 ``[E]``. The ranks of
    ``data_context_tensor`` have worked on different tokens."""
    dropped: Tensor
    """How many of them exceeded the capacity, int64 scalar; 0 for a dropless layer."""


class MoELayer(nn.Module):
    """A feed-forward layer of which each token uses ``top_k`` of ``num_experts`` parts.

    Without a mesh the layer holds all experts and communicates with no one. With a mesh it holds this rank's
    experts, or its part of them; every rank of the axis ``expert_model`` must then call it equally often (see
    :mod:`lightning_moe.moe.participation` for evaluation), on any number of tokens, also none.

    The layer always works on different tokens on each rank. Router and shared expert are whole on all ranks; with
    ``tensor`` > 1 each tensor rank has a part of their gradients.

    Args:
        hidden_size: Width ``D`` of the tokens.
        config: The layer's settings.
        mesh: This rank's place; None for a layer of a single process, which :meth:`shard_` can spread later.

    Attributes:
        router: The :class:`TopKRouter`.
        experts: The :class:`GroupedExperts` of this rank.
        shared_expert: The :class:`SharedExpert`, or None.
        placement: Which expert lives where.
        overlap: How exchanges hide under computation; None waits for one all-to-all each way.
        layer_index: Position among the layers that share the expert group.
        header_experts: Most experts of any layer that shares the expert group.

    Raises:
        ConfigError: The expert ranks do not divide the experts, or those of ``expert_tensor`` their inner width; or
            tokens are routed by series that the mesh cuts.
    """

    slots_of_expert: Tensor

    def __init__(self, hidden_size: int, config: MoEConfig, mesh: ParallelMesh | None = None) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.config = config
        self.mesh = mesh if mesh is not None else ParallelMesh.single()
        self.overlap: ExpertOverlap | None = None
        self.layer_index = 0
        self.header_experts = config.num_experts
        self.placement = place_experts(config, self.mesh)
        self.router = TopKRouter(hidden_size, config)
        self.experts = GroupedExperts(
            hidden_size,
            config.expert_hidden_size,
            config.activation,
            config.num_experts,
            self.placement.local_experts(self.mesh.rank(Axis.EXPERT)),
            config.grouped_gemm,
            even_slice(config.expert_hidden_size, self.mesh, Axis.EXPERT_TENSOR),
        )
        self.shared_expert = None
        if config.shared_expert_hidden_size:
            self.shared_expert = SharedExpert(
                hidden_size, config.shared_expert_hidden_size, config.activation, config.shared_expert_gate
            )
        slots = slots_of_experts(self.placement, self.mesh.size(Axis.EXPERT_TENSOR))
        self.register_buffer("slots_of_expert", slots, persistent=False)
        self._mark_partial_grads()

    @property
    def expert_group(self) -> dist.ProcessGroup | None:
        """The ranks that the experts are spread over; None when this rank holds them all."""
        return self.mesh.active_group(Axis.EXPERT_MODEL)

    @property
    def num_slots(self) -> int:
        """Number of slots of all ranks, ``E * X``."""
        return self.slots_of_expert.numel()

    @property
    def header_slots(self) -> int:
        """Most slots of any layer that shares the expert group."""
        return self.header_experts * self.mesh.size(Axis.EXPERT_TENSOR)

    def shard_(self, mesh: ParallelMesh) -> None:
        """Spread a layer that was built whole: keep only this rank's experts, and communicate from now on.

        The parameters stay the same objects (an optimizer may hold them) and lose their gradients. A layer
        that is already spread in this way is left as it is.

        Raises:
            ConfigError: The mesh does not suit the layer (see the class), or the layer is already spread in another
                way.
        """
        placement = place_experts(self.config, mesh)
        inner = even_slice(self.config.expert_hidden_size, mesh, Axis.EXPERT_TENSOR)
        self.experts.keep_(placement.local_experts(mesh.rank(Axis.EXPERT)), inner)
        self.mesh, self.placement = mesh, placement
        slots = slots_of_experts(placement, mesh.size(Axis.EXPERT_TENSOR))
        self.slots_of_expert = slots.to(self.slots_of_expert.device)
        self._mark_partial_grads()

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        *,
        sequence: Tensor | None = None,
        num_sequences: int | None = None,
        token_slices: bool = False,
        saved: RoutingTape | None = None,
    ) -> tuple[Tensor, RoutingInfo]:
        """Apply the layer.

        Args:
            hidden: ``[B, S, D]`` or ``[T, D]``; float32, float64, bfloat16 or float16.
            mask: Bool ``[B, S]`` or ``[T]``, True for real tokens. The others are not routed, count nowhere
                and get zeros. None when all are real.
            sequence: Sequence that each token belongs to, int64 ``[B, S]`` or ``[T]``, counted from 0 in the same way
                on all ranks of ``context_tensor``. Needed for ``load_balancing="sequence"`` with tokens ``[T, D]``.
            num_sequences: Number of sequences that ``sequence`` counts; needed with it.
            token_slices: What the ranks of the axis ``tensor`` bring: each its own tokens, equally many (sequence
                parallelism), or (False) copies of the same tokens, of which each rank then works on a slice.
            saved: Tape of the checkpointed function that the call is part of (see
                :func:`~lightning_moe.moe.checkpoint_with_routing`).

        Returns:
            The output, in the shape and dtype of ``hidden``, and the :class:`RoutingInfo`.

        Raises:
            ConfigError: The shapes do not fit, or the sequences are needed and unknown.
        """
        self._check_shapes(hidden, mask, sequence)
        if mask is not None:
            # Zeroed as well as left out: a NaN in a padded position would reach the router's weight gradient.
            hidden = hidden.masked_fill(~mask[..., None], 0)
        if self.config.load_balancing == "sequence":
            sequence, num_sequences = _sequences(hidden, sequence, num_sequences)
        group = None if token_slices else self.mesh.active_group(Axis.TENSOR)
        if group is None:
            out, info = self._apply_to_own(hidden, mask, sequence, num_sequences, saved)
            return out.view_as(hidden), info
        own = take_slice(hidden, mask, sequence, group)
        out, info = self._apply_to_own(own.tokens, own.mask, own.sequence, num_sequences, saved)
        return gather_slices(out, hidden, group), info

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
        # Autocast is decided by the ranks that call, and the dtype they announced already says so.
        with torch.autocast(weight.device.type, enabled=False):
            if self.overlap is not None:
                self.overlap.serve(self, tokens, choices, counts)
                return
            plan = plan_dispatch(choices, counts, self.mesh.rank(Axis.EXPERT_MODEL))
            self.run_experts(tokens, torch.empty_like(choices, dtype=torch.float32), plan, dtype)

    def run_experts(self, tokens: Tensor, weights: Tensor, plan: DispatchPlan, dtype: torch.dtype) -> Tensor:
        """Output ``[T, D]`` of the routed experts in ``dtype``, by one all-to-all each way.

        Args:
            tokens: ``[T, D]`` in the dtype of the computation.
            weights: ``[T, K]``.
            plan: Who sends which rows to whom.
            dtype: Dtype of the result.
        """
        rows = dispatch(tokens, plan, self.expert_group)
        rows = self.experts(rows, plan.expert_counts, plan.expert_offsets)
        return combine(rows, weights, plan, self.expert_group, dtype)

    def _apply_to_own(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        sequence: Tensor | None,
        num_sequences: int | None,
        saved: RoutingTape | None,
    ) -> tuple[Tensor, RoutingInfo]:
        """Output ``[T, D]`` for tokens that no other rank works on."""
        routing = self.router(hidden, mask, saved)
        tokens, mask = hidden.flatten(0, -2), None if mask is None else mask.flatten()
        dtype = compute_dtype(tokens)
        call, sending, dropped = once(saved, lambda: self._announce(routing, mask, dtype, tokens.requires_grad))
        weights = self._per_shard(routing.weights)
        overlapped = None
        if self.overlap is not None and self.expert_group is not None:
            overlapped = self.overlap.begin(self, tokens.to(dtype), weights, sending)
        # Before the host waits for the row counts: the device is busy with it meanwhile.
        shared = None if self.shared_expert is None else self.shared_expert(tokens)
        counts = once(saved, call.wait)
        if overlapped is None:
            plan = once(saved, lambda: sending.plan(counts, self.mesh.rank(Axis.EXPERT_MODEL)))
            out = self.run_experts(tokens.to(dtype), weights, plan, tokens.dtype)
        else:
            out = overlapped.finish(counts, tokens.dtype)
        if shared is not None:
            out = out + shared.to(out.dtype)
        # In evaluation the ranks may call a layer different numbers of times, so no rank may wait for the
        # others' counts: each reports the losses of its own tokens.
        losses = RouterLosses(self.config, self.mesh if self.training else None)
        sequences = None if sequence is None or num_sequences is None else (sequence.flatten(), num_sequences)
        auxiliary_loss, z_loss = losses(routing, mask, sequences, saved)
        return out, RoutingInfo(auxiliary_loss, z_loss, routing.tokens_per_expert, dropped)

    def _announce(
        self, routing: Routing, mask: Tensor | None, dtype: torch.dtype, grads: bool
    ) -> tuple[AnnouncedCall | OwnCall, RowsToSend, Tensor]:
        """Begin to exchange row counts, and work out what is sent and how many choices are dropped."""
        config, experts = self.config, routing.experts
        counts = routing.tokens_per_expert
        sent = None if mask is None else mask[:, None].expand_as(experts)
        dropped = counts.new_zeros(())
        if config.capacity_factor is not None:
            capacity = expert_capacity(counts.sum() // config.top_k, config)
            sent = within_capacity(experts, routing.weights, capacity, config, sent)
            dropped = counts.sum() - sent.sum()
            if config.pad_to_capacity:
                counts = capacity.expand(config.num_experts)
            else:
                counts = count_choices(experts, config.num_experts, sent)
        sizes, slots = counts, experts
        if self.slots_of_expert.shape[1] > 1 or self.placement.order is not None:
            sizes = counts.new_empty(self.num_slots)
            sizes.scatter_(0, self.slots_of_expert.flatten(), self._per_shard(counts[:, None]).flatten())
            slots = self.slots_of_expert[experts].flatten(1)
        # Overlapped rows carry the weights, whose gradients then come back with those of the rows.
        grads = grads or (self.overlap is not None and routing.weights.requires_grad)
        trained = grads or any(weight.requires_grad for weight in self.experts.projections)
        kind = (int(grads) + int(trained)) * torch.is_grad_enabled()
        call = announce_call(self.layer_index, dtype, kind, sizes, self.header_slots, self.expert_group)
        # A mask may be a slice or an expanded value, and kernels read it element by element.
        sent = None if sent is None else self._per_shard(sent).contiguous()
        return call, RowsToSend.of(slots, sent, sizes, padded=config.pad_to_capacity), dropped

    def _per_shard(self, per_choice: Tensor) -> Tensor:
        """``[N, K]`` to ``[N, K * X]``: each entry once for every rank that holds a part of the expert."""
        shards = self.slots_of_expert.shape[1]
        return per_choice[..., None].expand(*per_choice.shape, shards).flatten(1)

    def _mark_partial_grads(self) -> None:
        if self.mesh.size(Axis.TENSOR) == 1:
            return
        whole: list[nn.Module] = [self.router] if self.shared_expert is None else [self.router, self.shared_expert]
        for module in whole:
            for name, _ in module.named_parameters():
                set_partial_grad(module, name)

    def _check_shapes(self, hidden: Tensor, mask: Tensor | None, sequence: Tensor | None) -> None:
        if hidden.dim() not in (2, 3) or hidden.shape[-1] != self.hidden_size:
            raise ConfigError(
                "hidden.shape", tuple(hidden.shape), f"[B, S, {self.hidden_size}] or [T, {self.hidden_size}]"
            )
        for name, values, dtype in (("mask", mask, torch.bool), ("sequence", sequence, torch.int64)):
            if values is not None and (values.shape != hidden.shape[:-1] or values.dtype != dtype):
                raise ConfigError(
                    name,
                    f"{values.dtype} {tuple(values.shape)}",
                    f"{dtype} {tuple(hidden.shape[:-1])}",
                    "one value per token; masks are True for real tokens",
                )


def _sequences(hidden: Tensor, sequence: Tensor | None, num_sequences: int | None) -> tuple[Tensor, int]:
    """Sequence of each token and their number, read off the shape unless they are given."""
    if sequence is not None:
        if num_sequences is None:
            raise ConfigError("num_sequences", None, "the number of sequences that `sequence` counts")
        return sequence, num_sequences
    if hidden.dim() != 3:
        raise ConfigError(
            "moe.load_balancing",
            "sequence",
            f"with tokens [B, S, D], not {tuple(hidden.shape)}, or with `sequence`",
            'pass the sequence of each token, or use "auxiliary" or "global"',
        )
    batch, length = hidden.shape[:2]
    return torch.arange(batch, device=hidden.device)[:, None].expand(batch, length), batch
