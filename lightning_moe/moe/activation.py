"""The nonlinearities of experts, and the names and shapes of the projections that they need.

D model width, F expert width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from lightning_moe.layers.swiglu import swiglu

Activation = Literal["swiglu", "gelu", "relu"]


def up_projection(activation: Activation, expert_hidden_size: int) -> tuple[str, int]:
    """Name and output width of an expert's first projection.

    SwiGLU needs a gate beside the up projection; both are one matrix ``gate_up_proj`` of width ``2F``, the
    gate first, as in Hugging Face. The others have ``up_proj`` of width ``F``.
    """
    if activation == "swiglu":
        return "gate_up_proj", 2 * expert_hidden_size
    return "up_proj", expert_hidden_size


def activate(projected: Tensor, activation: Activation) -> Tensor:
    """Apply the nonlinearity: ``[..., 2F]`` (SwiGLU, ``silu(gate) * up``) or ``[..., F]`` to ``[..., F]``."""
    if activation == "swiglu":
        return swiglu(projected)
    return F.gelu(projected) if activation == "gelu" else F.relu(projected)
