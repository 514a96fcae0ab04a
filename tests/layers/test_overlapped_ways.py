"""Ways to run attention that overlaps its exchanges: checkpointed, frozen, adapted, compiled, under autocast."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_moe.layers import TokenLayout
from lightning_moe.parallel.mesh import ParallelMesh
from tests.distributed import RankPool
from tests.layers.overlapped import Case, count_differences, parts, traced
from tests.layers.parallel import assert_close, random, run_cases
from tests.weight_grad.owners import MainGrad


def grads_of(module: Any, output: Tensor, *more: Tensor, **settings: Any) -> list[Tensor]:
    wanted = [*more, *(p for p in module.parameters() if p.requires_grad)]
    return [output.detach(), *torch.autograd.grad(output.sin().sum(), wanted, **settings)]


def run_in_other_ways(mesh: ParallelMesh) -> dict[str, bool]:
    case = Case(6, 2, "head", chunks=3)
    module, layout, tables, leaf = parts(mesh, case)
    expected = grads_of(module, module(leaf, layout, tables), leaf)

    def same(values: list[Tensor], others: list[Tensor] = expected) -> bool:
        return all(map(torch.equal, values, others))

    report = {}
    output = module(leaf, layout, tables)
    report["twice"] = same(grads_of(module, output, leaf, retain_graph=True)) and same(grads_of(module, output, leaf))
    again = checkpoint(module, leaf, layout, tables, use_reentrant=False)
    report["checkpointed"] = same(grads_of(module, again, leaf))
    with torch.no_grad():
        report["without a graph"] = torch.equal(module(leaf, layout, tables), expected[0])
    report["without the input's gradient"] = same(
        grads_of(module, module(leaf.detach(), layout, tables)), [expected[0], *expected[2:]]
    )
    module.requires_grad_(False)
    report["frozen"] = same(grads_of(module, module(leaf, layout, tables), leaf), expected[:2])
    module.qkv_proj.requires_grad_(True)
    report["half frozen"] = same(grads_of(module, module(leaf, layout, tables), leaf), expected[:3])
    module.requires_grad_(True)
    output = module(leaf, layout, tables)
    only = torch.autograd.grad(output.sin().sum(), module.o_proj.weight)
    report["one weight"] = torch.equal(only[0], expected[3])
    module.requires_grad_(False).o_proj.requires_grad_(True)
    output = module(leaf.detach(), layout, tables)
    with traced() as events:
        report["the last weight"] = same(grads_of(module, output), [expected[0], expected[3]])
    report["nothing is sent for it"] = not any(event.startswith("post") for event in events)
    module.requires_grad_(True)
    module.o_proj.requires_grad_(False)
    report["the output projection frozen"] = same(grads_of(module, module(leaf, layout, tables), leaf), expected[:3])
    kept = kept_by(lambda: module(leaf, layout, tables))
    module.requires_grad_(True)
    report["frozen, it keeps less"] = kept_by(lambda: module(leaf, layout, tables)) - kept == leaf.shape[0] * 24 * 8
    module.compile(backend="eager")
    report["compiled"] = same(grads_of(module, module(leaf, layout, tables), leaf))
    return report


def kept_by(run: Callable[[], Tensor]) -> int:
    """Bytes of different tensors that are saved for the backward pass."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.nbytes for tensor in kept.values())


class Adapted(nn.Module):
    """A projection with an update beside it, in its place; shows its weight, as adapters do."""

    def __init__(self, base: nn.Module, seed: int) -> None:
        super().__init__()
        self.base = base
        self.update = nn.Parameter(random(*base.weight.shape, seed=seed) / 4)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, hidden: Tensor, layout: TokenLayout) -> Tensor:
        return self.base(hidden, layout) + hidden @ self.update.t()


def run_changed_projections(mesh: ParallelMesh) -> dict[str, bool]:
    """Adapters and hooks do what they do without chunks, also where only one rank has any."""
    report = {}
    for norm in ("head", "projection"):
        for name in ("adapter", "hook", "backward hook", "a hook on one rank"):
            module, layout, tables, leaf = parts(mesh, Case(6, 2, norm, chunks=3))
            plain = module(leaf, layout, tables)
            seen: list[int] = []
            for i, projection in enumerate(("qkv_proj", "o_proj")):
                of_module = getattr(module, projection)
                if name == "adapter":
                    setattr(module, projection, Adapted(of_module, seed=i))
                elif name == "hook":
                    of_module.register_forward_hook(lambda module, inputs, output: output * 1.5)
                elif name == "backward hook":
                    of_module.register_full_backward_hook(lambda module, grads, outer: (grads[0] * 1.5, None))
                elif mesh.rank("context") == 0:
                    of_module.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(1))
            with traced() as events:
                found = grads_of(module, module(leaf, layout, tables), leaf)
            module.exchange_chunks = 1
            expected = grads_of(module, module(leaf, layout, tables), leaf)
            label = f"{name}, norm {norm}"
            report[label] = all(map(partial(torch.allclose, rtol=1e-11, atol=1e-10), found, expected))
            report[f"{label}, exchanges"] = sum(event.startswith("post") for event in events) == 12
            if name == "a hook on one rank":
                report[f"{label}, is called"] = len(seen) == 4 * (mesh.rank("context") == 0)
            elif name != "backward hook":
                report[f"{label}, has an effect"] = not torch.allclose(found[0], plain)
    return report


def run_autocast(mesh: ParallelMesh) -> list[list[Tensor]]:
    """Blocking and by chunks; weights and their gradients are float32."""
    results = []
    for chunks in (1, 3):
        module, layout, tables, leaf = parts(mesh, Case(6, 2, "head", torch.float32, chunks))
        sinks = [MainGrad(weight, None) for weight in (module.qkv_proj.weight, module.o_proj.weight)]
        with torch.autocast(leaf.device.type, torch.bfloat16):
            output = module(leaf, layout, tables)
        assert output.dtype == torch.bfloat16
        output.float().sin().sum().backward()
        assert leaf.grad is not None
        results.append([output.detach().float(), leaf.grad, *(sink.sum for sink in sinks)])
    return results


def refuse(mesh: ParallelMesh) -> str:
    module, layout, tables, leaf = parts(mesh, Case(4, 4, "none"))
    output = module(leaf, layout, tables)
    with pytest.raises(RuntimeError, match=r"create_graph=True, or .*overlap\.attention_chunks: 1") as error:
        torch.autograd.grad(output.sum(), leaf, create_graph=True)
    module.exchange_chunks = 1
    (grad,) = torch.autograd.grad(module(leaf, layout, tables).sum(), leaf, create_graph=True)
    assert grad.requires_grad
    return str(error.value)


def run_cheap_checks(mesh: ParallelMesh) -> tuple[dict[str, bool], list[list[Tensor]], str, int]:
    differences = count_differences(mesh, Case(4, 2, "head", torch.bfloat16), length=32, width=16, head=8, times=6)
    return run_in_other_ways(mesh) | run_changed_projections(mesh), run_autocast(mesh), refuse(mesh), differences


def test_ways_to_run_a_module(ranks: RankPool) -> None:
    ((_, results),) = run_cases(ranks, {"context": 2}, run_cheap_checks, [()])
    for report, (blocking, chunked), message, differences in results:
        assert [name for name, equal in report.items() if not equal] == []
        assert len(report) == 12 + 22
        for value, expected in zip(chunked, blocking, strict=True):
            assert_close(value, expected, 2e-2)
        assert "has no second derivative" in message
        assert differences == 0
