"""An expert's activation times the probability of its row. n rows, F expert width, U width of the first projection.

The probability multiplies what goes into the second projection, so that a token's rows are simply added up where they
come from. Everything is computed in float32 at least (float64 for float64) and rounded once.

Nothing here has a derivative: it is for the forward and backward of autograd functions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.moe.activation import Activation, activate
from lightning_moe.weight_grad.fused_kernels import fused_kernels_take


def forward(projected: Tensor, probabilities: Tensor, activation: Activation) -> Tensor:
    """``activation(projected) * probability``.

    Args:
        projected: ``[n, U]``; for SwiGLU the gate first.
        probabilities: ``[n]``, with any stride.
        activation: Nonlinearity.

    Returns:
        ``[n, F]`` in the dtype of ``projected``.
    """
    if _fused(projected, probabilities):
        from lightning_moe.moe.overlap import triton_scaled_activation

        return triton_scaled_activation.forward(projected, probabilities, activation)
    wide = torch.promote_types(projected.dtype, torch.float32)
    out = activate(projected.to(wide), activation) * probabilities.to(wide)[:, None]
    return out.to(projected.dtype)


def backward(
    projected: Tensor,
    probabilities: Tensor,
    grad: Tensor,
    activation: Activation,
    grad_projected_out: Tensor,
    inner_out: Tensor,
) -> Tensor:
    """Gradients of :func:`forward`, and once more what it gave: an operand of the second projection's weight gradient.

    Args:
        projected: ``[n, U]``.
        probabilities: ``[n]``, with any stride.
        grad: Gradient of the result, ``[n, F]``.
        activation: Nonlinearity.
        grad_projected_out: Contiguous ``[n, U]``, to be filled with the gradient of ``projected``.
        inner_out: Contiguous ``[n, F]``, to be filled with the result.

    Returns:
        The gradient of the probabilities, ``[n]`` in their dtype.
    """
    if _fused(projected, probabilities, grad, grad_projected_out, inner_out):
        from lightning_moe.moe.overlap import triton_scaled_activation

        return triton_scaled_activation.backward(
            projected, probabilities, grad, activation, grad_projected_out, inner_out
        )
    wide = torch.promote_types(projected.dtype, torch.float32)
    scale, grad = probabilities.to(wide)[:, None], grad.to(wide)
    activated, grad_projected = _activated_and_grad(projected.to(wide), grad * scale, activation)
    grad_projected_out.copy_(grad_projected)
    inner_out.copy_(activated * scale)
    return (grad * activated).sum(1).to(probabilities.dtype)


def _activated_and_grad(projected: Tensor, grad: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """``activation(projected)`` and, from its gradient, that of ``projected``."""
    if activation == "swiglu":
        gate, up = projected.chunk(2, dim=1)
        silu = F.silu(gate)
        return silu * up, torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * silu], dim=1)
    if activation == "gelu":
        return F.gelu(projected), torch.ops.aten.gelu_backward(grad, projected)
    return F.relu(projected), torch.ops.aten.threshold_backward(grad, projected, 0)


def _fused(projected: Tensor, *others: Tensor) -> bool:
    return fused_kernels_take(projected, *others) and projected.numel() > 0
