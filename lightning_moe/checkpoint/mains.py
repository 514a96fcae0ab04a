"""Main parameters, and the optimizer state of each, as parts of whole tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lightning_moe.checkpoint.shards import FlatRun, LogicalShard, to_logical
from lightning_moe.parallel.layout import Axis, axis_named
from lightning_moe.parallel.main_params import MainParam
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import (
    ShardSpecs,
    local_part,
    partial_grads,
    replica_axis_of,
    sharded_parameters,
    whole_shape,
)

NO_MAINS: Mapping[Tensor, MainParam] = MappingProxyType({})
"""Where optimizers hold the model's own parameters."""


@dataclass(frozen=True)
class MainShard:
    """How a main parameter relates to the whole tensor of its parameter.

    Attributes:
        main: The main parameter.
        specs: Specs of the model's parameter.
        flat: Which of the parameter's elements it holds; None for all of them, in the parameter's shape.
    """

    main: MainParam
    specs: ShardSpecs
    flat: FlatRun | None

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return whole_shape(self.main.parameter, self.specs)

    def wrap(self, value: Tensor) -> Tensor:
        """Describe a tensor in the shape of the main parameter to DCP."""
        return to_logical(value, self.specs) if self.flat is None else LogicalShard.wrap(value, self.specs, self.flat)

    def empty(self, dtype: torch.dtype) -> Tensor:
        """A target for reading this rank's part of a tensor of :attr:`whole_shape`, described to DCP."""
        return self.wrap(torch.empty_like(self.main.main, dtype=dtype))

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of :attr:`whole_shape`, in the shape of the main parameter."""
        local = local_part(whole, self.specs)
        return local if self.flat is None else self.flat.take(local)


def main_shards(
    module: nn.Module, mains: Mapping[Tensor, MainParam], mesh: ParallelMesh | None = None
) -> dict[str, MainShard]:
    """The main parameters by the names of the module's parameters.

    Args:
        module: The module that the parameters belong to.
        mains: The main parameters; those of other modules' parameters are left out.
        mesh: Needed for writing: says which rank writes a run that several hold.
    """
    main_of = {main.parameter: main for main in mains.values()}
    partial = partial_grads(module)
    shards = {}
    for name, parameter, specs in sharded_parameters(module):
        main = main_of.get(parameter)
        if main is None:
            continue
        flat = None
        if main.run is not None:
            axis = replica_axis_of(specs, partial_grad=parameter in partial)
            writes = mesh is None or _is_first_replica(specs, axis, mesh)
            flat = FlatRun.of(parameter, main.run, writes=writes)
        shards[name] = MainShard(main, specs, flat)
    return shards


def _is_first_replica(specs: ShardSpecs, axis: Axis, mesh: ParallelMesh) -> bool:
    """Whether this rank is the one to write its run of a parameter's elements.

    The ranks of ``axis`` share the elements between them. Where another axis does not split the parameter (``tensor``
    and a norm's weight), its ranks share the same elements once more, and may cut them elsewhere: their buckets hold
    other parameters besides, and a vocabulary's rows need not be even. DCP refuses chunks that overlap. Two pipeline
    stages with a weight in common share its elements between them, too: each writes its own.
    """
    beyond = {Axis.EXPERT_DATA: {Axis.EXPERT, Axis.EXPERT_TENSOR}, Axis.DATA_CONTEXT: {Axis.TENSOR}}.get(axis, set())
    return all(mesh.rank(other) == 0 for other in beyond - {axis_named(spec.axis) for spec in specs})
