"""The worker pool itself: what it promises to every test that runs on several ranks."""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_moe.errors import ConfigError
from tests.distributed import MAX_WORLD_SIZE, RankFailure, RankPool


def place() -> tuple[int, int, str, str]:
    return dist.get_rank(), dist.get_world_size(), os.environ["RANK"], os.environ["LOCAL_WORLD_SIZE"]


def scaled_sum(values: torch.Tensor, *, factor: float) -> torch.Tensor:
    result = values * factor * (dist.get_rank() + 1)
    dist.all_reduce(result)
    return result


def process_id() -> int:
    return os.getpid()


def refuse_on(rank: int) -> int:
    if int(os.environ["RANK"]) == rank:
        raise ConfigError("parallel.expert", 3, "a divisor of 8", "try 4")
    return rank


def refuse_then_wait_on(rank: int) -> None:
    refuse_on(rank)
    time.sleep(600)


def refuse_everywhere() -> None:
    raise ConfigError("parallel.expert", dist.get_rank(), "a divisor of 8")


class UnpicklableError(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def raise_unpicklable() -> None:
    raise UnpicklableError(1, 2)


def die_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)


def dirty_state() -> None:
    os.environ["LEFT_BEHIND"] = "1"
    os.environ.pop("PATH", None)
    os.chdir("/")
    random.random()
    np.random.rand()
    torch.rand(())
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)


def observed_state() -> dict[str, object]:
    return {
        "left behind": "LEFT_BEHIND" in os.environ,
        "path": "PATH" in os.environ,
        "directory": os.getcwd(),
        "random": (random.random(), float(np.random.rand()), torch.rand(()).item()),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "group": dist.is_initialized(),
    }


def lightning_environment() -> tuple[str, int, int, bool]:
    from lightning.pytorch import Trainer

    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    trainer.strategy.setup_environment()
    return type(environment).__name__, trainer.global_rank, trainer.world_size, dist.is_initialized()


@pytest.mark.parametrize("world_size", range(1, MAX_WORLD_SIZE + 1))
def test_results_come_in_rank_order(ranks: RankPool, world_size: int) -> None:
    expected = [(rank, world_size, str(rank), str(world_size)) for rank in range(world_size)]
    assert ranks.run(world_size, place) == expected


def test_arguments_and_tensors_are_carried(ranks: RankPool) -> None:
    values = torch.arange(3.0)
    as_arguments = ranks.run(2, scaled_sum, values, factor=2.0)
    as_partial = ranks.run(2, functools.partial(scaled_sum, values, factor=2.0))
    for result in as_arguments + as_partial:
        torch.testing.assert_close(result, values * 6, rtol=0, atol=0)


def test_workers_are_kept_between_jobs(ranks: RankPool) -> None:
    first = ranks.run(2, process_id)
    assert ranks.run(2, process_id, init_process_group=False) == first
    assert os.getpid() not in first


@pytest.mark.parametrize("world_size", [0, MAX_WORLD_SIZE + 1])
def test_world_size_is_checked(ranks: RankPool, world_size: int) -> None:
    with pytest.raises(ValueError, match="world_size"):
        ranks.run(world_size, process_id)


def test_exception_of_one_rank_arrives_whole(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"rank 1: .*parallel\.expert") as caught:
        ranks.run(2, refuse_on, 1, init_process_group=False)
    assert set(caught.value.errors) == {1}
    error = caught.value.errors[1]
    assert isinstance(error, ConfigError)
    assert (error.field, error.value, error.hint) == ("parallel.expert", 3, "try 4")
    assert caught.value.__cause__ is error
    assert "in refuse_on" in caught.value.tracebacks[1]


def test_exceptions_of_all_ranks_are_collected(ranks: RankPool) -> None:
    with pytest.raises(RankFailure) as caught:
        ranks.run(2, refuse_everywhere)
    errors = caught.value.errors
    assert {rank: getattr(error, "value", None) for rank, error in errors.items()} == {0: 0, 1: 1}
    assert caught.value.stopped == ()


def test_exception_that_cannot_be_pickled_is_described(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match="UnpicklableError: 1 and 2"):
        ranks.run(1, raise_unpicklable)


@pytest.mark.slow
def test_pool_works_after_one_rank_failed_and_the_other_hung(ranks: RankPool) -> None:
    before = ranks.run(2, process_id)
    with pytest.raises(RankFailure) as caught:
        ranks.run(2, refuse_then_wait_on, 0, init_process_group=False)
    assert set(caught.value.errors) == {0}
    assert caught.value.stopped == (1,)
    after = ranks.run(2, process_id)
    assert not set(before) & set(after)
    for pid in before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
def test_hang_is_ended_and_shows_where_it_hung(ranks: RankPool) -> None:
    with pytest.raises(RankFailure) as caught:
        ranks.run(2, hang_on, 1, timeout=2)
    assert set(caught.value.errors) == {1}
    assert isinstance(caught.value.errors[1], TimeoutError)
    assert "in hang_on" in caught.value.tracebacks[1]
    assert [place[0] for place in ranks.run(2, place)] == [0, 1]


def test_death_of_a_process_is_reported(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match="exit code -9") as caught:
        ranks.run(2, die_on, 1, init_process_group=False)
    assert isinstance(caught.value.errors[1], ChildProcessError)
    assert [place[0] for place in ranks.run(2, place)] == [0, 1]


def test_every_job_starts_from_the_same_state(ranks: RankPool) -> None:
    clean = ranks.run(2, observed_state)
    ranks.run(2, dirty_state)
    assert ranks.run(2, observed_state) == clean
    assert clean[0] == clean[1]
    assert clean[0]["threads"] == 1
    assert clean[0]["dtype"] == torch.float32


def test_job_sees_the_callers_environment_and_directory(
    ranks: RankPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LEFT_BEHIND", "by the caller")
    monkeypatch.chdir(tmp_path)
    state = ranks.run(1, observed_state)[0]
    assert state["left behind"] is True
    assert state["directory"] == str(tmp_path)
    monkeypatch.undo()
    state = ranks.run(1, observed_state)[0]
    assert state["left behind"] is False
    assert state["directory"] == os.getcwd()


def test_lightning_joins_instead_of_launching(ranks: RankPool) -> None:
    results = ranks.run(2, lightning_environment, init_process_group=False)
    assert results == [("TorchElasticEnvironment", 0, 2, True), ("TorchElasticEnvironment", 1, 2, True)]
    states = ranks.run(2, observed_state, init_process_group=False)
    assert [state["group"] for state in states] == [False, False]
