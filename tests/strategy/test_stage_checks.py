"""What cannot work with pipeline stages is refused on all ranks, with words that name it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW

from lightning_moe import ConfigError, ParallelConfig, ParallelMesh
from lightning_moe.parallel.sharding import set_tied
from lightning_moe.strategy.checks import (
    check_evaluation_lengths,
    check_optimizers,
    check_same_batch,
    check_shards,
)
from lightning_moe.strategy.sizes import report_sizes
from tests.distributed import RankPool


class Stage(nn.Module):
    """A layer of its own on every stage; the ends have one embedding in common."""

    def __init__(self, mesh: ParallelMesh) -> None:
        super().__init__()
        self.stage = mesh.rank("pipeline")
        self.blocks = nn.ModuleDict({str(self.stage): nn.Linear(3, 3)})
        if self.stage in (0, mesh.size("pipeline") - 1):
            self.embedding = nn.Embedding(5, 3)
            set_tied(self.embedding, "weight")


def with_extra(module: Stage, stages: set[int], width: Callable[[int], int] = lambda stage: 2) -> Stage:
    """Some stages have a parameter of the same name."""
    if module.stage in stages:
        module.scale = nn.Parameter(torch.zeros(width(module.stage)))
    return module


def tied(module: Stage) -> Stage:
    if hasattr(module, "scale"):
        set_tied(module, "scale")
    return module


def refusal(check: Callable[..., None], *args: Any) -> str:
    """The message of the error, which has to be raised on every rank; empty if there is none."""
    try:
        check(*args)
    except ConfigError as error:
        return str(error)
    return ""


def check_models() -> list[str]:
    mesh = ParallelMesh.build(ParallelConfig(pipeline=3))
    cases = [
        Stage(mesh),
        with_extra(Stage(mesh), {1}),
        tied(with_extra(Stage(mesh), {0, 2})),
        with_extra(Stage(mesh), {0, 1, 2}),
        tied(with_extra(Stage(mesh), {0, 1})),
        tied(with_extra(Stage(mesh), {0, 2}, lambda stage: 2 + stage)),
    ]
    return [refusal(check_shards, module, mesh) for module in cases]


def test_each_parameter_is_on_one_stage_or_tied(ranks: RankPool) -> None:
    messages, *others = ranks.run(3, check_models)
    assert others == [messages, messages]
    assert messages[:3] == ["", "", ""]
    assert "parameter scale" in messages[3]
    assert "not tied, on stages [0, 1, 2] of the pipeline: (2,) torch.float32" in messages[3]
    assert "tied, on stages [0, 1]" in messages[4]
    assert "(2,) torch.float32, (4,) torch.float32" in messages[5]


def check_all_optimizers() -> list[str]:
    mesh = ParallelMesh.build(ParallelConfig(pipeline=2))
    first = mesh.rank("pipeline") == 0

    def refused(make: Callable[[Stage], list[torch.optim.Optimizer]]) -> str:
        module = Stage(mesh)
        return refusal(check_optimizers, make(module), module, mesh)

    def groups(module: Stage, *, empty: bool) -> list[dict[str, Any]]:
        own = [{"params": list(module.blocks.parameters()), "lr": 0.1}]
        return own if first and not empty else [*own, {"params": [], "lr": torch.tensor(0.2)}]

    return [
        refused(lambda module: [AdamW(groups(module, empty=True))]),
        refused(lambda module: [AdamW(groups(module, empty=False))]),
        refused(lambda module: [AdamW(module.parameters(), lr=0.1 if first else 0.2)]),
        refused(lambda module: [SGD(module.parameters()) if first else AdamW(module.parameters())]),
        refused(lambda module: [SGD(module.parameters())] * (1 + first)),
        refused(lambda module: [LBFGS(module.parameters())]),
    ]


def test_stages_have_the_same_groups(ranks: RankPool) -> None:
    messages, other = ranks.run(2, check_all_optimizers)
    assert messages == other
    assert messages[0] == ""
    assert "AdamW of 2 groups on stage 1 of the pipeline, AdamW of 1 groups on stage 0" in messages[1]
    assert "lr=0.2 in group 0 of AdamW on stage 1 of the pipeline, lr=0.1 in group 0 of AdamW on stage 0" in messages[2]
    assert "AdamW of 1 groups on stage 1 of the pipeline, SGD of 1 groups on stage 0" in messages[3]
    assert "SGD of 1 groups, SGD of 1 groups on stage 0" in messages[4]
    assert "different experts and layers on each" in messages[5]


def check_data(config: ParallelConfig, batch: list[int], lengths: list[int]) -> tuple[str, str]:
    mesh = ParallelMesh.build(config)
    tensors: dict[str, Tensor] = {"tokens": torch.full((2, 3), batch[mesh.global_rank])}
    return (
        refusal(check_same_batch, ((tensors,), {}), mesh),
        refusal(check_evaluation_lengths, range(lengths[mesh.global_rank]), mesh),
    )


@pytest.mark.parametrize(
    ("config", "batch", "lengths", "ranks_refused", "lengths_refused"),
    [
        (ParallelConfig(pipeline=2), [1, 2, 1, 2], [3, 1, 3, 1], "", False),
        (ParallelConfig(pipeline=2), [1, 1, 1, 2], [3, 3, 3, 1], "[1, 3]", True),
        (ParallelConfig(pipeline=2, tensor=2), [1, 2, 1, 2], [2, 2, 2, 1], "[0, 1, 2, 3]", True),
        (ParallelConfig(expert=2), [1, 2, 3, 4], [0, 1, 2, 3], "", True),
    ],
    ids=str,
)
def test_ranks_of_a_pipeline_share_their_batches(
    ranks: RankPool,
    config: ParallelConfig,
    batch: list[int],
    lengths: list[int],
    ranks_refused: str,
    lengths_refused: bool,
) -> None:
    results = ranks.run(4, check_data, config, batch, lengths)
    assert len(set(results)) == 1  # nobody is left waiting
    about_batch, about_lengths = results[0]
    assert bool(about_batch) == bool(ranks_refused)
    if ranks_refused:
        assert f"different batches on ranks {ranks_refused}" in about_batch
        assert "axes pipeline, context and tensor" in about_batch
    assert bool(about_lengths) == lengths_refused
    assert str(lengths) in about_lengths or not lengths_refused


def told_sizes() -> list[str]:
    mesh = ParallelMesh.build(ParallelConfig(pipeline=2))
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_moe.strategy.sizes.rank_zero_info", told.append)
        report_sizes(Stage(mesh), mesh)
    return told


def test_the_whole_model_is_counted_once(ranks: RankPool) -> None:
    """Two layers of 12 and an embedding of 15 on both stages."""
    for (told,) in ranks.run(2, told_sizes):
        assert told.endswith("39 parameters in the whole model, 27 on this rank")
