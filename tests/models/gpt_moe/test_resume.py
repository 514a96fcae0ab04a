"""A checkpoint of one topology resumes on another, with weights and optimizer states cut in two dims."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moe import OptimizerConfig, ParallelConfig
from tests.distributed import RankPool
from tests.models.gpt_moe.training import (
    CONFIGS,
    LocalRecorder,
    LocalRun,
    SeededGPTMoE,
    assemble,
    loader,
    local_run,
)
from tests.strategy.tiny import check_equal, check_losses, trainer


def fit(world_size: int, parallel: ParallelConfig | None, folder: str, resume: str | None) -> LocalRun:
    """Four steps with a checkpoint after two, or the last two of them."""
    recorder = LocalRecorder()
    checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    run = trainer(
        world_size,
        0,
        parallel,
        callbacks=[recorder, checkpoints],
        enable_checkpointing=True,
        max_steps=4,
        max_epochs=9,
        limit_train_batches=2,  # a plain DataLoader starts an epoch over on resume, so the checkpoint lies between two
        precision="64-true",
    )
    module = SeededGPTMoE(CONFIGS["untied"], OptimizerConfig(learning_rate=1e-2, warmup_steps=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, loader(run.distributed_sampler_kwargs, documents=True), ckpt_path=resume)
    return local_run(recorder, module)


@pytest.mark.slow
def test_resume_on_another_topology(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ParallelConfig(tensor=2, expert_tensor=2), ParallelConfig(context=2, expert=2)
    whole = assemble(ranks.run(1, fit, 1, None, str(tmp_path / "one"), None, init_process_group=False))
    saved = assemble(ranks.run(2, fit, 2, first, str(tmp_path / "first"), None, init_process_group=False))
    check_equal(saved, whole, 1e-11)
    resume = str(tmp_path / "first" / "step=2.ckpt")
    rest = assemble(ranks.run(2, fit, 2, second, str(tmp_path / "second"), resume, init_process_group=False))
    check_losses(rest.losses, whole.losses[2:], 1e-11)
    rest.losses, rest.grads = whole.losses, whole.grads[:2] + rest.grads
    check_equal(rest, whole, 1e-11)
