"""The logged expert load against counts that are taken another way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from lightning_moe import MoEConfig, MoELayer, ParallelConfig, ParallelMesh
from lightning_moe.callbacks import ExpertLoad
from tests.distributed import RankPool
from tests.strategy.tiny import TinyMoE, loader, trainer

Logged = list[tuple[int, dict[str, float]]]


class MemoryLogger(DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: Logged = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        load = {name: value for name, value in metrics.items() if name.startswith("expert_load/")}
        if load:
            assert step is not None
            self.logged.append((step, load))


class Counter(pl.Callback):
    """Counts choices from the layers' inputs and router weights, batch by batch."""

    def __init__(self) -> None:
        self.batches: list[list[Tensor]] = []

    def on_train_start(self, trainer: Any, module: pl.LightningModule) -> None:
        assert isinstance(module, TinyMoE)
        assert module.layers is not None
        for layer in module.layers:
            layer.register_forward_hook(self._count)

    def on_train_batch_start(self, trainer: Any, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append([])

    def _count(self, layer: Any, args: tuple[Tensor, ...], output: Any) -> None:
        if torch.is_grad_enabled():  # not in validation
            logits = args[0].detach().flatten(0, 1) @ layer.router.weight.detach().T
            chosen = logits.topk(layer.config.top_k).indices.flatten()
            self.batches[-1].append(torch.bincount(chosen, minlength=layer.config.num_experts))


def load_of(counts: Tensor) -> dict[str, float]:
    figures = {}
    for layer, row in enumerate(counts.double()):
        figures[f"expert_load/{layer}/busiest"] = float(row.max() / row.sum())
        figures[f"expert_load/{layer}/idlest"] = float(row.min() / row.sum())
        figures[f"expert_load/{layer}/imbalance"] = float(row.max() / row.mean())
    return figures


def logged_and_counted(world_size: int, expert: int, accumulate: int, every: int, steps: int) -> tuple[Logged, Logged]:
    counter, memory = Counter(), MemoryLogger()
    module = TinyMoE()
    run = trainer(
        world_size,
        expert,
        callbacks=[counter, ExpertLoad()],
        logger=memory,
        accumulate_grad_batches=accumulate,
        max_steps=steps,
        max_epochs=100,
        log_every_n_steps=every,
        val_check_interval=accumulate,
        num_sanity_val_steps=0,
    )
    batches = loader(8 * steps * accumulate, 8, world_size, run.global_rank)
    run.fit(module, batches, loader(8, 8, world_size, run.global_rank))
    window = accumulate * every
    counted: Logged = []
    for start in range(0, len(counter.batches) - window + 1, window):
        counts = torch.stack([torch.stack(layers) for layers in counter.batches[start : start + window]]).sum(0)
        if world_size > 1:
            dist.all_reduce(counts)
        counted.append((start // accumulate + every - 1, load_of(counts)))
    return memory.logged, counted


@pytest.mark.parametrize(("world_size", "expert"), [(1, 0), (1, 1), (2, 1), (2, 2)])
def test_figures_are_those_of_all_ranks_since_the_last_report(ranks: RankPool, world_size: int, expert: int) -> None:
    """Two micro-batches a step, a report every second step, validation in between, a step left over at the end."""
    results = ranks.run(world_size, logged_and_counted, world_size, expert, 2, 2, 5, init_process_group=False)
    logged, counted = results[0]
    assert [step for step, _ in logged] == [step for step, _ in counted] == [1, 3]
    for (_, figures), (_, expected) in zip(logged, counted, strict=True):
        assert figures == pytest.approx(expected, rel=1e-6)


def test_a_model_without_experts_is_left_alone(ranks: RankPool) -> None:
    assert ranks.run(1, _dense_run, init_process_group=False) == [[]]


def _dense_run() -> Logged:
    memory = MemoryLogger()
    module = BoringModel()
    trainer(1, 0, callbacks=[ExpertLoad()], logger=memory, log_every_n_steps=1, max_steps=2).fit(module)
    return memory.logged


def _on_stages(blocks: list[list[int]]) -> dict[str, float]:
    """What is logged by a rank that holds some blocks; block ``n`` sends n + 1 tokens to one expert, 1 to another."""
    mesh = ParallelMesh.build(ParallelConfig(pipeline=2, data=1))
    module = BoringModel()
    module.blocks = nn.ModuleDict()
    for number in blocks[mesh.rank("pipeline")]:
        layer = MoELayer(4, MoEConfig(num_experts=4, top_k=1, expert_hidden_size=4, load_balancing="none"), mesh)
        nn.init.zeros_(layer.router.weight)
        layer.router.weight.data[number % 4] = 1.0
        module.blocks[str(number)] = layer
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(mesh=mesh), global_step=0, log_every_n_steps=1)
    logged: dict[str, float] = {}
    module.log_dict = lambda values: logged.update({name: float(value) for name, value in values.items()})
    callback = ExpertLoad()
    callback.on_train_start(trainer, module)
    for number, layer in module.blocks.items():
        layer(torch.ones(int(number) + 1, 4))
        layer(-torch.ones(1, 4))
    trainer.global_step = 1
    callback.on_train_batch_end(trainer, module, None, None, 0)
    return logged


def test_layers_of_all_stages_are_logged_in_the_order_of_the_model(ranks: RankPool) -> None:
    """The first rank holds blocks on both sides of the other's, whose numbers are no alphabetical order."""
    found = ranks.run(2, _on_stages, [[0, 10], [2, 9]])
    assert found[0] == found[1]
    busiest = [found[0][f"expert_load/{layer}/busiest"] for layer in range(4)]
    assert busiest == pytest.approx([1 / 2, 3 / 4, 10 / 11, 11 / 12])
    assert len(found[0]) == 4 * 3
