"""Tensor-parallel layers and the vocabulary loss with weight gradients that are computed after the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lightning_moe.layers import TokenLayout, linear_cross_entropy
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.weight_grad import GatheredInputGrad, GatheredOutputGrad, WeightGradQueue
from tests.distributed import RankPool
from tests.layers.parallel import own_rows, random, run_cases
from tests.layers.test_linear import INNER, LAYOUTS, TOKENS, WIDTH, Operations, Pair
from tests.weight_grad.owners import MainGrad, flops

MICROBATCHES = 3
COPIES, SLICES = LAYOUTS


@dataclass(frozen=True)
class Step:
    """Gradients of the inputs and weights, and the operations of the last B (or BW) and of each W after it."""

    inputs: list[Tensor]
    weights: list[Tensor]
    backward: list[str]
    deferred: list[list[str]]
    nbytes: int
    """That the queue holds for one microbatch."""


def run_step(mesh: ParallelMesh, layout: TokenLayout, dtype: torch.dtype, mode: str) -> Step:
    pair = Pair(mesh).to(dtype)
    # Too many bytes, and a budget for everything: gradients with collectives wait for W all the same.
    queue = None if mode == "immediate" else WeightGradQueue(max_bytes=0 if layout.sequence_parallel else None)
    sinks = [MainGrad(weight, queue) for weight in pair.parameters()]
    inputs, deferred, nbytes = [], [], 0
    for microbatch in range(MICROBATCHES):
        hidden = random(TOKENS, WIDTH, seed=microbatch, dtype=dtype)
        leaf = own_rows(hidden, mesh, layout).clone().requires_grad_()
        loss = pair(leaf, layout).sin().sum()
        with Operations() as operations:
            if queue is None:
                loss.backward()
            else:
                with queue.capture(microbatch):
                    loss.backward()
        assert leaf.grad is not None
        inputs.append(leaf.grad)
        if queue is not None:
            nbytes = nbytes or queue.live_bytes
            assert not layout.sequence_parallel or queue.run_within(1e9, flops) == 0.0
        if mode == "one by one":
            assert queue is not None
            with Operations() as later:
                queue.pop(microbatch)
            deferred.append(later.names)
    if mode == "by weight":
        assert queue is not None
        with Operations() as later:
            queue.run_tail([(microbatch, 0) for microbatch in range(MICROBATCHES)])
        deferred.append(later.names)
    assert all(sink.added == MICROBATCHES for sink in sinks)
    assert queue is None or queue.live_bytes == queue.num_held == 0
    drains = {"immediate": 0, "one by one": MICROBATCHES, "by weight": 1}[mode]
    assert all(sink.drains == drains for sink in sinks)
    return Step(inputs, [sink.sum for sink in sinks], operations.names, deferred, nbytes)


@pytest.mark.parametrize("world_size", [2, 4])
def test_deferred_equals_immediate_bit_for_bit(ranks: RankPool, world_size: int) -> None:
    dtypes = [torch.float32, torch.bfloat16]
    modes = ["immediate", "one by one", "by weight"]
    cases = [(layout, dtype, mode) for layout in LAYOUTS for dtype in dtypes for mode in modes]
    steps = dict(run_cases(ranks, {"tensor": world_size}, run_step, cases))
    for (layout, dtype, mode), results in steps.items():
        for step, expected in zip(results, steps[layout, dtype, "immediate"], strict=True):
            for value, other in zip(step.inputs + step.weights, expected.inputs + expected.weights, strict=True):
                assert torch.equal(value, other), (layout, dtype, mode)
                assert value.isfinite().all()
    for step in steps[SLICES, torch.float32, "immediate"]:
        assert step.backward == [
            *["allgather_base", "mm", "addmm"],  # row: the gradient once for both products
            *["allgather_base", "mm", "reduce_scatter_base", "addmm"],
        ]
    for step in steps[SLICES, torch.float32, "one by one"]:
        assert step.backward == ["allgather_base", "mm", "mm", "reduce_scatter_base"]
        # The second gather is under way while the first product is computed.
        assert step.deferred == [["allgather_base", "allgather_base", "addmm", "addmm"]] * MICROBATCHES
    for step in steps[SLICES, torch.float32, "by weight"]:
        gathers = 2 * MICROBATCHES
        assert step.deferred == [["allgather_base", *["allgather_base", "addmm"] * (gathers - 1), "addmm"]]
    for rank, step in enumerate(steps[SLICES, torch.float32, "by weight"]):
        inner = len(range(INNER)[rank::world_size])
        operands = TOKENS * 3 * inner + 2 * (TOKENS // world_size) * WIDTH  # of the two shared out, one slice each
        assert step.nbytes == 4 * operands


def run_copies(mesh: ParallelMesh) -> tuple[list[str], list[str]]:
    """Without sequence parallelism no weight gradient needs a collective."""
    pair, queue = Pair(mesh), WeightGradQueue()
    for weight in pair.parameters():
        MainGrad(weight, queue)
    loss = pair(random(TOKENS, WIDTH, dtype=torch.float32).requires_grad_(), COPIES).sum()
    with Operations() as first, queue.capture(0):
        loss.backward()
    with Operations() as second:
        assert queue.run_within(1e9, flops) > 0.0
    assert queue.num_held == 0
    return first.names, second.names


def test_copies_are_deferred_without_collectives(ranks: RankPool) -> None:
    for _, results in run_cases(ranks, {"tensor": 2}, run_copies, [()]):
        assert results[0] == (["mm", "mm", "allreduce"], ["addmm", "addmm"])


class Refusing(MainGrad):
    def take(self, grad: object, *, deferrable: bool = True) -> bool:
        return False


def run_refused(mesh: ParallelMesh) -> list[Tensor]:
    """A sink that defers and then refuses: the gradient is computed at once, for autograd."""
    grads = []
    for refuses in (False, True):
        pair, queue = Pair(mesh), WeightGradQueue()
        if refuses:
            for weight in pair.parameters():
                Refusing(weight, queue)
        with queue.capture(0):
            pair(own_rows(random(TOKENS, WIDTH, dtype=torch.float32), mesh, SLICES), SLICES).sum().backward()
        grads += [weight.grad for weight in pair.parameters()]
    return grads


def test_a_refused_gradient_goes_to_autograd(ranks: RankPool) -> None:
    for _, results in run_cases(ranks, {"tensor": 2}, run_refused, [()]):
        for column, row, other_column, other_row in results:
            assert torch.equal(column, other_column)
            assert torch.equal(row, other_row)


def run_frozen(mesh: ParallelMesh) -> tuple[list[str], list[str]]:
    """Operations of B and W where the input needs no gradient, and where the weight of one layer needs none."""
    pair, queue = Pair(mesh), WeightGradQueue()
    MainGrad(pair.column.weight, queue)
    MainGrad(pair.row.weight, queue)
    pair.row.requires_grad_(False)
    loss = pair(own_rows(random(TOKENS, WIDTH, dtype=torch.float32), mesh, SLICES), SLICES).sum()
    with Operations() as first, queue.capture(0):
        loss.backward()
    with Operations() as second:
        queue.pop(0)
    return first.names, second.names


def test_frozen_weights_and_inputs_cost_nothing(ranks: RankPool) -> None:
    for _, results in run_cases(ranks, {"tensor": 2}, run_frozen, [()]):
        assert results[0] == (["allgather_base", "mm"], ["allgather_base", "addmm"])


def test_the_loss_is_not_deferred() -> None:
    mesh, queue = ParallelMesh.single(), WeightGradQueue()
    weight = nn.Parameter(random(11, WIDTH, dtype=torch.float32))
    sink = MainGrad(weight, queue)
    hidden = random(TOKENS, WIDTH, seed=1, dtype=torch.float32).requires_grad_()
    labels = torch.arange(TOKENS)
    with queue.capture(0):
        linear_cross_entropy(hidden, weight, labels, mesh=mesh, vocab_size=11, layout=COPIES).backward()
    assert queue.num_held == 0
    assert sink.added == 1
    expected = torch.autograd.grad(
        torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="sum"), weight
    )[0]
    torch.testing.assert_close(sink.sum, expected, rtol=1e-5, atol=1e-5)


def test_gathered_gradients_know_their_size(ranks: RankPool) -> None:
    for nbytes, flops_of_input, flops_of_output in ranks.run(2, sizes):
        assert nbytes == 4 * (8 * 5 + 4 * 3)
        assert flops_of_input == flops_of_output == 2 * 8 * 5 * 3


def sizes() -> tuple[int, float, float]:
    group = torch.distributed.group.WORLD
    assert group is not None
    own_input = GatheredInputGrad(torch.zeros(8, 5), torch.zeros(4, 3), group)
    own_output = GatheredOutputGrad(torch.zeros(4, 5), torch.zeros(8, 3), group)
    assert own_input.has_collective
    assert own_output.has_collective
    return own_input.nbytes, own_input.flops, own_output.flops
