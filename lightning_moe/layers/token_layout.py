"""How the hidden states that pass between layers are laid out over ranks: settled by each call, not by the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLayout:
    """Describes hidden states ``[T, D]``: the flat, row-major tokens of ``[batch, length]``.

    A layer's weights are cut once and for all, activations are not: training splits them over ranks, and generation,
    whose lengths are arbitrary, gives every rank a copy. So the layout is passed to ``forward``.

    Args:
        batch: Number of sequences ``B``.
        length: Tokens of each sequence on this rank of the axis ``context``: ``S / context``, or ``S``.
        sequence_parallel: Whether each rank of the axis ``tensor`` has its slice ``T / tensor`` of the flat tokens
            between the layers whose weights are split, in rank order. Otherwise each has a copy of all of them.
        context_parallel: Whether each rank of the axis ``context`` has its chunk of every sequence, in rank order.
            Otherwise each has a copy of whole sequences.
    """

    batch: int
    length: int
    sequence_parallel: bool = False
    context_parallel: bool = False

    @property
    def num_tokens(self) -> int:
        """``T``: tokens of this context rank, before tensor ranks slice them."""
        return self.batch * self.length
