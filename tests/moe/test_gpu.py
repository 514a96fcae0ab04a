"""The layer on CUDA devices."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_moe.config.moe import MoEConfig
from lightning_moe.moe.dispatch import _expert_major, match_rows
from lightning_moe.moe.layer import MoELayer
from lightning_moe.moe.routing_tape import checkpoint_with_routing
from lightning_moe.parallel.host_read import HostRead
from lightning_moe.weight_grad import GroupedMatmulGrad, can_group
from tests.gpus import run_on_gpus
from tests.moe.cases import relative_error

pytestmark = pytest.mark.gpu


def run(dtype: torch.dtype, device: str, checkpointed: bool = False, **changes: Any) -> list[Tensor]:
    """Output and all gradients, on the CPU."""
    config = MoEConfig(num_experts=16, top_k=4, expert_hidden_size=64, shared_expert_hidden_size=32, **changes)
    torch.manual_seed(0)
    layer = MoELayer(128, config).to(dtype)
    hidden, cotangent = torch.randn(2, 500, 128).to(dtype).unbind()
    mask = torch.rand(500) < 0.9
    layer, hidden = layer.to(device), hidden.to(device).requires_grad_()
    mask = mask.to(device)
    output, info = checkpoint_with_routing(layer, hidden, mask) if checkpointed else layer(hidden, mask)
    ((output * cotangent.to(device)).sum() + info.auxiliary_loss + info.z_loss).backward()
    tensors = [output, hidden.grad, *(parameter.grad for parameter in layer.parameters())]
    return [tensor.detach().cpu() for tensor in tensors if tensor is not None]


@pytest.mark.parametrize(
    "changes",
    [{}, {"z_loss_coefficient": 0.1}, {"capacity_factor": 0.8}, {"capacity_factor": 1.2, "pad_to_capacity": True}],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_cpu(dtype: torch.dtype, tolerance: float, changes: dict[str, Any]) -> None:
    pairs = zip(run(dtype, "cuda", **changes), run(dtype, "cpu", **changes), strict=True)
    assert max(relative_error(actual, expected) for actual, expected in pairs) <= tolerance


def test_grouped_gemm_equals_the_loop() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the grouped kernel needs compute capability 9.0")
    rows, weight = torch.zeros(8, 128, device="cuda"), torch.zeros(2, 64, 128, device="cuda")
    assert can_group(rows.bfloat16(), weight.bfloat16())
    assert not can_group(rows, weight)
    grouped = run(torch.bfloat16, "cuda", grouped_gemm=True)
    looped = run(torch.bfloat16, "cuda", grouped_gemm=False)
    assert max(relative_error(a, b) for a, b in zip(grouped, looped, strict=True)) <= 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"capacity_factor": 0.8}], ids=str)
def test_runs_are_bitwise_equal(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    first, second = run(dtype, "cuda", **changes), run(dtype, "cuda", **changes)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_checkpointing_is_bitwise_equal() -> None:
    kept, computed_again = (run(torch.bfloat16, "cuda", checkpointed, capacity_factor=0.8) for checkpointed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(kept, computed_again, strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_slots", [1, 8, 100, 256, 300])
@pytest.mark.parametrize("num_tokens", [0, 1, 100, 5000])
def test_choices_find_their_rows(num_tokens: int, num_slots: int, masked: bool) -> None:
    """The kernels' rows are those of the CPU, which sorts; 300 slots are sorted on the GPU, too."""
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(num_slots, (num_tokens, 4), generator=generator)
    slots[num_tokens // 2 :] //= 2  # some slots get much, others nothing
    sent = torch.rand(slots.shape, generator=generator) < 0.6 if masked else None
    sizes = (slots if sent is None else slots[sent]).flatten().bincount(minlength=num_slots)
    num_rows = int(sizes.sum())
    expected = match_rows(slots, sizes, num_rows, sent)
    found = match_rows(slots.cuda(), sizes.cuda(), num_rows, None if sent is None else sent.cuda())
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("num_ranks", "num_experts"), [(2, 3), (4, 32), (3, 300)])
def test_rows_of_all_ranks_are_sorted_by_expert(num_ranks: int, num_experts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    received = torch.randint(0, 40, (num_ranks, num_experts), generator=generator)
    received[:, 1] = 0
    rows = int(received.sum())
    on_gpu, on_cpu = _expert_major(received.cuda(), rows), _expert_major(received, rows)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(on_gpu, on_cpu, strict=True))


@pytest.mark.parametrize("view", ["a slice", "every other", "one value"])
def test_masks_that_are_views(view: str) -> None:
    """Kernels read masks element by element; what they get is the mask, whatever its strides."""
    flags = torch.rand((500, 6), device="cuda") < 0.7
    views = {"a slice": flags[:, 1], "every other": flags.flatten()[:1000:2], "one value": flags[0, 0].expand(500)}
    mask = views[view]
    assert not mask.is_contiguous()
    layer = MoELayer(128, MoEConfig(num_experts=16, top_k=1, expert_hidden_size=64)).cuda()
    hidden = torch.randn((500, 128), device="cuda")
    assert torch.equal(layer(hidden, mask)[0], layer(hidden, mask.contiguous())[0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_waits_for_the_device(checkpointed: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that holds all experts waits for nothing; with a mask it reads once how many rows there are."""
    reads: list[Any] = []
    wait = HostRead.wait

    def counted(read: HostRead) -> Any:
        values = wait(read)
        reads.append(values)
        return values

    layer = MoELayer(128, MoEConfig(num_experts=16, top_k=4, expert_hidden_size=64)).cuda().bfloat16()
    hidden = torch.randn(500, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    mask = torch.arange(500, device="cuda") % 3 > 0 if masked else None

    def step() -> None:
        output, _ = checkpoint_with_routing(layer, hidden, mask) if checkpointed else layer(hidden, mask)
        output.sum().backward()

    step()  # kernels are loaded
    monkeypatch.setattr(HostRead, "wait", counted)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "called a synchronizing" in str(warning.message)]
    assert waits == []  # of which PyTorch knows; it does not know of waits for an event
    assert len(reads) == masked


def test_main_grads_of_bfloat16_experts_are_float32() -> None:
    """Two micro-batches, with an expert that never gets a row and one that gets rows only once."""
    generator = torch.Generator().manual_seed(0)
    main = torch.full((4, 64, 128), torch.nan, device="cuda")
    expected = torch.zeros(4, 64, 128, dtype=torch.float64)
    for number, counts in enumerate([(300, 0, 77, 0), (123, 0, 4, 50)]):
        rows = torch.randn(sum(counts), 128, generator=generator).bfloat16()
        grads = torch.randn(sum(counts), 64, generator=generator).bfloat16()
        offsets = torch.tensor(counts).cumsum(0).int().cuda()
        grad = GroupedMatmulGrad(grads.cuda(), rows.cuda(), counts, offsets, can_group(rows.cuda(), main.bfloat16()))
        pieces = zip(grads.double().split(counts), rows.double().split(counts), strict=True)
        one = torch.stack([g.t() @ r for g, r in pieces])
        assert relative_error(grad.compute().cpu(), one) <= 2**-8
        grad.add_to(main, accumulate=number > 0)
        expected += one
    assert relative_error(main.cpu(), expected) <= 1e-6  # products of bf16 numbers are exact in float32
    assert not main[1].any()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_nccl_equals_one_gpu(world_size: int, tmp_path: Path) -> None:
    output = tmp_path / "errors.json"
    run_on_gpus(world_size, "tests.moe.gpu_script", output)
    errors = json.loads(output.read_text())
    assert len(errors) == 36
    # In bf16 the ranks' parts of a gradient are rounded before they are added up.
    tolerances = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 3 * 2**-8}
    wrong = {case: error for case, error in errors.items() if not error <= tolerances[case.split("; ")[-1]]}
    assert not wrong, wrong
