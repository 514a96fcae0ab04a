"""Attention that overlaps its exchanges, on several ranks and in one process; the same code on the CPU and on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.bench.deterministic import deterministic
from lightning_moe.layers import CausalSelfAttention, TokenLayout, rope_frequencies, rope_tables_at
from lightning_moe.layers.pending_exchange import PendingExchange
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import shard_specs
from lightning_moe.weight_grad import MatmulGrad, WeightGradQueue
from tests.layers.parallel import Grads, assert_close, assert_shards, own_rows, own_sequence, random
from tests.layers.test_causal_attention import reference, sum_over, whole_hidden
from tests.weight_grad.owners import MainGrad

BATCH, LENGTH, WIDTH, HEAD = 2, 12, 12, 4
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Largest error relative to the largest entry."""


@dataclass(frozen=True)
class Case:
    """A module and how its heads are exchanged."""

    heads: int
    kv_heads: int
    qk_norm: Literal["none", "head", "projection"]
    dtype: torch.dtype = torch.float64
    chunks: int = 2
    sequence_parallel: bool = False
    wait_at_once: bool = False
    sink: Literal["none", "at once", "deferred"] = "none"
    """Where gradients of the projections go; a sink gets those of two microbatches."""


def build(case: Case, mesh: ParallelMesh, width: int = WIDTH, head: int = HEAD) -> CausalSelfAttention:
    torch.manual_seed(0)
    module = CausalSelfAttention(
        width, case.heads, case.kv_heads, head, mesh, qk_norm=case.qk_norm, norm_eps=1e-3, output_init_std=0.3
    )
    for norm in (module.q_norm, module.k_norm):  # gains of one hide errors
        if norm is not None:
            gains = (random(case.heads * head, seed=9) / 4).exp()
            specs = shard_specs(module).get("q_norm.weight" if norm is module.q_norm else "k_norm.weight", ())
            index = list(specs[0].index) if specs else list(range(norm.weight.shape[0]))
            norm.weight.data = gains[index].to(norm.weight.dtype)
    module.exchange_chunks, module.wait_at_once = case.chunks, case.wait_at_once
    return module.to(case.dtype)


def run_overlapped(mesh: ParallelMesh, case: Case) -> Grads:
    """Forward and backward of this rank's tokens; parameters' gradients are in float64."""
    module, context = build(case, mesh), mesh.size("context")
    layout = TokenLayout(BATCH, LENGTH // context, case.sequence_parallel, context_parallel=context > 1)
    queue = WeightGradQueue() if case.sink == "deferred" else None
    weights = {"qkv_proj.weight": module.qkv_proj.weight, "o_proj.weight": module.o_proj.weight}
    sinks = {} if case.sink == "none" else {name: MainGrad(weight, queue) for name, weight in weights.items()}
    tables = rope(own_sequence(positions(), mesh, layout), case.dtype)

    def own(seed: int) -> Tensor:
        whole = random(BATCH, LENGTH, WIDTH, seed=seed, dtype=case.dtype)
        return own_rows(own_sequence(whole, mesh, layout).flatten(0, 1), mesh, layout)

    for microbatch in (0,) if case.sink == "none" else (1, 0):
        leaf = own(2 * microbatch).clone().requires_grad_()
        output = module(leaf, layout, tables)
        loss = (own(2 * microbatch + 1) * output.sin()).sum()
        if queue is None:
            loss.backward()
        else:
            with queue.capture(microbatch):
                loss.backward()
    if queue is not None:
        assert queue.num_held > 0
        assert all(sink.added == 0 for sink in sinks.values())
        queue.run_tail([(1, 0), (0, 0)])
    assert leaf.grad is not None
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert not grads.keys() & sinks.keys()
    grads |= {name: sink.sum for name, sink in sinks.items()}
    parameters = {name: grad.double().cpu() for name, grad in grads.items()}
    return Grads(output.detach().cpu(), leaf.grad.cpu(), parameters, shard_specs(module))


def positions() -> Tensor:
    return torch.arange(LENGTH).expand(BATCH, -1)


def rope(positions: Tensor, dtype: torch.dtype, head: int = HEAD) -> tuple[Tensor, Tensor]:
    return rope_tables_at(positions, *rope_frequencies(head, 100.0), dtype)


def dense(case: Case) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, gradient of the input and of the parameters in one process, in float64 on operands of ``case.dtype``."""
    module = build(case, ParallelMesh.single()).double()
    hidden = random(BATCH, LENGTH, WIDTH, dtype=case.dtype).double().requires_grad_()
    output = reference(module, hidden, {}, positions())
    (random(BATCH, LENGTH, WIDTH, seed=1, dtype=case.dtype).flatten(0, 1) * output.sin()).sum().backward()
    assert hidden.grad is not None
    parameters = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return output.detach(), hidden.grad.flatten(0, 1), parameters


def check_dense(
    results: list[Grads], expected: tuple[Tensor, Tensor, dict[str, Tensor]], case: Case, tensor: int, tolerance: float
) -> None:
    """Compare all ranks' results of a case without a sink with :func:`dense`."""
    output, grad, parameters = expected
    outputs = whole_hidden([result.output for result in results], tensor, case.sequence_parallel)
    assert_close(outputs.to(output.dtype), output, tolerance, f"{case} output")
    grads = whole_hidden([result.input for result in results], tensor, case.sequence_parallel)
    assert_close(grads.to(output.dtype), grad, tolerance, f"{case} input gradient")
    assert_shards(sum_over(results, tensor), parameters, tolerance)


def assert_bitwise(results: list[Grads], others: list[Grads], what: object) -> None:
    for result, other in zip(results, others, strict=True):
        assert torch.equal(result.output, other.output), what
        assert torch.equal(result.input, other.input), what
        assert result.parameters.keys() == other.parameters.keys()
        for name, grad in result.parameters.items():
            assert torch.equal(grad, other.parameters[name]), (what, name)


def variants(case: Case) -> tuple[Case, Case]:
    """Overlapped, with gradients added at once; and everything waited for at once, with gradients put off."""
    return replace(case, sink="at once"), replace(case, sink="deferred", wait_at_once=True)


def count_differences(mesh: ParallelMesh, case: Case, length: int, width: int, head: int, times: int) -> int:
    """How many of some runs, every other one of which waits at once, differ from the first in any bit on this rank."""
    with deterministic():  # attention's own backward pass may use atomics
        layout = TokenLayout(1, length // mesh.size("context"), context_parallel=True)
        tables = rope(own_sequence(torch.arange(length)[None], mesh, layout), case.dtype, head)
        hidden = own_sequence(random(1, length, width, dtype=case.dtype), mesh, layout)[0]
        module = build(case, mesh, width, head)
        first: list[Tensor] = []
        differences = 0
        for time in range(times):
            module.wait_at_once = time % 2 == 1
            sinks = [MainGrad(module.qkv_proj.weight, None), MainGrad(module.o_proj.weight, None)]
            leaf = hidden.clone().requires_grad_()
            output = module(leaf, layout, tables)
            output.sin().sum().backward()
            assert leaf.grad is not None
            values = [output.detach(), leaf.grad, *(sink.sum for sink in sinks)]
            first = first or values
            differences += not all(map(torch.equal, values, first))
        return differences


def parts(mesh: ParallelMesh, case: Case) -> tuple[Any, TokenLayout, tuple[Tensor, Tensor], Tensor]:
    """A module, and what it is called with, on tensor or context ranks."""
    context = mesh.size("context")
    layout = TokenLayout(BATCH, LENGTH // context, case.sequence_parallel, context_parallel=True)
    hidden = own_sequence(random(BATCH, LENGTH, WIDTH, dtype=case.dtype), mesh, layout).flatten(0, 1)
    leaf = hidden.clone().requires_grad_()
    return build(case, mesh), layout, rope(own_sequence(positions(), mesh, layout), case.dtype), leaf


@contextmanager
def traced() -> Iterator[list[str]]:
    """Exchanges posted and waited for, numbered in the order of the forward pass; projections, attention, sums."""
    events: list[str] = []
    numbers: dict[PendingExchange, int] = {}
    post, wait, linear, add_to = PendingExchange.post, PendingExchange._wait, F.linear, MatmulGrad.add_to
    attend = F.scaled_dot_product_attention

    def logged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number = numbers.setdefault(args[0], len(numbers)) if isinstance(args[0], PendingExchange) else ""
            events.append(f"{name}{number}")
            return function(*args, **kwargs)

        return call

    with (
        patch.object(PendingExchange, "post", logged("post", post)),
        patch.object(PendingExchange, "_wait", logged("wait", wait)),
        patch.object(F, "linear", logged("project", linear)),
        patch.object(F, "scaled_dot_product_attention", logged("attend", attend)),
        patch.object(MatmulGrad, "add_to", logged("add", add_to)),
    ):
        yield events
