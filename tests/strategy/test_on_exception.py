"""Checkpoints that are saved because of an exception: by all ranks together, or by none."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor

from lightning_moe.strategy import ranks as mesh_strategy
from lightning_moe.strategy.meeting import meet
from tests.distributed import RankFailure, RankPool
from tests.strategy.tiny import Recorder, TinyMoE, loader, trainer


class Fails(TinyMoE):
    """Raises at the fourth batch, on all ranks or on the last one only."""

    def __init__(self, everywhere: bool, broken: bool = True) -> None:
        super().__init__()
        self.everywhere, self.broken = everywhere, broken

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        last = self.trainer.global_rank == self.trainer.world_size - 1
        if self.broken and batch_idx == 3 and (self.everywhere or last):
            raise ValueError("no more")
        return super().training_step(batch, batch_idx)


def fit(folder: str, everywhere: bool, kind: str, asynchronous: bool = False) -> float:
    """Seconds until the exception came out."""
    mesh_strategy._PATIENCE = timedelta(seconds=2)
    callback: Any = (
        OnExceptionCheckpoint(folder, "stopped")
        if kind == "callback"
        else ModelCheckpoint(folder, filename="{step}", save_on_exception=True, every_n_epochs=100)
    )
    run = trainer(2, 2, callbacks=[callback], enable_checkpointing=True, precision="64-true")
    data = loader(64, 8, 2, run.global_rank, torch.float64)
    began = time.monotonic()
    try:
        run.fit(Fails(everywhere), data)
    except ValueError:
        return time.monotonic() - began
    raise AssertionError("no exception")


def resume(folder: str) -> tuple[list[float], list[float], int]:
    """Losses of a run without an exception, and of one that goes on where the other one stopped."""
    losses = []
    for path in (None, folder):
        recorder = Recorder()
        run = trainer(2, 2, callbacks=[recorder], max_epochs=1, precision="64-true")
        run.fit(Fails(True, broken=False), loader(64, 8, 2, run.global_rank, torch.float64), ckpt_path=path)
        losses.append(recorder.losses)
    return losses[0], losses[1], run.global_step


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["callback", pytest.param("checkpoint", marks=pytest.mark.slow)])
def test_all_ranks_stop_together(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    """The checkpoint is that of the last whole step, and the run goes on from it."""
    ranks.run(2, fit, str(tmp_path), True, kind, init_process_group=False)
    (path,) = tmp_path.iterdir()
    assert path.name == ("stopped.ckpt" if kind == "callback" else "step=3.ckpt")
    for whole, rest, step in ranks.run(2, resume, str(path), init_process_group=False):
        assert rest == whole[3:]
        assert step == 8


@pytest.mark.slow
def test_one_rank_stops_alone(ranks: RankPool, tmp_path: Path) -> None:
    """It does not wait for ranks that will not come, saves nothing, and shows its own exception."""
    with pytest.raises(RankFailure) as failure:
        ranks.run(2, fit, str(tmp_path), False, "callback", init_process_group=False)
    assert 1 not in failure.value.errors  # it has returned
    assert list(tmp_path.iterdir()) == []


def come(late: bool) -> tuple[bool, bool]:
    """Meet once together, and once with the last rank at another place."""
    rank, size = dist.get_rank(), dist.get_world_size()
    together = meet("here", rank, size, timedelta(seconds=20))
    elsewhere = "there" if late and rank == size - 1 else "here too"
    return together, meet(elsewhere, rank, size, timedelta(seconds=1))


@pytest.mark.slow
def test_ranks_meet_at_one_place_only(ranks: RankPool) -> None:
    assert ranks.run(3, come, False) == [(True, True)] * 3
    assert ranks.run(3, come, True) == [(True, False)] * 3
