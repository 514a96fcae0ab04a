"""Queries, keys and values of a fused projection against their definition in float64."""

from __future__ import annotations

import sys
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_moe.layers import qkv_heads as module
from lightning_moe.layers import rope_frequencies, rope_tables_at
from lightning_moe.layers.qkv_heads import HeadShape, qkv_heads

EPS = 1e-3
CASES = {  # batch, length, query heads, key and value heads, head width
    "one head each": (2, 9, 1, 1, 4),
    "odd width": (2, 7, 3, 1, 10),
    "grouped": (3, 33, 8, 2, 16),
    "wide, one sequence": (1, 300, 5, 1, 128),
}


def inputs(case: str, dtype: torch.dtype, device: str, *, norm: bool, shared: bool) -> dict[str, Any]:
    """Operands; ``shared`` positions are the same for all sequences."""
    batch, length, num_heads, num_kv_heads, head_size = CASES[case]
    generator = torch.Generator().manual_seed(0)
    shape = HeadShape(num_heads, num_kv_heads, head_size)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    positions = torch.arange(length)[None]
    if not shared:
        positions = torch.randint(0, 500, (batch, length), generator=generator)
    tables = rope_tables_at(positions.to(device), *rope_frequencies(head_size, 100.0), dtype)
    return {
        "projected": draw(batch, length, sum(shape.widths)).requires_grad_(),
        "gains": tuple(draw(head_size).exp().requires_grad_() for _ in range(2)) if norm else None,
        "rope": tables,
        "shape": shape,
        # As attention's kernels give them: heads before tokens.
        "grads": [
            draw(batch, heads, length, head_size).transpose(1, 2) for heads in (num_heads, num_kv_heads, num_kv_heads)
        ],
    }


def definition(given: dict[str, Any]) -> tuple[Tensor, ...]:
    """The same in float64, pair by pair of features, as complex numbers that are turned."""
    shape: HeadShape = given["shape"]
    cos, sin = (table.double()[:, :, None, : shape.head_size // 2] for table in given["rope"])
    query, key, value = (
        part.unflatten(-1, (-1, shape.head_size)) for part in given["projected"].double().split(shape.widths, dim=-1)
    )
    placed = []
    for heads, gain in zip((query, key), given["gains"] or (None, None), strict=True):
        if gain is not None:
            heads = heads / (heads.square().mean(-1, keepdim=True) + EPS).sqrt() * gain.double()
        real, imaginary = heads.chunk(2, dim=-1)
        turned = torch.complex(real, imaginary) * torch.complex(cos, sin)
        placed.append(torch.cat((turned.real, turned.imag), dim=-1))
    return *placed, value


def leaves(given: dict[str, Any]) -> list[Tensor]:
    return [given["projected"], *(given["gains"] or ())]


def check(given: dict[str, Any], tolerance: float) -> None:
    """Outputs and gradients; those of gains are sums over all tokens, and are compared by their size."""
    outputs = qkv_heads(given["projected"], given["gains"], given["rope"], given["shape"], EPS)
    expected = definition(given)
    grads = torch.autograd.grad(outputs, leaves(given), given["grads"])
    wanted = torch.autograd.grad(expected, leaves(given), [grad.double() for grad in given["grads"]])
    for value, reference in zip((*outputs, *grads), (*expected, *wanted), strict=True):
        assert value.shape == reference.shape
        assert value.dtype == given["projected"].dtype
        assert (value.double() - reference).norm() <= tolerance * reference.double().norm()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case: str, norm: bool, shared: bool) -> None:
    check(inputs(case, torch.float64, "cpu", norm=norm, shared=shared), 1e-14)
    check(inputs(case, torch.float32, "cpu", norm=norm, shared=shared), 1e-6)


class PlainKernels(ModuleType):
    """Stands in for the kernels: the same arguments and results, by plain operations in float64."""

    def forward(
        self,
        projected: Tensor,
        gains: tuple[Tensor, Tensor] | None,
        cos: Tensor,
        sin: Tensor,
        heads: tuple[int, int],
        eps: float,
    ) -> tuple[Tensor, ...]:
        assert projected.is_contiguous()
        assert not torch.is_grad_enabled()
        shape = HeadShape(*heads, projected.shape[-1] // (heads[0] + 2 * heads[1]))
        rope = tuple(torch.cat((table, table), dim=-1) for table in (cos, sin))
        assert eps == EPS
        return definition({"projected": projected, "gains": gains, "rope": rope, "shape": shape})

    def backward(
        self,
        grads: tuple[Tensor, ...],
        projected: Tensor | None,
        gains: tuple[Tensor, Tensor] | None,
        cos: Tensor,
        sin: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor | None]:
        assert (projected is None) == (gains is None), "a rotation needs no input"
        assert all(grad.stride(-1) == 1 for grad in grads)
        batch, length, num_heads, head_size = grads[0].shape
        heads = num_heads, grads[1].shape[2]
        if projected is None:
            projected = grads[0].new_zeros((batch, length, (heads[0] + 2 * heads[1]) * head_size))
        leaves = [each.detach().requires_grad_() for each in (projected, *(gains or ()))]
        with torch.enable_grad():
            shape = HeadShape(*heads, head_size)
            rope = tuple(torch.cat((table, table), dim=-1) for table in (cos, sin))
            given = {"projected": leaves[0], "gains": tuple(leaves[1:]) or None, "rope": rope, "shape": shape}
            first, *others = torch.autograd.grad(definition(given), leaves, grads)
        return first, torch.stack(others) if others else None


@pytest.fixture
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything around the kernels be tested without a GPU."""
    monkeypatch.setitem(sys.modules, "lightning_moe.layers.triton_qkv_heads", PlainKernels("triton_qkv_heads"))
    monkeypatch.setattr(module, "can_fuse", lambda projected, rope: True)


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("trained", list(product([False, True], repeat=3)))
@pytest.mark.parametrize("norm", [False, True])
def test_first_and_second_derivatives_of_what_is_trained(norm: bool, trained: tuple[bool, ...]) -> None:
    """Projection, gain of queries, gain of keys: any of them may be frozen."""
    given = inputs("grouped", torch.float64, "cpu", norm=norm, shared=True)
    for leaf, requires_grad in zip(leaves(given), trained, strict=False):
        leaf.requires_grad_(requires_grad)
    wanted = [leaf for leaf in leaves(given) if leaf.requires_grad]
    outputs = qkv_heads(given["projected"], given["gains"], given["rope"], given["shape"], EPS)
    if not wanted:
        assert not any(output.requires_grad for output in outputs)
        return
    found = []
    for values in (outputs, definition(given)):
        pairs = [(value, grad) for value, grad in zip(values, given["grads"], strict=True) if value.requires_grad]
        through = [grad.clone().requires_grad_() for _, grad in pairs]
        first = torch.autograd.grad([value for value, _ in pairs], wanted, through, retain_graph=True)
        again = torch.autograd.grad([value for value, _ in pairs], wanted, through, create_graph=True)
        total = sum(grad.square().sum() for grad in again)
        second = torch.autograd.grad(total, [*through, *(wanted if norm else ())], allow_unused=True)
        found.append([*first, *again, *(grad for grad in second if grad is not None)])
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
