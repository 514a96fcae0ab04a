"""Dense feed-forward layers: a transformer block's, and the residual block around patches."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.layers.linear import ColumnParallelLinear, Linear, RowParallelLinear
from lightning_moe.layers.swiglu import swiglu
from lightning_moe.layers.token_layout import TokenLayout
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import even_slice


class FeedForward(nn.Module):
    """Bias-free ReLU feed-forward layer ``down(relu(up(x)))``, as in T5 and Chronos.

    Args:
        hidden_size: Width ``D`` of the tokens.
        ffn_hidden_size: Width of the inner layer.
    """

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, ffn_hidden_size, bias=False)
        self.down_proj = Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., D]``."""
        out: Tensor = self.down_proj(F.relu(self.up_proj(hidden)))
        return out


class SwiGLU(nn.Module):
    """Bias-free feed-forward layer ``down(silu(gate(x)) * up(x))``, its inner width split over the axis ``tensor``.

    Args:
        hidden_size: Width ``D`` of the tokens.
        ffn_hidden_size: Width ``F`` of the inner layer.
        mesh: The parallel mesh.
        init_std: Standard deviation of the initial gate and up projections; ``D^-0.5`` when None.
        output_init_std: That of the down projection; ``F^-0.5`` when None.

    Attributes:
        gate_up_proj: Weight ``[2F / tensor, D]``: this rank's rows of the gate, then of the up projection.
        down_proj: Weight ``[D, F / tensor]``.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        mesh: ParallelMesh,
        *,
        init_std: float | None = None,
        output_init_std: float | None = None,
    ) -> None:
        super().__init__()
        inner = even_slice(ffn_hidden_size, mesh, Axis.TENSOR)
        index = (*inner, *(ffn_hidden_size + row for row in inner))
        self.gate_up_proj = ColumnParallelLinear(hidden_size, 2 * ffn_hidden_size, mesh, index=index, init_std=init_std)
        self.down_proj = RowParallelLinear(ffn_hidden_size, hidden_size, mesh, index=inner, init_std=output_init_std)

    def forward(self, hidden: Tensor, layout: TokenLayout) -> Tensor:
        """Map hidden states to hidden states, ``[T / tensor, D]`` or ``[T, D]`` as ``layout`` says."""
        out: Tensor = self.down_proj(swiglu(self.gate_up_proj(hidden, layout)), layout)
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
