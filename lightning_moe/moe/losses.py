"""The losses of one layer call, for tokens that are spread over the ranks of several axes.

[Note: scales of the losses]
Gradients of dense parameters are summed over the axis ``tensor`` (where each rank has a part) and averaged over
``data_context``. With DC and C the sizes of ``data_context`` and ``context``, the loss that is trained is therefore

    sum over all ranks of (a rank's loss) / DC

The global loss is one sum over the tokens of all ranks, so each rank multiplies its own term (see balance.py, note
"terms of a loss") by DC. The other losses are means over the micro-batches of the ``DC / C`` data ranks, each spread
over ``context`` and ``tensor``; there the factor is C.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.config.moe import MoEConfig
from lightning_moe.moe import balance
from lightning_moe.moe.router import Routing
from lightning_moe.moe.routing_tape import RoutingTape, once
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh


class RouterLosses:
    """Computes the balancing and z-losses of the layers with one configuration, with their coefficients.

    Args:
        config: Which losses, and their coefficients.
        mesh: Ranks that hold the other tokens; None for the losses of this rank's tokens by themselves, without
            communication.
    """

    def __init__(self, config: MoEConfig, mesh: ParallelMesh | None) -> None:
        self._config = config
        self._mesh = mesh

    def __call__(
        self,
        routing: Routing,
        mask: Tensor | None,
        sequences: tuple[Tensor, int] | None,
        saved: RoutingTape | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Auxiliary loss and z-loss of one call; a collective call on all ranks of the mesh.

        Args:
            routing: What the router decided for this rank's tokens.
            mask: Bool ``[T]``, True for real tokens.
            sequences: Sequence of each token, int64 ``[T]``, and number of sequences; for the sequence-wise loss.
            saved: Tape of the checkpointed function that the call is part of.

        Returns:
            Two scalars, 0 for losses that are off. The gradients are those of this rank's own terms; the values are
            the sums over the axis ``tensor``, equal on all of its ranks.
        """
        config, off = self._config, routing.logits.new_zeros(())
        balanced = config.load_balancing != "none" and config.auxiliary_loss_coefficient != 0
        bounded = config.z_loss_coefficient != 0
        if not balanced and not bounded:
            return off, off
        microbatch = routing.tokens_per_expert
        if bounded or config.load_balancing == "auxiliary":
            microbatch = self._sum(microbatch, Axis.CONTEXT_TENSOR, saved)
        auxiliary_loss = z_loss = off
        if balanced:
            loss = self._balance(routing, microbatch, mask, sequences, saved)
            auxiliary_loss = config.auxiliary_loss_coefficient * loss
        if bounded:
            loss = balance.z_loss(routing.logits, microbatch.sum() // config.top_k, mask)
            z_loss = config.z_loss_coefficient * self._size(Axis.CONTEXT) * loss
        return self._whole(auxiliary_loss, z_loss, saved)

    def _balance(
        self,
        routing: Routing,
        microbatch: Tensor,
        mask: Tensor | None,
        sequences: tuple[Tensor, int] | None,
        saved: RoutingTape | None,
    ) -> Tensor:
        top_k = self._config.top_k
        if self._config.load_balancing == "sequence":
            assert sequences is not None, "the layer checks it"
            sequence, num_sequences = sequences
            counts = balance.count_by_sequence(
                routing.experts, sequence, (num_sequences, self._config.num_experts), mask
            )
            counts = self._sum(counts, Axis.CONTEXT_TENSOR, saved)
            loss = balance.sequence_auxiliary_loss(routing.scores, sequence, counts, top_k, mask)
            return self._size(Axis.CONTEXT) * loss
        if self._config.load_balancing == "auxiliary":
            return self._size(Axis.CONTEXT) * balance.auxiliary_loss(routing.scores, microbatch, top_k, mask)
        counts = self._sum(routing.tokens_per_expert, Axis.DATA_CONTEXT_TENSOR, saved)
        return self._size(Axis.DATA_CONTEXT) * balance.auxiliary_loss(routing.scores, counts, top_k, mask)

    def _whole(self, auxiliary_loss: Tensor, z_loss: Tensor, saved: RoutingTape | None) -> tuple[Tensor, Tensor]:
        """The same gradients, with the sums over the tensor ranks as values."""
        if self._mesh is None or self._mesh.active_group(Axis.TENSOR) is None:
            return auxiliary_loss, z_loss
        own = torch.stack([auxiliary_loss, z_loss])
        whole: Tensor = _WithValue.apply(own, self._sum(own.detach(), Axis.TENSOR, saved))  # type: ignore[no-untyped-call]
        return whole[0], whole[1]

    def _sum(self, values: Tensor, axis: Axis, saved: RoutingTape | None) -> Tensor:
        group = None if self._mesh is None else self._mesh.active_group(axis)
        if group is None:
            return values
        return once(saved, lambda: _all_reduced(values, group))

    def _size(self, axis: Axis) -> int:
        return 1 if self._mesh is None else self._mesh.size(axis)


def _all_reduced(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = values.clone()
    dist.all_reduce(total, group=group)
    return total


class _WithValue(torch.autograd.Function):
    """A tensor that has the value of another. ``x + (value - x).detach()`` would be off by a rounding on some ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
