"""What the whole model holds and what this rank holds of it, told once when training is set up."""

from __future__ import annotations

import math

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import sharded_parameters, whole_shape
from lightning_moe.parallel.stages import gather_stages


def report_sizes(module: nn.Module, mesh: ParallelMesh) -> None:
    """Say how large the whole model is, and if an axis is idle; a collective call where there is a pipeline.

    Args:
        module: The module with this rank's parameters.
        mesh: The parallel mesh.
    """
    parameters = sharded_parameters(module)
    local = sum(parameter.numel() for _, parameter, _ in parameters)
    sizes = {name: math.prod(whole_shape(parameter, specs)) for name, parameter, specs in parameters}
    split = {spec.axis for _, _, specs in parameters for spec in specs}
    for sizes_of_stage, split_of_stage in gather_stages((sizes, split), mesh):
        sizes |= sizes_of_stage  # by name: tied weights count once
        split |= split_of_stage
    rank_zero_info(f"{mesh}: {sum(sizes.values()):,} parameters in the whole model, {local:,} on this rank")
    if mesh.size(Axis.TENSOR) > 1 and Axis.TENSOR not in split:
        rank_zero_warn(
            f"parallel.tensor is {mesh.size(Axis.TENSOR)}, but no parameter of {type(module).__name__} is split over "
            "it, so these ranks do the same work. Use tensor=1, or layers that are split, such as "
            "lightning_moe.layers.ColumnParallelLinear."
        )
