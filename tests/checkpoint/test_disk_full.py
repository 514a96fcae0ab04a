"""The disk is full, or writing is forbidden, at every point of saving in turn, on any rank."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_moe.checkpoint import commit, store
from lightning_moe.errors import CheckpointError
from tests.checkpoint.known import check, hidden, save, visible
from tests.distributed import RankPool

CALLS = ("open", "write", "fsync", "mkdir", "rename")
NEVER = 10**9
LASTING = pytest.mark.parametrize("lasting", [True, False], ids=["stays full", "once"])
HINTS = {
    errno.ENOSPC: "Hint: free space there, or use another folder",
    errno.EACCES: "Hint: check the owner and the permissions of the folder",
    errno.EROFS: "Hint: the file system is mounted read-only",
    errno.EDQUOT: "Hint: your quota is used up",
    errno.EIO: "",
}


@contextmanager
def failing(at: int, code: int, swap: bool, lasting: bool) -> Iterator[list[str]]:
    """Let the call number ``at`` that changes files fail, and with ``lasting`` all that take space from there on.

    Deleting takes no space, nor does giving a name back to what had it; so it is on a full disk. Gives the failed ones.
    """
    originals = {name: getattr(os, name) for name in CALLS}
    exchange = commit.exchange
    calls, failed = count(1), []

    def may_fail(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return function(*arguments, **named)
            number = next(calls)
            if number == at or (lasting and number > at and name not in ("rename", "exchange")):
                failed.append(name)
                named_file = None if name in ("write", "fsync") else os.fspath(arguments[0])
                raise OSError(code, os.strerror(code), named_file)
            return function(*arguments, **named)

        return call

    try:
        for name, original in originals.items():
            setattr(os, name, may_fail(name, original))
        commit.exchange = may_fail("exchange", exchange) if swap else lambda first, second: False  # type: ignore[attr-defined]
        yield failed
    finally:
        commit.exchange = exchange  # type: ignore[attr-defined]
        for name, original in originals.items():
            setattr(os, name, original)


def fail_at_every_call(base: str, rank: int, code: int, swap: bool, lasting: bool) -> list[str]:
    """Save over step 1 with a failure at each call of one rank in turn, until none is left; gives the messages."""
    group = dist.group.WORLD if dist.is_initialized() else None
    own_rank = 0 if group is None else dist.get_rank(group)
    messages = []
    for at in count(1):
        folder = Path(base, str(at))
        if own_rank == 0:
            shutil.copytree(Path(base, "template"), folder)
        at_here = at if own_rank == rank else NEVER
        with failing(at_here, code, swap, lasting) as failed:
            try:
                save(folder / "last.ckpt", 2, group)
            except CheckpointError as error:
                messages.append(str(error))
            else:
                messages.append("")
        if group is not None:
            everywhere: list[Any] = [None, None]
            dist.all_gather_object(everywhere, (failed, messages[-1]))
            assert everywhere[0][1] == everywhere[1][1], "all ranks raise the same error, or none"
            failed = everywhere[rank][0]
        if own_rank == 0:
            check_folder(folder, messages[-1])
            shutil.rmtree(folder)
        if not failed:
            return messages
    raise AssertionError


def check_folder(folder: Path, message: str) -> None:
    """The old checkpoints are there after an error, and the new one if there was none."""
    check(store.open(folder / "step=1.ckpt", None), 1)
    check(store.open(folder / "last.ckpt", None), 1 if message else 2)
    assert visible(folder) == ["last.ckpt", "step=1.ckpt"]
    assert hidden(folder) == []


def check_messages(messages: list[str], rank: int, code: int) -> None:
    *failed, last = messages
    assert last == "", "nothing failed in the end"
    assert len([message for message in failed if message]) > len(failed) // 2
    for message in filter(None, failed):
        cause = rf"rank {rank} could not write it: {os.strerror(code)} \(\S+\)"
        assert re.match(rf"checkpoint \S+/last\.ckpt: {cause}", message)
        assert HINTS[code] in message
        assert message.endswith("older checkpoints are as they were")


@pytest.fixture
def template(tmp_path: Path) -> Path:
    for name in ("step=1.ckpt", "last.ckpt"):
        save(tmp_path / "template" / name, 1)
    return tmp_path


@pytest.mark.parametrize("swap", [True, False], ids=["exchange", "two renames"])
@LASTING
def test_disk_full_in_one_process(template: Path, swap: bool, lasting: bool) -> None:
    messages = fail_at_every_call(str(template), 0, errno.ENOSPC, swap, lasting)
    assert len(messages) > 20
    check_messages(messages, 0, errno.ENOSPC)


@LASTING
@pytest.mark.parametrize("rank", [0, 1])
def test_disk_full_on_one_rank(ranks: RankPool, template: Path, rank: int, lasting: bool) -> None:
    for messages in ranks.run(2, fail_at_every_call, str(template), rank, errno.ENOSPC, True, lasting):
        assert len(messages) > 6
        check_messages(messages, rank, errno.ENOSPC)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_other_errors_name_their_cause(template: Path, code: int) -> None:
    messages = fail_at_every_call(str(template), 0, code, True, True)
    check_messages(messages, 0, code)


def test_the_cause_is_found_behind_that_of_torch(tmp_path: Path) -> None:
    """Tensors that are too large for the buffer fail inside of torch.save, which raises an error of its own."""
    state = {"large": torch.zeros(1 << 20)}
    messages = []
    for at in range(1, 30):
        with failing(at, errno.ENOSPC, swap=True, lasting=False) as failed:
            try:
                store.write(tmp_path / "a.ckpt", state, {}, step=1, group=None)
            except CheckpointError as error:
                messages.append(str(error))
    assert not failed
    assert len(messages) > 10
    assert all("rank 0 could not write it: No space left on device (/" in message for message in messages)


def save_with_a_limit(path: str) -> str:
    """The kernel itself refuses: files of this process may have 4096 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        save(Path(path), 2)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return ""


def test_a_real_limit(ranks: RankPool, template: Path) -> None:
    path = template / "template" / "last.ckpt"
    (message,) = ranks.run(1, save_with_a_limit, str(path))
    assert re.search(r"rank 0 could not write it: File too large \(\S+__0_0\.distcp\)\. Hint: .*ulimit -f", message)
    check_folder(path.parent, message)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"rank 0 could not write it: Not a directory .*older checkpoints are as"):
        save(tmp_path / "file" / "run" / "last.ckpt", 1)
