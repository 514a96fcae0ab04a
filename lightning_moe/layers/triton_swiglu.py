"""Triton kernels for SwiGLU on CUDA: one pass forward, one backward, computed in float32. F inner width."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Columns that one program handles."""


@triton.jit
def _forward_kernel(projected, out, width, BLOCK: tl.constexpr):  # noqa: N803 (Triton's spelling of constants)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(projected + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(projected + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(projected, grad, out, width, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(projected + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(projected + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    incoming = tl.load(grad + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate = incoming * up * (sigmoid + silu * (1.0 - sigmoid))
    target = out + row * 2 * width + columns
    tl.store(target, grad_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(target + width, (incoming * silu).to(out.dtype.element_ty), mask=inside)


def forward(projected: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[..., 2F]``, the gate first; gives ``[..., F]``."""
    projected, width = projected.contiguous(), projected.shape[-1] // 2
    out = projected.new_empty((*projected.shape[:-1], width))
    grid = (projected.numel() // (2 * width), triton.cdiv(width, _BLOCK))
    _forward_kernel[grid](projected, out, width, BLOCK=_BLOCK)
    return out


def backward(projected: Tensor, grad: Tensor) -> Tensor:
    """Gradient with respect to ``projected`` ``[..., 2F]`` from that of the result, ``[..., F]``."""
    projected, grad, width = projected.contiguous(), grad.contiguous(), projected.shape[-1] // 2
    out = torch.empty_like(projected)
    grid = (projected.numel() // (2 * width), triton.cdiv(width, _BLOCK))
    _backward_kernel[grid](projected, grad, out, width, BLOCK=_BLOCK)
    return out
