"""Kernels of overlapped expert layers on CUDA: against float64, bit for bit the same in every repetition."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from lightning_moe.moe.activation import Activation
from lightning_moe.moe.overlap import payload as payload_module
from lightning_moe.moe.overlap import scaled_activation
from lightning_moe.moe.overlap.payload import hidden_of, pack, pad_width, probabilities_of, put_back, sum_back
from lightning_moe.weight_grad import can_group, grouped_product
from tests.moe.overlap import test_payload, test_scaled_activation
from tests.weight_grad.test_grouped import offsets_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

WIDTHS = [*test_payload.WIDTHS, 2050]
"""The last one is more than a program handles."""
DTYPES = test_payload.DTYPES


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_probabilities(dtype: torch.dtype, width: int, ragged: bool) -> None:
    rows = torch.empty(4, width + pad_width(dtype), dtype=dtype, device="cuda")
    aligned = dtype == torch.float32 or width % 2 == 0
    assert payload_module._fused(rows) == (aligned and dtype != torch.float64)
    test_payload.check_pack(dtype, width, "cuda", ragged)
    test_payload.check_put_back(dtype, width, "cuda")
    test_payload.check_sum_back(dtype, width, "cuda", ragged, 1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens_and_no_rows(dtype: torch.dtype) -> None:
    test_payload.check_empty(dtype, "cuda")


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("size", [*test_scaled_activation.SIZES, (300, 768)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled_activations(dtype: torch.dtype, size: tuple[int, int], activation: Activation) -> None:
    rows = torch.empty(size, dtype=dtype, device="cuda")
    assert scaled_activation._fused(rows) == (dtype != torch.float64 and size[0] > 0)
    test_scaled_activation.check(dtype, size, activation, "cuda")


@pytest.mark.parametrize("activation", get_args(Activation))
def test_not_a_number_stays_so_and_in_its_row(activation: Activation) -> None:
    test_scaled_activation.check_not_a_number(activation, "cuda")


def test_the_grouped_gemm_reads_around_pads() -> None:
    """The pads hold NaN; its results are those of rows without gaps, bit for bit."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the grouped kernel needs compute capability 9.0")
    counts = [100, 0, 33, 300]
    generator = torch.Generator("cuda").manual_seed(0)
    rows = torch.randn(sum(counts), 256 + 8, generator=generator, device="cuda").bfloat16()
    rows[:, 256:] = torch.nan
    weight = torch.randn(4, 128, 256, generator=generator, device="cuda").bfloat16()
    hidden, offsets = hidden_of(rows), offsets_of(counts).cuda()
    assert can_group(hidden, weight)
    gapped = grouped_product(hidden, weight.transpose(1, 2), counts, offsets, True)
    plain = grouped_product(hidden.contiguous(), weight.transpose(1, 2), counts, offsets, True)
    assert torch.equal(gapped, plain)
    looped = grouped_product(hidden.double(), weight.double().transpose(1, 2), counts, offsets, False)
    torch.testing.assert_close(gapped.double(), looped, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_repetition_gives_the_same_bits(dtype: torch.dtype) -> None:
    made = test_payload.case(dtype, 1536, "cuda", ragged=True)
    projected, probabilities, grad = test_scaled_activation.operands(dtype, (64, 2304), "swiglu", "cuda")
    grads = made.pack()

    def payload() -> list[Tensor]:
        packed = pack(made.tokens, made.weights, made.choice_of_row, made.filled)
        written = torch.empty_like(packed)
        put_back(hidden_of(packed), probabilities_of(packed), written)
        back = sum_back(grads, made.row_of_choice, made.present, test_payload.K, dtype, torch.float32)
        return [packed, written, *back]

    def activation() -> list[Tensor]:
        out = scaled_activation.forward(projected, probabilities, "swiglu")
        written = [torch.empty_like(projected), torch.empty_like(grad)]
        back = scaled_activation.backward(projected, probabilities, grad, "swiglu", *written)
        return [out, *written, back]

    calls: list[Callable[[], list[Tensor]]] = [payload, activation]
    for call in calls:
        first = call()
        for _ in range(100):
            assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))
