"""A run that was interrupted goes on bit by bit as the one that was not: dropout, shuffling, augmentation, schedule."""

from __future__ import annotations

import io
import random
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_moe import ParallelConfig, ParallelMesh
from lightning_moe.parallel.rng import AxisRng, capture_generators
from lightning_moe.strategy.resume import RANK_STATES, ExactResume, gather
from tests.distributed import RankPool
from tests.strategy.resuming import Noisy, Step, every_step, fit, shuffled

STEPS, EPOCH, AHEAD = 20, 6, 3
TOPOLOGIES = [
    (1, ParallelConfig(), "bf16-mixed"),
    (2, ParallelConfig(expert=2), "32-true"),
    (4, ParallelConfig(tensor=2, expert=2), "bf16-mixed"),
]


def random_steps(seed: int) -> list[int]:
    """Five steps within epochs."""
    within = [step for step in range(1, STEPS - AHEAD + 1) if step % EPOCH]
    return sorted(random.Random(seed).sample(within, 5))


def interrupt(world_size: int, parallel: ParallelConfig, precision: str, folder: str) -> list[Step]:
    """Train once with a checkpoint at every step, and go on from five of them, on every rank."""
    data_ranks = world_size // parallel.tensor
    run = partial(
        fit,
        partial(shuffled, 4 * EPOCH * data_ranks),
        world_size=world_size,
        parallel=parallel,
        precision=precision,
        background=world_size == 2,  # where the states of ranks are gathered on another thread, later
    )
    whole = run(1, callbacks=[every_step(folder)], max_steps=STEPS)
    for step in random_steps(world_size):
        path = Path(folder, f"step={step}.ckpt")
        resumed = run(100 + step, resume=path, max_steps=step + AHEAD)
        assert resumed == whole[step : step + AHEAD], f"after step {step}"
    return whole


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "parallel", "precision"), TOPOLOGIES, ids=str)
def test_the_next_three_losses_are_those_of_the_run_that_was_not_interrupted(
    ranks: RankPool, tmp_path: Path, world_size: int, parallel: ParallelConfig, precision: str
) -> None:
    runs = ranks.run(world_size, interrupt, world_size, parallel, precision, str(tmp_path), init_process_group=False)
    for steps in runs:
        assert len({loss for loss, *_ in steps}) == STEPS
        assert len({numbers for _, numbers, *_ in steps}) == STEPS
    # Each data rank has samples of its own.
    assert len({steps[0][1] for steps in runs}) == world_size // parallel.tensor


def validated_and_not(folder: str) -> None:
    def validation() -> DataLoader[Any]:
        return DataLoader(Noisy(8), batch_size=4)

    plain = fit(shuffled, 1, max_steps=8)
    assert fit(shuffled, 1, max_steps=8, val=validation, val_check_interval=2) == plain
    saved = every_step(folder)
    fit(shuffled, 1, max_steps=8, val=validation, val_check_interval=2, callbacks=[saved])
    assert fit(shuffled, 99, max_steps=8, resume=Path(folder, "step=4.ckpt")) == plain[4:]


@pytest.mark.slow
def test_validation_does_not_change_what_training_draws(ranks: RankPool, tmp_path: Path) -> None:
    """However often it runs, also when the run that resumes does not validate any more."""
    ranks.run(1, validated_and_not, str(tmp_path), init_process_group=False)


# --- what is kept


def test_states_of_all_ranks_are_gathered_on_another_thread(ranks: RankPool) -> None:
    first, second = ranks.run(2, gather_in_background)
    assert first == second == {RANK_STATES: {"sizes": {"data": 2}, "ranks": [{"seen": [0]}, {"seen": [1]}]}}


def gather_in_background() -> Any:
    group = dist.new_group(backend="gloo")
    found: list[Any] = []
    state = {"sizes": {"data": 2}, "seen": [dist.get_rank()]}
    thread = threading.Thread(target=lambda: found.append(gather(state, group)))
    thread.start()
    busy = torch.ones(100)
    for _ in range(10):  # training goes on communicating
        dist.all_reduce(busy)
    thread.join()
    return found[0]


def test_one_process_gathers_by_itself() -> None:
    assert gather(None, None) == {}
    assert gather({"sizes": {}, "seen": 1}, None) == {RANK_STATES: {"sizes": {}, "ranks": [{"seen": 1}]}}


def plain_checkpoint() -> dict[str, Any]:
    counts = {"ready": 1, "started": 1, "processed": 1, "completed": 1}
    batches = {"total": dict(counts), "current": dict(counts), "is_last_batch": True}
    epochs = {"total": dict(counts), "current": dict(counts)}
    return {"loops": {"fit_loop": {"state_dict": {}, "epoch_progress": epochs, "epoch_loop.batch_progress": batches}}}


def trainer_between_epochs() -> Any:
    """The little of a trainer without loaders that is asked when training starts."""
    batches = SimpleNamespace(ready=1, processed=1, completed=1)
    progress = SimpleNamespace(
        current=batches, is_last_batch=True, state_dict=lambda: {"current": vars(batches), "is_last_batch": True}
    )
    fit_loop = SimpleNamespace(
        _combined_loader=None,
        _data_fetcher=None,
        epoch_progress=SimpleNamespace(current=SimpleNamespace(started=1, processed=1)),
        epoch_loop=SimpleNamespace(batch_progress=progress, restarting=True),
    )
    return SimpleNamespace(fit_loop=fit_loop, strategy=SimpleNamespace(root_device=torch.device("cpu")))


def draw(rng: AxisRng) -> list[float]:
    with rng.fork("replicated"):
        inside = torch.rand(3).tolist()
    return inside + torch.rand(3).tolist()


@pytest.mark.parametrize("kept", ["this mesh", "another mesh", "none"])
def test_random_states_are_those_of_the_same_rank_of_the_same_mesh(kept: str) -> None:
    """Elsewhere the run begins with those that it has by itself: other ranks would draw alike."""
    mesh = ParallelMesh(ParallelConfig(tensor=2).resolve(2), global_rank=1)
    states = []
    for rank in (0, 1):
        torch.manual_seed(rank)
        state = {"generators": capture_generators(), "streams": AxisRng(mesh, rank).state_dict()}
        states.append({**state, "loaders": [], "seeds": [], "held_batch": None})
    torch.manual_seed(1)
    of_the_checkpoint = draw(AxisRng(mesh, 1))
    torch.manual_seed(7)
    of_the_process = draw(AxisRng(mesh, 7))

    sizes = {"pipeline": 1, "data": 1, "context": 1, "tensor": 2, "expert": 1, "expert_tensor": 1}
    if kept == "another mesh":
        sizes |= {"data": 2}
    checkpoint = plain_checkpoint()
    if kept != "none":
        buffer = io.BytesIO()
        torch.save({"sizes": sizes, "ranks": states}, buffer)
        buffer.seek(0)
        checkpoint[RANK_STATES] = torch.load(buffer, weights_only=True)
    resume, rng = ExactResume(), AxisRng(mesh, 7)
    resume.take(checkpoint, mesh)
    torch.manual_seed(7)
    resume.start_training(trainer_between_epochs(), rng)
    assert draw(rng) == (of_the_checkpoint if kept == "this mesh" else of_the_process)
    assert RANK_STATES not in checkpoint
