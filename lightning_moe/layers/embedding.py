"""Token embedding whose vocabulary is split over the axis ``tensor``.

B batch, S tokens of each sequence on this context rank, T = B * S, D model width, V vocabulary, P tensor ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.layers.token_layout import TokenLayout
from lightning_moe.layers.vocabulary import VocabularyShard
from lightning_moe.parallel.collectives import reduce_scatter, summands_to_copies
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import set_shard_spec, sharded_init_
from lightning_moe.weight_grad import compute_dtype


class VocabParallelEmbedding(nn.Module):
    """Looks tokens up in a table of which each tensor rank holds the rows of some tokens.

    The table is drawn from a normal distribution and does not depend on the topology.

    Args:
        vocab_size: Size ``V`` of the vocabulary; the ranks need not divide it.
        hidden_size: Width ``D`` of the hidden states.
        mesh: The parallel mesh.
        init_std: Standard deviation of the initial weights.

    Attributes:
        weight: ``[len(vocabulary.tokens), D]``. May also serve as the output projection.
        vocabulary: The tokens whose rows are held here.

    Raises:
        ConfigError: There are fewer tokens than ranks.
    """

    def __init__(self, vocab_size: int, hidden_size: int, mesh: ParallelMesh, *, init_std: float) -> None:
        super().__init__()
        self._mesh = mesh
        self.vocabulary = VocabularyShard.of(mesh, vocab_size)
        self.weight = nn.Parameter(torch.empty(len(self.vocabulary.tokens), hidden_size))
        spec = self.vocabulary.spec
        set_shard_spec(self, "weight", spec)
        sharded_init_(self.weight, (spec,), lambda values, generator: values.normal_(0, init_std, generator=generator))

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Look up the embeddings of tokens.

        Args:
            tokens: int64 ``[B, S]``, the same on all tensor ranks.
            layout: How the hidden states are to be laid out.

        Returns:
            ``[T / P, D]`` with sequence parallelism, else ``[T, D]``; in the autocast dtype under autocast.
        """
        group = self._mesh.active_group(Axis.TENSOR)
        rows, elsewhere = self.vocabulary.locate(tokens.reshape(-1))
        # Cast the rows looked up rather than the table, and before they are sent.
        summand = F.embedding(rows, self.weight).to(compute_dtype(self.weight))
        if group is not None:
            summand = summand.masked_fill(elsewhere[:, None], 0.0)
        if layout.sequence_parallel:
            return reduce_scatter(summand, group)
        return summands_to_copies(summand, group)

    def extra_repr(self) -> str:
        """Show the sizes and this rank's share in the module's repr."""
        return f"{self.vocabulary.size}, {self.weight.shape[1]}, tokens={self.vocabulary.tokens}"
