"""When checkpoints are on disk, and of which moment they are, where they are written beside training."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lightning_moe import MoEStrategy, ParallelConfig
from lightning_moe.checkpoint import store
from lightning_moe.errors import CheckpointError
from lightning_moe.strategy.checkpoints import RunCheckpoints, local_path
from tests.distributed import RankPool
from tests.strategy.test_overlap import Watched
from tests.strategy.tiny import TinyMoE, loader, trainer


class Held:
    """Plain values that arrive late: what is written waits for them."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, group: Any) -> dict[str, Any]:
        assert self.event.wait(60)
        return {}


def none_late(group: Any) -> dict[str, Any]:
    return {}


@contextmanager
def in_background() -> Iterator[RunCheckpoints]:
    checkpoints = RunCheckpoints(background=True)
    checkpoints.start()
    yield checkpoints
    checkpoints.finish()


def test_a_checkpoint_is_of_the_moment_of_saving(tmp_path: Path) -> None:
    """And the one that it replaces stays until it is there."""
    weight, meta = torch.zeros(3), {"callbacks": {"seen": [1], "mean": np.zeros(2)}}
    held = Held()
    with in_background() as checkpoints:
        checkpoints.save(tmp_path / "old", {"model": {"weight": weight}}, {}, none_late, 1)
        checkpoints.save(tmp_path / "new", {"model": {"weight": weight}}, meta, held, 2)
        checkpoints.remove(tmp_path / "old")
        weight.fill_(7)
        meta["callbacks"]["seen"].append(2)  # type: ignore[union-attr]
        meta["callbacks"]["mean"] += 1  # type: ignore[operator]
        assert checkpoints.unfinished
        assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]
        held.event.set()
        checkpoints.wait()
        assert not checkpoints.unfinished
        assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
        read = {"model": {"weight": torch.ones(3)}}
        opened = checkpoints.open(tmp_path / "new")
        opened.read(read)
        assert torch.equal(read["model"]["weight"], torch.zeros(3))
        plain = opened.meta(weights_only=False)["callbacks"]
        assert plain["seen"] == [1]
        assert plain["mean"].tolist() == [0, 0]


def test_an_error_is_raised_by_the_next_call_and_what_was_to_be_replaced_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with in_background() as checkpoints:
        checkpoints.save(tmp_path / "old", {}, {}, none_late, 1)
        checkpoints.save(tmp_path / "file" / "new", {}, {}, none_late, 2)
        checkpoints.remove(tmp_path / "old")
        with pytest.raises(CheckpointError, match="could not write it"):
            checkpoints.save(tmp_path / "newer", {}, {}, none_late, 3)
        checkpoints.wait()  # it is raised once
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "old"]


def test_nothing_is_left_to_the_background_when_the_run_is_over(tmp_path: Path) -> None:
    """The process may end at once, and the memory of the copies is free."""
    checkpoints = RunCheckpoints(background=True)
    checkpoints.start()
    state = {"model": {"weight": torch.zeros(3)}}
    checkpoints.save(tmp_path / "1", state, {}, none_late, 1)
    checkpoints.save(tmp_path / "2", state, {}, none_late, 1, at_once=True)
    assert store.is_checkpoint(tmp_path / "2")
    assert checkpoints._host._buffers
    checkpoints.finish()
    checkpoints.save(tmp_path / "3", state, {}, none_late, 1)
    assert store.is_checkpoint(tmp_path / "3")
    assert not checkpoints._host._buffers


def test_paths_do_not_follow_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = local_path("a.ckpt/")
    monkeypatch.chdir("/")
    assert path == tmp_path / "a.ckpt"


class FollowsLink(pl.Callback):
    """Notes whether ``last.ckpt`` leads anywhere when Lightning has made it."""

    def __init__(self, folder: str) -> None:
        self.link, self.leads = Path(folder) / "last.ckpt", []  # type: ignore[var-annotated]

    def on_train_batch_start(self, *args: Any) -> None:
        if self.link.is_symlink():
            self.leads.append(store.is_checkpoint(self.link))


def fit_and_save(folder: str) -> tuple[list[bool], bool, bool, int]:
    """With a link in a folder that is not there yet; then save what is not a part of the run any more."""
    linked = FollowsLink(folder)
    saving = ModelCheckpoint(folder, every_n_train_steps=1, save_last="link")
    run = trainer(
        2,
        0,
        strategy=MoEStrategy(ParallelConfig(), async_checkpoint=True),
        callbacks=[saving, linked],
        enable_checkpointing=True,
    )
    run.fit(TinyMoE(), loader(24, 8, 2, run.global_rank))
    run.save_checkpoint(f"{folder}/after.ckpt")
    strategy: Any = run.strategy
    return (
        linked.leads,
        store.is_checkpoint(Path(folder) / "after.ckpt"),
        strategy._checkpoints.unfinished,
        run.global_step,
    )


def test_links_lead_to_checkpoints_and_fit_leaves_nothing_under_way(ranks: RankPool, tmp_path: Path) -> None:
    """A link to what a killed writer has not finished would make ``ckpt_path="last"`` begin anew."""
    for result in ranks.run(2, fit_and_save, str(tmp_path / "new"), init_process_group=False):
        assert result == ([True, True], True, False, 3)


def save_every_step(folder: str) -> list[tuple[int, int]]:
    """How many gathers are under way when the weights are asked for, and when they are handed over."""
    run = trainer(
        2,
        0,
        strategy=MoEStrategy(ParallelConfig(), bucket_megabytes=0.002),
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1)],
        enable_checkpointing=True,
        max_steps=3,
    )
    strategy: Any = run.strategy
    original, seen = strategy.lightning_module_state_dict, []

    def pending() -> int:
        return sum(weights.gather is not None for weights in strategy._mains._weights)

    def watched() -> dict[str, Any]:
        before = pending()
        state: dict[str, Any] = original()
        seen.append((before, pending()))
        return state

    strategy.lightning_module_state_dict = watched
    run.fit(Watched(), loader(32, 8, 2, run.global_rank))
    return seen


def test_weights_have_arrived_when_they_are_saved(ranks: RankPool, tmp_path: Path) -> None:
    for seen in ranks.run(2, save_every_step, str(tmp_path), init_process_group=False):
        assert len(seen) == 3
        assert seen[0][0] > 0
        assert [after for _, after in seen] == [0, 0, 0]


def average(folder: str, resume: str | None) -> dict[str, torch.Tensor]:
    """The average at the end of a run in low precision; Lightning keeps it in float32."""
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    run = trainer(
        2, 2, callbacks=[saving, EMAWeightAveraging(decay=0.9)], enable_checkpointing=True, precision="bf16-true"
    )
    module = TinyMoE()
    run.fit(module, loader(32, 8, 2, run.global_rank, torch.bfloat16), ckpt_path=resume)
    return {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.mark.slow
def test_a_weight_average_keeps_its_digits(ranks: RankPool, tmp_path: Path) -> None:
    whole = ranks.run(2, average, str(tmp_path / "a"), None, init_process_group=False)
    resumed = ranks.run(2, average, str(tmp_path / "b"), str(tmp_path / "a" / "step=2.ckpt"), init_process_group=False)
    for expected, value in zip(whole, resumed, strict=True):
        for name in expected:
            assert torch.equal(value[name], expected[name]), name
