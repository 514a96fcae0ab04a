"""Differentiable collectives; a group of None stands for a world of one and makes each of them the identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed these two; 2.11 and 2.12 have only the older names.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


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
    out: Tensor = _AllToAll.apply(rows, list(output_splits), list(input_splits), group)  # type: ignore[no-untyped-call]
    return out


def all_gather(tensor: Tensor, group: dist.ProcessGroup | None, dim: int = 0) -> Tensor:
    """Concatenate every rank's equally shaped tensor along ``dim``; backward reduce-scatters (sums) the gradient."""
    if group is None:
        return tensor
    out: Tensor = _AllGather.apply(tensor, group, dim)  # type: ignore[no-untyped-call]
    return out


def reduce_scatter(tensor: Tensor, group: dist.ProcessGroup | None, dim: int = 0) -> Tensor:
    """Sum the tensor over the ranks and keep this rank's slice along ``dim``; backward all-gathers the gradient.

    The length along ``dim`` must be a multiple of the group's size.
    """
    if group is None:
        return tensor
    out: Tensor = _ReduceScatter.apply(tensor, group, dim)  # type: ignore[no-untyped-call]
    return out


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
