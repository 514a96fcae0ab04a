from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from lightning_moe.checkpoint import store
from lightning_moe.checkpoint.background import BackgroundWriter
from lightning_moe.errors import CheckpointError
from tests.checkpoint.known import check, save
from tests.distributed import RankPool


def test_jobs_run_beside_the_caller_one_after_the_other() -> None:
    writer, order, go_on = BackgroundWriter(), list[str](), threading.Event()

    def first() -> None:
        assert go_on.wait(60)
        order.append("first")

    writer.submit(first)
    order.append("caller")  # submit has returned, and the job cannot be done
    go_on.set()
    writer.submit(lambda: order.append("second"))
    writer.wait()
    assert order == ["caller", "first", "second"]
    writer.wait()
    writer.close()


def test_errors_are_raised_by_the_next_call_and_once() -> None:
    class BaseFailure(BaseException):
        """As what torch's distributed checkpoints raise."""

    def fail(error: BaseException) -> None:
        raise error

    writer, done = BackgroundWriter(), list[int]()
    error = CheckpointError("a.ckpt", "No space left on device")
    writer.submit(lambda: fail(error))
    with pytest.raises(CheckpointError) as caught:
        writer.submit(lambda: done.append(1))
    assert caught.value is error
    writer.wait()
    assert done == [], "a job after a failed one is not started"
    writer.submit(lambda: fail(BaseFailure()))
    with pytest.raises(BaseFailure):
        writer.wait()
    writer.submit(lambda: fail(error))
    with pytest.raises(CheckpointError):
        writer.close()
    writer.close()


def test_the_thread_does_not_keep_the_process() -> None:
    writer, go_on = BackgroundWriter(), threading.Event()
    writer.submit(lambda: assert_daemon(go_on))
    go_on.set()
    writer.close()


def assert_daemon(go_on: threading.Event) -> None:
    assert threading.current_thread().daemon
    assert threading.current_thread() is not threading.main_thread()
    assert go_on.wait(60)


def save_while_training(folder: str) -> None:
    """Checkpoints are written over a group of their own while the default group communicates."""
    group = dist.new_group(backend="gloo")
    writer = BackgroundWriter()
    values = []
    for step in range(1, 4):
        writer.submit(lambda step=step: save(Path(folder, f"step={step}.ckpt"), step, group) and None)
        for i in range(50):
            value = [None, None]
            dist.all_gather_object(value, (step, i, dist.get_rank()))
            values.append(value == [(step, i, 0), (step, i, 1)])
    writer.close()
    assert all(values)
    check(store.find_newest(Path(folder), group), 3)


def test_saves_while_other_groups_communicate(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_while_training, str(tmp_path))
