"""SwiGLU (Shazeer 2020, arXiv:2002.05202), keeping only its input for the backward pass. F inner width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.weight_grad.fused_kernels import fused_kernels_take


def swiglu(projected: Tensor) -> Tensor:
    """``silu(gate) * up``.

    Autograd would keep ``silu(gate)`` beside the gate and ``up``, half as much again; here it is recomputed. The values
    and gradients are those of autograd to the last bit. On CUDA one kernel does it all in float32, so 16-bit results
    are rounded once instead of at every step.

    Args:
        projected: ``[..., 2F]``, the gate first.

    Returns:
        ``[..., F]``.
    """
    if torch.compiler.is_compiling():  # the compiler chooses itself what to recompute
        return _plain(projected)
    out: Tensor = _SwiGLU.apply(projected)  # type: ignore[no-untyped-call]
    return out


def _plain(projected: Tensor) -> Tensor:
    gate, up = projected.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        if fused_kernels_take(projected) and projected.numel():
            from lightning_moe.layers import triton_swiglu

            return triton_swiglu.forward(projected)
        return _plain(projected)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        projected: Tensor = ctx.saved_tensors[0]
        if torch.is_grad_enabled():  # create_graph=True: the kernel below writes in place, which has no derivative
            return torch.autograd.grad(_plain(projected), projected, grad, create_graph=True)[0]
        if fused_kernels_take(projected) and projected.numel():
            from lightning_moe.layers import triton_swiglu

            return triton_swiglu.backward(projected, grad)
        gate, up = projected.chunk(2, dim=-1)
        out = torch.empty_like(projected)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return out
