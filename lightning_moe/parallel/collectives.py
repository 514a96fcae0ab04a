"""Differentiable collectives; a group of None stands for a world of one and makes each of them the identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed these two; 2.11 and 2.12 have only the older names.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def apply_eagerly(function: type[torch.autograd.Function], *arguments: object) -> Tensor:
    """Apply an autograd function of one result; compiled code is interrupted around it.

    The compiler rewrites collectives. That of torch 2.11 does it wrongly inside an autograd function: an all-reduced
    tensor comes out as zeros, without an error.
    """
    out: Tensor = _apply(function, *arguments)
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _apply(function: type[torch.autograd.Function], *arguments: object) -> Any:
    return function.apply(*arguments)


def all_to_all(
    rows: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], group: dist.ProcessGroup | None
) -> Tensor:
    """Exchange blocks of rows: block ``i`` of the input goes to rank ``i`` of the group.

    Args:
        rows: ``[sum(input_splits), ...]``, any dtype the backend carries.
        output_splits: Rows to receive from each rank.
        input_splits: Rows to send to each rank; zeros are fine.
        group: Process group; None for a world of one.

    Returns:
        ``[sum(output_splits), ...]``, blocks in the order of the source ranks.
    """
    if group is None:
        return rows
    return apply_eagerly(_AllToAll, rows, list(output_splits), list(input_splits), group)


def all_gather(tensor: Tensor, group: dist.ProcessGroup | None, dim: int = 0) -> Tensor:
    """Concatenate every rank's equally shaped tensor along ``dim``; backward reduce-scatters (sums) the gradient."""
    if group is None:
        return tensor
    return apply_eagerly(_AllGather, tensor, group, dim)


def reduce_scatter(tensor: Tensor, group: dist.ProcessGroup | None, dim: int = 0) -> Tensor:
    """Sum the tensor over the ranks and keep this rank's slice along ``dim``; backward all-gathers the gradient.

    The length along ``dim`` must be a multiple of the group's size.
    """
    if group is None:
        return tensor
    return apply_eagerly(_ReduceScatter, tensor, group, dim)


@dataclass(frozen=True, eq=False)
class PendingTensor:
    """The result of a collective that is under way; other work can be done before :meth:`wait`."""

    tensor: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        """The result; on CUDA only the current stream waits."""
        self.work.wait()
        return self.tensor


def start_all_gather(tensor: Tensor, group: dist.ProcessGroup) -> PendingTensor:
    """Begin to concatenate every rank's equally shaped tensor along dim 0; has no gradient."""
    out = tensor.new_empty((dist.get_world_size(group) * tensor.shape[0], *tensor.shape[1:]))
    return PendingTensor(out, _all_gather_single(out, tensor.contiguous(), group=group, async_op=True))


def start_reduce_scatter(tensor: Tensor, group: dist.ProcessGroup) -> PendingTensor:
    """Begin to sum over the ranks what becomes this rank's slice along dim 0; has no gradient."""
    length, ranks = tensor.shape[0], dist.get_world_size(group)
    assert length % ranks == 0, f"length {length} along dim 0 is not a multiple of {ranks} ranks"
    out = tensor.new_empty((length // ranks, *tensor.shape[1:]))
    return PendingTensor(out, _reduce_scatter_single(out, tensor.contiguous(), group=group, async_op=True))


def start_all_gather_(flat: Tensor, group: dist.ProcessGroup) -> PendingTensor:
    """Begin to fill a contiguous tensor of which each rank has its own slice along dim 0, in place; has no gradient."""
    return PendingTensor(flat, _all_gather_single(flat, _own_slice(flat, group), group=group, async_op=True))


def start_reduce_scatter_(flat: Tensor, group: dist.ProcessGroup) -> PendingTensor:
    """Begin to sum over the ranks, into a rank's own slice along dim 0 of a contiguous tensor; has no gradient.

    The other slices are undefined afterwards. The result is the own slice.
    """
    own = _own_slice(flat, group)
    return PendingTensor(own, _reduce_scatter_single(own, flat, group=group, async_op=True))


def start_all_reduce_(tensor: Tensor, group: dist.ProcessGroup) -> PendingTensor:
    """Begin to sum a contiguous tensor over the ranks, in place; has no gradient."""
    return PendingTensor(tensor, dist.all_reduce(tensor, group=group, async_op=True))


def _own_slice(flat: Tensor, group: dist.ProcessGroup) -> Tensor:
    return flat.tensor_split(dist.get_world_size(group))[dist.get_rank(group)]


# [Note: copies and parts]
# On an axis whose ranks share weights, an activation is either a *copy*, equal on all ranks, or a *part*: a slice of
# the whole, or a summand. The gradient of a copy is a copy too, and that of a slice a slice. The four functions below
# go from one to the other; forward of one is backward of another. all_gather and reduce_scatter above connect slices
# with summands, whose gradients are summands and slices.


def copies_to_summands(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return ``tensor`` itself, of which each rank goes on to use a part of its own; backward sums over the ranks."""
    if group is None:
        return tensor
    return apply_eagerly(_CopiesToSummands, tensor, group)


def summands_to_copies(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over the ranks (all-reduce); the gradient, a copy on every rank, passes unchanged."""
    if group is None:
        return tensor
    return apply_eagerly(_SummandsToCopies, tensor, group)


def copies_to_slices(tensor: Tensor, group: dist.ProcessGroup | None, dim: int = 0) -> Tensor:
    """Keep this rank's slice along ``dim``, whose length the ranks divide; backward gathers the slices' gradients."""
    if group is None:
        return tensor
    return apply_eagerly(_CopiesToSlices, tensor, group, dim)


def slices_to_copies(tensor: Tensor, group: dist.ProcessGroup | None, dim: int = 0) -> Tensor:
    """Gather the ranks' slices along ``dim``; backward keeps this rank's slice of the gradient, which is a copy."""
    if group is None:
        return tensor
    return apply_eagerly(_SlicesToCopies, tensor, group, dim)


def _sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


def _slice(tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    ranks, length = dist.get_world_size(group), tensor.shape[dim]
    assert length % ranks == 0, f"length {length} along dim {dim} is not a multiple of {ranks} ranks"
    return tensor.narrow(dim, dist.get_rank(group) * (length // ranks), length // ranks).contiguous()


def _exchange(rows: Tensor, output_splits: list[int], input_splits: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty((sum(output_splits), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), output_splits, input_splits, group=group)
    return out


def _gather(tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    local = tensor.movedim(dim, 0).contiguous()
    out = local.new_empty((dist.get_world_size(group) * local.shape[0], *local.shape[1:]))
    _all_gather_single(out, local, group=group)
    return out.movedim(0, dim)


def _reduce_scatter(tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    whole = tensor.movedim(dim, 0).contiguous()
    length, ranks = whole.shape[0], dist.get_world_size(group)
    assert length % ranks == 0, f"length {length} along dim {dim} is not a multiple of {ranks} ranks"
    out = whole.new_empty((length // ranks, *whole.shape[1:]))
    _reduce_scatter_single(out, whole, group=group)
    return out.movedim(0, dim)


# Each backward is the opposite collective through its public, differentiable form: calling the plain one instead would
# make second derivatives (gradient penalties) wrong without an error.


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, output_splits: list[int], input_splits: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.splits, ctx.group = (output_splits, input_splits), group
        return _exchange(rows, output_splits, input_splits, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        output_splits, input_splits = ctx.splits
        return all_to_all(grad, input_splits, output_splits, ctx.group), None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _gather(tensor, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(grad, ctx.group, ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _reduce_scatter(tensor, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad, ctx.group, ctx.dim), None, None


class _CopiesToSummands(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return summands_to_copies(grad, ctx.group), None


class _SummandsToCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return copies_to_summands(grad, ctx.group), None


class _CopiesToSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _slice(tensor, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return slices_to_copies(grad, ctx.group, ctx.dim), None, None


class _SlicesToCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _gather(tensor, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return copies_to_slices(grad, ctx.group, ctx.dim), None, None
