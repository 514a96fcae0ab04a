"""Overlapped layers in all the ways that autograd can be used in, against the same layers with all-to-alls."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_moe.config import MoEConfig, OverlapConfig, ParallelConfig
from lightning_moe.moe import MoELayer, RoutingTape, checkpoint_with_routing
from lightning_moe.moe.overlap import executor, scaled_activation, transport
from lightning_moe.moe.overlap.cost import Rates
from lightning_moe.moe.overlap.executor import ExpertOverlap
from lightning_moe.moe.overlap.transport import Pending
from lightning_moe.parallel.mesh import ParallelMesh
from tests.distributed import RankPool

D = 8
PLANS = [("source", None, "fc1"), ("expert", 2, "recompute"), ("source", None, "redispatch")]
Step = Callable[[MoELayer, Tensor], list[Tensor]]


def loss_of(layer: MoELayer, hidden: Tensor) -> Tensor:
    output, info = layer(hidden)
    loss: Tensor = output.square().sum() + info.auxiliary_loss
    return loss


def grads_of(layer: MoELayer, *others: Tensor) -> list[Tensor]:
    return [each.grad for each in (*others, *layer.parameters()) if each.grad is not None]


def several_calls(layer: MoELayer, hidden: Tensor) -> list[Tensor]:
    """Three calls before the first backward pass, which add up."""
    losses = [loss_of(layer, hidden * scale) for scale in (1.0, 0.5, 2.0)]
    for loss in (losses[1], losses[0], losses[2]):
        loss.backward()
    return grads_of(layer, hidden)


def twice(layer: MoELayer, hidden: Tensor) -> list[Tensor]:
    loss = loss_of(layer, hidden)
    loss.backward(retain_graph=True)
    loss.backward()
    return grads_of(layer, hidden)


def weights_alone(layer: MoELayer, hidden: Tensor) -> list[Tensor]:
    """Gradients that nobody asks for are on their way when backward ends."""
    loss = loss_of(layer, hidden)
    first = torch.autograd.grad(loss, list(layer.experts.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, *layer.parameters()])
    return [*first, *second]


def frozen_experts(layer: MoELayer, hidden: Tensor) -> list[Tensor]:
    layer.experts.requires_grad_(False)
    loss_of(layer, hidden).backward()
    return grads_of(layer, hidden)


def frozen_half(layer: MoELayer, hidden: Tensor) -> list[Tensor]:
    layer.experts.projections[0].requires_grad_(False)
    loss_of(layer, hidden).backward()
    return grads_of(layer, hidden)


def frozen_tokens(layer: MoELayer, hidden: Tensor) -> list[Tensor]:
    layer.router.requires_grad_(False)
    output, _ = layer(hidden.detach())
    output.square().sum().backward()
    return grads_of(layer)


def hooked(layer: MoELayer, hidden: Tensor) -> list[Tensor]:
    for weight in layer.experts.parameters():
        weight.register_hook(lambda grad: 2.0 * grad)
    loss_of(layer, hidden).backward()
    return grads_of(layer, hidden)


def autocast(layer: MoELayer, hidden: Tensor) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(layer, hidden)
    loss.backward()
    return grads_of(layer, hidden)


def checkpointed(layer: MoELayer, hidden: Tensor) -> list[Tensor]:
    def function(hidden: Tensor, saved: RoutingTape | None = None) -> Tensor:
        for _ in range(2):
            hidden = hidden + layer(hidden, saved=saved)[0]
        return hidden

    checkpoint_with_routing(function, hidden).square().sum().backward()
    return grads_of(layer, hidden)


def plainly_checkpointed(layer: MoELayer, hidden: Tensor) -> list[Tensor]:
    """Without a tape; the recomputation stops with the last layer's last saved tensor."""
    out = checkpoint(lambda hidden: layer(hidden + layer(hidden)[0])[0], hidden, use_reentrant=False)
    out.square().sum().backward()
    return grads_of(layer, hidden)


def without_grad(layer: MoELayer, hidden: Tensor) -> list[Tensor]:
    with torch.no_grad():
        first = layer(hidden)[0]
    with torch.inference_mode():
        return [first, layer(hidden)[0].clone()]


STEPS: list[Step] = [
    several_calls,
    twice,
    weights_alone,
    frozen_experts,
    frozen_half,
    frozen_tokens,
    hooked,
    autocast,
    checkpointed,
    plainly_checkpointed,
    without_grad,
]


def run(overlap: OverlapConfig | None, step: Step, mesh: ParallelMesh) -> list[Tensor]:
    torch.manual_seed(0)
    dtype = torch.float32 if step is autocast else torch.float64
    config = MoEConfig(num_experts=4, expert_hidden_size=8, shared_expert_hidden_size=4, load_balancing="none")
    layer = MoELayer(D, config, mesh).to(dtype)
    layer.overlap = None if overlap is None else ExpertOverlap(overlap)
    torch.manual_seed(mesh.global_rank)
    return step(layer, torch.randn(5 - 2 * mesh.global_rank, D, dtype=dtype).requires_grad_())


@contextmanager
def all_waited_for(name: str) -> Iterator[None]:
    """Whoever forgets a message frees memory that it may yet be written to."""
    posted: list[Pending] = []
    original = transport.Pending

    def post(*args: Any) -> Pending:
        posted.append(original(*args))
        return posted[-1]

    with mock.patch.object(transport, "Pending", post):
        yield
    assert posted
    assert not any(pending._works for pending in posted), name


def errors(steps: list[Step]) -> dict[str, float]:
    mesh = ParallelMesh.build(ParallelConfig(expert=2))
    worst = {}
    for step in steps:
        expected = run(None, step, mesh)
        assert expected
        for by, groups, save in PLANS:
            overlap = OverlapConfig(dispatch="p2p", chunk=by, expert_groups=groups, save=save)  # type: ignore[arg-type]
            with all_waited_for(f"{step.__name__}, {by}, {save}"):
                found = run(overlap, step, mesh)
            differences = [(a - e).abs().max() / e.abs().max() for a, e in zip(found, expected, strict=True)]
            worst[f"{step.__name__}, {by}, {save}"] = max(differences, default=torch.zeros(())).item()
    return worst


def test_as_an_all_to_all(ranks: RankPool) -> None:
    for of_rank in ranks.run(2, errors, STEPS):
        wrong = {name: e for name, e in of_rank.items() if not e <= (3e-2 if "autocast" in name else 1e-12)}
        assert not wrong


def orders() -> list[str]:
    """What is called first, where the model chooses chunks, and where all are sure that it does not."""
    mesh = ParallelMesh.build(ParallelConfig(expert=2))
    found = []
    for link in (1e5, 1e18):
        rates = Rates(link_bytes_per_second=link, latency=0.0, gemm=((1.0, 1e6),), launch=0.0)
        layer = MoELayer(D, MoEConfig(num_experts=4, expert_hidden_size=8, shared_expert_hidden_size=4), mesh)
        layer.overlap = ExpertOverlap(OverlapConfig(), rates)
        calls: list[str] = []
        assert layer.shared_expert is not None
        layer.shared_expert.register_forward_pre_hook(lambda *_, calls=calls: calls.append("shared"))

        def packed(*args: Any, calls: list[str] = calls, original: Any = executor.pack) -> Any:
            calls.append("pack")
            return original(*args)

        with mock.patch.object(executor, "pack", packed):
            layer(torch.randn(4, D))
        found.append(" ".join(calls))
    return found


def test_rows_are_packed_before_the_shared_expert_where_chunks_are_expected(ranks: RankPool) -> None:
    assert ranks.run(2, orders) == [["pack shared", "shared"]] * 2


def most_alive(grad: bool) -> int:
    """Most outputs of first projections that exist at a time."""
    layer = MoELayer(D, MoEConfig(num_experts=8, expert_hidden_size=8), ParallelMesh.build(ParallelConfig(expert=2)))
    layer.overlap = ExpertOverlap(OverlapConfig(dispatch="p2p", chunk="expert", expert_groups=4))
    seen: list[weakref.ref[Tensor]] = []
    most = 0

    def forward(projected: Tensor, *args: Any, original: Any = scaled_activation.forward) -> Any:
        nonlocal most
        seen.append(weakref.ref(projected))
        most = max(most, sum(ref() is not None for ref in seen))
        return original(projected, *args)

    with mock.patch.object(scaled_activation, "forward", forward), torch.set_grad_enabled(grad):
        layer(torch.randn(40, D))
    return most


def test_what_backward_needs_is_kept_only_for_backward(ranks: RankPool) -> None:
    assert ranks.run(2, most_alive, True) == [5, 5]
    assert ranks.run(2, most_alive, False) == [1, 1]
