"""ChronosMoE under MoEStrategy equals ChronosMoE in a single process on the same global batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moe.config import MoEConfig, OptimizerConfig, ParallelConfig
from lightning_moe.errors import ConfigError
from lightning_moe.models.chronos_moe import ChronosMoE
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.state import gather_full_state_dict
from lightning_moe.strategy import MoEStrategy
from tests.distributed import RankFailure, RankPool
from tests.models.chronos_moe.configs import batch_of, small_config

STEPS = 4


class _Data(pl.LightningDataModule):
    """Global batches of 12 rows with unevenly many valid points; each data rank takes its rows."""

    dataset_names = ("a", "b")

    def _rows(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self.trainer is not None
        mesh = getattr(self.trainer.strategy, "mesh", None) or ParallelMesh.single()
        size = 12 // mesh.size("data")
        return {key: value[mesh.rank("data") * size :][:size] for key, value in batch.items()}

    def train_dataloader(self) -> DataLoader[Any]:
        batches = [batch_of(12, seed=seed, dtype=torch.float64) for seed in range(STEPS)]
        for batch in batches:
            batch["target"][:4, 1:] = torch.nan
        return DataLoader([self._rows(batch) for batch in batches], batch_size=None)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        mesh = getattr(self.trainer.strategy, "mesh", None) or ParallelMesh.single()
        batches = [batch_of(5, seed=seed, dtype=torch.float64) for seed in range(7)]
        return DataLoader(batches[mesh.rank("data") :: mesh.size("data")], batch_size=None)  # type: ignore[arg-type]


def _train(
    directory: str, expert: int, moe: MoEConfig | None
) -> tuple[dict[str, Tensor], dict[str, float], Tensor | None]:
    """Train some steps, then test; returns the whole weights (rank 0), the scores and the expert load."""
    torch.manual_seed(0)
    module = ChronosMoE(small_config(moe=moe), OptimizerConfig(warmup_steps=2))
    trainer = pl.Trainer(
        strategy=MoEStrategy(ParallelConfig(expert=expert)) if expert else "auto",
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        precision="64-true",
        max_epochs=1,
        gradient_clip_val=0.1,
        accumulate_grad_batches=2,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=directory,
    )
    data = _Data()
    trainer.fit(module, datamodule=data)
    mesh = getattr(trainer.strategy, "mesh", None) or ParallelMesh.single()
    weights = gather_full_state_dict(module.network(), mesh)
    (scores,) = trainer.test(module, datamodule=data, verbose=False)
    return weights, dict(scores), None if module.expert_load is None else module.expert_load.compute()


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(num_experts=4, expert_hidden_size=8, shared_expert_hidden_size=8, auxiliary_loss_coefficient=0.1),
        None,
    ],
    ids=["moe", "dense"],
)
def test_training_and_scores_equal_a_single_process(tmp_path: Path, ranks: RankPool, moe: MoEConfig | None) -> None:
    (single,) = ranks.run(1, _train, str(tmp_path), 0, moe, init_process_group=False)
    weights, scores, load = single
    results = ranks.run(2, _train, str(tmp_path), 2 if moe else 1, moe, init_process_group=False)
    assert results[0][0].keys() == weights.keys()
    for name, expected in weights.items():
        torch.testing.assert_close(results[0][0][name], expected, rtol=1e-11, atol=1e-12, msg=name)
    for _, rank_scores, rank_load in results:
        assert rank_scores == pytest.approx(scores, rel=1e-6)
        assert (load is None and rank_load is None) or torch.equal(rank_load, load)


def _fit_on(parallel: ParallelConfig) -> None:
    trainer = pl.Trainer(
        strategy=MoEStrategy(parallel), accelerator="cpu", devices=2, max_steps=1, logger=False, barebones=True
    )
    trainer.fit(ChronosMoE(small_config()), datamodule=_Data())


@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_refuses_axes_that_would_split_its_layers(ranks: RankPool, axis: str) -> None:
    with pytest.raises(RankFailure) as raised:
        ranks.run(2, _fit_on, ParallelConfig(**{axis: 2}), init_process_group=False)
    for error in raised.value.errors.values():
        assert isinstance(error, ConfigError)
        assert error.field == f"parallel.{axis}"
        assert "not split" in error.hint
