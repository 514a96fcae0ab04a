"""Sums over chunks in 16 bits: rounded once. What else the products do is tested with the exchanges around them."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from lightning_moe.layers import matmul_by_chunks
from lightning_moe.layers.matmul_by_chunks import ColumnMatmulByChunks, row_matmul_of_arrivals
from lightning_moe.layers.pending_exchange import PendingExchange
from lightning_moe.weight_grad.segments import PartOfGrad
from tests.layers.parallel import random
from tests.margins import Margins

TOKENS, WIDTH, HEADS, HEAD = 16, 24, 12, 8
ROUNDING = 2**-8
"""Largest relative error of one rounding to bfloat16."""


class Arrived:
    """An exchange of a single rank with itself."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def collect(self) -> Tensor:
        return self.blocks

    def post(self, blocks: Tensor) -> None:
        self.blocks = blocks


def runs(count: int) -> list[tuple[slice, ...]]:
    """Every head for itself; each chunk has two."""
    size = HEAD // 2
    return [(slice(i * size, (i + 1) * size), slice((i + count) * size, (i + count + 1) * size)) for i in range(count)]


def assert_rounded_once(value: Tensor, exact: Tensor) -> None:
    assert value.dtype == torch.bfloat16
    exact = exact.detach()
    error = (value.double() - exact).abs() - ROUNDING * exact.abs()
    assert error.max() < 1e-5 * exact.abs().max()


def test_outputs_of_a_row_parallel_product_are_rounded_once() -> None:
    weight = nn.Parameter(random(WIDTH, HEADS * HEAD, dtype=torch.bfloat16))
    features = random(TOKENS, HEADS * HEAD, seed=1, dtype=torch.bfloat16)
    columns = runs(HEADS)
    joined = [torch.cat([features[:, run] for run in each], dim=1) for each in columns]
    exchanges: list[Any] = [Arrived(part.view(1, 2, TOKENS // 2, 1, HEAD)) for part in joined]
    tickets = [torch.empty(0, dtype=torch.bfloat16, requires_grad=True) for _ in columns]
    output = row_matmul_of_arrivals(
        tickets, cast("list[PendingExchange]", exchanges), columns, weight, None, sequence_parallel=False
    )
    assert_rounded_once(output, features.double() @ weight.double().t())
    grad = random(TOKENS, WIDTH, seed=2, dtype=torch.bfloat16)
    output.backward(grad)
    whole = grad.double() @ weight.double()
    for exchange, each in zip(exchanges, columns, strict=True):
        sent = exchange.blocks.flatten(0, 2).flatten(1)
        assert_rounded_once(sent, torch.cat([whole[:, run] for run in each], dim=1))
    assert weight.grad is not None
    assert_rounded_once(weight.grad, grad.double().t() @ features.double())


def test_input_gradients_of_a_column_parallel_product_are_rounded_once() -> None:
    weight = nn.Parameter(random(HEADS * HEAD, WIDTH, dtype=torch.bfloat16))
    hidden = random(TOKENS, WIDTH, seed=1, dtype=torch.bfloat16).requires_grad_()
    grad = random(TOKENS, HEADS * HEAD, seed=2, dtype=torch.bfloat16)
    product = ColumnMatmulByChunks(hidden, weight, None, sequence_parallel=False)
    outputs = [product.rows(each) for each in runs(HEADS)]
    grads = [torch.cat([grad[:, run] for run in each], dim=1) for each in runs(HEADS)]
    torch.autograd.backward(outputs, grads)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert_rounded_once(hidden.grad, grad.double() @ weight.double())
    assert_rounded_once(weight.grad, grad.double().t() @ hidden.double())


def test_products_leave_room_for_messages_and_weight_gradients_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    margins = Margins()
    margins.record(monkeypatch, matmul_by_chunks, PartOfGrad)
    weight, back = nn.Parameter(random(HEADS * HEAD, WIDTH)), nn.Parameter(random(WIDTH, HEADS * HEAD, seed=3))
    hidden = random(TOKENS, WIDTH, seed=1).requires_grad_()
    product = ColumnMatmulByChunks(hidden, weight, None, sequence_parallel=False, sm_margin=5)
    columns = runs(HEADS)
    joined = [product.rows(each) for each in columns]
    assert margins.entered == [5] * HEADS
    exchanges: list[Any] = [Arrived(part.detach().view(1, 2, TOKENS // 2, 1, HEAD)) for part in joined]
    tickets = [torch.empty(0, dtype=part.dtype, requires_grad=True) for part in joined]
    output = row_matmul_of_arrivals(
        tickets, cast("list[PendingExchange]", exchanges), columns, back, None, sequence_parallel=False, sm_margin=5
    )
    assert margins.entered == [5] * 2 * HEADS
    output.sum().backward()
    torch.stack([part.sum() for part in joined]).sum().backward()
    assert margins.entered == [5] * 4 * HEADS
    assert margins.weight_grads == 2 * HEADS
