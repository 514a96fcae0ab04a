"""Dense feed-forward layers: a transformer block's, and the residual block around patches."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """Bias-free ReLU feed-forward layer ``down(relu(up(x)))``, as in T5 and Chronos.

    Args:
        hidden_size: Width ``D`` of the tokens.
        ffn_hidden_size: Width of the inner layer.
    """

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., D]``."""
        out: Tensor = self.down_proj(F.relu(self.up_proj(hidden)))
        return out


class ResidualBlock(nn.Module):
    """``out(relu(hidden(x))) + residual(x)`` with biases.

    The patch embedding and the head of Chronos-Bolt and Chronos-2, taken from TiDE (arXiv:2304.08424).

    Args:
        input_size: Width of the input.
        hidden_size: Width of the inner layer.
        output_size: Width of the output.
    """

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.hidden_proj = nn.Linear(input_size, hidden_size)
        self.output_proj = nn.Linear(hidden_size, output_size)
        self.residual_proj = nn.Linear(input_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., input_size]`` to ``[..., output_size]``."""
        out: Tensor = self.output_proj(F.relu(self.hidden_proj(x))) + self.residual_proj(x)
        return out
