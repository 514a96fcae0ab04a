"""Triton kernels that write and read rows with probabilities, for CUDA; see :mod:`lightning_moe.moe.overlap.payload`.

T tokens, K choices of each, R rows, D model width. Rows have 16 or 32 bits, so probabilities are float32. Each kernel
gets a payload twice, as it is and as float32 words. Sums run over k in order, in float32.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Columns that one program handles."""
_PAD_WORDS = 4
"""float32 words of a pad."""


@triton.jit
def _write_kernel(
    rows,
    probabilities,
    choice_of_row,
    filled,
    payload,
    words,
    width,
    row_step,
    probability_step,
    payload_step,
    word_step,
    TOP_K: tl.constexpr,  # noqa: N803 (Triton's spelling of compile-time constants)
    GATHER: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
    UNIT: tl.constexpr,  # noqa: N803
    PAD_WORDS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Payload row r gets row ``choice // TOP_K`` of ``rows`` and probability ``choice``; without GATHER, row r's."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    choice = row
    if GATHER:
        choice = tl.load(choice_of_row + row)
    wanted = inside
    is_filled = row >= 0
    if MASKED:
        is_filled = tl.load(filled + row) != 0
        wanted = inside & is_filled
    # The product with a constant tells the compiler that rows are aligned, though their stride may be no multiple of 16
    # elements; else it would move element by element.
    source = rows + choice // TOP_K * row_step * UNIT + columns
    values = tl.load(source, mask=wanted, other=0.0)
    tl.store(payload + row * payload_step * UNIT + columns, values.to(payload.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        probability = tl.load(probabilities + choice * probability_step, mask=is_filled, other=0.0).to(tl.float32)
        word = tl.arange(0, PAD_WORDS)
        tl.store(words + row * word_step + word, tl.where(word == 0, probability, 0.0))


@triton.jit
def _sum_back_kernel(
    grads,
    words,
    row_of_choice,
    present,
    grad_tokens,
    grad_weights,
    width,
    grad_step,
    word_step,
    TOP_K: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
    UNIT: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        choice = token * TOP_K + k
        wanted = inside
        is_present = choice >= 0
        if MASKED:
            is_present = tl.load(present + choice) != 0
            wanted = inside & is_present
        row = tl.load(row_of_choice + choice)
        total += tl.load(grads + row * grad_step * UNIT + columns, mask=wanted, other=0.0).to(tl.float32)
        if tl.program_id(1) == 0:
            probability = tl.load(words + row * word_step, mask=is_present, other=0.0)
            tl.store(grad_weights + choice, probability.to(grad_weights.dtype.element_ty))
    tl.store(grad_tokens + token * width + columns, total.to(grad_tokens.dtype.element_ty), mask=inside)


def pack(tokens: Tensor, weights: Tensor, choice_of_row: Tensor, filled: Tensor | None, payload: Tensor) -> None:
    """Fill ``payload`` ``[R, D + pad]``; see :func:`lightning_moe.moe.overlap.payload.pack`."""
    _write(tokens.contiguous(), weights.contiguous().view(-1), choice_of_row, filled, payload, weights.shape[1])


def put_back(grad_rows: Tensor, grad_probabilities: Tensor, out: Tensor) -> None:
    """Fill ``out`` ``[n, D + pad]``; see :func:`lightning_moe.moe.overlap.payload.put_back`."""
    _write(grad_rows.contiguous(), grad_probabilities, None, None, out, 1)


def sum_back(
    grads: Tensor,
    row_of_choice: Tensor,
    present: Tensor | None,
    top_k: int,
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients of tokens and weights; see :func:`lightning_moe.moe.overlap.payload.sum_back`."""
    num_tokens, words, unit = row_of_choice.numel() // top_k, _pad_words(grads), _unit(grads)
    width = grads.shape[1] - _PAD_WORDS * 4 // grads.element_size()
    grad_tokens = torch.empty((num_tokens, width), dtype=dtype, device=grads.device)
    grad_weights = torch.empty((num_tokens, top_k), dtype=weights_dtype, device=grads.device)
    if num_tokens:
        _sum_back_kernel[(num_tokens, triton.cdiv(width, _BLOCK))](
            grads,
            words,
            row_of_choice,
            row_of_choice if present is None else present,
            grad_tokens,
            grad_weights,
            width,
            grads.stride(0) // unit,
            words.stride(0),
            TOP_K=top_k,
            MASKED=present is not None,
            UNIT=unit,
            BLOCK=_BLOCK,
        )
    return grad_tokens, grad_weights


def _write(
    rows: Tensor,
    probabilities: Tensor,
    choice_of_row: Tensor | None,
    filled: Tensor | None,
    payload: Tensor,
    top_k: int,
) -> None:
    num_rows, width, words = payload.shape[0], rows.shape[1], _pad_words(payload)
    unit = _unit(rows, payload)
    if num_rows:
        _write_kernel[(num_rows, triton.cdiv(width, _BLOCK))](
            rows,
            probabilities,
            probabilities if choice_of_row is None else choice_of_row,
            probabilities if filled is None else filled,
            payload,
            words,
            width,
            rows.stride(0) // unit,
            probabilities.stride(0),
            payload.stride(0) // unit,
            words.stride(0),
            TOP_K=top_k,
            GATHER=choice_of_row is not None,
            MASKED=filled is not None,
            UNIT=unit,
            PAD_WORDS=_PAD_WORDS,
            BLOCK=_BLOCK,
        )


def _pad_words(payload: Tensor) -> Tensor:
    """The pads as a view ``[R, 4]`` of float32."""
    return payload.view(torch.float32)[:, -_PAD_WORDS:]


def _unit(*matrices: Tensor) -> int:
    """Elements that all row strides are multiples of: 16 bytes of the narrowest, or 1."""
    wanted = 16 // min(matrix.element_size() for matrix in matrices)
    return wanted if all(matrix.stride(0) % wanted == 0 for matrix in matrices) else 1
