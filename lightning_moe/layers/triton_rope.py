"""Triton kernel for rotary positions on CUDA: one pass, computed in the tables' dtype. H head width."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS = 32
"""Heads of one token that a program rotates."""


@triton.jit
def _kernel(
    x,
    cos,
    sin,
    out,
    length,
    num_heads,
    half,
    x_batch,
    x_token,
    x_head,
    table_batch,
    table_token,
    BACK: tl.constexpr,  # noqa: N803 (Triton's spelling of compile-time constants)
    HEADS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // length, token % length
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)  # times a stride, it may need them
    column = tl.arange(0, BLOCK)
    inside = column < half
    table = batch * table_batch + position * table_token + column
    c = tl.load(cos + table, mask=inside, other=0.0)[None, :]
    s = tl.load(sin + table, mask=inside, other=0.0)[None, :]
    if BACK:
        s = -s
    wanted = (heads < num_heads)[:, None] & inside[None, :]
    source = x + batch * x_batch + position * x_token + heads[:, None] * x_head + column[None, :]
    first = tl.load(source, mask=wanted, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=wanted, other=0.0).to(tl.float32)
    target = out + ((token * num_heads + heads[:, None]) * 2 * half + column[None, :])
    tl.store(target, (first * c - second * s).to(out.dtype.element_ty), mask=wanted)
    tl.store(target + half, (second * c + first * s).to(out.dtype.element_ty), mask=wanted)


def can_rotate(x: Tensor, cos: Tensor) -> bool:
    """Whether the kernel takes these shapes: ``[B, S, ..., H]``, and the same table for all heads of a token."""
    sizes = [1] * (x.dim() - cos.dim()) + list(cos.shape)
    return x.dim() >= 4 and x.numel() > 0 and all(size == 1 for size in sizes[2:-1])


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """Rotate heads, one way or the other.

    Args:
        x: ``[B, S, ..., H]``.
        cos: float32, broadcasts to ``[B, S, 1, ..., H / 2]``.
        sin: Likewise.
        back: Whether to turn by the negative angles.

    Returns:
        The shape and dtype of ``x``, contiguous.
    """
    batch, length, half = x.shape[0], x.shape[1], x.shape[-1] // 2
    cos, sin = (table if table.stride(-1) == 1 else table.contiguous() for table in (cos, sin))
    assert cos.stride() == sin.stride(), "both tables are made alike"
    heads = x.reshape(batch, length, -1, 2 * half)  # a view, where the heads follow each other
    if heads.stride(-1) != 1:
        heads = heads.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ones = (1,) * (x.dim() - 3)
    cos, sin = (table.expand(batch, length, *ones, half) for table in (cos, sin))
    _kernel[(batch * length, triton.cdiv(heads.shape[2], _HEADS))](
        heads,
        cos,
        sin,
        out,
        length,
        heads.shape[2],
        half,
        heads.stride(0),
        heads.stride(1),
        heads.stride(2),
        cos.stride(0),
        cos.stride(1),
        BACK=back,
        HEADS=min(_HEADS, triton.next_power_of_2(heads.shape[2])),
        BLOCK=triton.next_power_of_2(half),
    )
    return out
