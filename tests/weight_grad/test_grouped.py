"""The grouped product against one product per expert, where its weight gradients go, and the grouped GEMM's rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.weight_grad import GroupedMatmulGrad, attach_sink, can_group, grouped_linear, grouped_product
from lightning_moe.weight_grad import grouped as grouped_module
from tests.weight_grad.test_linear import Collector

COUNTS = [[3, 0, 4, 2], [0, 0, 9, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
EXPERT_OF_ROW = [0, 0, 0, 2, 2, 2, 2, 3, 3]
"""For the first of the counts."""


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def operands(counts: list[int], dtype: torch.dtype, width: int = 32, out: int = 16) -> tuple[Tensor, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(counts), width, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), out, width, dtype=torch.float64, generator=generator).to(dtype)
    return rows, nn.Parameter(weight)


def run(counts: list[int], dtype: torch.dtype, grouped: bool, width: int = 32, out: int = 16) -> list[Tensor]:
    """Output and gradients."""
    rows, weight = operands(counts, dtype, width, out)
    output = grouped_linear(rows, weight, counts, offsets_of(counts), grouped)
    cotangent = torch.linspace(-1, 1, output.numel()).view_as(output).to(dtype)
    return [output.detach(), *torch.autograd.grad(output, (rows, weight), cotangent)]


@pytest.mark.parametrize("grouped", [True, False])
def test_each_row_meets_its_expert(grouped: bool) -> None:
    rows, weight = operands(COUNTS[0], torch.float32)
    output = grouped_linear(rows, weight, COUNTS[0], offsets_of(COUNTS[0]), grouped)
    expected = torch.einsum("rnk,rk->rn", weight[EXPERT_OF_ROW].double(), rows.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_derivatives_of_both_orders(counts: list[int]) -> None:
    rows, weight = operands(counts, torch.float64, 3, 2)

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        return grouped_linear(rows, weight, counts, offsets_of(counts))

    assert torch.autograd.gradcheck(product, (rows, weight))
    assert torch.autograd.gradgradcheck(product, (rows, weight))


def test_the_grouped_gemm_is_differentiated_twice_through_the_loop() -> None:
    second = []
    for grouped in (True, False):
        rows, weight = operands(COUNTS[0], torch.float32)
        output = grouped_linear(rows, weight, COUNTS[0], offsets_of(COUNTS[0]), grouped)
        grads = torch.autograd.grad(output.square().sum(), (rows, weight), create_graph=True)
        second.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), (rows, weight)))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(*second, strict=True))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_grouped_gemm_equals_the_loop_bitwise(
    counts: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    grouped_mm = F.grouped_mm
    monkeypatch.setattr(
        grouped_module.F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or grouped_mm(*args, **kwargs)
    )
    grouped = run(counts, dtype, True)
    assert len(calls) == (3 if sum(counts) else 0)  # forward, and both gradients
    looped = run(counts, dtype, False)
    assert len(calls) == (3 if sum(counts) else 0)
    assert all(torch.equal(a, b) for a, b in zip(grouped, looped, strict=True))


@pytest.mark.parametrize("grouped", [True, False])
def test_a_rank_without_rows_stays_in_the_graph(grouped: bool) -> None:
    output, grad_rows, grad_weight = run([0, 0, 0, 0], torch.float32, grouped)
    assert output.shape == (0, 16)
    assert grad_rows.shape == (0, 32)
    assert grad_weight.shape == (4, 16, 32)
    assert not grad_weight.any()


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("offset", [0, 1], ids=["expanded", "misaligned"])
def test_gradients_that_grouped_mm_refuses(grouped: bool, offset: int) -> None:
    """The gradient of a sum has stride 0; one that is a view may start anywhere."""
    rows, weight = operands(COUNTS[0], torch.float32)
    output = grouped_linear(rows, weight, COUNTS[0], offsets_of(COUNTS[0]), grouped)
    cotangent = torch.ones(9 * 16 + 1)[1:].view(9, 16) if offset else torch.ones(()).expand(9, 16)
    grads = torch.autograd.grad(output, (rows, weight), cotangent)
    expected = run_with_ones()
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def run_with_ones() -> tuple[Tensor, ...]:
    rows, weight = operands(COUNTS[0], torch.float32)
    pieces = zip(rows.split(COUNTS[0]), weight.unbind(0), strict=True)
    return torch.autograd.grad(torch.cat([F.linear(*piece) for piece in pieces]).sum(), (rows, weight))


@pytest.mark.parametrize("grouped", [True, False])
def test_a_sink_gets_the_weight_gradient(grouped: bool) -> None:
    expected = run(COUNTS[0], torch.float32, grouped)
    rows, weight = operands(COUNTS[0], torch.float32)
    collector = Collector()
    attach_sink(weight, collector)
    output = grouped_linear(rows, weight, COUNTS[0], offsets_of(COUNTS[0]), grouped)
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
    assert weight.grad is None
    assert rows.grad is not None
    assert torch.equal(rows.grad, expected[1])
    (grad,) = collector.grads
    assert isinstance(grad, GroupedMatmulGrad)
    assert torch.equal(grad.compute(), expected[2])
    assert not grad.rows.requires_grad  # or a deferred gradient would keep the graph alive


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_main_grads_are_summed_in_their_own_precision(dtype: torch.dtype, counts: list[int], accumulate: bool) -> None:
    """Experts without rows: exact zeros when the gradient is written, untouched when it is added."""
    rows, weight = operands(counts, dtype)
    cotangent = torch.randn(sum(counts), 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = 3.0 if accumulate else torch.nan
    main = torch.full(weight.shape, before, dtype=torch.promote_types(dtype, torch.float32))
    grad = GroupedMatmulGrad(cotangent, rows.detach(), tuple(counts), offsets_of(counts), False)
    grad.add_to(main, accumulate=accumulate)
    start = 0
    for expert, count in enumerate(counts):
        own = slice(start, start + count)
        expected = cotangent[own].double().t() @ rows[own].double() + (3.0 if accumulate else 0.0)
        tolerance = (1e-13 if dtype == torch.float64 else 1e-5) if count else 0.0
        torch.testing.assert_close(main[expert].double(), expected.detach(), rtol=tolerance, atol=tolerance)
        start += count


@pytest.mark.parametrize("grouped", [True, False])
def test_autocast(grouped: bool) -> None:
    rows, weight = operands(COUNTS[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = grouped_linear(rows, weight, COUNTS[0], offsets_of(COUNTS[0]), grouped)
        wide = grouped_linear(rows.double(), weight, COUNTS[0], offsets_of(COUNTS[0]), grouped)
    assert wide.dtype == torch.float64
    low = grouped_linear(rows.bfloat16(), weight.bfloat16(), COUNTS[0], offsets_of(COUNTS[0]), grouped)
    assert torch.equal(output, low)
    output.float().sum().backward()
    assert rows.grad is not None
    assert weight.grad is not None
    assert rows.grad.dtype == weight.grad.dtype == torch.float32


def test_compiled_code_gives_the_same_gradients_through_autograd() -> None:
    expected = run(COUNTS[0], torch.float32, False)
    rows, weight = operands(COUNTS[0], torch.float32)
    attach_sink(weight, Collector())
    compiled = torch.compile(grouped_linear, backend="aot_eager", fullgraph=True)
    output = compiled(rows, weight, COUNTS[0], offsets_of(COUNTS[0]))
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
    for actual, wanted in zip((output, rows.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


def grouped_mm_accepts(rows: Tensor, weight: Tensor) -> bool:
    """Ask torch itself, forward and backward."""
    rows, weight = rows.detach().requires_grad_(), weight.detach().requires_grad_()
    counts = [len(rows), *[0] * (len(weight) - 1)]
    try:
        out = F.grouped_mm(rows, weight.transpose(-2, -1), offs=offsets_of(counts))
        out.backward(torch.ones_like(out).contiguous())
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("width", "out"), [(8, 16), (4, 8), (6, 8), (8, 6), (12, 20), (3, 3)])
def test_rules_agree_with_torch(dtype: torch.dtype, width: int, out: int) -> None:
    rows, weight = torch.randn(5, width).to(dtype), torch.randn(3, out, width).to(dtype)
    assert can_group(rows, weight) == grouped_mm_accepts(rows, weight)


@pytest.mark.parametrize("num_rows", [5, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gap", [0, 1, 2, 4, 8, 12])
def test_rules_on_gaps_between_rows_agree_with_torch(gap: int, dtype: torch.dtype, num_rows: int) -> None:
    """Also of a single row, which counts as contiguous whatever its stride."""
    rows, weight = torch.randn(num_rows, 16 + gap).to(dtype)[:, :16], torch.randn(3, 8, 16).to(dtype)
    assert can_group(rows, weight) == grouped_mm_accepts(rows, weight) == (gap * dtype.itemsize % 16 == 0)


def test_rules_on_layout() -> None:
    rows, weight = torch.randn(5, 8), torch.randn(3, 16, 8)
    assert can_group(rows, weight)
    assert not can_group(rows.double(), weight)
    assert not can_group(rows.bfloat16(), weight)
    assert not can_group(rows, torch.randn(3, 8, 16).transpose(1, 2))
    assert not can_group(torch.randn(8, 5).t(), weight)
    assert not can_group(torch.randn(1, 8).expand(5, 8), weight)
    flat = torch.randn(3 * 16 * 8 + 1)
    assert not can_group(rows, flat[1:].view(3, 16, 8))  # starts 4 bytes off
    assert not can_group(flat[1:61].view(5, 12)[:, :8], weight)
    assert not can_group(rows.to("meta"), weight.to("meta"))
    assert not can_group(rows[:0], weight)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gap", [8, 3], ids=["aligned", "not aligned"])
def test_gaps_between_rows_change_nothing(gap: int, dtype: torch.dtype, grouped: bool) -> None:
    """They hold no numbers, and neither forward nor either gradient reads them."""
    expected = run(COUNTS[0], dtype, grouped)
    rows, weight = operands(COUNTS[0], dtype)
    buffer = torch.full((9, 32 + gap), torch.nan, dtype=dtype)
    buffer[:, :32] = rows.detach()
    gapped = buffer[:, :32].requires_grad_()
    output = grouped_linear(gapped, weight, COUNTS[0], offsets_of(COUNTS[0]), grouped)
    cotangent = torch.linspace(-1, 1, output.numel()).view_as(output).to(dtype)
    actual = [output, *torch.autograd.grad(output, (gapped, weight), cotangent)]
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
    for value, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance)
    mains = []
    for operand in (gapped.detach(), rows.detach()):
        mains.append(torch.full(weight.shape, torch.nan))
        grad = GroupedMatmulGrad(cotangent, operand, tuple(COUNTS[0]), offsets_of(COUNTS[0]), grouped and gap == 8)
        grad.compact().add_to(mains[-1], accumulate=False)
    torch.testing.assert_close(*mains, rtol=1e-5, atol=1e-5)


def test_the_product_alone() -> None:
    rows, weight = operands(COUNTS[0], torch.float32)
    matrices = weight.detach().transpose(-2, -1)
    for grouped in (True, False):
        out = grouped_product(rows.detach(), matrices, COUNTS[0], offsets_of(COUNTS[0]), grouped)
        assert torch.equal(out, run(COUNTS[0], torch.float32, grouped)[0])


@pytest.mark.parametrize(("width", "out"), [(6, 8), (8, 6), (7, 5)])
def test_widths_that_cannot_be_grouped_still_work(width: int, out: int) -> None:
    pairs = zip(
        run(COUNTS[0], torch.float32, True, width, out), run(COUNTS[0], torch.float32, False, width, out), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)
