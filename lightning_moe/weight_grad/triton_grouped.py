"""Triton kernel for the weight gradient of a grouped product on CUDA.

R rows, E experts, S segments of an expert's rows, K input width, N output width.

One launch for all experts reads 16-bit operands and accumulates in float32. A product per expert (cuBLAS) does the
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
_VECTOR = 8
"""Elements of 16 bits that a thread can load at a time."""


@triton.jit
def _kernel(
    grad_output,
    rows,
    bounds,
    out,
    n_width,
    k_width,
    grad_step,
    row_step,
    num_segments,
    FROM_ENDS: tl.constexpr,  # noqa: N803 (Triton's spelling of compile-time constants)
    ACCUMULATE: tl.constexpr,  # noqa: N803
    UNIT: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
):
    expert = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(k_width, TILE)
    n = tl.program_id(0) // tiles * TILE + tl.arange(0, TILE)
    k = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    n_inside, k_inside = n < n_width, k < k_width
    total = tl.zeros((TILE, TILE), tl.float32)
    for segment in range(num_segments):
        if FROM_ENDS:
            end = tl.load(bounds + expert)
            start = tl.load(bounds + expert - 1, mask=expert > 0, other=0)
        else:
            bound = bounds + (expert * num_segments + segment) * 2
            start = tl.load(bound)
            end = tl.load(bound + 1)
        row = start.to(tl.int64) + tl.arange(0, ROWS)
        # The product with a constant tells the compiler that rows are aligned, though their stride may be no multiple
        # of 16 elements; else it would load element by element.
        left = grad_output + row[:, None] * grad_step * UNIT + n[None, :]
        right = rows + row[:, None] * row_step * UNIT + k[None, :]
        for first in range(start, end, ROWS):
            inside = (first + tl.arange(0, ROWS) < end)[:, None]
            # Both are masked: rows of others may hold infinities, which a zero on the other side makes NaN.
            g = tl.load(left, mask=inside & n_inside[None, :], other=0.0)
            x = tl.load(right, mask=inside & k_inside[None, :], other=0.0)
            total = tl.dot(tl.trans(g), x, total)
            left += ROWS * grad_step * UNIT
            right += ROWS * row_step * UNIT
    target = out + (expert * n_width + n[:, None]) * k_width + k[None, :]
    wanted = n_inside[:, None] & k_inside[None, :]
    if ACCUMULATE:
        total += tl.load(target, mask=wanted, other=0.0).to(tl.float32)
    tl.store(target, total.to(out.dtype.element_ty), mask=wanted)


def add_grouped(grad_output: Tensor, rows: Tensor, offsets: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """``out[e] = accumulate * out[e] + grad_output[e's rows]^T @ rows[e's rows]``; equal from run to run, bit for bit.

    Args:
        grad_output: ``[R, N]``, bfloat16 or float16. Last stride 1; there may be gaps between rows.
        rows: ``[R, K]``, likewise.
        offsets: The end of each expert's rows, int32 ``[E]``.
        out: ``[E, N, K]``, contiguous; float32, or in the dtype of the operands, to which sums are rounded once.
        accumulate: Whether to add to ``out`` or to overwrite it, whatever it holds.
    """
    _launch(grad_output, rows, offsets, 1, out, from_ends=True, accumulate=accumulate)


def add_segments(grad_output: Tensor, rows: Tensor, bounds: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """The same where each expert's rows are several runs, added up in their order.

    Args:
        grad_output: As of :func:`add_grouped`.
        rows: Likewise.
        bounds: Start and end of each run, int32 ``[E, S, 2]``, contiguous; runs may be empty.
        out: As of :func:`add_grouped`.
        accumulate: Likewise.
    """
    _launch(grad_output, rows, bounds, bounds.shape[1], out, from_ends=False, accumulate=accumulate)


def _launch(
    grad_output: Tensor,
    rows: Tensor,
    bounds: Tensor,
    num_segments: int,
    out: Tensor,
    *,
    from_ends: bool,
    accumulate: bool,
) -> None:
    assert grad_output.stride(1) == rows.stride(1) == 1, "the elements of a row follow each other"
    num_experts, n_width, k_width = out.shape
    grad_stride, row_stride = grad_output.stride(0), rows.stride(0)
    unit = _VECTOR if grad_stride % _VECTOR == row_stride % _VECTOR == 0 else 1
    grid = (triton.cdiv(n_width, _TILE) * triton.cdiv(k_width, _TILE), num_experts)
    _kernel[grid](
        grad_output,
        rows,
        bounds,
        out,
        n_width,
        k_width,
        grad_stride // unit,
        row_stride // unit,
        num_segments,
        FROM_ENDS=from_ends,
        ACCUMULATE=accumulate,
        UNIT=unit,
        TILE=_TILE,
        ROWS=_ROWS,
        num_warps=4,
        num_stages=4,
    )
