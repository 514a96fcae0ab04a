"""Flat buffers that gradients of many parameters share, and how they are reduced.

[Note: what a bucket holds]
Gradients live in flat *main-grad* buckets of at least float32. A dense bucket is reduced over ``data_context`` (over
``data_context_tensor`` where each tensor rank has a part of the gradient), an expert bucket over ``expert_data``; all
are divided by the size of ``data_context``, because the loss is a mean over those ranks: an expert's gradient already
holds the sum over the ranks that sent it tokens, so dividing it by the number of its replicas would make it ``expert``
times too large (see ``docs/concepts/expert-parallelism.md``).

Every parameter has a flag, "this rank used it". The flags are summed like the gradients, so that a parameter which no
rank used keeps ``grad=None``, as in a single process: a zero gradient would let AdamW decay its weights. They lie
behind the gradients and travel with them, unless these are scattered. Sharded or not, a bucket has the same length,
because backends choose the order of their sums by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_moe.parallel.collectives import start_all_reduce_, start_reduce_scatter_
from lightning_moe.parallel.flat import FlatLayout
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import ShardSpecs, shard_axis_of
from lightning_moe.parallel.slots import Slot, dense_stride

Member = tuple[str, nn.Parameter, ShardSpecs]
"""Name, parameter and specs of what a bucket is made for."""


@dataclass(eq=False)
class Bucket:
    """Gradients in one buffer, with the group it is reduced over."""

    layout: FlatLayout
    grads: Tensor
    """The gradients of all parameters, with gaps that stay zero."""
    flags: Tensor
    """For each parameter whether, or how many, ranks have used it. The last part of ``grads`` unless sharded."""
    slots: list[Slot]
    group: dist.ProcessGroup | None
    rank: int
    """This rank's position in the group."""
    scale: float
    """What the sum over the group is multiplied by to give the mean over ``data_context``."""
    sharded: bool
    """Whether each rank of the group gets, and steps, only its shard."""
    missing: int = 0
    issued: bool = False
    reduced: bool = False
    works: list[dist.Work] = field(default_factory=list)

    @property
    def shard(self) -> Tensor:
        """This rank's part of the gradients."""
        return own_shard(self.grads, self.layout, self.rank)

    def take_over(self) -> None:
        """Bring the bucket in line with the gradients that were handed out, before backward adds to it."""
        self.wait()  # for what a backward pass has left that ended in an exception
        for slot in self.slots:
            slot.take_over(reduced=self.reduced)
        if self.reduced and not all(slot.fresh for slot in self.slots):
            self._undo_reduction()
        self.reduced = self.issued = False
        self.missing = len(self.slots)

    def reduce(self) -> None:
        """Begin to sum over the ranks of the group."""
        self.issued = True
        for slot in self.slots:
            if slot.fresh:
                slot.view.zero_()
            slot.join()
        if all(slot.used for slot in self.slots):
            self.flags.fill_(1.0)
        else:
            self.flags.copy_(torch.tensor([float(slot.used) for slot in self.slots]))
        if self.group is None:
            return
        if self.sharded:
            self.works.append(start_reduce_scatter_(self.grads, self.group).work)
            self.works.append(start_all_reduce_(self.flags, self.group).work)
        else:
            self.works.append(start_all_reduce_(self.grads, self.group).work)

    def finish_reduction(self) -> None:
        """Wait for the sums and make means of them, and find out which parameters have been used by any rank."""
        self.wait()
        (self.shard if self.sharded else self.grads).mul_(self.scale)
        self.reduced = True
        if not all(slot.used for slot in self.slots):  # reading the flags waits for the device: only if needed
            for slot, flag in zip(self.slots, self.flags.tolist(), strict=True):
                slot.used = abs(flag) > 0  # a complex bucket has complex flags

    def hand_out(self) -> None:
        """Set the gradients of all parameters."""
        for slot in self.slots:
            slot.join()
            slot.hand_out(reduced=self.reduced)

    def wait(self) -> None:
        """Wait for the collectives that are under way."""
        for work in self.works:
            work.wait()
        self.works.clear()

    def _undo_reduction(self) -> None:
        """Leave a reduced gradient to one rank, so that reducing it again, with what is added to it, counts it once."""
        shard = self.layout.shard(self.rank)
        self.grads[: shard.start].zero_()
        self.grads[shard.stop :].zero_()
        self.shard.div_(self.scale)


def make_bucket(members: Sequence[Member], axis: Axis, mesh: ParallelMesh, *, shard: bool) -> Bucket:
    """Allocate a bucket for parameters of one dtype and device.

    Args:
        members: The parameters.
        axis: What their gradients are summed over.
        mesh: The parallel mesh.
        shard: Whether each rank steps only its part, if there are several.
    """
    replicas, data_ranks = mesh.size(axis), mesh.size(Axis.DATA_CONTEXT)
    holders = mesh.size(Axis.DATA_CONTEXT_TENSOR)
    if axis is Axis.TIED:  # on another stage, too
        holders = holders * replicas // data_ranks
    first = members[0][1]
    layout = FlatLayout((*(parameter.numel() for _, parameter, _ in members), len(members)), replicas)
    grads = torch.zeros(layout.total, dtype=main_dtype(first.dtype), device=first.device)
    *offsets, behind = layout.offsets
    flags = grads[behind : behind + len(members)]
    slots = [
        Slot(
            name,
            parameter,
            grads.as_strided(parameter.shape, dense_stride(parameter), offset),
            layout.run(i, mesh.rank(axis)),
            holders // (replicas * _parts(specs, mesh)),
            torch.autograd.graph.get_gradient_edge(parameter).node,
        )
        for i, ((name, parameter, specs), offset) in enumerate(zip(members, offsets, strict=True))
    ]
    sharded = shard and replicas > 1
    return Bucket(
        layout,
        grads,
        flags.clone() if sharded else flags,
        slots,
        mesh.active_group(axis),
        mesh.rank(axis),
        scale=1 / data_ranks,
        sharded=sharded,
    )


def main_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype gradients of parameters of ``dtype`` are summed."""
    return torch.promote_types(dtype, torch.float32)


def own_shard(flat: Tensor, layout: FlatLayout, rank: int) -> Tensor:
    """The part of a flat tensor that belongs to ``rank``."""
    positions = layout.shard(rank)
    return flat[positions.start : positions.stop]


def _parts(specs: ShardSpecs, mesh: ParallelMesh) -> int:
    """Number of ranks that hold the whole parameter between them."""
    axis = shard_axis_of(specs)
    return 1 if axis is None else mesh.size(axis)
