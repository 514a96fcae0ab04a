"""The stacked experts of one rank: what they compute, what they hold, and how they are cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.errors import ConfigError
from lightning_moe.moe.experts import GroupedExperts
from lightning_moe.parallel.sharding import shard_specs

COUNTS = [3, 0, 4, 2]
OFFSETS = torch.tensor([3, 3, 7, 9], dtype=torch.int32)


def build(grouped: bool = True, width: int = 32, inner: int = 16) -> GroupedExperts:
    torch.manual_seed(0)
    return GroupedExperts(width, inner, "swiglu", 4, (0, 1, 2, 3), grouped)


def test_each_row_meets_its_expert() -> None:
    experts = build()
    rows = torch.randn(9, 32)
    out = experts(rows, COUNTS, OFFSETS)
    for row, expert in enumerate([0, 0, 0, 2, 2, 2, 2, 3, 3]):
        gate, up = (experts.gate_up_proj[expert] @ rows[row]).chunk(2)
        assert torch.allclose(out[row], experts.down_proj[expert] @ (F.silu(gate) * up), atol=1e-6)


@pytest.mark.parametrize("grouped", [True, False])
def test_experts_without_rows_get_zero_gradients(grouped: bool) -> None:
    experts, rows = build(grouped), torch.zeros(0, 32, requires_grad=True)
    out = experts(rows, [0, 0, 0, 0], torch.zeros(4, dtype=torch.int32))
    out.sum().backward()
    assert out.shape == (0, 32)
    gradients = [p.grad for p in experts.parameters()]
    assert [gradient.shape for gradient in gradients if gradient is not None] == [(4, 32, 32), (4, 32, 16)]
    assert not any(gradient.any() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("grouped", [True, False])
def test_autocast(grouped: bool) -> None:
    experts, rows = build(grouped), torch.randn(9, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = experts(rows, COUNTS, OFFSETS)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, build(grouped).bfloat16()(rows.bfloat16(), COUNTS, OFFSETS))


def test_initial_spread() -> None:
    torch.manual_seed(0)
    experts = GroupedExperts(256, 128, "relu", 8, tuple(range(8)))
    assert experts.up_proj.std().item() == pytest.approx(256**-0.5, rel=0.01)
    assert experts.down_proj.std().item() == pytest.approx(0.5 * 128**-0.5, rel=0.01)
    assert not torch.equal(experts.up_proj[0], experts.up_proj[1])


def part_of(whole: GroupedExperts, index: list[int], inner: slice) -> tuple[Tensor, Tensor]:
    """Up and down projections of some experts, cut along the inner width."""
    gate, up = whole.gate_up_proj.detach()[index].chunk(2, dim=1)
    return torch.cat([gate[:, inner], up[:, inner]], dim=1), whole.down_proj.detach()[index][..., inner]


@pytest.mark.parametrize("inner", [slice(0, 8), slice(8, 16)], ids=["first half", "second half"])
def test_a_part_is_cut_from_the_whole(inner: slice) -> None:
    """Built in parts or cut afterwards: the same weights, specs and random numbers left for others."""
    torch.manual_seed(0)
    part = GroupedExperts(32, 16, "swiglu", 4, (3, 1), inner=range(16)[inner])
    following = torch.rand(3)
    cut = build()
    assert torch.equal(torch.rand(3), following)
    up, down = part_of(cut, [3, 1], inner)
    cut.keep_((3, 1), range(16)[inner])
    for experts in (part, cut):
        assert torch.equal(experts.gate_up_proj, up)
        assert torch.equal(experts.down_proj, down)
    assert shard_specs(part) == shard_specs(cut)
    rows = tuple(range(32)[inner]) + tuple(range(16, 32)[inner])
    assert [(s.axis, s.dim, s.size, s.index) for s in shard_specs(part)["gate_up_proj"]] == [
        ("expert", 0, 4, (3, 1)),
        ("expert_tensor", 1, 32, rows),
    ]
    assert [(s.axis, s.dim, s.size, s.index) for s in shard_specs(part)["down_proj"]] == [
        ("expert", 0, 4, (3, 1)),
        ("expert_tensor", 2, 16, tuple(range(16)[inner])),
    ]


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_parts_add_up(activation: str) -> None:
    rows = torch.randn(9, 32, dtype=torch.float64)
    outs = []
    for inner in (range(16), range(8), range(8, 16)):
        torch.manual_seed(0)
        experts = GroupedExperts(32, 16, activation, 4, (0, 1, 2, 3), inner=inner).double()  # type: ignore[arg-type]
        outs.append(experts(rows, COUNTS, OFFSETS))
    torch.testing.assert_close(outs[1] + outs[2], outs[0], rtol=1e-13, atol=1e-13)


def test_keeps_only_what_it_holds() -> None:
    experts = build()
    experts.keep_((3, 1), range(8))
    for index, inner in (((3, 0), range(8)), ((3, 1), range(4, 12))):
        with pytest.raises(ConfigError, match="that this module holds"):
            experts.keep_(index, inner)
