"""Triton kernel for the weight gradient of a grouped product on CUDA. R rows, E experts, K input width, N output width.

One launch for all experts reads 16-bit operands and accumulates into float32. A product per expert (cuBLAS) does the
same, but with 64 experts of some hundred rows each the host needs longer to launch them than the device to compute.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TILE = 128
"""Rows and columns of a gradient that one program computes."""
_ROWS = 32
"""Rows of the operands that it reads at a time."""


@triton.jit
def _kernel(
    grad_output,
    rows,
    offsets,
    out,
    n_width,
    k_width,
    ACCUMULATE: tl.constexpr,  # noqa: N803 (Triton's spelling of compile-time constants)
    TILE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
):
    expert = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(k_width, TILE)
    n = tl.program_id(0) // tiles * TILE + tl.arange(0, TILE)
    k = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    n_inside, k_inside = n < n_width, k < k_width
    end = tl.load(offsets + expert)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    row = start.to(tl.int64) + tl.arange(0, ROWS)
    left = grad_output + row[:, None] * n_width + n[None, :]
    right = rows + row[:, None] * k_width + k[None, :]
    total = tl.zeros((TILE, TILE), tl.float32)
    for first in range(start, end, ROWS):
        inside = (first + tl.arange(0, ROWS) < end)[:, None]
        # Both are masked: rows of the next expert may hold infinities, which a zero on the other side makes NaN.
        g = tl.load(left, mask=inside & n_inside[None, :], other=0.0)
        x = tl.load(right, mask=inside & k_inside[None, :], other=0.0)
        total = tl.dot(tl.trans(g), x, total)
        left += ROWS * n_width
        right += ROWS * k_width
    target = out + (expert * n_width + n[:, None]) * k_width + k[None, :]
    wanted = n_inside[:, None] & k_inside[None, :]
    if ACCUMULATE:
        total += tl.load(target, mask=wanted, other=0.0)
    tl.store(target, total, mask=wanted)


def add_grouped(grad_output: Tensor, rows: Tensor, offsets: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """``out[e] = accumulate * out[e] + grad_output[e's rows]^T @ rows[e's rows]``; equal from run to run, bit for bit.

    Args:
        grad_output: ``[R, N]``, bfloat16 or float16, contiguous.
        rows: ``[R, K]``, likewise.
        offsets: The end of each expert's rows, int32 ``[E]``.
        out: float32 ``[E, N, K]``, contiguous.
        accumulate: Whether to add to ``out`` or to overwrite it, whatever it holds.
    """
    num_experts, n_width, k_width = out.shape
    grid = (triton.cdiv(n_width, _TILE) * triton.cdiv(k_width, _TILE), num_experts)
    _kernel[grid](
        grad_output,
        rows,
        offsets,
        out,
        n_width,
        k_width,
        ACCUMULATE=accumulate,
        TILE=_TILE,
        ROWS=_ROWS,
        num_warps=4,
        num_stages=4,
    )
