"""Bringing what the stages have found to all ranks of a pipeline."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_moe.errors import ConfigError
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.pipeline.engine import StepTotals
from lightning_moe.pipeline.spec import ScheduleResult


class TotalsReduction:
    """Sums losses and metrics over the stages, in one all-reduce for each step.

    The names, shapes and dtypes of the metrics are exchanged in the first step.

    Args:
        mesh: The parallel mesh.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        self._mesh = mesh
        self._known: dict[str, tuple[tuple[int, ...], torch.dtype]] | None = None
        self._loss_dtype = torch.float32

    def __call__(self, totals: StepTotals) -> ScheduleResult:
        """Add up what all stages have; a collective call of the pipeline's ranks.

        Sums are taken in float64; loss and metrics are returned in their own dtypes, the loss in float32 at least.

        Raises:
            ConfigError: A metric is new, or has another shape than in the first step.
        """
        group = self._mesh.active_group(Axis.PIPELINE)
        known = self._agree(totals, group)
        sums = torch.cat(
            [totals.loss.reshape(1)]
            + [
                totals.metrics[name].double().reshape(-1)
                if name in totals.metrics
                else totals.loss.new_zeros(math.prod(shape))
                for name, (shape, _) in known.items()
            ]
        )
        if group is not None:
            dist.all_reduce(sums, group=group)
        lengths = [1] + [math.prod(shape) for shape, _ in known.values()]
        loss, *values = sums.split(lengths)
        metrics = {
            name: value.reshape(shape).to(dtype)
            for (name, (shape, dtype)), value in zip(known.items(), values, strict=True)
        }
        return ScheduleResult(loss.reshape(()).to(self._loss_dtype), metrics)

    def _agree(
        self, totals: StepTotals, group: dist.ProcessGroup | None
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        own = {name: (tuple(value.shape), value.dtype) for name, value in totals.metrics.items()}
        if self._known is None:
            everybody: list[Any] = [(own, totals.loss_dtype)]
            if group is not None:
                everybody = [None] * self._mesh.size(Axis.PIPELINE)
                dist.all_gather_object(everybody, (own, totals.loss_dtype), group=group)
            joined = {name: entry for part, _ in everybody for name, entry in part.items()}
            self._known = {name: joined[name] for name in sorted(joined)}
            self._loss_dtype = reduce(torch.promote_types, (dtype for _, dtype in everybody))
        for name, entry in own.items():
            if self._known.get(name) != entry:
                raise ConfigError(
                    f"metrics.{name}",
                    f"{entry[1]} {entry[0]}",
                    "the names, shapes and dtypes of the first step, the same in all parts: "
                    + ", ".join(f"{key} {dtype} {shape}" for key, (shape, dtype) in self._known.items()),
                )
        return self._known


def share_outputs(outputs: list[Any], mesh: ParallelMesh, source: int) -> list[Any]:
    """Bring predictions to all ranks of a pipeline; a collective call.

    Args:
        outputs: What each microbatch has given, on the rank of the last stage; tensors in any nesting.
        mesh: The parallel mesh.
        source: That rank's position in the pipeline.
    """
    group = mesh.active_group(Axis.PIPELINE)
    if group is None:
        return outputs
    root = mesh.ranks(Axis.PIPELINE)[source]
    leaves, structure = tree_flatten(outputs)
    sends = mesh.global_rank == root
    described = [
        (tuple(leaf.shape), leaf.dtype, leaf.device.type) if isinstance(leaf, Tensor) else leaf for leaf in leaves
    ]
    box: list[Any] = [(structure, described, [isinstance(leaf, Tensor) for leaf in leaves]) if sends else None]
    dist.broadcast_object_list(box, root, group=group)
    structure, described, are_tensors = box[0]
    received = []
    device = _device_of(group)
    for i, (entry, is_tensor) in enumerate(zip(described, are_tensors, strict=True)):
        if not is_tensor:
            received.append(entry)
            continue
        shape, dtype, kind = entry
        tensor = leaves[i].to(device).contiguous() if sends else torch.empty(shape, dtype=dtype, device=device)
        # As bytes: no backend carries every dtype.
        dist.broadcast(tensor.reshape(-1).view(torch.uint8), root, group=group)
        received.append(tensor.to(kind) if tensor.device.type != kind else tensor)
    shared: list[Any] = tree_unflatten(received, structure)
    return shared


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Where a group's backend wants its tensors."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
