"""The shared expert: a feed-forward layer that every token visits beside its routed experts.

D model width, F width of the shared expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.moe.activation import Activation, activate, up_projection
from lightning_moe.parallel.sharding import whole_init_
from lightning_moe.weight_grad import linear


class SharedExpert(nn.Module):
    """Bias-free feed-forward layer, optionally scaled per token by ``sigmoid(gate . token)`` (Qwen2-MoE).

    Its parameters are dense: every rank holds all of them and applies them to its own tokens. Splitting them over the
    axis ``tensor`` would save little memory, for a shared expert is small beside the routed ones, and would cost a
    gather and a reduction of all tokens that the whole expert does without.

    Args:
        hidden_size: Width ``D`` of the tokens.
        expert_hidden_size: Inner width ``F``.
        activation: Nonlinearity.
        gated: Whether there is a gate.

    Attributes:
        gate_up_proj: ``[2F, D]`` (SwiGLU), or ``up_proj`` ``[F, D]``.
        down_proj: ``[D, F]``.
        gate: ``[1, D]``, or None.
    """

    def __init__(self, hidden_size: int, expert_hidden_size: int, activation: Activation, gated: bool) -> None:
        super().__init__()
        self.activation = activation
        self._up_name, up_width = up_projection(activation, expert_hidden_size)
        self.register_parameter(self._up_name, nn.Parameter(torch.empty(up_width, hidden_size)))
        self.down_proj = nn.Parameter(torch.empty(hidden_size, expert_hidden_size))
        self.gate = nn.Parameter(torch.empty(1, hidden_size)) if gated else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every weight as ``nn.Linear`` does: U(-fan_in^-0.5, fan_in^-0.5)."""
        for parameter in self.parameters():
            whole_init_(parameter, lambda weight: nn.init.kaiming_uniform_(weight, a=5**0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., D]``; a token of zeros gives zeros."""
        up: Tensor = getattr(self, self._up_name)
        out = linear(activate(linear(tokens, up), self.activation), self.down_proj)
        return out if self.gate is None else F.sigmoid(F.linear(tokens, self.gate)) * out
