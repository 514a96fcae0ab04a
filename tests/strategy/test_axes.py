"""Modules that know nothing of the axes context, tensor and expert_tensor train on them as on one process."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_moe import ConfigError, ParallelConfig, ParallelMesh
from lightning_moe.layers import ColumnParallelLinear
from tests.distributed import RankFailure, RankPool
from tests.strategy.tiny import WIDTH, Run, Sequences, TinyMoE, check_equal, train, trainer

SETTINGS: dict[str, Any] = {
    "dtype": torch.float64,
    "steps": 4,
    "accumulate": 2,
    "gradient_clip_val": 0.05,
    "model": {"z_loss_coefficient": 0.01, "auxiliary_loss_coefficient": 0.1, "expert_bias": True},
}
AXES = [
    (2, ParallelConfig(tensor=2)),
    (2, ParallelConfig(tensor=2, expert=2)),
    (2, ParallelConfig(context=2, expert=2)),
    (2, ParallelConfig(expert_tensor=2)),
    (4, ParallelConfig(tensor=2, expert=2, expert_tensor=2)),
    (4, ParallelConfig(context=2, tensor=2, expert=4)),
    (4, ParallelConfig(expert=2, expert_tensor=2)),
]


def train_on(world_size: int, parallel: ParallelConfig) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(world_size, 0, parallel=parallel, **SETTINGS)


@pytest.fixture(scope="module")
def one_process(ranks: RankPool) -> Run:
    """Under the strategy, which updates the expert bias; that one rank equals no strategy is tested elsewhere."""
    run: Run = ranks.run(1, train_on, 1, ParallelConfig(), init_process_group=False)[0]
    assert min(run.gradient_norms()) > SETTINGS["gradient_clip_val"]
    return run


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "parallel"), AXES, ids=str)
def test_equals_one_process(ranks: RankPool, one_process: Run, world_size: int, parallel: ParallelConfig) -> None:
    """Losses, clipped steps and weights; the dense layers do the same work on all ranks that share a batch."""
    run = ranks.run(world_size, train_on, world_size, parallel, init_process_group=False)[0]
    check_equal(run, one_process, 1e-11)


def fit_shuffled(seeded: bool) -> None:
    """Without Lightning's sampler, ranks shuffle by their own seeds."""
    run = trainer(2, 0, ParallelConfig(tensor=2), max_steps=1, use_distributed_sampler=False)
    generator = torch.Generator().manual_seed(0 if seeded else run.global_rank)
    run.fit(TinyMoE(), DataLoader(Sequences(32), batch_size=4, shuffle=True, generator=generator))


@pytest.mark.slow
def test_ranks_that_share_samples_must_draw_the_same(ranks: RankPool) -> None:
    with pytest.raises(RankFailure) as caught:
        ranks.run(2, fit_shuffled, False, init_process_group=False)
    assert all(isinstance(error, ConfigError) for error in caught.value.errors.values())
    assert "train_dataloader" in str(caught.value)
    ranks.run(2, fit_shuffled, True, init_process_group=False)


class SplitInInit(TinyMoE):
    """Has a split layer before there is a mesh, as after ``load_from_checkpoint``: all of it on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.split = ColumnParallelLinear(WIDTH, WIDTH, ParallelMesh.single())


def fit_split_in_init(parallel: ParallelConfig) -> None:
    run = trainer(2, 0, parallel, max_steps=1)
    run.fit(SplitInInit(), DataLoader(Sequences(32), batch_size=4))


def test_split_layers_that_every_rank_holds_whole_are_refused(ranks: RankPool) -> None:
    """They would count once for each rank in the gradient norm."""
    ranks.run(2, fit_split_in_init, ParallelConfig(expert=2), init_process_group=False)
    with pytest.raises(RankFailure, match=r"split\.weight.*configure_model") as caught:
        ranks.run(2, fit_split_in_init, ParallelConfig(tensor=2), init_process_group=False)
    assert all(isinstance(error, ConfigError) for error in caught.value.errors.values())


def fit_and_catch_warnings() -> list[str]:
    run = trainer(2, 0, ParallelConfig(tensor=2), max_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(TinyMoE(), DataLoader(Sequences(32), batch_size=4))
    return [str(warning.message) for warning in caught]


def test_a_module_that_is_not_split_over_tensor_is_told_so(ranks: RankPool) -> None:
    messages = ranks.run(2, fit_and_catch_warnings, init_process_group=False)[0]
    assert any("no parameter of TinyMoE is split over it" in message for message in messages)
