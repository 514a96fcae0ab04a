"""Bringing what the stages have found to all ranks of a pipeline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_moe.errors import ConfigError
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.pipeline.engine import StepTotals
from lightning_moe.pipeline.spec import ScheduleResult
from lightning_moe.pipeline.transport import as_bytes


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
        outputs: What each microbatch has given, on the rank of the last stage; tensors in any nesting, other values
            being pickled.
        mesh: The parallel mesh.
        source: That rank's position in the pipeline.
    """
    group = mesh.active_group(Axis.PIPELINE)
    if group is None:
        return outputs
    root = mesh.ranks(Axis.PIPELINE)[source]
    box: list[Any] = [tree_map_only(Tensor, _Missing.of, outputs) if mesh.global_rank == root else None]
    dist.broadcast_object_list(box, root, group=group)
    own = iter([leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)])
    device = _device_of(group)

    def share(missing: _Missing) -> Tensor:
        if mesh.global_rank == root:
            tensor = next(own).to(device).contiguous()
        else:
            tensor = torch.empty(missing.shape, dtype=missing.dtype, device=device)
        if tensor.numel():
            dist.broadcast(as_bytes(tensor), root, group=group)
        return tensor.to(missing.device) if tensor.device.type != missing.device else tensor

    shared: list[Any] = tree_map_only(_Missing, share, box[0])
    return shared


@dataclass(frozen=True)
class _Missing:
    """In the place of a tensor that other ranks do not have yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, tensor: Tensor) -> _Missing:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device.type)


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Where a group's backend wants its tensors."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
