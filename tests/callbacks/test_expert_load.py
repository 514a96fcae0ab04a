"""The logged expert load against counts that are taken another way."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

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
