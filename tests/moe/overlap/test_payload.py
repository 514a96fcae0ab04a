"""Rows with probabilities against plain loops, and their gradients against autograd; also of the kernels for CUDA."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_moe.moe.overlap.payload import (
    hidden_of,
    pack,
    pad_width,
    probabilities_of,
    probability_dtype,
    put_back,
    sum_back,
)

T, K = 11, 3
WIDTHS = [48, 70, 13]
"""Rows whose starts are aligned for the grouped GEMM, for a float32 only, and (with 16 bits) not even for that."""
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [float("nan"), float("inf"), -0.0, 1e-45, 1 / 3]


@dataclass
class Case:
    tokens: Tensor
    weights: Tensor
    choice_of_row: Tensor
    filled: Tensor | None
    row_of_choice: Tensor
    present: Tensor | None

    def pack(self) -> Tensor:
        return pack(self.tokens, self.weights, self.choice_of_row, self.filled)

    def sum_back(self, grads: Tensor, dtype: torch.dtype, weights_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return sum_back(grads, self.row_of_choice, self.present, K, dtype, weights_dtype)


def case(dtype: torch.dtype, width: int, device: str, *, ragged: bool) -> Case:
    """With ``ragged``, a third of the choices has no row, and every fourth row is padding."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(T, width, generator=generator).to(device, dtype)
    weights = torch.rand(T, K, generator=generator, dtype=torch.float64)
    weights[0, 0], weights[1, 1] = SPECIAL[3], SPECIAL[4]
    present = torch.arange(T * K) % 3 != 1 if ragged else torch.ones(T * K, dtype=torch.bool)
    choices = torch.randperm(T * K, generator=generator)
    choices = choices[present[choices]]
    filled = torch.arange(len(choices) * 4 // 3) % 4 != 2 if ragged else torch.ones(len(choices), dtype=torch.bool)
    filled = torch.cat([filled, torch.ones(len(choices) - int(filled.sum()), dtype=torch.bool)])
    choice_of_row = torch.zeros(len(filled), dtype=torch.int64)
    choice_of_row[filled] = choices
    row_of_choice = torch.zeros(T * K, dtype=torch.int64)
    row_of_choice[choices] = filled.nonzero()[:, 0]
    on_device = [tensor.to(device) for tensor in (choice_of_row, filled, row_of_choice, present)]
    masks = (on_device[1], on_device[3]) if ragged else (None, None)
    return Case(tokens, weights.to(device, probability_dtype(dtype)), on_device[0], masks[0], on_device[2], masks[1])


def bits(tensor: Tensor) -> Tensor:
    """For comparisons in which NaN equals itself and 0 does not equal -0."""
    return tensor.contiguous().view(torch.uint8)


def check_pack(dtype: torch.dtype, width: int, device: str, ragged: bool) -> None:
    made = case(dtype, width, device, ragged=ragged)
    payload = made.pack()
    assert payload.shape == (len(made.choice_of_row), width + pad_width(dtype))
    assert payload.dtype == dtype
    hidden, probabilities = hidden_of(payload), probabilities_of(payload)
    assert probabilities.dtype == probability_dtype(dtype)
    for row, choice in enumerate(made.choice_of_row.tolist()):
        there = made.filled is None or bool(made.filled[row])
        token = made.tokens[choice // K] if there else torch.zeros_like(made.tokens[0])
        weight = made.weights.flatten()[choice] if there else torch.zeros_like(made.weights[0, 0])
        assert torch.equal(hidden[row], token)
        assert torch.equal(probabilities[row], weight)
    rest = bits(payload)[:, width * dtype.itemsize + probabilities.element_size() :]
    assert rest.shape[1] > 0
    assert not rest.any()


def check_put_back(dtype: torch.dtype, width: int, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, width, generator=generator).to(device, dtype)
    kept = torch.tensor(SPECIAL, dtype=probability_dtype(dtype), device=device)
    strided = torch.stack([kept, torch.zeros_like(kept)], dim=1)[:, 0]
    buffer = torch.full((9, width + pad_width(dtype)), 7.0, dtype=dtype, device=device)
    for probabilities in (kept, strided):
        buffer[2:7] = torch.nan
        put_back(values, probabilities, buffer[2:7])
        assert torch.equal(hidden_of(buffer)[2:7], values)
        assert torch.equal(bits(probabilities_of(buffer[2:7])), bits(kept))
        assert torch.equal(bits(probabilities_of(buffer)[2:7]), bits(kept))
        assert not bits(buffer[2:7])[:, width * dtype.itemsize + kept.element_size() :].any()
        assert bool((buffer[:2] == 7).all())
        assert bool((buffer[7:] == 7).all())
    put_back(values[:0], kept[:0], buffer[2:2])
    assert bool((buffer[:2] == 7).all())


def check_sum_back(dtype: torch.dtype, width: int, device: str, ragged: bool, tolerance: float) -> None:
    """What no choice refers to, padding and the rest of the pads, holds NaN."""
    made = case(dtype, width, device, ragged=ragged)
    generator = torch.Generator().manual_seed(1)
    num_rows, filled = len(made.choice_of_row), made.filled
    rows = torch.randn(num_rows, width, generator=generator).to(device, dtype)
    probabilities = torch.randn(num_rows, generator=generator).to(device, probability_dtype(dtype))
    if filled is not None:
        rows[~filled], probabilities[~filled] = torch.nan, torch.nan
    grads = torch.empty(num_rows, width + pad_width(dtype), dtype=dtype, device=device)
    put_back(rows, probabilities, grads)
    start = width + probability_dtype(dtype).itemsize // dtype.itemsize
    grads[:, start:] = torch.nan

    there = torch.ones(num_rows, dtype=torch.bool, device=device) if filled is None else filled
    leaves = [tensor.double().requires_grad_() for tensor in (made.tokens, made.weights)]
    chosen = made.choice_of_row[there]
    outputs = (leaves[0][chosen // K], leaves[1].flatten()[chosen])
    expected = torch.autograd.grad(outputs, leaves, (rows[there].double(), probabilities[there].double()))

    wide = torch.promote_types(dtype, torch.float32)
    grad_tokens, grad_weights = made.sum_back(grads, wide, probability_dtype(dtype))
    assert (grad_tokens.dtype, grad_weights.dtype) == (wide, probability_dtype(dtype))
    torch.testing.assert_close(grad_tokens.double(), expected[0], rtol=tolerance, atol=tolerance)
    assert torch.equal(grad_weights.double(), expected[1])
    narrow_tokens, narrow_weights = made.sum_back(grads, dtype, torch.float32)
    assert torch.equal(narrow_tokens, grad_tokens.to(dtype))  # rounded once, after the sum
    assert torch.equal(narrow_weights, grad_weights.float())


def check_empty(dtype: torch.dtype, device: str) -> None:
    width = 16 + pad_width(dtype)
    tokens, weights = torch.empty(0, 16, dtype=dtype, device=device), torch.empty(0, K, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    payload = pack(tokens, weights, none, None)
    assert payload.shape == (0, width)
    assert hidden_of(payload).shape == (0, 16)
    assert probabilities_of(payload).shape == probabilities_of(payload[0:0]).shape == (0,)
    padding = torch.zeros(4, dtype=torch.int64, device=device)
    payload = pack(tokens, weights, padding, padding.bool())
    assert torch.equal(payload, torch.zeros(4, width, dtype=dtype, device=device))
    grads = sum_back(payload, none, None, K, dtype, torch.float32)
    assert [grad.shape for grad in grads] == [(0, 16), (0, K)]
    absent = torch.zeros(2 * K, dtype=torch.int64, device=device)
    grad_tokens, grad_weights = sum_back(payload[:0], absent, absent.bool(), K, dtype, torch.float32)
    assert torch.equal(grad_tokens, torch.zeros(2, 16, dtype=dtype, device=device))
    assert torch.equal(grad_weights, torch.zeros(2, K, device=device))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_probabilities_are_exact(dtype: torch.dtype, width: int, ragged: bool) -> None:
    check_pack(dtype, width, "cpu", ragged)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_written_into_a_part(dtype: torch.dtype, width: int) -> None:
    check_put_back(dtype, width, "cpu")


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_equal_autograd_through_plain_indexing(dtype: torch.dtype, width: int, ragged: bool) -> None:
    check_sum_back(dtype, width, "cpu", ragged, 1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens_and_no_rows(dtype: torch.dtype) -> None:
    check_empty(dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_are_a_view_where_they_can_be(dtype: torch.dtype) -> None:
    payload = torch.zeros(3, 16 + pad_width(dtype), dtype=dtype)
    probabilities_of(payload[1:])[1] = 0.1
    assert probabilities_of(payload).tolist() == [0.0, 0.0, torch.tensor(0.1, dtype=probability_dtype(dtype)).item()]
    assert not hidden_of(payload).any()
    assert hidden_of(payload).data_ptr() == payload.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pads_keep_rows_aligned(dtype: torch.dtype) -> None:
    assert pad_width(dtype) * dtype.itemsize == 16


def test_weights_of_another_dtype() -> None:
    made = case(torch.bfloat16, 48, "cpu", ragged=True)
    exact = made.pack()
    made.weights = made.weights.double()
    assert torch.equal(bits(made.pack()), bits(exact))
