"""Names change their checkpoint as a whole: replacing, removing, and undoing what failed half-way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lightning_moe.checkpoint import commit, store
from lightning_moe.errors import CheckpointError, ConfigError
from tests.checkpoint.known import check, save
from tests.distributed import RankPool

SWAPS = pytest.mark.parametrize("swap", [True, False], ids=["exchange", "two renames"])


def choose(monkeypatch: pytest.MonkeyPatch, swap: bool) -> None:
    if not swap:
        monkeypatch.setattr(commit, "exchange", lambda first, second: False)


@SWAPS
def test_a_name_can_be_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool) -> None:
    choose(monkeypatch, swap)
    for step in (1, 2, 3):
        save(tmp_path / "last.ckpt", step)
        check(store.open(tmp_path / "last.ckpt", None), step)
        assert os.listdir(tmp_path) == ["last.ckpt"]


def test_this_kernel_can_swap(tmp_path: Path) -> None:
    """Or the test above would try one way twice."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("b")
    assert commit.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").is_file()
    assert (tmp_path / "b").is_dir()
    with pytest.raises(FileNotFoundError, match="missing"):
        commit.exchange(tmp_path / "a", tmp_path / "missing")


@SWAPS
@pytest.mark.parametrize("target", ["step=1.ckpt", "nothing"])
def test_a_link_is_replaced_and_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool, target: str
) -> None:
    choose(monkeypatch, swap)
    save(tmp_path / "step=1.ckpt", 1)
    (tmp_path / "last.ckpt").symlink_to(target)
    save(tmp_path / "last.ckpt", 2)
    check(store.open(tmp_path / "step=1.ckpt", None), 1)
    check(store.open(tmp_path / "last.ckpt", None), 2)
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step=1.ckpt"]


def test_damaged_checkpoints_and_empty_directories_are_replaced(tmp_path: Path) -> None:
    save(tmp_path / "last.ckpt", 1)
    (tmp_path / "last.ckpt" / "manifest.json").unlink()
    save(tmp_path / "last.ckpt", 2)
    check(store.open(tmp_path / "last.ckpt", None), 2)
    (tmp_path / "empty.ckpt").mkdir()
    save(tmp_path / "empty.ckpt", 3)
    check(store.open(tmp_path / "empty.ckpt", None), 3)


def save_expecting_config_error(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        save(Path(path), 2, dist.group.WORLD)
    return str(caught.value)


def test_nothing_else_is_replaced(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file.ckpt").write_text("a whole-file checkpoint")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "manifest.json").write_text("of a web page")
    assert [*ranks.run(2, save_expecting_config_error, str(tmp_path / "file.ckpt"))] == 2 * [
        f"filepath: '{tmp_path / 'file.ckpt'}' is not allowed; "
        "allowed: a new path or a checkpoint directory. Hint: a file is in the way"
    ]
    with pytest.raises(ConfigError, match="other contents, which would be deleted"):
        save(tmp_path / "project", 1)
    assert (tmp_path / "file.ckpt").read_text() == "a whole-file checkpoint"
    assert (tmp_path / "project" / "manifest.json").read_text() == "of a web page"
    assert sorted(os.listdir(tmp_path)) == ["file.ckpt", "project"]


def test_a_failed_swap_leaves_the_old_one_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when only the wait for the disk fails: afterwards nobody knows what a crash would leave."""
    save(tmp_path / "last.ckpt", 1)

    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    for swap in (True, False):
        with monkeypatch.context() as patch:
            choose(patch, swap)
            patch.setattr(commit, "sync_directory", fail)
            with pytest.raises(CheckpointError, match="rank 0 could not write it: Input/output error"):
                save(tmp_path / "last.ckpt", 2)
            with pytest.raises(CheckpointError, match="rank 0 could not write it: Input/output error"):
                save(tmp_path / "new.ckpt", 2)
        check(store.open(tmp_path / "last.ckpt", None), 1)
        assert os.listdir(tmp_path) == ["last.ckpt"]


@SWAPS
def test_everything_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool
) -> None:
    """No kill can show this, only a crash of the system."""
    save(tmp_path / "last.ckpt", 1)
    choose(monkeypatch, swap)
    log: list[str] = []
    fsync, rename, exchange = os.fsync, os.rename, commit.exchange

    def logged_fsync(descriptor: int) -> None:
        fsync(descriptor)
        log.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*paths: Path) -> Any:
            if os.path.basename(paths[1]) == "last.ckpt":
                log.append("named")
            return function(*paths)

        return call

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged(rename))
    monkeypatch.setattr(commit, "exchange", logged(exchange) if swap else exchange)
    save(tmp_path / "last.ckpt", 2)
    assert sorted(log[:3]) == [".metadata.tmp", "__0_0.distcp", "meta.pt"]
    assert log[3] == "manifest.json"
    assert log[4].startswith(".last.ckpt.staging-")
    assert log[5:] == ["named", tmp_path.name]


# ---- removing


def test_remove(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", 1)
    (tmp_path / "last.ckpt").symlink_to("a.ckpt")
    store.remove(tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["a.ckpt"]
    (tmp_path / "file.ckpt").write_text("x")
    for name in ("a.ckpt", "a.ckpt", "file.ckpt", "never/was/there.ckpt"):
        store.remove(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_remove_says_why_it_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.ckpt", 1)

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(source))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(CheckpointError, match=r"a\.ckpt: it cannot be removed: Permission denied"):
            store.remove(tmp_path / "a.ckpt")
    check(store.open(tmp_path / "a.ckpt", None), 1)


def test_is_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", 1)
    assert store.is_checkpoint(tmp_path / "a.ckpt")
    for name in ("manifest.json", "meta.pt"):
        (tmp_path / "a.ckpt" / name).unlink()
        assert store.is_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt" / ".metadata").unlink()
    assert not store.is_checkpoint(tmp_path / "a.ckpt")
    assert not store.is_checkpoint(tmp_path / "missing")
    assert not store.is_checkpoint(tmp_path)
