"""Chronos-MoE trained, scored and asked for forecasts through pipelines gives, bit for bit, what one stage gives."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from lightning_moe.config import MoEConfig, OptimizerConfig
from lightning_moe.models.chronos_moe import ChronosMoE
from tests.distributed import RankPool
from tests.models.chronos_moe.configs import batch_of, contexts, small_config
from tests.models.staged import Staged, StageRecorder, StageRun, check_stages

MOE = MoEConfig(
    num_experts=4,
    expert_hidden_size=8,
    shared_expert_hidden_size=8,
    auxiliary_loss_coefficient=0.1,
    z_loss_coefficient=0.01,
    expert_bias=True,
    expert_bias_update_rate=0.01,
)
BATCH = 10
ROWS = (5, 3, 4, 1)
"""Of the batches of evaluation; no multiple of the number of microbatches, and fewer."""


@dataclass(frozen=True)
class Case:
    """A model, how it is spread, and where its weights go in the end."""

    moe: MoEConfig | None = MOE
    staged: Staged = field(default_factory=Staged)
    num_layers: int = 4
    folder: Path | None = None


class Data(pl.LightningDataModule):
    """Batches of unevenly many valid points; each data rank takes its rows, or in evaluation every other batch."""

    dataset_names = ("a", "b")

    def _shard(self) -> tuple[int, int]:
        assert self.trainer is not None
        shard = self.trainer.distributed_sampler_kwargs
        assert shard is not None
        return shard["rank"], shard["num_replicas"]

    def train_dataloader(self) -> DataLoader[Any]:
        rank, replicas = self._shard()
        batches = [batch_of(BATCH, seed=seed) for seed in range(3)]
        for batch in batches:
            batch["target"][:4, 1:] = torch.nan
        rows = slice(rank * BATCH // replicas, (rank + 1) * BATCH // replicas)
        return DataLoader([{key: value[rows] for key, value in batch.items()} for batch in batches], batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        rank, replicas = self._shard()
        batches = [batch_of(rows, seed=seed) for seed, rows in enumerate(ROWS)]
        # The first data rank has three batches, the second one.
        own = batches if replicas == 1 else (batches[:3], batches[3:])[rank]
        return DataLoader(own, batch_size=None)  # type: ignore[arg-type]

    test_dataloader = predict_dataloader = val_dataloader


def train(case: Case) -> StageRun:
    """Train on this rank; then test, predict, forecast further than the horizon, and save."""
    recorder, data = StageRecorder(), Data()
    trainer = case.staged.trainer(recorder, max_epochs=1, use_distributed_sampler=False)
    torch.manual_seed(0)
    module = ChronosMoE(
        small_config(num_layers=case.num_layers, moe=case.moe), OptimizerConfig(learning_rate=1e-2, warmup_steps=1)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, datamodule=data)
        recorder.logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})
        (scores,) = trainer.test(module, datamodule=data, verbose=False)
        recorder.logged.append(dict(scores))
        predictions = trainer.predict(module, datamodule=data)
        forecast = module.predict(contexts(5), 12, batch_size=2)
    assert predictions is not None
    found = {"predictions": torch.cat(predictions), "forecast": forecast}  # type: ignore[arg-type]
    if module.expert_load is not None:
        found["expert load"] = module.expert_load.compute()
    if case.folder is not None:
        module.save_pretrained(case.folder)
        found |= load_file(case.folder / "model.safetensors")
    return recorder.run(module, **found)


def train_all(cases: list[Case]) -> list[StageRun]:
    """One after the other in the same processes."""
    return [train(case) for case in cases]


def check(ranks: RankPool, world_size: int, pipeline: int, cases: list[Case], *schedules: str) -> None:
    """Each case by each schedule is the case on one stage."""
    references = ranks.run(world_size // pipeline, train_all, cases, init_process_group=False)
    staged = [
        replace(case, staged=replace(case.staged, schedule=schedule, pipeline=pipeline))
        for case in cases
        for schedule in schedules
    ]
    runs = ranks.run(world_size, train_all, staged, init_process_group=False, timeout=300)
    for i, case in enumerate(staged):
        check_stages([run[i] for run in runs], [run[i // len(schedules)] for run in references], case)


@pytest.mark.slow
def test_two_stages(ranks: RankPool, tmp_path: Path) -> None:
    check(ranks, 2, 2, [Case(num_layers=2, folder=tmp_path)], "zb-h1")


@pytest.mark.slow
def test_schedules(ranks: RankPool) -> None:
    check(ranks, 2, 2, [Case()], "1f1b", "zb-v")
    check(ranks, 2, 2, [Case(None)], "zb-h1")
    check(ranks, 4, 4, [Case(num_layers=8)], "interleaved-1f1b", "zb-h2")


@pytest.mark.slow
def test_with_experts_spread_over_data_ranks(ranks: RankPool, tmp_path: Path) -> None:
    """In evaluation they have three batches and one."""
    staged = Staged(axes={"expert": 2}, settings={"accumulate_grad_batches": 2})
    check(ranks, 4, 2, [Case(staged=staged, folder=tmp_path)], "zb-h1", "zb-v")


@pytest.mark.slow
def test_microbatches_add_up_to_the_batch(ranks: RankPool) -> None:
    """The reference of the other tests against steps in one piece, in float64."""
    moe = replace(MOE, load_balancing="sequence", z_loss_coefficient=0.0)
    whole = Staged(None, settings={"precision": "64-true"})
    cases = [Case(moe, each) for each in (whole, replace(whole, schedule="1f1b"))]
    one, cut = ranks.run(1, train_all, cases, init_process_group=False)[0]
    check_stages([cut], [one], "microbatches", tolerance=1e-11)
