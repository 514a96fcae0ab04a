"""Running a layer on several ranks with the same whole weights and inputs, and comparing it with one process.

T tokens, D width, P tensor ranks, C context ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.layers import TokenLayout
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import ShardSpecs, local_part, shard_specs
from tests.distributed import RankPool

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}
"""Largest error relative to the largest entry."""


@dataclass(frozen=True)
class Grads:
    """What a rank returns: its part of the output, and the gradients of its input and of its parameters."""

    output: Tensor
    input: Tensor
    parameters: dict[str, Tensor]
    specs: dict[str, ShardSpecs]


def here(tensor: Tensor) -> Tensor:
    """The tensor on the default device: the same tests run on CUDA."""
    return tensor.to(torch.get_default_device())


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return here(torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype))


def build_mesh(**sizes: int) -> ParallelMesh:
    """A mesh over all ranks; without ``torch.distributed`` a single one."""
    return ParallelMesh.build(ParallelConfig(**sizes)) if torch.distributed.is_initialized() else ParallelMesh.single()


def run_cases(
    ranks: RankPool, sizes: dict[str, int], function: Callable[..., Any], cases: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[tuple[Any, ...], list[Any]]]:
    """Each case with every rank's ``function(mesh, *case)``; one job and one mesh for all of them."""
    results = ranks.run(math.prod(sizes.values()), _each_case, sizes, function, cases)
    for i, case in enumerate(cases):
        yield case, [result[i] for result in results]


def _each_case(sizes: dict[str, int], function: Callable[..., Any], cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    mesh = build_mesh(**sizes)
    return [function(mesh, *case) for case in cases]


def own_rows(whole: Tensor, mesh: ParallelMesh, layout: TokenLayout) -> Tensor:
    """This tensor rank's rows of hidden states ``[T, D]`` of its context rank."""
    return whole.chunk(mesh.size("tensor"))[mesh.rank("tensor")] if layout.sequence_parallel else whole


def own_sequence(whole: Tensor, mesh: ParallelMesh, layout: TokenLayout) -> Tensor:
    """This context rank's chunk of ``[B, S, ...]``."""
    return whole.chunk(mesh.size("context"), 1)[mesh.rank("context")] if layout.context_parallel else whole


def gather(parts: list[Tensor], layout: TokenLayout) -> Tensor:
    """The whole of what tensor ranks hold."""
    if layout.sequence_parallel:
        return torch.cat(parts)
    for part in parts:
        assert torch.equal(part, parts[0])
    return parts[0]


def assert_close(value: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Compare with an error relative to the largest expected entry."""
    assert value.shape == expected.shape, what
    expected = expected.detach()
    error = (value.to(expected.dtype) - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"{what}: relative error {error:.1e} > {tolerance}"


def assert_shards(results: list[Grads], expected: dict[str, Tensor], tolerance: float) -> None:
    """Check every rank's parameter gradients against its part of the whole ones."""
    for result in results:
        assert result.parameters.keys() == expected.keys()
        for name, grad in result.parameters.items():
            assert_close(grad, local_part(expected[name], result.specs.get(name, ())), tolerance, name)


def result_of(module: nn.Module, output: Tensor, leaf: Tensor) -> Grads:
    assert leaf.grad is not None
    parameters = {name: p.grad.cpu() for name, p in module.named_parameters() if p.grad is not None}
    return Grads(output.detach().cpu(), leaf.grad.cpu(), parameters, shard_specs(module))
