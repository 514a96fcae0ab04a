"""The layer behind its router: choices and weights are given, their gradients are taken.

Imported by worker processes, so nothing slow is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_moe.config.moe import MoEConfig
from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.moe.choices import count_choices
from lightning_moe.moe.layer import MoELayer
from lightning_moe.moe.router import Routing
from lightning_moe.moe.routing_tape import RoutingTape
from lightning_moe.parallel.mesh import ParallelMesh


@dataclass(frozen=True)
class RoutedBatch:
    """Tokens of the whole world with their routing; rank ``r`` of ``P`` takes every ``P``-th token from ``r`` on."""

    config: MoEConfig
    gate_up_proj: Tensor
    down_proj: Tensor
    hidden: Tensor
    experts: Tensor
    weights: Tensor
    cotangent: Tensor


@dataclass(frozen=True)
class RoutedResult:
    output: Tensor
    hidden_grad: Tensor
    weights_grad: Tensor
    gate_up_grad: Tensor
    down_grad: Tensor


def run_routed(batch: RoutedBatch, num_ranks: int) -> RoutedResult:
    """Run this rank's tokens; expert gradients are those of this rank's experts."""
    mesh = ParallelMesh.build(ParallelConfig(expert=num_ranks)) if num_ranks > 1 else ParallelMesh.single()
    config = replace(batch.config, shared_expert_hidden_size=0, shared_expert_gate=False)
    layer = MoELayer(batch.hidden.shape[1], config, mesh).to(batch.hidden.dtype)
    own = slice(mesh.global_rank, None, num_ranks)
    router = _GivenRouting(batch.experts[own], batch.weights[own], config.num_experts)
    layer.router = router  # type: ignore[assignment]
    index = list(layer.experts.index)
    layer.experts.gate_up_proj.data = batch.gate_up_proj[index]
    layer.experts.down_proj.data = batch.down_proj[index]
    hidden = batch.hidden[own].clone().requires_grad_()
    output, _ = layer(hidden)
    output.backward(batch.cotangent[own])
    grads = [p.grad for p in (hidden, router.weights, layer.experts.gate_up_proj, layer.experts.down_proj)]
    return RoutedResult(output.detach(), *grads)  # type: ignore[arg-type]


class _GivenRouting(nn.Module):
    def __init__(self, experts: Tensor, weights: Tensor, num_experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.weights = nn.Parameter(weights.clone())
        self.num_experts = num_experts

    def forward(self, hidden: Tensor, mask: Tensor | None, saved: RoutingTape | None) -> Routing:
        nothing = torch.zeros(len(hidden), self.num_experts)
        return Routing(self.experts, self.weights, nothing, nothing, count_choices(self.experts, self.num_experts))
