"""One transformer block: self attention, then a mixture of experts or a dense feed-forward layer."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_moe.config.chronos import ChronosMoEConfig
from lightning_moe.layers import FeedForward, RMSNorm, SelfAttention
from lightning_moe.moe.layer import MoELayer, RoutingInfo
from lightning_moe.parallel.main_params import gather_in_forward
from lightning_moe.parallel.mesh import ParallelMesh


class ChronosBlock(nn.Module):
    """Pre-norm residual block: ``x + attention(norm(x))``, then ``x + ffn(norm(x))``.

    Args:
        config: Sizes; ``config.moe`` None gives a dense feed-forward layer.
        mesh: Where the experts live; None builds all of them here.
    """

    def __init__(self, config: ChronosMoEConfig, mesh: ParallelMesh | None = None) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size)
        self.attention = SelfAttention(config.hidden_size, config.num_heads, config.dropout)
        self.ffn_norm = RMSNorm(config.hidden_size)
        self.ffn: MoELayer | FeedForward
        if config.moe is None:
            self.ffn = FeedForward(config.hidden_size, config.ffn_hidden_size)
        else:
            self.ffn = MoELayer(config.hidden_size, config.moe, mesh)
        self.dropout = nn.Dropout(config.dropout)
        gather_in_forward(self)

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> tuple[Tensor, RoutingInfo | None]:
        """Transform the tokens of each series.

        Args:
            hidden: ``[B, S, D]``.
            rope: Rotary tables for ``S`` positions.
            mask: bool ``[B, S]``, False for tokens that hold no observation: nobody attends to them, and
                they are not routed to experts.

        Returns:
            ``[B, S, D]``, and what the router did (None for a dense block).
        """
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), rope, mask))
        normed = self.ffn_norm(hidden)
        if isinstance(self.ffn, FeedForward):
            return hidden + self.dropout(self.ffn(normed)), None
        update, routing = self.ffn(normed, mask)
        return hidden + self.dropout(update), routing
