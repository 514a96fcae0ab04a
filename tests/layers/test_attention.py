"""Self attention against a plain implementation, and its key mask."""

from __future__ import annotations

import pytest
import torch

from lightning_moe.errors import ConfigError
from lightning_moe.layers import SelfAttention, apply_rope, rope_tables

CPU = torch.device("cpu")


def _reference(layer: SelfAttention, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One head, one query at a time."""
    batch, length, width = x.shape
    heads, size = layer.num_heads, width // layer.num_heads
    query, key, value = (x @ layer.qkv_proj.weight.T).split(width, dim=-1)
    cos, sin = rope_tables(length, size, 100.0, x.dtype, CPU)
    out = torch.zeros_like(x)
    for b in range(batch):
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            q, k = apply_rope(query[b, :, part], cos, sin), apply_rope(key[b, :, part], cos, sin)
            for s in range(length):
                scores = (k @ q[s] / size**0.5).masked_fill(~mask[b], -torch.inf)
                out[b, s, part] = scores.softmax(0) @ value[b, :, part]
    return out @ layer.out_proj.weight.T


def test_equals_plain_attention() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(12, 3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    mask = torch.tensor([[False, True, True, True, True], [False, False, False, True, False]])
    out = layer(x, rope_tables(5, 4, 100.0, x.dtype, CPU), mask)
    torch.testing.assert_close(out, _reference(layer, x, mask), rtol=0, atol=1e-13)


def test_masked_tokens_have_no_influence() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(8, 2)
    x = torch.randn(1, 4, 8, requires_grad=True)
    mask = torch.tensor([[False, True, True, True]])
    out = layer(x, rope_tables(4, 4, 100.0, x.dtype, CPU), mask)
    out[:, 1:].sum().backward()
    assert x.grad is not None
    assert x.grad[0, 0].eq(0).all()
    assert x.grad[0, 1:].ne(0).any(-1).all()


def test_no_mask_equals_full_mask() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(8, 2)
    x, rope = torch.randn(2, 3, 8), rope_tables(3, 4, 100.0, torch.float32, CPU)
    full = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(layer(x, rope), layer(x, rope, full), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("width", "heads"), [(12, 5), (12, 4), (12, 0)])
def test_refuses_heads_that_do_not_fit(width: int, heads: int) -> None:
    with pytest.raises(ConfigError, match="num_heads"):
        SelfAttention(width, heads)
