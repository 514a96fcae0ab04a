"""Multi-head self attention with rotary positions and a key mask."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.errors import ConfigError
from lightning_moe.layers.linear import Linear
from lightning_moe.layers.rope import apply_rope

# Shapes: B batch, S sequence, D model width, N heads, H head width (D = N * H).


class SelfAttention(nn.Module):
    """Bidirectional self attention: ``softmax(q k^T / sqrt(H)) v`` over the keys that the mask admits.

    Args:
        hidden_size: Width ``D`` of the tokens.
        num_heads: Number of heads; ``D / num_heads`` must be even (rotary positions act on pairs).
        dropout: Probability of dropping an attention weight, in training only.

    Raises:
        ConfigError: ``num_heads`` does not give even heads.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % (2 * num_heads):
            raise ConfigError("num_heads", num_heads, f"a divisor of hidden_size {hidden_size} that gives even heads")
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv_proj = Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor], key_mask: Tensor | None = None) -> Tensor:
        """Let every token attend to the admitted tokens of its sequence.

        Args:
            hidden: ``[B, S, D]``.
            rope: Tables of :func:`~lightning_moe.layers.rope.rope_tables` for ``S`` positions.
            key_mask: bool ``[B, S]``, True where a token may be attended to; at least one per sequence. All
                when None.

        Returns:
            ``[B, S, D]``. Rows of masked tokens are finite but mean nothing.
        """
        batch, length, width = hidden.shape
        qkv = self.qkv_proj(hidden).view(batch, length, 3, self.num_heads, width // self.num_heads)
        # Queries and keys are rotated in one call: with few tokens, the number of kernels is what costs time.
        cos, sin = (table[:, None, None] for table in rope)
        query, key = apply_rope(qkv[:, :, :2], cos, sin).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            qkv[:, :, 2].transpose(1, 2),
            attn_mask=None if key_mask is None else key_mask[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        out: Tensor = self.out_proj(attended.transpose(1, 2).reshape(batch, length, width))
        return out
