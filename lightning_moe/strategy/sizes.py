"""What the whole model holds and what this rank holds of it, told once when training is set up."""

from __future__ import annotations

import math

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import sharded_parameters, whole_shape


def report_sizes(module: nn.Module, mesh: ParallelMesh) -> None:
    """Say how large the whole model is, since Lightning's summary counts rank 0's part; and if an axis is idle.

    Args:
        module: The module with this rank's parameters.
        mesh: The parallel mesh.
    """
    parameters = sharded_parameters(module)
    local = sum(parameter.numel() for _, parameter, _ in parameters)
    whole = sum(math.prod(whole_shape(parameter, specs)) for _, parameter, specs in parameters)
    rank_zero_info(f"{mesh}: {whole:,} parameters in the whole model, {local:,} on this rank")
    split = {spec.axis for _, _, specs in parameters for spec in specs}
    if mesh.size(Axis.TENSOR) > 1 and Axis.TENSOR not in split:
        rank_zero_warn(
            f"parallel.tensor is {mesh.size(Axis.TENSOR)}, but no parameter of {type(module).__name__} is split over "
            "it, so these ranks do the same work. Use tensor=1, or layers that are split, such as "
            "lightning_moe.layers.ColumnParallelLinear."
        )
