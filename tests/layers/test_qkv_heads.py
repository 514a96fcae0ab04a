"""Queries, keys and values of a fused projection against their definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

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
