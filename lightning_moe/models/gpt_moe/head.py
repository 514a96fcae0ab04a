"""The output projection of a model whose embedding is not tied to it. V vocabulary of this rank, D model width."""

from __future__ import annotations

import torch
from torch import nn

from lightning_moe.layers import VocabularyShard
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import set_shard_spec, sharded_init_


class OutputProjection(nn.Module):
    """Holds the weight; it is applied where the loss or the logits are computed, a chunk of tokens at a time.

    Args:
        vocab_size: Size of the whole vocabulary.
        hidden_size: Width ``D`` of the hidden states.
        mesh: The parallel mesh.
        init_std: Standard deviation of the initial weights.

    Attributes:
        weight: ``[V, D]``, the rows of this rank's tokens.
    """

    def __init__(self, vocab_size: int, hidden_size: int, mesh: ParallelMesh, *, init_std: float) -> None:
        super().__init__()
        vocabulary = VocabularyShard.of(mesh, vocab_size)
        self.weight = nn.Parameter(torch.empty(len(vocabulary.tokens), hidden_size))
        set_shard_spec(self, "weight", vocabulary.spec)
        sharded_init_(
            self.weight,
            (vocabulary.spec,),
            lambda values, generator: values.normal_(0.0, init_std, generator=generator),
        )
