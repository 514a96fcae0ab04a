"""Feed-forward layers against their formulas."""

from __future__ import annotations

import torch

from lightning_moe.layers import FeedForward, ResidualBlock


def test_feed_forward() -> None:
    torch.manual_seed(0)
    layer = FeedForward(6, 10).double()
    assert sorted(name for name, _ in layer.named_parameters()) == ["down_proj.weight", "up_proj.weight"]
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = (x @ layer.up_proj.weight.T).clamp(min=0) @ layer.down_proj.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)


def test_residual_block() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(3, 5, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    hidden = (x @ block.hidden_proj.weight.T + block.hidden_proj.bias).clamp(min=0)
    expected = hidden @ block.output_proj.weight.T + block.output_proj.bias
    expected = expected + x @ block.residual_proj.weight.T + block.residual_proj.bias
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-14)
