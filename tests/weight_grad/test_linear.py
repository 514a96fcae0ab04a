"""The linear product against F.linear, and where its weight gradients go."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.weight_grad import MatmulGrad, WeightGrad, attach_sink, detach_sink, linear, sink_of


class Collector:
    """Keeps what it is given, unless it is closed."""

    def __init__(self, taking: bool = True) -> None:
        self.taking = taking
        self.grads: list[WeightGrad] = []

    @property
    def defers(self) -> bool:
        return False

    def take(self, grad: WeightGrad, *, deferrable: bool = True) -> bool:
        if self.taking:
            self.grads.append(grad)
        return self.taking


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    return input, nn.Parameter(torch.randn(5, 4, dtype=torch.float64, generator=generator).to(dtype))


def test_equals_the_library_in_value_and_both_derivatives() -> None:
    input, weight = operands()
    assert torch.equal(linear(input, weight), F.linear(input, weight))
    assert torch.autograd.gradcheck(linear, (input, weight))
    assert torch.autograd.gradgradcheck(linear, (input, weight))


def test_a_sink_gets_the_weight_gradient_instead_of_autograd() -> None:
    input, weight = operands()
    collector = Collector()
    attach_sink(weight, collector)
    out = linear(input, weight)
    out.square().sum().backward()
    assert weight.grad is None
    assert len(collector.grads) == 1
    expected_input, expected_weight = torch.autograd.grad(F.linear(input, weight).square().sum(), (input, weight))
    torch.testing.assert_close(collector.grads[0].compute(), expected_weight, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(input.grad, expected_input, rtol=1e-14, atol=1e-14)


def test_a_closed_or_detached_sink_leaves_the_gradient_to_autograd() -> None:
    input, weight = operands()
    collector = Collector(taking=False)
    attach_sink(weight, collector)
    linear(input, weight).sum().backward()
    first = weight.grad
    assert first is not None
    detach_sink(weight)
    assert sink_of(weight) is None
    weight.grad = None
    linear(input, weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, first)


def test_copies_of_a_parameter_have_no_sink() -> None:
    _, weight = operands()
    attach_sink(weight, Collector())
    assert sink_of(copy.deepcopy(weight)) is None


def test_frozen_operands_get_no_gradient() -> None:
    input, weight = operands()
    collector = Collector()
    attach_sink(weight, collector)
    weight.requires_grad_(False)
    linear(input, weight).sum().backward()
    assert not collector.grads
    assert input.grad is not None


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_main_grads_are_summed_in_their_own_precision(dtype: torch.dtype, accumulate: bool) -> None:
    """Products of bfloat16 operands are exact in float32, so nothing but the sum may round."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(64, 6, generator=generator).to(dtype)
    grads = torch.randn(64, 5, generator=generator).to(dtype)
    main_dtype = torch.promote_types(dtype, torch.float32)
    main = torch.full((5, 6), 3.0 if accumulate else torch.nan, dtype=main_dtype)
    MatmulGrad(grads, rows).add_to(main, accumulate=accumulate)
    expected = grads.double().t() @ rows.double() + (3.0 if accumulate else 0.0)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(main.double(), expected, rtol=tolerance, atol=tolerance)


def test_autocast_multiplies_in_16_bits_and_keeps_the_weight_gradient_in_32() -> None:
    input, weight = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(input, weight)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, F.linear(input.bfloat16(), weight.bfloat16()))
    collector = Collector()
    attach_sink(weight, collector)
    with torch.autocast("cpu", torch.bfloat16):
        linear(input, weight).sum().backward()
    main = torch.zeros_like(weight)
    collector.grads[0].add_to(main, accumulate=True)
    expected = input.detach().bfloat16().double().sum((0, 1)).expand(5, 4)
    torch.testing.assert_close(main.double(), expected, rtol=1e-6, atol=1e-6)


def test_compiled_code_gives_the_same_gradients_through_autograd() -> None:
    input, weight = operands()
    attach_sink(weight, Collector())
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    compiled(input, weight).square().sum().backward()
    expected = torch.autograd.grad(F.linear(input, weight).square().sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-13, atol=1e-13)
