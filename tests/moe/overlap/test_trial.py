"""Trying both ways on a call's own rows: what is chosen, what is left as it was, and who agrees on the times."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lightning_moe.config import MoEConfig, OverlapConfig, ParallelConfig
from lightning_moe.moe import MoELayer
from lightning_moe.moe.overlap import executor
from lightning_moe.moe.overlap.cost import LayerShape, Rates
from lightning_moe.moe.overlap.executor import ExpertOverlap
from lightning_moe.moe.overlap.trial import seconds_of
from lightning_moe.moe.participation import number_layers
from lightning_moe.moe.routing_tape import checkpoint_with_routing
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.weight_grad import WeightGradQueue
from tests.distributed import RankPool
from tests.weight_grad.owners import MainGrad

WIDTH, TOKENS = 16, 24
RATES = Rates(link_bytes_per_second=1e5, latency=0.0, gemm=((1.0, 1e6),), launch=0.0)
"""So slow a link that the model would overlap."""


@dataclass
class Outcome:
    """What two steps gave, and what was tried."""

    tensors: list[Tensor]
    calls: int
    trials: dict[LayerShape, tuple[float, float]] | None
    generator: Tensor


def two_steps(overlap: ExpertOverlap | None, mesh: ParallelMesh, sinks: str, how: str) -> Outcome:
    """Train a layer for two steps of different lengths, counting what is tried."""
    torch.manual_seed(0)
    layer = MoELayer(WIDTH, MoEConfig(num_experts=4, top_k=2, expert_hidden_size=8), mesh).double()
    layer.overlap = overlap
    queue = WeightGradQueue() if sinks == "queue" else None
    sums = {}
    if sinks != "autograd":
        sums = {name: MainGrad(weight, queue) for name, weight in layer.experts.named_parameters()}
    if overlap is not None:
        overlap.queue = queue
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    found: list[Tensor] = []
    tried = mock.Mock(side_effect=executor.seconds_of)

    def call(hidden: Tensor) -> Tensor:
        if how == "checkpoint":
            out: Tensor = checkpoint(lambda x: layer(x)[0], hidden, use_reentrant=False)
        elif how == "selective":  # results of these operations are kept by their order
            kept = partial(
                create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.bmm.default]
            )
            out = checkpoint(lambda x: layer(x)[0], hidden, use_reentrant=False, context_fn=kept)
        elif how == "checkpoint_with_routing":
            out = checkpoint_with_routing(lambda x, saved: layer(x, saved=saved)[0], hidden)
        else:
            out = layer(hidden)[0]
        return out

    with mock.patch.object(executor, "seconds_of", tried):
        for length in (TOKENS, TOKENS, 2 * TOKENS):
            hidden = torch.randn(length, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
            if queue is None:
                out = call(hidden)
                out.square().sum().backward()
            else:
                with queue.capture(0):
                    out = call(hidden)
                    out.square().sum().backward()
                queue.pop_all()
            assert hidden.grad is not None
            found += [out.detach(), hidden.grad]
        with torch.no_grad():
            found.append(layer(hidden[:3])[0])  # in evaluation nothing is tried
    found += [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
    found += [total.sum for total in sums.values()]
    return Outcome(found, tried.call_count, None if overlap is None else overlap.choice.trials, torch.get_rng_state())


def outcomes(sinks: str, how: str) -> dict[str, Outcome]:
    """Without a trial, and with trials that one way or the other is made to win."""
    mesh = ParallelMesh.build(ParallelConfig(expert=2))
    found = {
        "blocking": two_steps(None, mesh, sinks, how),
        "p2p": two_steps(ExpertOverlap(OverlapConfig(dispatch="p2p"), RATES), mesh, sinks, how),
        "auto": two_steps(ExpertOverlap(OverlapConfig(), RATES), mesh, sinks, how),
    }
    real = seconds_of
    for winner in ("blocking", "p2p"):

        def times(*args: Any, winner: str = winner, **options: Any) -> list[float]:
            measured = real(*args, **options)
            assert len(measured) == 2
            assert all(seconds > 0 for seconds in measured)
            return [1.0, 2.0] if winner == "blocking" else [2.0, 1.0]

        with mock.patch.object(executor, "seconds_of", times):
            found[f"tried, {winner} wins"] = two_steps(
                ExpertOverlap(OverlapConfig(), RATES, trials={}), mesh, sinks, how
            )
    return found


@pytest.mark.parametrize("how", ["plain", "checkpoint", "selective", "checkpoint_with_routing"])
@pytest.mark.parametrize("sinks", ["autograd", "sink", "queue"])
def test_the_winner_is_used_and_nothing_else_changes(ranks: RankPool, sinks: str, how: str) -> None:
    """Outputs, gradients, sums in sinks and random generators, bit for bit those of the way that has won."""
    for found in ranks.run(2, outcomes, sinks, how):
        bits = {name: outcome.tensors for name, outcome in found.items()}
        differ = [not torch.equal(a, b) for a, b in zip(bits["blocking"], bits["p2p"], strict=True)]
        assert any(differ), "otherwise this shows nothing"
        pairs = [("auto", "p2p"), ("tried, p2p wins", "p2p"), ("tried, blocking wins", "blocking")]
        for name, expected in pairs:
            same = [torch.equal(a, b) for a, b in zip(bits[name], bits[expected], strict=True)]
            assert all(same), (name, same)
            assert torch.equal(found[name].generator, found[expected].generator)
        assert found["auto"].calls == 0
        for winner in ("blocking", "p2p"):
            outcome = found[f"tried, {winner} wins"]
            assert outcome.calls == 2, "one for each number of rows"
            assert outcome.trials is not None
            assert len(outcome.trials) == 2


def experts_alone(winner: str, save: Any, how: str) -> tuple[int, list[Tensor]]:
    """Two layers of one kind, of which only the experts are trained: the first gets tokens without gradients."""
    torch.manual_seed(0)
    mesh, config = ParallelMesh.build(ParallelConfig(expert=2)), MoEConfig(num_experts=4, expert_hidden_size=8)
    layers = nn.ModuleList(MoELayer(WIDTH, config, mesh) for _ in range(2))
    number_layers(list(layers))  # type: ignore[arg-type]
    overlap = ExpertOverlap(OverlapConfig(save=save), RATES, trials={})
    for layer in layers:
        layer.overlap = overlap  # type: ignore[assignment]
        layer.router.requires_grad_(False)  # type: ignore[union-attr,operator]
    hidden = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    times = [1.0, 2.0] if winner == "blocking" else [2.0, 1.0]
    tried = mock.Mock(side_effect=lambda *args, **options: (seconds_of(*args, **options), times)[1])

    def both(x: Tensor, saved: Any = None) -> Tensor:
        for layer in layers:
            x = x + layer(x, saved=saved)[0]
        return x

    with mock.patch.object(executor, "seconds_of", tried):
        for _ in range(2):
            if how == "plain":
                out = both(hidden)
            elif how == "checkpoint":
                out = checkpoint(both, hidden, use_reentrant=False)
            else:
                out = checkpoint_with_routing(both, hidden)
            out.square().sum().backward()
    return tried.call_count, [out, *(weight.grad for weight in layers.parameters() if weight.grad is not None)]


@pytest.mark.parametrize("save", ["fc1", "recompute", "redispatch"])
@pytest.mark.parametrize("winner", ["blocking", "p2p"])
def test_what_is_run_again_goes_the_same_way(ranks: RankPool, winner: str, save: str) -> None:
    """The first call that records gradients is tried, also where its tokens need none."""
    expected = ranks.run(2, experts_alone, winner, save, "plain")
    for how in ("checkpoint", "checkpoint_with_routing"):
        for (calls, tensors), (_, wanted) in zip(ranks.run(2, experts_alone, winner, save, how), expected, strict=True):
            assert calls == 1
            assert len(tensors) == 5
            assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))


def ragged(winner: str) -> list[Tensor]:
    """A step of ranks with 5, no and 11 tokens."""
    torch.manual_seed(0)
    layer = MoELayer(
        WIDTH, MoEConfig(num_experts=6, expert_hidden_size=8), ParallelMesh.build(ParallelConfig(expert=3))
    )
    overlap = None
    times = [1.0, 2.0] if winner == "blocking" else [2.0, 1.0]
    if winner != "neither":
        overlap = ExpertOverlap(OverlapConfig(), RATES, trials={})
    layer.overlap = overlap
    hidden = torch.randn((5, 0, 11)[dist.get_rank()], WIDTH, requires_grad=True)
    with mock.patch.object(executor, "seconds_of", lambda *args, **options: (seconds_of(*args, **options), times)[1]):
        out = layer(hidden)[0]
    out.square().sum().backward()
    assert overlap is None or len(overlap.choice.trials or ()) == 1
    assert hidden.grad is not None
    return [
        out.detach(),
        hidden.grad,
        *(weight.grad for weight in layer.experts.parameters() if weight.grad is not None),
    ]


def test_ranks_with_few_and_with_no_tokens_try_together(ranks: RankPool) -> None:
    expected = ranks.run(3, ragged, "neither")
    for rank, tensors in enumerate(ranks.run(3, ragged, "blocking")):
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected[rank], strict=True))
    for rank, tensors in enumerate(ranks.run(3, ragged, "p2p")):
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(tensors, expected[rank], strict=True))


def agreed() -> tuple[list[float], list[list[str]]]:
    """Times of two ways, the first of which is slow on rank 1; and what gradients each pass was asked for."""
    asked: list[list[str]] = []
    group = dist.group.WORLD

    def way(seconds: float) -> Any:
        def run(tokens: Tensor, weights: Tensor, up: nn.Parameter, down: nn.Parameter) -> Tensor:
            given = {"tokens": tokens, "weights": weights, "up": up, "down": down}
            asked.append([name for name, value in given.items() if value.requires_grad])
            time.sleep(seconds)
            return tokens * weights.sum() * up.sum() * down.sum()

        return run

    tokens, weights = torch.ones(3, 2, requires_grad=True), torch.ones(3, 1)
    up, down = nn.Parameter(torch.ones(2, 2, 2)), nn.Parameter(torch.ones(2, 2, 2), requires_grad=False)
    slow = 0.05 * dist.get_rank()
    times = seconds_of((way(slow), way(0.01)), tokens, weights, (up, down), group, deferred=False)
    assert all(each.grad is None for each in (tokens, weights, up, down))
    return times, asked


def test_ranks_agree_on_the_slowest(ranks: RankPool) -> None:
    (first, asked), (second, _) = ranks.run(2, agreed)
    assert first == second
    assert first[0] >= 0.05
    assert 0.01 <= first[1] < first[0]
    assert all(each == ["tokens", "up"] for each in asked), "what is frozen stays so"
