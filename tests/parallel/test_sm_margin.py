"""Multiprocessors that products leave free."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lightning_moe.parallel.sm_margin import SmMargin, sm_margin_for

CUDA = torch.device("cuda")


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """PyTorch's switches, as a build for CUDA has them."""
    state: dict[str, Any] = {"margin": None, "backend": torch._C._BlasBackend.Cublas}
    for name, key in (("sm_carveout_experimental", "margin"), ("blas_preferred_backend", "backend")):
        monkeypatch.setattr(torch._C, f"_get_{name}", lambda key=key: state[key])
        monkeypatch.setattr(torch._C, f"_set_{name}", lambda value, key=key: state.update({key: value}))
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return state


def test_inside_alone(switches: dict[str, Any]) -> None:
    before, margin = dict(switches), SmMargin(4, CUDA)
    for _ in range(2):
        with margin:
            assert switches == {"margin": 4, "backend": torch._C._BlasBackend.Cublaslt}
        assert switches == before


def test_one_is_left_to_the_product(switches: dict[str, Any]) -> None:
    with SmMargin(200, CUDA):
        assert switches["margin"] == 131


def test_within_another(switches: dict[str, Any]) -> None:
    before, outer = dict(switches), SmMargin(4, CUDA)
    with outer:
        with SmMargin(16, CUDA), outer:
            assert switches["margin"] == 4
        assert switches == {"margin": 4, "backend": torch._C._BlasBackend.Cublaslt}
    assert switches == before


def test_errors_set_it_back(switches: dict[str, Any]) -> None:
    before = dict(switches)
    with pytest.raises(KeyError), SmMargin(4, CUDA):
        raise KeyError
    assert switches == before


@pytest.mark.parametrize(("count", "device"), [(0, CUDA), (4, torch.device("cpu"))])
def test_nothing_to_leave(count: int, device: torch.device, switches: dict[str, Any]) -> None:
    before = dict(switches)
    with SmMargin(count, device):
        assert switches == before


def test_a_build_without_the_switch(switches: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_set_sm_carveout_experimental")
    before = dict(switches)
    with SmMargin(4, CUDA):
        assert switches == before


def test_messages_to_more_ranks_need_more() -> None:
    assert [sm_margin_for(ranks, None) for ranks in (1, 2, 3, 4, 8)] == [4, 4, 8, 8, 8]
    assert [sm_margin_for(ranks, 0) for ranks in (2, 4)] == [0, 0]


@pytest.mark.gpu
def test_the_grid_of_a_product_is_smaller() -> None:
    """cuBLASLt starts a block for each multiprocessor that it may use, or fewer."""
    left, right = torch.randn((2, 8192, 8192), device=CUDA, dtype=torch.bfloat16)
    margin, blocks = SmMargin(16, CUDA), []
    left @ right
    for context in (contextlib.nullcontext(), margin):
        with context:
            left @ right
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded, context:
            left @ right
            torch.cuda.synchronize()
        kernels = json.loads(_trace_of(recorded))["traceEvents"]
        blocks.append(max(math.prod(event["args"]["grid"]) for event in kernels if event.get("cat") == "kernel"))
    count = torch.cuda.get_device_properties(CUDA).multi_processor_count
    assert blocks[1] <= count - 16 < blocks[0]


def _trace_of(recorded: profile) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        return path.read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products(dtype: torch.dtype) -> None:
    """They stay right, and are the same each time."""
    left, right = torch.randn((2, 1024, 1024), generator=torch.Generator().manual_seed(0)).to(CUDA, dtype)
    margin = SmMargin(4, CUDA)
    with margin:
        found = left @ right
    expected = left.double() @ right.double()
    tolerance = {torch.bfloat16: 4e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    assert (found - expected).norm() <= tolerance * expected.norm()
    with margin:
        assert torch.equal(left @ right, found)
