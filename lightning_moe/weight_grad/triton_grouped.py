"""Triton kernel for the weight gradient of a grouped product on CUDA.

R rows, E experts, S segments of an expert's rows, K input width, N output width.

One launch for all experts reads 16-bit operands and accumulates in float32. A product per expert and segment (cuBLAS)
does the same, but with 64 experts of some hundred rows each the host needs longer to launch them than the device to
compute, and each segment's product reads and writes the sum once more.

[Note: descriptors]
From Hopper on, tensor descriptors let the GPU copy whole blocks to shared memory. A descriptor that ends where the
segment ends yields zeros beyond it, so nothing is masked. Making one takes each program a while, so they are for
segments of many rows. On H200, bfloat16 into float32, 32 experts with 4 segments of 1,024 rows: widths of 1,536 and
2,048 take 1.45 ms with descriptors and 1.62 ms without, 2,048 and 768 take 0.72 and 0.78. 64 experts of 512 rows take
0.75 and 0.68 ms. The tiles were chosen on that GPU, too.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

from contextvars import copy_context
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_VECTOR = 8
"""Elements of 16 bits that a thread can load at a time."""


class _Tiling(NamedTuple):
    """How the work is cut: a program computes ``[tile_n, tile_k]`` of a gradient, from so many rows at a time."""

    tile_n: int
    tile_k: int
    rows: int
    warps: int
    stages: int


_LOADS = _Tiling(128, 128, 64, 4, 3)
_DESCRIPTORS = _Tiling(256, 128, 64, 8, 4)


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
    DESCRIPTORS: tl.constexpr,  # noqa: N803
    TILE_N: tl.constexpr,  # noqa: N803
    TILE_K: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
):
    expert = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(k_width, TILE_K)
    first_n, first_k = tl.program_id(0) // tiles * TILE_N, tl.program_id(0) % tiles * TILE_K
    n, k = first_n + tl.arange(0, TILE_N), first_k + tl.arange(0, TILE_K)
    n_inside, k_inside = n < n_width, k < k_width
    total = tl.zeros((TILE_N, TILE_K), tl.float32)
    for segment in range(num_segments):
        if FROM_ENDS:
            end = tl.load(bounds + expert)
            start = tl.load(bounds + expert - 1, mask=expert > 0, other=0)
        else:
            bound = bounds + (expert * num_segments + segment) * 2
            start = tl.load(bound)
            end = tl.load(bound + 1)
        # Both operands are zero beyond the end: rows of others may hold infinities, which a zero on the other side
        # makes NaN. The product with a constant tells the compiler that rows are aligned, though their stride may be
        # no multiple of 16 elements; else it would load element by element.
        if DESCRIPTORS:
            size = tl.maximum(end, 1)  # a descriptor of nothing does not exist
            left = tl.make_tensor_descriptor(grad_output, [size, n_width], [grad_step * UNIT, 1], [ROWS, TILE_N])
            right = tl.make_tensor_descriptor(rows, [size, k_width], [row_step * UNIT, 1], [ROWS, TILE_K])
            for first in range(start, end, ROWS):
                total = tl.dot(left.load([first, first_n]).T, right.load([first, first_k]), total)
        else:
            row = start.to(tl.int64) + tl.arange(0, ROWS)
            left = grad_output + row[:, None] * grad_step * UNIT + n[None, :]
            right = rows + row[:, None] * row_step * UNIT + k[None, :]
            for first in range(start, end, ROWS):
                inside = (first + tl.arange(0, ROWS) < end)[:, None]
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


def add_grouped(
    grad_output: Tensor, rows: Tensor, offsets: Tensor, out: Tensor, *, descriptors: bool, accumulate: bool
) -> None:
    """``out[e] = accumulate * out[e] + grad_output[e's rows]^T @ rows[e's rows]``; equal from run to run, bit for bit.

    Args:
        grad_output: ``[R, N]``, bfloat16 or float16. Last stride 1; there may be gaps between rows.
        rows: ``[R, K]``, likewise.
        offsets: The end of each expert's rows, int32 ``[E]``.
        out: ``[E, N, K]``, contiguous; float32, or in the dtype of the operands, to which sums are rounded once.
        descriptors: Whether to read by tensor descriptors, where the GPU has them and every row of both operands starts
            at a multiple of 16 bytes. It chooses tiles, and with them the order of sums.
        accumulate: Whether to add to ``out`` or to overwrite it, whatever it holds.
    """
    _launch(grad_output, rows, offsets, 1, out, descriptors=descriptors, from_ends=True, accumulate=accumulate)


def add_segments(
    grad_output: Tensor, rows: Tensor, bounds: Tensor, out: Tensor, *, descriptors: bool, accumulate: bool
) -> None:
    """The same where each expert's rows are several runs, added up in their order.

    Args:
        grad_output: As of :func:`add_grouped`.
        rows: Likewise.
        bounds: Start and end of each run, int32 ``[E, S, 2]``, contiguous; runs may be empty.
        out: As of :func:`add_grouped`.
        descriptors: As of :func:`add_grouped`.
        accumulate: Likewise.
    """
    _launch(
        grad_output, rows, bounds, bounds.shape[1], out, descriptors=descriptors, from_ends=False, accumulate=accumulate
    )


def _launch(
    grad_output: Tensor,
    rows: Tensor,
    bounds: Tensor,
    num_segments: int,
    out: Tensor,
    *,
    descriptors: bool,
    from_ends: bool,
    accumulate: bool,
) -> None:
    assert grad_output.stride(1) == rows.stride(1) == 1, "the elements of a row follow each other"
    num_experts, n_width, k_width = out.shape
    grad_stride, row_stride = grad_output.stride(0), rows.stride(0)
    unit = _VECTOR if grad_stride % _VECTOR == row_stride % _VECTOR == 0 else 1
    tiling = _DESCRIPTORS if descriptors else _LOADS
    grid = (triton.cdiv(n_width, tiling.tile_n) * triton.cdiv(k_width, tiling.tile_k), num_experts)

    def launch() -> None:
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
            DESCRIPTORS=descriptors,
            TILE_N=tiling.tile_n,
            TILE_K=tiling.tile_k,
            ROWS=tiling.rows,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )

    def launch_with_memory() -> None:
        triton.set_allocator(_memory)  # where descriptors lie
        launch()

    if descriptors:
        copy_context().run(launch_with_memory)  # in which the allocator is ours; the caller's stays as it is
    else:
        launch()


def _memory(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
