"""Rotary positions (Su et al. 2021, arXiv:2104.09864) in the half-split layout of GPT-NeoX and Llama."""

from __future__ import annotations

import torch
from torch import Tensor

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
        cos: Table that broadcasts against ``x``: ``[S, head_size]`` for ``[..., S, head_size]``.
        sin: Likewise.

    Returns:
        The shape and dtype of ``x``; computed in the tables' dtype.
    """
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)
