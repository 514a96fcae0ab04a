"""Grouped GEMM and loop, and the rules of which runs when."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.errors import ConfigError
from lightning_moe.moe import experts as experts_module
from lightning_moe.moe.experts import GroupedExperts, can_group, compute_dtype
from lightning_moe.parallel.sharding import shard_specs

COUNTS = [[3, 0, 4, 2], [0, 0, 9, 0], [1, 1, 1, 1], [0, 0, 0, 0]]


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def build(grouped: bool = True, width: int = 32, inner: int = 16) -> GroupedExperts:
    torch.manual_seed(0)
    return GroupedExperts(width, inner, "swiglu", 4, (0, 1, 2, 3), grouped)


def run(experts: GroupedExperts, rows: Tensor, counts: list[int]) -> list[Tensor]:
    rows = rows.clone().requires_grad_()
    out = experts(rows, counts, offsets_of(counts))
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    return [out, *(p.grad for p in (rows, *experts.parameters()) if p.grad is not None)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grouped_equals_loop_bitwise(counts: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    grouped_mm = F.grouped_mm
    monkeypatch.setattr(
        experts_module.F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or grouped_mm(*args, **kwargs)
    )
    rows = torch.randn(sum(counts), 32).to(dtype)
    grouped = run(build(True).to(dtype), rows, counts)
    assert len(calls) == 2
    looped = run(build(False).to(dtype), rows, counts)
    assert len(calls) == 2
    assert len(grouped) == len(looped) == 4
    assert all(torch.equal(a, b) for a, b in zip(grouped, looped, strict=True))


def test_an_expanded_gradient() -> None:
    """The gradient of a sum has stride 0, which grouped_mm refuses."""
    counts, gradients = [3, 0, 4, 2], []
    for grouped in (True, False):
        experts = build(grouped)
        experts(torch.ones(9, 32), counts, offsets_of(counts)).sum().backward()
        gradients.append([p.grad for p in experts.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours is not None
        assert theirs is not None
        assert ours.any()
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("grouped", [True, False])
def test_experts_without_rows_get_zero_gradients(grouped: bool) -> None:
    out, *gradients = run(build(grouped), torch.zeros(0, 32), [0, 0, 0, 0])
    assert out.shape == (0, 32)
    assert [gradient.shape for gradient in gradients] == [(0, 32), (4, 32, 32), (4, 32, 16)]
    assert not any(gradient.any() for gradient in gradients)


def test_each_row_meets_its_expert() -> None:
    experts = build()
    rows = torch.randn(9, 32)
    out = experts(rows, [3, 0, 4, 2], offsets_of([3, 0, 4, 2]))
    for row, expert in enumerate([0, 0, 0, 2, 2, 2, 2, 3, 3]):
        gate, up = (experts.gate_up_proj[expert] @ rows[row]).chunk(2)
        assert torch.allclose(out[row], experts.down_proj[expert] @ (F.silu(gate) * up), atol=1e-6)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("width", "inner"), [(8, 16), (4, 8), (6, 8), (8, 6), (12, 20), (3, 3)])
def test_rules_agree_with_torch(dtype: torch.dtype, width: int, inner: int) -> None:
    rows, weight = torch.randn(5, width).to(dtype), torch.randn(3, inner, width).to(dtype)
    assert can_group(rows, weight) == grouped_mm_accepts(rows, weight)


def test_rules_on_layout() -> None:
    rows, weight = torch.randn(5, 8), torch.randn(3, 16, 8)
    assert can_group(rows, weight)
    assert not can_group(rows.double(), weight)
    assert not can_group(rows.bfloat16(), weight)
    assert not can_group(rows, torch.randn(3, 8, 16).transpose(1, 2))
    assert not can_group(torch.randn(5, 16)[:, :8], weight)
    flat = torch.randn(3 * 16 * 8 + 1)
    assert not can_group(rows, flat[1:].view(3, 16, 8))  # starts 4 bytes off
    assert not can_group(rows.to("meta"), weight.to("meta"))


@pytest.mark.parametrize(("width", "inner"), [(6, 8), (8, 6), (7, 5)])
def test_widths_that_cannot_be_grouped_still_work(width: int, inner: int) -> None:
    rows = torch.randn(9, width)
    pairs = zip(
        run(build(True, width, inner), rows, [3, 0, 4, 2]),
        run(build(False, width, inner), rows, [3, 0, 4, 2]),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("grouped", [True, False])
def test_autocast(grouped: bool) -> None:
    experts, rows = build(grouped), torch.randn(9, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute_dtype(rows) == torch.bfloat16
        assert compute_dtype(rows.double()) == torch.float64
        out = experts(rows, [3, 0, 4, 2], offsets_of([3, 0, 4, 2]))
    assert out.dtype == torch.bfloat16
    rounded = build(grouped).bfloat16()
    assert torch.equal(out, rounded(rows.bfloat16(), [3, 0, 4, 2], offsets_of([3, 0, 4, 2])))
    assert compute_dtype(rows) == torch.float32


def test_initial_spread() -> None:
    torch.manual_seed(0)
    experts = GroupedExperts(256, 128, "relu", 8, tuple(range(8)))
    assert experts.up_proj.std().item() == pytest.approx(256**-0.5, rel=0.01)
    assert experts.down_proj.std().item() == pytest.approx(0.5 * 128**-0.5, rel=0.01)
    assert not torch.equal(experts.up_proj[0], experts.up_proj[1])


def test_keep() -> None:
    experts = build()
    up = experts.gate_up_proj.detach().clone()
    experts.keep_((3, 1))
    assert torch.equal(experts.gate_up_proj, up[[3, 1]])
    assert {spec.index for spec in shard_specs(experts).values()} == {(3, 1)}
    with pytest.raises(ConfigError, match="experts that this module holds"):
        experts.keep_((3, 0))
