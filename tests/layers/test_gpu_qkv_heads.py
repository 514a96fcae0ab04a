"""One kernel for queries, keys and values, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_moe.layers import CausalSelfAttention, TokenLayout, rope_frequencies, rope_tables_at
from lightning_moe.layers.qkv_heads import can_fuse, qkv_heads
from lightning_moe.parallel.mesh import ParallelMesh
from tests.layers.test_qkv_heads import CASES, EPS, check, definition, inputs, leaves

pytestmark = pytest.mark.gpu

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
"""Computed in float32 and rounded once: 2^-9 of bfloat16, 2^-12 of float16, in the mean rather less."""


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case: str, norm: bool, shared: bool, dtype: torch.dtype) -> None:
    given = inputs(case, dtype, "cuda", norm=norm, shared=shared)
    assert can_fuse(given["projected"], given["rope"])
    check(given, TOLERANCES[dtype])


def test_many_tokens_take_several_tiles() -> None:
    given = inputs("grouped", torch.float32, "cuda", norm=True, shared=True)
    given["projected"] = torch.randn(1, 33 * 300, sum(given["shape"].widths), device="cuda", requires_grad=True)
    given["rope"] = tuple(table.repeat(1, 300, 1) for table in given["rope"])
    given["grads"] = [grad[:1].repeat(1, 300, 1, 1) for grad in given["grads"]]
    check(given, 2e-6)


def test_gradients_do_not_change_from_run_to_run() -> None:
    given = inputs("wide, one sequence", torch.bfloat16, "cuda", norm=True, shared=True)
    outputs = qkv_heads(given["projected"], given["gains"], given["rope"], given["shape"], EPS)
    first, *others = (torch.autograd.grad(outputs, leaves(given), given["grads"], retain_graph=True) for _ in range(20))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("norm", [False, True])
def test_second_derivatives(norm: bool) -> None:
    given = inputs("grouped", torch.float32, "cuda", norm=norm, shared=False)
    found = []
    for outputs in (
        qkv_heads(given["projected"], given["gains"], given["rope"], given["shape"], EPS),
        definition(given),
    ):
        incoming = [grad.to(outputs[0].dtype).requires_grad_() for grad in given["grads"]]
        first = torch.autograd.grad(outputs, leaves(given), incoming, create_graph=True)
        total = sum(grad.square().sum() for grad in first)
        needed = [*incoming, *(leaves(given) if norm else ())]
        found.append(torch.autograd.grad(total, needed))
    for value, reference in zip(*found, strict=True):
        assert (value.double() - reference).norm() <= 1e-5 * reference.double().norm()


@pytest.mark.parametrize("qk_norm", ["none", "head"])
@pytest.mark.parametrize("hooked", [False, True])
def test_attention_uses_it_unless_a_norm_has_hooks(qk_norm: Any, hooked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_moe.layers import triton_qkv_heads

    forward, calls = triton_qkv_heads.forward, []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return forward(*arguments)

    monkeypatch.setattr(triton_qkv_heads, "forward", counted)
    torch.manual_seed(0)
    attention = CausalSelfAttention(64, 4, 2, 16, ParallelMesh.single(), qk_norm=qk_norm).cuda()
    seen: list[Tensor] = []
    if hooked and attention.q_norm is not None:
        attention.q_norm.register_forward_hook(lambda module, args, output: seen.append(output))
    hidden = torch.randn(2 * 24, 64, device="cuda", requires_grad=True)
    positions = torch.arange(24, device="cuda")[None]

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        module = attention.to(dtype)
        rope = rope_tables_at(positions, *rope_frequencies(16, 100.0), dtype)
        out = module(hidden.to(dtype), TokenLayout(2, 24), rope)
        return out, *torch.autograd.grad(out.sin().sum(), [hidden, *module.parameters()])

    for value, reference in zip(run(torch.float32), run(torch.float64), strict=True):
        assert (value.double() - reference).norm() <= 1e-5 * reference.double().norm()
    assert len(calls) == (not (hooked and qk_norm == "head"))
    assert len(seen) == (2 if hooked and qk_norm == "head" else 0)
