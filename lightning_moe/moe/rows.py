"""Sums over a token's choices, forward and backward: plain operations, and fused kernels for 16 and 32 bits on CUDA.

T tokens, K top-k, R rows, D model width, N = T*K choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moe.weight_grad.fused_kernels import fused_kernels_take


def take_rows(values: Tensor, index: Tensor, present: Tensor | None) -> Tensor:
    """``values[index]`` along dim 0, with zeros where ``present`` is False."""
    if values.shape[0] == 0:  # nothing to read from: every entry is absent
        return values.new_zeros((index.numel(), *values.shape[1:]))
    taken = values.index_select(0, index)
    if present is None:
        return taken
    return taken.masked_fill(~present.view(-1, *[1] * (values.dim() - 1)), 0)


def sum_choices(
    rows: Tensor, row_of_choice: Tensor, present: Tensor | None, weights: Tensor | None, top_k: int, dtype: torch.dtype
) -> Tensor:
    """Add up each token's rows, in order of k, in float32 (float64 where an operand is).

    Args:
        rows: ``[R, D]``.
        row_of_choice: Row of each choice, int64 ``[N]``.
        present: Bool ``[N]``, False for choices without a row; None when all have one.
        weights: ``[T, K]``; None for ones.
        top_k: Choices per token ``K``.
        dtype: Dtype of the result.

    Returns:
        ``[T, D]``.
    """
    if _fused(rows, weights):
        from lightning_moe.moe import triton_rows

        return triton_rows.sum_choices(rows, row_of_choice, present, weights, top_k, dtype)
    per_choice = take_rows(rows, row_of_choice, present).view(row_of_choice.numel() // top_k, top_k, rows.shape[-1])
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = per_choice[:, 0].to(wide) if weights is None else weights[:, :1] * per_choice[:, 0]
    for k in range(1, top_k):
        total = total + (per_choice[:, k] if weights is None else weights[:, k : k + 1] * per_choice[:, k])
    return total.to(dtype)


def spread_grad(
    grad: Tensor, weights: Tensor, choice_of_row: Tensor, filled: Tensor | None, top_k: int, dtype: torch.dtype
) -> Tensor:
    """Gradient of :func:`sum_choices` with respect to its rows: each row's weight times its token's gradient.

    Args:
        grad: ``[T, D]``.
        weights: ``[T, K]``.
        choice_of_row: Choice of each row, int64 ``[R]``.
        filled: Bool ``[R]``, False for padding, which gets zeros; None when there is none.
        top_k: Choices per token ``K``.
        dtype: Dtype of the result.

    Returns:
        ``[R, D]``.
    """
    if _fused(grad, weights):
        from lightning_moe.moe import triton_rows

        return triton_rows.spread_grad(grad, weights, choice_of_row, filled, top_k, dtype)
    weight_of_row = take_rows(weights.flatten(), choice_of_row, filled)
    return (weight_of_row[:, None] * take_rows(grad, choice_of_row // top_k, filled)).to(dtype)


def dot_choices(
    grad: Tensor, rows: Tensor, row_of_choice: Tensor, present: Tensor | None, weights: Tensor, top_k: int
) -> Tensor:
    """Gradient of :func:`sum_choices` with respect to its weights: products of token gradients and rows.

    Args:
        grad: ``[T, D]``.
        rows: ``[R, D]``.
        row_of_choice: Row of each choice, int64 ``[N]``.
        present: Bool ``[N]``, False for choices without a row; None when all have one.
        weights: ``[T, K]``; gives the dtype of the result.
        top_k: Choices per token ``K``.

    Returns:
        ``[T, K]``.
    """
    if _fused(rows, weights):
        from lightning_moe.moe import triton_rows

        return triton_rows.dot_choices(grad, rows, row_of_choice, present, top_k, weights.dtype)
    per_choice = take_rows(rows, row_of_choice, present).view(row_of_choice.numel() // top_k, top_k, rows.shape[-1])
    wide = grad.to(torch.promote_types(weights.dtype, rows.dtype))
    columns = [(wide * per_choice[:, k]).sum(-1) for k in range(top_k)]
    return torch.stack(columns, dim=1).to(weights.dtype)


def _fused(rows: Tensor, weights: Tensor | None) -> bool:
    """Whether to use the kernels; they have no derivative of their own."""
    operands = (rows,) if weights is None else (rows, weights)
    return fused_kernels_take(*operands) and not torch.is_grad_enabled()
