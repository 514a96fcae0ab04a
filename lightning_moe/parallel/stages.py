"""What the stages of a pipeline hold between them: each knows its own layers only."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import state_dict_specs, whole_shape

_T = TypeVar("_T")

StateEntries = dict[str, tuple[int, ...] | None]
"""The entries of a ``state_dict``: the shape of the whole tensor by name, None for a value that is no tensor."""


def gather_stages(value: _T, mesh: ParallelMesh | None) -> list[_T]:
    """The values of all pipeline stages, in their order; a collective call where there is more than one.

    Args:
        value: This stage's; pickled where there are others.
        mesh: The parallel mesh; None in a process that has none.
    """
    group = None if mesh is None else mesh.active_group(Axis.PIPELINE)
    if group is None:
        return [value]
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def state_entries(module: nn.Module) -> StateEntries:
    """What this rank's ``state_dict`` has, as entries of the whole model."""
    specs = state_dict_specs(module)
    return {
        name: whole_shape(value, specs.get(name, ())) if isinstance(value, Tensor) else None
        for name, value in module.state_dict().items()
    }


def entries_elsewhere(module: nn.Module, mesh: ParallelMesh | None) -> StateEntries:
    """Entries of the whole model's ``state_dict`` that this stage does not have; a collective call."""
    own = state_entries(module)
    return {name: shape for stage in gather_stages(own, mesh) for name, shape in stage.items() if name not in own}
