"""Rotary positions (Su et al. 2021, arXiv:2104.09864) in the half-split layout of GPT-NeoX and Llama."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_moe.config.rope import RopeScaling
from lightning_moe.weight_grad.fused_kernels import fused_kernels_take

# [Note: no state for rotary tables]
# The tables are computed once per forward pass and handed to every block. A buffer would be cast with the
# module: in bfloat16 (8 bits of mantissa) positions above 256 become equal, and a table cast up from
# float32 makes a float64 model disagree with itself by 1e-8.


def rope_tables(
    length: int, head_size: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles of positions ``0 .. length - 1``.

    Args:
        length: Number of positions ``S``.
        head_size: Width of one attention head; even.
        theta: Base of the geometric series of wavelengths.
        dtype: Dtype of the model; the tables are float64 for a float64 model and float32 otherwise.
        device: Device of the tables.

    Returns:
        ``(cos, sin)``, each ``[S, head_size]``; the second half of the columns repeats the first.
    """
    assert head_size % 2 == 0, f"rotary embedding needs an even head size, got {head_size}"
    compute = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_size, 2, dtype=compute, device=device) / head_size
    angles = torch.outer(torch.arange(length, dtype=compute, device=device), theta**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads by their positions.

    Args:
        x: ``[..., head_size]``.
        cos: Table that broadcasts against ``x``: ``[S, head_size]`` for ``[..., S, head_size]``. Has no gradient.
        sin: Likewise.

    Returns:
        The shape and dtype of ``x``; computed in the tables' dtype.
    """
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    if torch.compiler.is_compiling():
        first, second = x[..., :half], x[..., half:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    out: Tensor = _Rotate.apply(x, cos, sin, False)  # type: ignore[no-untyped-call]
    return out


class _Rotate(torch.autograd.Function):
    """Rotates pairs of features; tables ``[..., H / 2]``. By hand it moves less than half the bytes of plain ops.

    On CUDA one kernel does it, which reads and writes everything once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.back = back
        if fused_kernels_take(x, cos, sin):
            from lightning_moe.layers import triton_rope

            if triton_rope.can_rotate(x, cos):
                return triton_rope.rotate(x, cos, sin, back=back)
        if back:
            sin = -sin
        out = torch.empty_like(x)
        (first, second), (out_first, out_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
        torch.sub(first * cos, second * sin, out=out_first)
        torch.add(second * cos, first * sin, out=out_second)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        out: Tensor = _Rotate.apply(grad, cos, sin, not ctx.back)  # type: ignore[no-untyped-call]
        return out, None, None, None


def rope_frequencies(head_size: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Tensor, float]:
    """Angles by which each pair of features turns from one position to the next.

    Args:
        head_size: Width ``H`` of one attention head; even.
        theta: Base of the geometric series of wavelengths.
        scaling: How to stretch the wavelengths for longer sequences; None leaves them.

    Returns:
        Frequencies in radians, float64 ``[H / 2]`` on the CPU, and the factor on cosines and sines.
    """
    assert head_size % 2 == 0, f"rotary embedding needs an even head size, got {head_size}"
    frequencies = theta ** (-torch.arange(0, head_size, 2, dtype=torch.float64, device="cpu") / head_size)
    if scaling is None:
        return frequencies, 1.0
    if scaling.type == "linear":
        return frequencies / scaling.factor, 1.0
    length = scaling.original_max_position_embeddings
    assert length is not None, "a rule of RopeScaling"
    # Share of each frequency that stays; the rest is stretched.
    if scaling.type == "llama3":
        # Linear in the number of turns over the original length, between the two factors.
        turns = frequencies * length / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        factor = 1.0
    else:
        # Linear in the index of the pair, between those that turn beta_fast and beta_slow times (rounded outwards).
        def pair_that_turns(times: float) -> float:
            return head_size * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
        last = min(math.ceil(pair_that_turns(scaling.beta_slow)), head_size - 1)
        pairs = torch.arange(head_size // 2, dtype=torch.float64, device="cpu")
        kept = 1 - (pairs - first) / (last - first if last > first else 1e-3)
        factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    kept = kept.clamp(0.0, 1.0)
    return frequencies * kept + frequencies / scaling.factor * (1 - kept), factor


def rope_tables_at(
    positions: Tensor, frequencies: Tensor, attention_factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles of given positions.

    Args:
        positions: int64 ``[..., S]``, e.g. ``[B, S]`` where sequences hold several documents.
        frequencies: float64 ``[H / 2]`` of :func:`rope_frequencies`.
        attention_factor: Likewise; both tables are multiplied by it.
        dtype: Dtype of the model; the tables are float64 for a float64 model and float32 otherwise.

    Returns:
        ``(cos, sin)``, each ``[..., S, H]`` on the device of the positions; the second half of the columns repeats the
        first.
    """
    # Angles grow with the position: in float32 they would be off by 0.004 at position 100,000.
    angles = positions[..., None] * frequencies.to(positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    compute = torch.promote_types(dtype, torch.float32)
    return (angles.cos() * attention_factor).to(compute), (angles.sin() * attention_factor).to(compute)
