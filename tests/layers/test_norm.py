"""RMSNorm against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_moe.layers import RMSNorm


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)]
)
def test_equals_definition(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(16, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 16, dtype=dtype)
    reference = x.double().numpy()
    reference = (
        reference / np.sqrt((reference**2).mean(-1, keepdims=True) + 1e-5) * norm.weight.detach().double().numpy()
    )
    out = norm(x)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.detach().double().numpy(), reference, rtol=tolerance, atol=tolerance)


def test_float16_does_not_overflow() -> None:
    # 300 ** 2 is beyond the largest float16.
    out = RMSNorm(8).half()(torch.full((1, 8), 300.0, dtype=torch.float16))
    torch.testing.assert_close(out, torch.ones(1, 8, dtype=torch.float16), rtol=1e-3, atol=0)


def test_zero_vector_has_finite_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    RMSNorm(4)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
