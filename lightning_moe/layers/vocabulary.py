"""A vocabulary whose tokens are spread over the axis ``tensor``: which rank holds which."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.errors import ConfigError
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import ShardSpec, even_slice


@dataclass(frozen=True)
class VocabularyShard:
    """The tokens that one tensor rank holds; the ranks' shares are even up to one token, nothing is padded.

    Args:
        size: Number of tokens ``V`` in the whole vocabulary.
        tokens: Those held here.
    """

    size: int
    tokens: range

    @classmethod
    def of(cls, mesh: ParallelMesh, size: int) -> VocabularyShard:
        """This rank's shard of a vocabulary of ``size`` tokens.

        Raises:
            ConfigError: There are fewer tokens than ranks.
        """
        if size < mesh.size(Axis.TENSOR):
            raise ConfigError("parallel.tensor", mesh.size(Axis.TENSOR), f"at most vocab_size = {size}")
        return cls(size, even_slice(size, mesh, Axis.TENSOR))

    @property
    def spec(self) -> ShardSpec:
        """How a matrix with one row per token is sharded."""
        return ShardSpec(Axis.TENSOR, 0, self.size, tuple(self.tokens))

    def locate(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Find tokens among those held here.

        Tokens outside the vocabulary count as held by the first or the last rank and get positions that no row has, so
        that the lookup reports them there as it does on one rank. Taken for tokens of another rank on every rank, they
        would be lost without an error.

        Args:
            tokens: int64, any shape.

        Returns:
            The row of each token, 0 for those of other ranks; and bool, True for those of other ranks.
        """
        elsewhere = torch.zeros_like(tokens, dtype=torch.bool)
        if self.tokens.start > 0:
            elsewhere |= tokens < self.tokens.start
        if self.tokens.stop < self.size:
            elsewhere |= tokens >= self.tokens.stop
        return (tokens - self.tokens.start).masked_fill(elsewhere, 0), elsewhere
