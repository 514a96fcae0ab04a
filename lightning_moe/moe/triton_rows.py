"""Triton kernels that move rows between tokens and choices, for CUDA; :mod:`lightning_moe.moe.rows` chooses them.

T tokens, K top-k, R rows, D model width. Each kernel reads rows where they lie: the plain operations first gather all
T*K rows into a new tensor and then pass over it once or twice for each k, in float32. All sums run over k in order, in
float32, so results do not change from run to run.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Columns that one program handles at a time."""


@triton.jit
def _sum_choices_kernel(
    rows,
    row_of_choice,
    weights,
    present,
    out,
    width,
    TOP_K: tl.constexpr,  # noqa: N803 (Triton's spelling of compile-time constants)
    WEIGHTED: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        choice = token * TOP_K + k
        wanted = inside
        if MASKED:
            wanted = inside & (tl.load(present + choice) != 0)
        row = tl.load(row_of_choice + choice)
        values = tl.load(rows + row * width + columns, mask=wanted, other=0.0).to(tl.float32)
        if WEIGHTED:
            values = values * tl.load(weights + choice)
        total += values
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _spread_kernel(
    grad,
    choice_of_row,
    weights,
    filled,
    out,
    width,
    TOP_K: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    wanted = inside
    if MASKED:
        wanted = inside & (tl.load(filled + row) != 0)
    choice = tl.load(choice_of_row + row)
    values = tl.load(grad + (choice // TOP_K) * width + columns, mask=wanted, other=0.0).to(tl.float32)
    values = values * tl.load(weights + choice)
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dot_kernel(
    grad,
    rows,
    row_of_choice,
    present,
    out,
    width,
    TOP_K: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    choice = tl.program_id(0).to(tl.int64)
    token = choice // TOP_K
    row = tl.load(row_of_choice + choice)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        wanted = columns < width
        if MASKED:
            wanted = wanted & (tl.load(present + choice) != 0)
        left = tl.load(grad + token * width + columns, mask=wanted, other=0.0).to(tl.float32)
        right = tl.load(rows + row * width + columns, mask=wanted, other=0.0).to(tl.float32)
        total += left * right
    tl.store(out + choice, tl.sum(total))


def sum_choices(
    rows: Tensor, row_of_choice: Tensor, present: Tensor | None, weights: Tensor | None, top_k: int, dtype: torch.dtype
) -> Tensor:
    """``out[t] = sum_k weights[t, k] * rows[row_of_choice[t, k]]``; see :func:`lightning_moe.moe.rows.sum_choices`."""
    rows, num_tokens, width = rows.contiguous(), row_of_choice.numel() // top_k, rows.shape[-1]
    out = torch.empty((num_tokens, width), dtype=dtype, device=rows.device)
    if num_tokens:
        _sum_choices_kernel[(num_tokens, triton.cdiv(width, _BLOCK))](
            rows,
            row_of_choice,
            rows if weights is None else weights.contiguous(),
            row_of_choice if present is None else present,
            out,
            width,
            TOP_K=top_k,
            WEIGHTED=weights is not None,
            MASKED=present is not None,
            BLOCK=_BLOCK,
        )
    return out


def spread_grad(
    grad: Tensor, weights: Tensor, choice_of_row: Tensor, filled: Tensor | None, top_k: int, dtype: torch.dtype
) -> Tensor:
    """``out[r] = weights[choice_of_row[r]] * grad[choice_of_row[r] // K]``."""
    grad, num_rows, width = grad.contiguous(), choice_of_row.numel(), grad.shape[-1]
    out = torch.empty((num_rows, width), dtype=dtype, device=grad.device)
    if num_rows:
        _spread_kernel[(num_rows, triton.cdiv(width, _BLOCK))](
            grad,
            choice_of_row,
            weights.contiguous(),
            choice_of_row if filled is None else filled,
            out,
            width,
            TOP_K=top_k,
            MASKED=filled is not None,
            BLOCK=_BLOCK,
        )
    return out


def dot_choices(
    grad: Tensor, rows: Tensor, row_of_choice: Tensor, present: Tensor | None, top_k: int, dtype: torch.dtype
) -> Tensor:
    """``out[t, k] = grad[t] . rows[row_of_choice[t, k]]``."""
    grad, rows, width = grad.contiguous(), rows.contiguous(), grad.shape[-1]
    out = torch.empty((grad.shape[0], top_k), dtype=dtype, device=grad.device)
    if out.numel():
        _dot_kernel[(out.numel(),)](
            grad,
            rows,
            row_of_choice,
            row_of_choice if present is None else present,
            out,
            width,
            TOP_K=top_k,
            MASKED=present is not None,
            BLOCK=_BLOCK,
        )
    return out
