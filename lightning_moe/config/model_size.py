"""What a model consists of, for dividing it among stages and for estimates of memory (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lightning_moe.config.block_size import BlockShape, ParameterSize


class RelativeCosts(NamedTuple):
    """Work of the pieces of a model, relative to an average block: what divides blocks among stages."""

    blocks: tuple[float, ...]
    """Of each block."""
    embed: float
    """Of what comes before the blocks."""
    head: float
    """Of what comes after them."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The pieces of a model.

    Attributes:
        embedding: Parameters of what comes before the blocks.
        blocks: The blocks.
        head: Parameters of what comes after the blocks.
        tied: Whether the head's matrix is the embedding's, which counts once wherever both are held.
        embed_work: Parameters before the blocks that a token is multiplied with, on average.
        head_work: Parameters after the blocks that a token is multiplied with, on average.
    """

    embedding: ParameterSize
    blocks: tuple[BlockShape, ...]
    head: ParameterSize
    tied: bool
    embed_work: float
    head_work: float

    @property
    def relative_costs(self) -> RelativeCosts:
        """Costs by the products of tokens with parameters, 2 operations for each.

        What does not go with the parameters is left out: the products of queries with keys, which grow with the
        sequence, and the exchange of tokens between experts.
        """
        active = [shape.parameters.active for shape in self.blocks]
        mean = sum(active) / len(active)
        return RelativeCosts(tuple(one / mean for one in active), self.embed_work / mean, self.head_work / mean)
