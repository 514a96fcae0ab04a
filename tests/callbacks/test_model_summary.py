"""The summary of a model that is spread over ranks equals Lightning's of the whole model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.utilities.model_summary.model_summary import ModelSummary as Summary
from torch import nn

from lightning_moe import ParallelConfig, ParallelMesh, ShardSpec, set_shard_spec
from lightning_moe.callbacks.model_summary import ShardedModelSummary, WholeSummary, in_model_order
from lightning_moe.callbacks.throughput import ShardedThroughputMonitor
from lightning_moe.parallel.sharding import even_slice, set_tied
from lightning_moe.strategy.substitutes import substitute_callbacks
from tests.distributed import RankPool

BLOCKS = 12


class Block(nn.Module):
    def __init__(self, mesh: ParallelMesh) -> None:
        super().__init__()
        experts = even_slice(4, mesh, "expert")
        self.experts = nn.Parameter(torch.zeros(len(experts), 3, 5))
        set_shard_spec(self, "experts", ShardSpec("expert", 0, 4, tuple(experts)))
        self.norm = nn.LayerNorm(3).requires_grad_(False)
        self.twice = self.norm


class Network(nn.Module):
    """What one pipeline rank holds: two looped chunks, the embedding being the output projection too."""

    def __init__(self, mesh: ParallelMesh) -> None:
        super().__init__()
        stages, stage = mesh.size("pipeline"), mesh.rank("pipeline")
        if stage in (0, stages - 1):
            self.embedding = nn.Embedding(7, 3)
            if stages > 1:
                set_tied(self.embedding, "weight")
        run = BLOCKS // (2 * stages)
        self.blocks = nn.ModuleDict({str(i): Block(mesh) for i in range(BLOCKS) if i // run % stages == stage})
        if stage == stages - 1:
            self.final = nn.Linear(3, 3)


class Module(pl.LightningModule):
    def __init__(self, mesh: ParallelMesh) -> None:
        super().__init__()
        self.metric = nn.Identity()
        self.model = Network(mesh)
        self.model.blocks.eval()


def rows_of(summary: Summary) -> dict[str, Any]:
    return {
        "rows": [(name, values) for name, values in summary._get_summary_data() if name != "FLOPs"],
        "total": summary.total_parameters,
        "trainable": summary.trainable_parameters,
        "modes": summary.total_training_modes,
        "text": str(summary),
    }


def summarize(config: ParallelConfig, depths: tuple[int, ...]) -> list[dict[str, Any]]:
    mesh = ParallelMesh.build(config)
    return [rows_of(WholeSummary(Module(mesh), mesh, depth)) for depth in depths]


@pytest.mark.parametrize("config", [ParallelConfig(pipeline=2), ParallelConfig(expert=2)], ids=str)
def test_it_shows_the_whole_model(ranks: RankPool, config: ParallelConfig) -> None:
    depths = 1, 3, -1
    whole = [rows_of(Summary(Module(ParallelMesh.single()), depth)) for depth in depths]
    assert ranks.run(2, summarize, config, depths) == [whole, whole]
    assert whole[0]["total"] == 7 * 3 + BLOCKS * (4 * 3 * 5 + 6) + 12
    assert whole[0]["trainable"] == whole[0]["total"] - BLOCKS * 6


def test_modules_of_all_stages_come_in_the_order_of_the_model() -> None:
    first = ["net", "net.embed", "net.blocks", "net.blocks.0", "net.blocks.0.fc", "net.blocks.10", "loss"]
    second = ["net", "net.blocks", "net.blocks.2", "net.blocks.2.fc", "net.head", "loss", "net.embed"]
    assert in_model_order([first, second]) == [
        "net",
        "net.embed",
        "net.blocks",
        "net.blocks.0",
        "net.blocks.0.fc",
        "net.blocks.2",
        "net.blocks.2.fc",
        "net.blocks.10",
        "net.head",
        "loss",
    ]


class Own(callbacks.ModelSummary):
    """Somebody's own summary."""


def substituted(config: ParallelConfig, ranks: int) -> list[pl.Callback]:
    lightnings = [callbacks.ModelSummary(3), callbacks.Timer(), Own(), callbacks.ThroughputMonitor(len, window_size=7)]
    trainer: Any = SimpleNamespace(callbacks=lightnings)
    mesh = ParallelMesh(config.resolve(ranks), 0)
    substitute_callbacks(trainer, mesh)
    once = list(trainer.callbacks)
    substitute_callbacks(trainer, mesh)
    assert trainer.callbacks == once  # another fit finds them in place
    return once


def test_callbacks_are_substituted_where_a_rank_is_not_the_whole() -> None:
    summary, timer, own, monitor = substituted(ParallelConfig(pipeline=2), 4)
    assert isinstance(summary, ShardedModelSummary)
    assert summary._max_depth == 3
    assert isinstance(monitor, ShardedThroughputMonitor)
    assert (monitor.batch_size_fn, monitor.length_fn, monitor.kwargs) == (len, None, {"window_size": 7})
    assert (type(timer), type(own)) == (callbacks.Timer, Own)
    kinds = [type(callback) for callback in substituted(ParallelConfig(expert=2), 4)]
    assert kinds == [ShardedModelSummary, callbacks.Timer, Own, callbacks.ThroughputMonitor]
    kinds = [type(callback) for callback in substituted(ParallelConfig(context=2), 4)]
    assert kinds == [callbacks.ModelSummary, callbacks.Timer, Own, ShardedThroughputMonitor]
    kinds = [type(callback) for callback in substituted(ParallelConfig(), 4)]
    assert kinds == [callbacks.ModelSummary, callbacks.Timer, Own, callbacks.ThroughputMonitor]
