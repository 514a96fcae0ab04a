"""Rows that carry their probability: what is exchanged in one message instead of two.

T tokens, K choices of each, R rows, N = T*K choices, D model width.

A payload row is the token's ``D`` elements and a pad of 16 bytes. The pad begins with the bits of the row's probability
in float32 (float64 for float64 rows); the rest is zero. So rows stay aligned for the grouped GEMM, and the probability
is as exact as if it were sent by itself. Gradients have the same layout: those of the row and of its probability.

Nothing here has a derivative: it is for the forward and backward of autograd functions. Kernels on CUDA, plain
operations elsewhere; each sum runs over k in order, without atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moe.moe.rows import sum_choices, take_rows
from lightning_moe.weight_grad.fused_kernels import fused_kernels_take


def pad_width(dtype: torch.dtype) -> int:
    """Elements of a row's pad, 16 bytes."""
    return 16 // dtype.itemsize


def probability_dtype(dtype: torch.dtype) -> torch.dtype:
    """What probabilities of rows in ``dtype`` are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pack(tokens: Tensor, weights: Tensor, choice_of_row: Tensor, filled: Tensor | None) -> Tensor:
    """The rows of the chosen tokens with their probabilities.

    Args:
        tokens: ``[T, D]``.
        weights: Probability of each choice, ``[T, K]``.
        choice_of_row: Choice that each row comes from, int64 ``[R]``; 0 where not filled.
        filled: Bool ``[R]``; other rows are zeros with probability 0. None when all are.

    Returns:
        ``[R, D + pad]`` in the dtype of the tokens.
    """
    num_rows, width, top_k = choice_of_row.numel(), tokens.shape[1], weights.shape[1]
    payload = tokens.new_empty((num_rows, width + pad_width(tokens.dtype)))
    if _fused(payload, tokens, weights):
        from lightning_moe.moe.overlap import triton_payload

        triton_payload.pack(tokens, weights, choice_of_row, filled, payload)
        return payload
    hidden_of(payload).copy_(take_rows(tokens, choice_of_row // top_k, filled))
    _write_probabilities(take_rows(weights.flatten(), choice_of_row, filled), payload)
    return payload


def hidden_of(payload: Tensor) -> Tensor:
    """The rows without their pads, a view ``[R, D]`` with gaps between rows."""
    return payload[:, : payload.shape[1] - pad_width(payload.dtype)]


def probabilities_of(payload: Tensor) -> Tensor:
    """The rows' probabilities, ``[R]`` in :func:`probability_dtype`.

    A view, except of 16-bit rows of odd width: only every other of these starts where a float32 may.
    """
    bits = _bits_of(payload)
    kept = probability_dtype(payload.dtype)
    if not _holds_words(payload):
        bits = bits.clone(memory_format=torch.contiguous_format)
    return bits.view(kept)[:, 0]


def put_back(grad_rows: Tensor, grad_probabilities: Tensor, out: Tensor) -> None:
    """Write the gradients of rows and of their probabilities in the layout of a payload.

    Args:
        grad_rows: ``[n, D]``.
        grad_probabilities: ``[n]``.
        out: ``[n, D + pad]``; some rows of a payload-shaped tensor.
    """
    if _fused(out, grad_rows, grad_probabilities):
        from lightning_moe.moe.overlap import triton_payload

        triton_payload.put_back(grad_rows, grad_probabilities, out)
        return
    hidden_of(out).copy_(grad_rows)
    _write_probabilities(grad_probabilities, out)


def sum_back(
    grads: Tensor,
    row_of_choice: Tensor,
    present: Tensor | None,
    top_k: int,
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradient of :func:`pack`.

    Args:
        grads: Of the rows and their probabilities, ``[R, D + pad]``.
        row_of_choice: Row of each choice, int64 ``[N]``; 0 for choices without a row.
        present: Bool ``[N]``, False for choices without a row; None when all have one.
        top_k: Choices per token ``K``.
        dtype: Dtype of the gradient of tokens.
        weights_dtype: Dtype of the gradient of weights.

    Returns:
        Gradients of the tokens ``[T, D]``, summed over k in float32 (float64 for float64), and of the weights
        ``[T, K]``; zeros for choices without a row.
    """
    if _fused(grads):
        from lightning_moe.moe.overlap import triton_payload

        return triton_payload.sum_back(grads, row_of_choice, present, top_k, dtype, weights_dtype)
    grad_tokens = sum_choices(hidden_of(grads), row_of_choice, present, None, top_k, dtype)
    grad_weights = take_rows(probabilities_of(grads), row_of_choice, present)
    return grad_tokens, grad_weights.view(-1, top_k).to(weights_dtype)


def _bits_of(payload: Tensor) -> Tensor:
    """The part of the pads that holds probabilities: ``[R, 1]``, or ``[R, 2]`` of 16-bit rows."""
    start = payload.shape[1] - pad_width(payload.dtype)
    return payload[:, start : start + probability_dtype(payload.dtype).itemsize // payload.element_size()]


def _write_probabilities(probabilities: Tensor, payload: Tensor) -> None:
    payload[:, payload.shape[1] - pad_width(payload.dtype) :].zero_()
    kept = probabilities.to(probability_dtype(payload.dtype)).contiguous()
    _bits_of(payload).copy_(kept[:, None].view(payload.dtype))


def _holds_words(payload: Tensor) -> bool:
    """Whether every pad starts at a multiple of a probability's size, so that it can be viewed as one."""
    ratio = probability_dtype(payload.dtype).itemsize // payload.element_size()
    return all(n % ratio == 0 for n in (payload.shape[1], payload.stride(0), payload.storage_offset()))


def _fused(payload: Tensor, *others: Tensor) -> bool:
    return fused_kernels_take(payload, *others) and _holds_words(payload)
