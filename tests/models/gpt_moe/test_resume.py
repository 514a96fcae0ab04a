"""A checkpoint of one topology resumes on another, with weights and optimizer states cut in two dims."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moe import GPTMoE, OptimizerConfig, ParallelConfig
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


def fit_built_before(world_size: int, parallel: ParallelConfig | None) -> LocalRun:
    """Two clipped steps of a network that was built outside of the Trainer, with a frozen embedding."""
    module = GPTMoE(CONFIGS["untied"], OptimizerConfig(learning_rate=1e-2, warmup_steps=0))
    torch.manual_seed(11)
    module.network().embedding.requires_grad_(False)
    recorder = LocalRecorder()
    settings = {"max_steps": 2, "precision": "64-true", "gradient_clip_val": 0.05}
    run = trainer(world_size, 0, parallel, callbacks=[recorder], **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, loader(run.distributed_sampler_kwargs, documents=True))
    assert module.network().mesh.world_size == world_size
    return local_run(recorder, module)


def test_a_network_that_was_built_whole_is_split(ranks: RankPool) -> None:
    """As after ``load_from_checkpoint``. Left whole, each tensor rank would count all of it in the gradient norm."""
    expected = assemble(ranks.run(1, fit_built_before, 1, None, init_process_group=False))
    assert expected.grads[0]["model.embedding.weight"] is None
    parallel = ParallelConfig(tensor=2, expert=2)
    local = ranks.run(2, fit_built_before, 2, parallel, init_process_group=False)
    assert len(local[0].weights["model.embedding.weight"]) < len(expected.weights["model.embedding.weight"])
    check_equal(assemble(local), expected, 1e-11)
