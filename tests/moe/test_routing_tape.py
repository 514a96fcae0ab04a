"""Checkpointed regions with MoE layers: the same gradients to the last bit, and every decision made once."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightning_moe.config.moe import MoEConfig
from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.moe import MoELayer, RoutingTape, checkpoint_with_routing, losses, participation, rows_to_send
from lightning_moe.moe import dispatch as dispatch_module
from lightning_moe.moe.router import TopKRouter
from lightning_moe.parallel.mesh import ParallelMesh
from tests.distributed import RankPool

D = 8
CONFIG = MoEConfig(
    num_experts=4,
    expert_hidden_size=8,
    capacity_factor=1.2,
    expert_bias=True,
    load_balancing="sequence",
    z_loss_coefficient=0.1,
    shared_expert_hidden_size=4,
)
MESHES = [
    ParallelConfig(data=1),
    ParallelConfig(data=2, expert=2),
    ParallelConfig(data=1, tensor=2, expert_tensor=2),
    ParallelConfig(data=1, context=2, expert=2),
]


class Region:
    """A function that calls one layer twice."""

    def __init__(self, mesh: ParallelMesh | None) -> None:
        torch.manual_seed(0)
        self.layer = MoELayer(D, CONFIG, mesh)

    def __call__(self, hidden: Tensor, saved: RoutingTape | None = None) -> tuple[Tensor, Tensor]:
        loss = hidden.new_zeros(())
        for _ in range(2):
            update, info = self.layer(hidden, saved=saved)
            hidden = hidden + update.tanh()
            loss = loss + info.auxiliary_loss + info.z_loss
        return hidden, loss


def tokens(seed: int) -> Tensor:
    return torch.randn(3, 5, D, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(region: Region, hidden: Tensor, checkpointed: bool) -> list[Tensor]:
    """Output, loss, then the gradients of the tokens and of all parameters."""
    out, loss = checkpoint_with_routing(region, hidden) if checkpointed else region(hidden)
    grads = torch.autograd.grad(out.square().sum() + loss, [hidden, *region.layer.parameters()])
    return [out.detach(), loss.detach(), *grads]


def compare(parallel: ParallelConfig) -> dict[str, Any]:
    """Both ways on this rank; how often each kind of exchange ran forward and backward."""
    mesh = ParallelMesh.build(parallel) if parallel.data != 1 or parallel.model_size > 1 else None
    region = Region(mesh)
    hidden = tokens(0 if mesh is None else mesh.rank("data_context"))
    plain = gradients(region, hidden, False)
    counts = region.layer.router.tokens_since_update
    assert counts is not None
    counted = counts.clone()
    counts.zero_()
    calls: Counter[str] = Counter()
    with ExitStack() as stack:
        for name, module, function in (
            ("header", participation, "all_gather"),
            ("reduction", losses, "_all_reduced"),
            ("plan", rows_to_send, "plan_dispatch"),
            ("exchange", dispatch_module, "all_to_all"),
        ):
            original = getattr(module, function)

            def counting(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
                calls[name] += 1
                return original(*args, **kwargs)

            stack.enter_context(mock.patch.object(module, function, counting))
        out, loss = checkpoint_with_routing(region, hidden)
        forward = dict(calls)
        calls.clear()
        grads = torch.autograd.grad(out.square().sum() + loss, [hidden, *region.layer.parameters()])
    same = all(torch.equal(a, b) for a, b in zip(plain, [out, loss, *grads], strict=True))
    return {"same": same, "counted once": torch.equal(counts, counted), "forward": forward, "again": dict(calls)}


@pytest.mark.parametrize("parallel", MESHES, ids=repr)
def test_gradients_are_bitwise_equal_and_decisions_are_made_once(ranks: RankPool, parallel: ParallelConfig) -> None:
    world_size = (parallel.data or 1) * parallel.model_size
    results = [compare(parallel)] if world_size == 1 else ranks.run(world_size, compare, parallel)
    for result in results:
        assert result["same"]
        assert result["counted once"]
        assert result["forward"]["plan"] == 2
        assert result["forward"]["exchange"] == 4
        assert result["again"] == {"exchange": 4}  # the tokens travel again; nothing is asked or counted
        if world_size > 1:
            assert result["forward"]["header"] == 2
            # Per call: choices by sequence and of the micro-batch, and between tensor ranks the losses.
            reductions = 6 if parallel.tensor > 1 else 4 if parallel.context > 1 else 0
            assert result["forward"].get("reduction", 0) == reductions


def test_another_choice_in_the_recomputation_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    region, hidden = Region(None), tokens(0)
    plain = gradients(region, hidden, False)
    choose, runs = TopKRouter._choice, []

    def contrary(self: TopKRouter, probabilities: Tensor) -> Tensor:
        runs.append(1)
        return choose(self, probabilities if len(runs) <= 2 else -probabilities)

    monkeypatch.setattr(TopKRouter, "_choice", contrary)
    again = gradients(region, hidden, True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert len(runs) == 2
    different = gradients(region, hidden, False)  # the patch has an effect
    assert not torch.equal(different[0], plain[0])


def test_backward_twice() -> None:
    region, hidden = Region(None), tokens(0)
    out, loss = checkpoint_with_routing(region, hidden)
    total, inputs = out.square().sum() + loss, [hidden, *region.layer.parameters()]
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    bias = region.layer.router.expert_bias
    assert bias is not None
    bias += torch.tensor([9.0, 0.0, -9.0, 0.0])  # as an optimizer step in between would
    second = torch.autograd.grad(total, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_gradients_it_is_a_plain_call() -> None:
    region = Region(None)
    with torch.no_grad():
        expected, actual = region(tokens(0))[0], checkpoint_with_routing(region, tokens(0))[0]
    assert torch.equal(actual, expected)


def test_a_later_run_that_asks_for_more_is_refused() -> None:
    tape = RoutingTape()
    tape.rewind()
    assert not tape.replaying
    assert tape.once(lambda: 1) == 1
    for _ in range(2):
        tape.rewind()
        assert tape.replaying
        assert tape.once(lambda: 2) == 1
        with pytest.raises(RuntimeError, match="calls more MoE layers"):
            tape.once(lambda: 3)
