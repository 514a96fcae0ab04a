"""Linear layers whose weight is split over the axis ``tensor`` (Shoeybi et al. 2019, arXiv:1909.08053).

T tokens, K input width, N output width, P ranks of the axis ``tensor``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_moe.layers.column_matmul import column_matmul
from lightning_moe.layers.row_matmul import row_matmul
from lightning_moe.layers.token_layout import TokenLayout
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import ShardSpec, even_slice, set_shard_spec, sharded_init_
from lightning_moe.weight_grad import linear

# [Note: fused matrices]
# A matrix may stack several logical blocks, as q|k|v or gate|up. A rank then needs its rows of every block, which are
# no contiguous slice of the whole: that is what ``index`` is for. It is part of the ShardSpec, so checkpoints and
# initial weights are those of the whole matrix whatever the number of ranks.


class Linear(nn.Linear):
    """``nn.Linear`` whose weight gradient can be accumulated in float32, and deferred by a pipeline's schedule.

    Parameters, their names and initial values are those of ``nn.Linear``; a state dict of one fits the other.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``input @ weight^T + bias``, ``[..., K]`` to ``[..., N]``; the bias's gradient is not deferred."""
        out = linear(input, self.weight)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class ColumnParallelLinear(nn.Module):
    """``y = x W^T`` where each tensor rank holds some of the rows of ``W`` and computes those features of ``y``.

    The weight is drawn from a normal distribution; the whole matrix does not depend on the topology.

    Args:
        in_features: Input width ``K``.
        out_features: Output width ``N`` of the whole matrix.
        mesh: The parallel mesh.
        index: Rows of the whole matrix held by this rank, in local order; an even, contiguous slice when None.
        init_std: Standard deviation of the initial weights; ``K^-0.5`` when None.

    Attributes:
        weight: ``[len(index), K]``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mesh: ParallelMesh,
        *,
        index: Sequence[int] | None = None,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        rows = tuple(even_slice(out_features, mesh, Axis.TENSOR) if index is None else index)
        self.weight = nn.Parameter(torch.empty(len(rows), in_features))
        self._mesh = mesh
        _shard(self, ShardSpec(Axis.TENSOR, 0, out_features, rows), in_features, init_std)

    def forward(self, hidden: Tensor, layout: TokenLayout) -> Tensor:
        """Map hidden states to this rank's features of every token.

        Args:
            hidden: ``[T / P, K]`` with sequence parallelism, else ``[T, K]``, the same on all tensor ranks.
            layout: How the hidden states are laid out.

        Returns:
            ``[T, len(index)]``.
        """
        group = self._mesh.active_group(Axis.TENSOR)
        return column_matmul(hidden, self.weight, group, sequence_parallel=layout.sequence_parallel)


class RowParallelLinear(nn.Module):
    """``y = x W^T`` where each tensor rank holds some of the columns of ``W``, and those features of ``x``.

    Takes the output of a :class:`ColumnParallelLinear` back to the layout of the hidden states. The weight is drawn
    from a normal distribution; the whole matrix does not depend on the topology.

    Args:
        in_features: Input width ``K`` of the whole matrix.
        out_features: Output width ``N``.
        mesh: The parallel mesh.
        index: Columns of the whole matrix held by this rank, in local order; an even, contiguous slice when None.
        init_std: Standard deviation of the initial weights; ``K^-0.5`` when None.

    Attributes:
        weight: ``[N, len(index)]``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mesh: ParallelMesh,
        *,
        index: Sequence[int] | None = None,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        columns = tuple(even_slice(in_features, mesh, Axis.TENSOR) if index is None else index)
        self.weight = nn.Parameter(torch.empty(out_features, len(columns)))
        self._mesh = mesh
        _shard(self, ShardSpec(Axis.TENSOR, 1, in_features, columns), in_features, init_std)

    def forward(self, features: Tensor, layout: TokenLayout) -> Tensor:
        """Map this rank's features of every token to hidden states.

        Args:
            features: ``[T, len(index)]``.
            layout: How the hidden states are to be laid out.

        Returns:
            ``[T / P, N]`` with sequence parallelism, else ``[T, N]``, the same on all tensor ranks.
        """
        group = self._mesh.active_group(Axis.TENSOR)
        return row_matmul(features, self.weight, group, sequence_parallel=layout.sequence_parallel)


def _shard(
    module: ColumnParallelLinear | RowParallelLinear, spec: ShardSpec, in_features: int, init_std: float | None
) -> None:
    """Mark and initialise ``module.weight``; also with one rank, so that the topology changes nothing."""
    set_shard_spec(module, "weight", spec)
    std = in_features**-0.5 if init_std is None else init_std
    sharded_init_(module.weight, (spec,), lambda values, generator: values.normal_(0.0, std, generator=generator))
