"""Ranks with different numbers of forward passes stay in step, and ranks out of step find out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_moe.config.moe import MoEConfig
from lightning_moe.config.overlap import OverlapConfig
from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.moe.layer import MoELayer
from lightning_moe.moe.overlap.executor import ExpertOverlap
from lightning_moe.moe.participation import number_layers, serve_until_idle
from lightning_moe.parallel.mesh import ParallelMesh
from tests.distributed import RankPool

D = 16


class TwoLayers(nn.Module):
    """Two layers with different numbers of experts: their headers have to be brought to one length."""

    def __init__(self, mesh: ParallelMesh | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = MoELayer(D, MoEConfig(num_experts=12, expert_hidden_size=8, load_balancing="global"), mesh)
        self.second = MoELayer(D, MoEConfig(num_experts=24, top_k=3, expert_hidden_size=8), mesh)
        number_layers(self.moe_layers)

    @property
    def moe_layers(self) -> list[MoELayer]:
        return [self.first, self.second]

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.first(tokens)[0]
        out: Tensor = tokens + self.second(tokens)[0]
        return out


def batches(rank: int, number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(1 + (3 * rank + i) % 5, D, generator=generator) for i in range(number)]


def evaluate(
    numbers: tuple[int, ...], expert: int, expert_tensor: int, autocast: bool = False
) -> tuple[list[Tensor], int]:
    mesh = ParallelMesh.build(ParallelConfig(expert=expert, expert_tensor=expert_tensor))
    model = TwoLayers(mesh).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = [model(batch) for batch in batches(mesh.global_rank, numbers[mesh.global_rank])]
    # A rank that serves goes by what the others announce, not by its own autocast.
    with torch.autocast("cpu", torch.bfloat16, enabled=not autocast):
        served = serve_until_idle(model.moe_layers)
    return outputs, served


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("numbers", "expert", "expert_tensor"),
    [
        ((2, 5), 2, 1),
        ((3, 0), 2, 1),
        ((0, 0), 2, 1),
        ((4, 0, 2), 3, 1),
        ((1, 3, 0, 2), 4, 1),
        ((1, 3, 0, 2), 2, 1),
        ((1, 2), 1, 1),
        ((1, 3, 0, 2), 2, 2),
        ((1, 3, 0, 2), 1, 2),
    ],
)
def test_unequal_numbers_of_batches(
    ranks: RankPool, numbers: tuple[int, ...], expert: int, expert_tensor: int, autocast: bool
) -> None:
    results = ranks.run(len(numbers), evaluate, numbers, expert, expert_tensor, autocast, timeout=60)
    whole = TwoLayers(None).eval()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-6}
    for rank, (outputs, served) in enumerate(results):
        assert len(outputs) == numbers[rank]
        for batch, output in zip(batches(rank, numbers[rank]), outputs, strict=True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                assert torch.allclose(output, whole(batch), **tolerance)
        size = expert * expert_tensor
        group = numbers[rank - rank % size : rank - rank % size + size]
        assert served == 2 * (max(group) - numbers[rank])  # two layers; no one to serve in a group of one


def evaluate_until_small() -> tuple[Tensor, int, int]:
    """The number of passes depends on the data: halve the tokens until their norm is below a bound."""
    mesh = ParallelMesh.build(ParallelConfig(expert=3))
    model = TwoLayers(mesh).eval()
    tokens = torch.randn(2 + mesh.global_rank, D, generator=torch.Generator().manual_seed(mesh.global_rank))
    passes = 0
    with torch.no_grad():
        while tokens.norm() > 0.5 + 2 * mesh.global_rank:
            tokens = 0.4 * model(tokens)
            passes += 1
    return tokens, passes, serve_until_idle(model.moe_layers)


def test_data_dependent_number_of_passes(ranks: RankPool) -> None:
    results = ranks.run(3, evaluate_until_small, timeout=60)
    passes = [number for _, number, _ in results]
    assert len(set(passes)) > 1
    assert [served for _, _, served in results] == [2 * (max(passes) - number) for number in passes]
    whole = TwoLayers(None).eval()
    for rank, (tokens, number, _) in enumerate(results):
        expected = torch.randn(2 + rank, D, generator=torch.Generator().manual_seed(rank))
        with torch.no_grad():
            for _ in range(number):
                expected = 0.4 * whole(expected)
        assert torch.allclose(tokens, expected, rtol=1e-5, atol=1e-6)


def two_precisions() -> int:
    """A bf16 model that gets bf16 and float64 tokens: the rank that serves sees neither."""
    mesh = ParallelMesh.build(ParallelConfig(expert=2))
    model = TwoLayers(mesh).eval().bfloat16()
    with torch.no_grad():
        if mesh.global_rank == 0:
            model.first(torch.randn(3, D, dtype=torch.bfloat16))
            model.first(torch.randn(3, D, dtype=torch.float64))
    return serve_until_idle(model.moe_layers)


def test_dtype_of_the_rows_is_announced(ranks: RankPool) -> None:
    assert ranks.run(2, two_precisions, timeout=60) == [0, 2]


def test_world_of_one_serves_nothing() -> None:
    assert serve_until_idle(TwoLayers(None).moe_layers) == 0
    assert serve_until_idle([]) == 0


def message_of(action: Callable[[TwoLayers, int], Any]) -> str:
    mesh = ParallelMesh.build(ParallelConfig(expert=2))
    try:
        action(TwoLayers(mesh).eval(), mesh.global_rank)
    except RuntimeError as error:
        return str(error)
    return ""


@torch.no_grad()
def call_different_layers(model: TwoLayers, rank: int) -> None:
    model.moe_layers[rank](torch.zeros(2, D))


@torch.no_grad()
def call_in_different_precisions(model: TwoLayers, rank: int) -> None:
    model.double() if rank else model.bfloat16()
    model.first(torch.zeros(2, D, dtype=[torch.bfloat16, torch.float64][rank]))


def train_while_the_other_evaluates(model: TwoLayers, rank: int) -> None:
    with torch.set_grad_enabled(rank == 0):
        model.first(torch.zeros(2, D))


def want_gradients_of_tokens_on_one_rank(model: TwoLayers, rank: int) -> None:
    model.first(torch.zeros(2, D, requires_grad=rank == 1))


def freeze_experts_on_one_rank(model: TwoLayers, rank: int) -> None:
    model.first.experts.requires_grad_(rank == 1)
    model.first(torch.zeros(2, D))


def finish_while_the_other_trains(model: TwoLayers, rank: int) -> None:
    if rank == 0:
        model(torch.zeros(2, D))
    else:
        serve_until_idle(model.moe_layers)


def serve_unnumbered_layers(model: TwoLayers, rank: int) -> None:
    model.second.layer_index = 0
    serve_until_idle(model.moe_layers)


@pytest.mark.parametrize(
    ("action", "parts"),
    [
        (call_different_layers, ["rank 0 calls layer 0", "rank 1 calls layer 1"]),
        (call_in_different_precisions, ["rank 0 sends torch.bfloat16", "rank 1 sends torch.float64"]),
        (
            train_while_the_other_evaluates,
            ["MoE layer 0", "rank 0 sends gradients to experts alone", "rank 1 sends no gradients"],
        ),
        (
            want_gradients_of_tokens_on_one_rank,
            ["rank 0 sends gradients to experts alone", "rank 1 sends gradients to experts and back", "freeze"],
        ),
        (
            freeze_experts_on_one_rank,
            ["rank 0 sends no gradients", "rank 1 sends gradients to experts alone"],
        ),
        (finish_while_the_other_trains, ["ranks [1]", "have finished while others record gradients"]),
        (serve_unnumbered_layers, ["same layer_index", "number_layers"]),
    ],
)
def test_ranks_out_of_step_all_say_so(
    ranks: RankPool, action: Callable[[TwoLayers, int], Any], parts: list[str]
) -> None:
    for message in ranks.run(2, partial(message_of, action), timeout=60):
        assert all(part in message for part in parts), message


def serve_one_of_two() -> str:
    """Rank 1 serves only the first layer; rank 0 calls the second, and is stopped by rank 1's death."""
    mesh = ParallelMesh.build(ParallelConfig(expert=2))
    model = TwoLayers(mesh).eval()
    if mesh.global_rank == 1:
        with pytest.raises(RuntimeError, match=r"call MoE layer 1; this rank serves \[0\]"):
            serve_until_idle([model.first])
        return "refused"
    # Only the header, so that this rank does not wait for rows that never come.
    header = torch.tensor([1, 0, 0, *[0] * 24])
    gathered = header.new_empty(2 * len(header))
    dist.all_gather_into_tensor(gathered, header, group=mesh.group("expert_model"))
    return "called"


def test_a_layer_that_is_not_served(ranks: RankPool) -> None:
    assert ranks.run(2, serve_one_of_two, timeout=60) == ["called", "refused"]


def weights_bring_gradients_of_rows() -> bool:
    """Overlapped rows carry the router's weights, so whether the tokens want gradients makes no difference."""
    mesh = ParallelMesh.build(ParallelConfig(expert=2))
    model = TwoLayers(mesh)
    model.first.overlap = ExpertOverlap(OverlapConfig(dispatch="p2p", chunk="source"))
    hidden = torch.randn(2, D, requires_grad=mesh.global_rank == 1)
    model.first(hidden)[0].sum().backward()
    return hidden.grad is not None


def test_what_counts_are_the_gradients_that_are_exchanged(ranks: RankPool) -> None:
    assert ranks.run(2, weights_bring_gradients_of_rows, timeout=60) == [False, True]
