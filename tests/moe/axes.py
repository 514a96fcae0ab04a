"""One layer on one global batch: in a single process, or spread over a mesh with any axes.

Imported by worker processes and by the GPU script, so nothing slow is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.config.moe import MoEConfig
from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.moe.layer import MoELayer
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import ShardSpecs, local_part, partial_grads, replica_axis_of, sharded_parameters
from lightning_moe.parallel.state import load_full_state_dict
from tests.moe.cases import relative_error

D = 8
CONFIGS = {
    "global": MoEConfig(
        num_experts=4,
        expert_hidden_size=6,
        load_balancing="global",
        z_loss_coefficient=0.1,
        shared_expert_hidden_size=5,
        shared_expert_gate=True,
        expert_placement=(2, 0, 3, 1),
    ),
    "auxiliary": MoEConfig(
        num_experts=4,
        expert_hidden_size=6,
        top_k=3,
        activation="gelu",
        router_score="sigmoid",
        expert_bias=True,
        load_balancing="auxiliary",
        z_loss_coefficient=0.1,
    ),
    "sequence": MoEConfig(
        num_experts=4, expert_hidden_size=6, load_balancing="sequence", z_loss_coefficient=0.1, grouped_gemm=False
    ),
}


@dataclass(frozen=True)
class Case:
    """A layer with its weights, all tokens ``[B, S, D]``, and how they are brought to the layer."""

    config: MoEConfig
    state: dict[str, Tensor]
    hidden: Tensor
    cotangent: Tensor
    mask: Tensor | None
    token_slices: bool

    @property
    def rows(self) -> Tensor:
        """Positions of the tokens, ``[B, S]``."""
        return torch.arange(self.hidden.shape[:-1].numel()).view(self.hidden.shape[:-1])


@dataclass
class Outcome:
    """What one rank, or the single process, computed; gradients are reduced over the ranks."""

    rows: Tensor
    """Positions of the rank's tokens among all."""
    output: Tensor
    hidden_grad: Tensor
    grads: dict[str, tuple[ShardSpecs, Tensor]]
    losses: Tensor
    bias: Tensor | None


def random_case(
    config: MoEConfig, parallel: ParallelConfig, token_slices: bool, dtype: torch.dtype = torch.float64
) -> Case:
    """Three sequences for each data rank."""
    assert parallel.data is not None
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    # Where the layer itself slices the tokens, their number is odd. Slices end inside a sequence.
    shape = (3 * parallel.data, (6 if token_slices else 5) * parallel.context)
    mask = None
    if config.load_balancing != "auxiliary":
        mask = torch.rand(shape, generator=generator) < 0.8
        mask[:, 0] = True  # ranks with equally many real sequences, or the mean over ranks is another one
    state = {name: 0.3 * normal(*value.shape) for name, value in MoELayer(D, config).state_dict().items()}
    if config.expert_bias:
        state["router.expert_bias"] = state["router.expert_bias"].float()
    return Case(config, state, normal(*shape, D), normal(*shape, D), mask, token_slices)


def run_whole(case: Case, data: int, device: str = "cpu") -> Outcome:
    """A single process; losses that are means over micro-batches take each data rank's tokens in turn."""
    layer = build(case, None, device)
    hidden = case.hidden.to(device, copy=True).requires_grad_()
    mask = None if case.mask is None else case.mask.to(device)
    masks = [None] * data if mask is None else mask.chunk(data)
    parts = [layer(*part) for part in zip(hidden.chunk(data), masks, strict=True)]
    layer.router.update_expert_bias()
    auxiliary_loss = torch.stack([info.auxiliary_loss for _, info in parts]).mean()
    if case.config.load_balancing == "global":
        auxiliary_loss = layer(hidden, mask)[1].auxiliary_loss
    losses = torch.stack([auxiliary_loss, torch.stack([info.z_loss for _, info in parts]).mean()])
    output = torch.cat([out for out, _ in parts])
    ((output * case.cotangent.to(device)).sum() + losses.sum()).backward()
    return outcome(case.rows, output, hidden, layer, losses)


def build(case: Case, mesh: ParallelMesh | None, device: str) -> MoELayer:
    layer = MoELayer(D, case.config, mesh).to(device, case.hidden.dtype)
    load_full_state_dict(layer, case.state)
    return layer


def run_rank(case: Case, mesh: ParallelMesh, late_sharding: bool = False, device: str = "cpu") -> Outcome:
    """This rank's part, with gradients reduced as the strategy does."""
    layer = build(case, None if late_sharding else mesh, device)
    if late_sharding:
        layer.shard_(mesh)
    rows = case.rows.chunk(mesh.size("data"))[mesh.rank("data")].chunk(mesh.size("context"), 1)[mesh.rank("context")]
    arguments: dict[str, Any] = {}
    if case.token_slices:
        sequence = torch.arange(len(rows))[:, None].expand_as(rows)
        arguments = {"num_sequences": len(rows), "token_slices": True}
        rows, arguments["sequence"] = (
            values.flatten().chunk(mesh.size("tensor"))[mesh.rank("tensor")] for values in (rows, sequence)
        )
        arguments["sequence"] = arguments["sequence"].to(device)
    hidden = case.hidden.flatten(0, 1)[rows].to(device).requires_grad_()
    mask = None if case.mask is None else case.mask.flatten()[rows].to(device)
    output, info = layer(hidden, mask, **arguments)
    layer.router.update_expert_bias(mesh.active_group("data_context_tensor"))
    replicas = mesh.size("data_context")
    losses = torch.stack([info.auxiliary_loss, info.z_loss])
    (replicas * (output * case.cotangent.flatten(0, 1)[rows].to(device)).sum() + losses.sum()).backward()
    assert hidden.grad is not None
    hidden.grad /= replicas
    partial = partial_grads(layer)
    for _, parameter, specs in sharded_parameters(layer):
        assert parameter.grad is not None
        group = mesh.active_group(replica_axis_of(specs, partial_grad=parameter in partial))
        if group is not None:
            dist.all_reduce(parameter.grad, group=group)
        parameter.grad /= replicas
    return outcome(rows, output, hidden, layer, losses)


def outcome(rows: Tensor, output: Tensor, hidden: Tensor, layer: MoELayer, losses: Tensor) -> Outcome:
    """Everything on the CPU."""
    assert hidden.grad is not None
    grads = {name: (specs, p.grad.cpu()) for name, p, specs in sharded_parameters(layer) if p.grad is not None}
    assert len(grads) == len(list(layer.parameters()))
    bias = layer.router.expert_bias
    return Outcome(
        rows.flatten(),
        output.detach().flatten(0, -2).cpu(),
        hidden.grad.flatten(0, -2).cpu(),
        grads,
        losses.detach().cpu(),
        None if bias is None else bias.cpu(),
    )


def in_logical_order(specs: ShardSpecs, grad: Tensor) -> Tensor:
    for spec in specs:
        grad = torch.empty_like(grad).index_copy_(spec.dim, torch.tensor(spec.index), grad)
    return grad


def compare(actual: Outcome, expected: Outcome) -> dict[str, float]:
    """Relative errors of one rank's tokens and weights."""
    errors = {
        "output": relative_error(actual.output, expected.output[actual.rows]),
        "hidden gradient": relative_error(actual.hidden_grad, expected.hidden_grad[actual.rows]),
    }
    if actual.bias is not None and expected.bias is not None:
        errors["expert bias"] = relative_error(actual.bias, expected.bias)
    for name, (specs, grad) in actual.grads.items():
        errors[name] = relative_error(grad, local_part(in_logical_order(*expected.grads[name]), specs))
    return errors
