"""Processes are killed while they save; what they had reported as saved must be there, to the bit.

Trials run in a worker of the pool, which forks the ranks of each trial: they need not import anything. They save
without a pause: each step under a name of its own and as ``last.ckpt``, which is used again and again, and remove old
steps. A rank reports what is saved through a pipe, as a user would be told. Folders are used for several trials, so
later ones find what earlier kills have left.
"""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lightning_moe.checkpoint import commit, store
from lightning_moe.checkpoint.background import BackgroundWriter
from lightning_moe.errors import CheckpointError
from tests.checkpoint.known import check, hidden, save, visible
from tests.distributed import RankPool

KEPT = 2
"""Steps that are not removed."""


def save_step(folder: Path, step: int, group: dist.ProcessGroup | None, report: Callable[[str], None]) -> None:
    """What one step of training saves and removes."""
    for name in (f"step={step}.ckpt", "last.ckpt"):
        save(folder / name, step, group)
        report(f"{name} {step}\n")
    if group is None or dist.get_rank(group) == 0:
        store.remove(folder / f"step={step - KEPT}.ckpt")


@dataclass
class Folder:
    """A folder of checkpoints, and what was reported as saved in it."""

    path: Path
    saved: dict[str, int] = field(default_factory=dict)

    def report(self, lines: bytes) -> None:
        for line in lines.decode().splitlines():
            name, step = line.split()
            self.saved[name] = int(step)

    @property
    def newest(self) -> int:
        """The newest step that was reported."""
        return max(self.saved.values(), default=0)

    def verify(self) -> int:
        """Assert that nothing which was reported is lost, and that nothing visible is damaged; gives the newest step.

        Checkpoints may be newer than the last report: a kill can come between saving and reporting.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # damaged checkpoints would be passed over with a warning
            try:
                newest = store.find_newest(self.path, None)
            except CheckpointError:
                if self.saved or visible(self.path):
                    raise
                return 0  # killed before anything was saved
        check(newest, newest.step)
        assert newest.step >= self.newest
        expected = {f"step={step}.ckpt" for step in range(max(1, newest.step - KEPT + 1), self.newest + 1)}
        for name in {*visible(self.path), *(name for name in self.saved if name in expected or name == "last.ckpt")}:
            checkpoint = store.open(self.path / name, None)
            if name != "last.ckpt":
                assert name == f"step={checkpoint.step}.ckpt"
            assert checkpoint.step >= self.saved.get(name, 0)
            check(checkpoint, checkpoint.step)
        return newest.step


# ---- at random moments


def save_until_killed(
    rank: int, rendezvous: str, folder: Path, first: int, background: bool, swap: bool, pipe: int
) -> None:
    if not swap:
        commit.exchange = lambda first, second: False  # type: ignore[attr-defined]  # where the kernel cannot
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    group = dist.new_group(backend="gloo") if background else dist.group.WORLD
    writer = BackgroundWriter()

    def report(line: str) -> None:
        if rank == 0:
            os.write(pipe, line.encode())

    os.write(pipe, b"\n")  # ready
    for step in count(first):
        if background:
            writer.submit(lambda step=step: save_step(folder, step, group, report))
        else:
            save_step(folder, step, group, report)


def fork(function: Callable[..., None], *arguments: Any, errors: Path) -> int:
    """Run a function in a child, which ends with it and says nothing but on a pipe."""
    pid = os.fork()
    if pid:
        return pid
    try:
        output = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        function(*arguments)
        os._exit(0)
    except BaseException as error:
        with suppress(OSError):
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(3)


def wait_for(pids: list[int], seconds: float) -> None:
    """Wait for processes, and kill those that take too long; a rank notices at once that another one is gone."""
    deadline = time.monotonic() + seconds
    for pid in pids:
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)


def kill_at_random(base: str, trials: int, trials_per_folder: int) -> dict[str, int]:
    """The trials; gives what they came across."""
    generator = random.Random(0)
    seen = {"left something": 0, "saved": 0, "survivors": 0}
    for trial in range(trials):
        if trial % trials_per_folder == 0:
            folder = Folder(Path(base) / str(trial))
            folder.path.mkdir()
            first = 1
        background, swap = generator.random() < 0.5, generator.random() < 0.5
        victims = generator.choice([[0], [1], [0, 1]])
        reports_before, delay = generator.randrange(4), generator.uniform(0, 2)
        rendezvous, errors = f"{base}/rendezvous-{trial}", Path(base) / "errors"
        read, write = os.pipe()
        ranks = [
            fork(save_until_killed, rank, rendezvous, folder.path, first, background, swap, write, errors=errors)
            for rank in range(2)
        ]
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            try:
                assert pipe.readline() + pipe.readline() == b"\n\n", errors.read_text()
                start = time.monotonic()
                for _ in range(reports_before):
                    folder.report(pipe.readline())
                # On a busy machine everything takes longer, and the kills are to fall on any moment of saving.
                pace = (time.monotonic() - start) / reports_before if reports_before else 0.03
                time.sleep(delay * pace)
                for victim in victims:
                    os.kill(ranks[victim], signal.SIGKILL)
            finally:
                wait_for(ranks, seconds=3.0)
            folder.report(pipe.read())
        seen["left something"] += bool(hidden(folder.path))
        seen["survivors"] += len(victims) < 2
        newest = folder.verify()
        seen["saved"] += newest - first + 1
        first = newest + 1
    return seen


@pytest.mark.parametrize(
    "trials", [20, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(900)])], ids=["20", "200"]
)
def test_killed_at_random(ranks: RankPool, tmp_path: Path, trials: int) -> None:
    """Either rank or both, on the main thread or in the background, with and without a kernel that can swap names."""
    (seen,) = ranks.run(1, kill_at_random, str(tmp_path), trials, 5, init_process_group=False, timeout=10 + 4 * trials)
    assert seen["left something"] >= trials // 10, "the kills missed the moments of saving"
    assert seen["saved"] >= trials // 4


# ---- at every single step of saving

NAMING = ("mkdir", "rename", "unlink", "rmdir")
WRITING = ("open", "write", "fsync")


def save_and_die(folder: Path, step: int, swap: bool, names: tuple[str, ...], die_at: int, pipe: int) -> None:
    """Save a step, and kill this process before the given call that changes files."""
    calls = count(1)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if next(calls) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    report = os.write
    commit.exchange = counted(commit.exchange) if swap else lambda first, second: False  # type: ignore[attr-defined]
    for name in names:
        setattr(os, name, counted(getattr(os, name)))
    save_step(folder, step, None, lambda line: report(pipe, line.encode()) and None)
    report(pipe, b"end 0\n")


def kill_at_every_call(base: str, swap: bool, names: tuple[str, ...]) -> int:
    """Kill before each call in turn, until the saving ends before; gives the number of calls."""
    folder = Folder(Path(base) / "run")
    folder.path.mkdir()
    for step in range(1, KEPT + 1):
        save_step(folder.path, step, None, lambda line: folder.report(line.encode()))
    for die_at, step in enumerate(count(KEPT + 1), start=1):
        read, write = os.pipe()
        pid = fork(save_and_die, folder.path, step, swap, names, die_at, write, errors=Path(base) / "errors")
        os.close(write)
        with os.fdopen(read, "rb") as reports:
            folder.report(reports.read())
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert folder.saved.pop("end") == 0, (Path(base) / "errors").read_text()
            folder.verify()
            assert hidden(folder.path) == [], "leftovers of the kill before"
            return die_at
        assert os.WTERMSIG(status) == signal.SIGKILL
        folder.verify()
    raise AssertionError


@pytest.mark.parametrize("swap", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize(
    "names", [NAMING, pytest.param(NAMING + WRITING, marks=pytest.mark.slow)], ids=["names", "names and contents"]
)
def test_killed_at_every_call(ranks: RankPool, tmp_path: Path, swap: bool, names: tuple[str, ...]) -> None:
    """Before each rename, write, ... of a step, each time in the folder that the kill before has left."""
    (calls,) = ranks.run(1, kill_at_every_call, str(tmp_path), swap, names, init_process_group=False)
    assert calls > (15 if names == NAMING else 45)
