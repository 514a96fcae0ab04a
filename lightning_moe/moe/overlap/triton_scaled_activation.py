"""Triton kernels for scaled activations on CUDA: one pass forward, one backward, computed in float32.

n rows, F expert width, U width of the first projection. See :mod:`lightning_moe.moe.overlap.scaled_activation`.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_moe.moe.activation import Activation

_BLOCK = 1024
"""Columns that one program handles at a time."""


@triton.jit
def _forward_kernel(
    projected,
    probabilities,
    out,
    width,
    probability_step,
    ACTIVATION: tl.constexpr,  # noqa: N803 (Triton's spelling of compile-time constants)
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    probability = tl.load(probabilities + row * probability_step).to(tl.float32)
    if ACTIVATION == "swiglu":
        source = projected + row * 2 * width + columns
        gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
        activated = gate * tl.sigmoid(gate) * up
    else:
        x = tl.load(projected + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION == "gelu":
            activated = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        else:
            activated = tl.where(x <= 0.0, 0.0, x)  # and not a maximum, which may turn NaN into 0
    tl.store(out + row * width + columns, (activated * probability).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    projected,
    probabilities,
    grad,
    grad_projected,
    inner,
    grad_probabilities,
    width,
    probability_step,
    ACTIVATION: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    probability = tl.load(probabilities + row * probability_step).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        incoming = tl.load(grad + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        scaled = incoming * probability
        if ACTIVATION == "swiglu":
            source = projected + row * 2 * width + columns
            target = grad_projected + row * 2 * width + columns
            gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            activated = silu * up
            grad_gate = scaled * up * (sigmoid + silu * (1.0 - sigmoid))
            tl.store(target, grad_gate.to(grad_projected.dtype.element_ty), mask=inside)
            tl.store(target + width, (scaled * silu).to(grad_projected.dtype.element_ty), mask=inside)
        else:
            x = tl.load(projected + row * width + columns, mask=inside, other=0.0).to(tl.float32)
            if ACTIVATION == "gelu":
                below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
                density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
                activated = x * below
                grad_x = scaled * (below + x * density)
            else:
                activated = tl.where(x <= 0.0, 0.0, x)
                grad_x = tl.where(x <= 0.0, 0.0, scaled)
            target = grad_projected + row * width + columns
            tl.store(target, grad_x.to(grad_projected.dtype.element_ty), mask=inside)
        total += incoming * activated
        tl.store(inner + row * width + columns, (activated * probability).to(inner.dtype.element_ty), mask=inside)
    tl.store(grad_probabilities + row, tl.sum(total).to(grad_probabilities.dtype.element_ty))


def forward(projected: Tensor, probabilities: Tensor, activation: Activation) -> Tensor:
    """``activation(projected) * probability``, ``[n, F]``."""
    projected, width = projected.contiguous(), _inner_width(projected, activation)
    out = projected.new_empty((projected.shape[0], width))
    _forward_kernel[(projected.shape[0], triton.cdiv(width, _BLOCK))](
        projected, probabilities, out, width, probabilities.stride(0), ACTIVATION=activation, BLOCK=_BLOCK
    )
    return out


def backward(
    projected: Tensor,
    probabilities: Tensor,
    grad: Tensor,
    activation: Activation,
    grad_projected_out: Tensor,
    inner_out: Tensor,
) -> Tensor:
    """Fill both outputs and return the gradient of the probabilities, ``[n]``."""
    assert grad_projected_out.is_contiguous(), "written row after row"
    assert inner_out.is_contiguous(), "written row after row"
    projected, grad = projected.contiguous(), grad.contiguous()
    grad_probabilities = torch.empty(projected.shape[0], dtype=probabilities.dtype, device=projected.device)
    _backward_kernel[(projected.shape[0],)](
        projected,
        probabilities,
        grad,
        grad_projected_out,
        inner_out,
        grad_probabilities,
        _inner_width(projected, activation),
        probabilities.stride(0),
        ACTIVATION=activation,
        BLOCK=_BLOCK,
    )
    return grad_probabilities


def _inner_width(projected: Tensor, activation: Activation) -> int:
    return projected.shape[1] // 2 if activation == "swiglu" else projected.shape[1]
