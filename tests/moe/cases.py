"""One layer on one batch, run whole or spread over ranks, with everything that can be compared.

Imported by worker processes, so nothing slow is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import inf
from typing import Literal

import torch
from torch import Tensor

from lightning_moe.config.moe import MoEConfig
from lightning_moe.config.overlap import OverlapConfig
from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.moe.layer import MoELayer
from lightning_moe.moe.overlap.cost import Rates
from lightning_moe.moe.overlap.executor import ExpertOverlap
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import ShardSpecs, shard_specs
from lightning_moe.parallel.state import load_full_state_dict
from lightning_moe.weight_grad import WeightGradQueue
from tests.weight_grad.owners import MainGrad


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer with its weights, and for each rank tokens, output gradients and masks."""

    config: MoEConfig
    state: dict[str, Tensor]
    hidden: tuple[Tensor, ...]
    cotangent: tuple[Tensor, ...]
    mask: tuple[Tensor, ...] | None = None
    expert: int = 1
    expert_tensor: int = 1
    late_sharding: bool = False
    """Build the layer whole and spread it by ``shard_``, instead of building this rank's part."""
    training: bool = True
    overlap: OverlapConfig | None = None
    """How the layer overlaps, None for an all-to-all."""
    rates: Rates | None = None
    slot_major: bool = False
    """Whether rows that are computed lie slot after slot."""
    weight_grads: Literal["autograd", "sink", "queue"] = "autograd"
    """Where the experts' weight gradients go: to autograd, or into float32 sums at once or by way of a queue."""

    @property
    def hidden_size(self) -> int:
        return self.hidden[0].shape[-1]


@dataclass
class Result:
    """What one rank, or the single process, computed."""

    output: Tensor
    hidden_grad: Tensor
    grads: dict[str, Tensor]
    specs: dict[str, ShardSpecs]
    auxiliary_loss: Tensor
    z_loss: Tensor
    tokens_per_expert: Tensor
    dropped: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)


def random_case(
    config: MoEConfig,
    lengths: Sequence[int],
    *,
    hidden_size: int = 16,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    masked: float = 0.0,
    sequence_length: int | None = None,
    expert: int = 1,
    expert_tensor: int = 1,
    late_sharding: bool = False,
    training: bool = True,
) -> Case:
    """Random weights and tokens; ``lengths`` are tokens (or sequences, with ``sequence_length``) per rank."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    layer = MoELayer(hidden_size, config)
    state = {name: 0.3 * normal(*value.shape).to(dtype) for name, value in layer.state_dict().items()}
    if "router.expert_bias" in state:
        state["router.expert_bias"] = state["router.expert_bias"].float()
    shapes = [(n,) if sequence_length is None else (n, sequence_length) for n in lengths]
    mask = tuple(torch.rand(shape, generator=generator) >= masked for shape in shapes) if masked else None
    return Case(
        config=config,
        state=state,
        hidden=tuple(normal(*shape, hidden_size).to(dtype) for shape in shapes),
        cotangent=tuple(normal(*shape, hidden_size).to(dtype) for shape in shapes),
        mask=mask,
        expert=expert,
        expert_tensor=expert_tensor,
        late_sharding=late_sharding,
        training=training,
    )


def build_layer(case: Case, mesh: ParallelMesh | None) -> MoELayer:
    dtype = case.hidden[0].dtype
    layer = MoELayer(case.hidden_size, case.config, None if case.late_sharding else mesh).to(dtype)
    load_full_state_dict(layer, case.state)
    if case.late_sharding and mesh is not None:
        layer.shard_(mesh)
    return layer.train(case.training)


def run_ranks(cases: Sequence[Case]) -> list[Result]:
    """This rank's part of each case; ``sum`` over ranks of its loss is the loss of :func:`run_single`."""
    meshes: dict[tuple[int, int], ParallelMesh] = {}
    results = []
    for case in cases:
        key = (case.expert, case.expert_tensor)
        if key not in meshes:  # process groups take longer than the case
            meshes[key] = ParallelMesh.build(ParallelConfig(expert=case.expert, expert_tensor=case.expert_tensor))
        mesh = meshes[key]
        rank = mesh.global_rank
        mask = None if case.mask is None else case.mask[rank]
        layer = build_layer(case, mesh)
        queue = None
        if case.weight_grads != "autograd":
            queue = WeightGradQueue() if case.weight_grads == "queue" else None
            sums = {name: MainGrad(parameter, queue) for name, parameter in layer.experts.named_parameters()}
        if case.overlap is not None:
            layer.overlap = ExpertOverlap(
                case.overlap, case.rates, queue, large_product=0.0 if case.slot_major else inf
            )
        with queue.capture(0) if queue is not None else nullcontext():
            result = _run(layer, case.hidden[rank], case.cotangent[rank], mask, mesh.world_size, case.weight_grads)
        if queue is not None:
            held = queue.num_held
            queue.pop_all()
            assert not queue.live_bytes
            result.extra = {"held": torch.tensor(held), "run_within": torch.tensor(queue.statistics.run_within)}
        if case.weight_grads != "autograd":
            result.grads |= {f"experts.{name}": total.sum for name, total in sums.items()}
        results.append(result)
    return results


def run_single(case: Case) -> Result:
    """Run all ranks' tokens through a layer that holds all experts."""
    mask = None if case.mask is None else torch.cat(case.mask)
    return _run(build_layer(case, None), torch.cat(case.hidden), torch.cat(case.cotangent), mask, 1)


def _run(
    layer: MoELayer, hidden: Tensor, cotangent: Tensor, mask: Tensor | None, num_ranks: int, sunk: str = "autograd"
) -> Result:
    hidden = hidden.clone().requires_grad_()
    output, info = layer(hidden, mask)
    loss = (output * cotangent).sum() + (info.auxiliary_loss + info.z_loss) / num_ranks
    loss.backward()
    assert hidden.grad is not None
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    elsewhere = "" if sunk == "autograd" else "experts."
    missing = [n for n, grad in grads.items() if grad is None and not (elsewhere and n.startswith(elsewhere))]
    assert not missing, f"no gradient for {missing}"
    return Result(
        output.detach(),
        hidden.grad,
        {name: grad for name, grad in grads.items() if grad is not None},
        shard_specs(layer),
        info.auxiliary_loss.detach(),
        info.z_loss.detach(),
        info.tokens_per_expert,
        info.dropped,
    )


def assemble(results: Sequence[Result]) -> Result:
    """Put the ranks' results together as a single process would have computed them, in logical order."""
    grads: dict[str, Tensor] = {}
    for result in results:
        for name, grad in result.grads.items():
            whole = in_whole(grad, result.specs.get(name, ()))
            grads[name] = grads[name] + whole if name in grads else whole
    return Result(
        torch.cat([result.output for result in results]),
        torch.cat([result.hidden_grad for result in results]),
        grads,
        {},
        torch.stack([result.auxiliary_loss for result in results]).mean(),
        torch.stack([result.z_loss for result in results]).mean(),
        torch.stack([result.tokens_per_expert for result in results]).sum(0),
        torch.stack([result.dropped for result in results]).sum(),
    )


def in_whole(local: Tensor, specs: ShardSpecs) -> Tensor:
    """The part at its place in the whole tensor, zeros elsewhere."""
    for spec in specs:
        shape = list(local.shape)
        shape[spec.dim] = spec.size
        local = local.new_zeros(shape).index_copy_(spec.dim, torch.tensor(spec.index), local)
    return local


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation over the largest expected magnitude; both zero counts as equal."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    if not expected.numel():
        return 0.0
    deviation = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    assert deviation == deviation, "not a number"
    return deviation / scale if scale else deviation


def assert_same(actual: Result, expected: Result, tolerance: float) -> None:
    """Compare outputs, gradients and losses to a relative tolerance, and counts exactly."""
    errors = {
        "output": relative_error(actual.output, expected.output),
        "hidden gradient": relative_error(actual.hidden_grad, expected.hidden_grad),
        "auxiliary loss": relative_error(actual.auxiliary_loss, expected.auxiliary_loss),
        "z-loss": relative_error(actual.z_loss, expected.z_loss),
    }
    assert actual.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        whole = in_whole(actual.grads[name], actual.specs.get(name, ()))
        errors[name] = relative_error(whole, in_whole(grad, expected.specs.get(name, ())))
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"
    assert actual.tokens_per_expert.tolist() == expected.tokens_per_expert.tolist()
    assert actual.dropped.item() == expected.dropped.item()
