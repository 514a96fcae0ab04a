"""Writing, opening, replacing and removing checkpoints, and what killed processes leave behind."""

from __future__ import annotations

import os
import re
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.load import _load_distributed_checkpoint

from lightning_moe.checkpoint import commit, store
from lightning_moe.checkpoint.hidden import Kind, new_hidden
from lightning_moe.errors import CheckpointError, ConfigError
from tests.checkpoint.known import assert_equal, blank, check, hidden, save, state_of, visible, whole_state
from tests.distributed import RankFailure, RankPool

# ---- writing and reading


def test_one_process(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "step=3.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # DCP itself warns where there is no process group
        written = save(path, 3)
        check(store.open(path, None), 3)
    assert sorted(os.listdir(path)) == [".metadata", "__0_0.distcp", "manifest.json", "meta.pt"]
    assert written == sum(file.stat().st_size for file in path.iterdir() if file.name != "manifest.json")
    assert hidden(path.parent) == []


def save_with_default_group(path: str, step: int) -> int:
    return save(Path(path), step, dist.group.WORLD)


def check_on_ranks(path: str, step: int) -> None:
    check(store.open(Path(path), dist.group.WORLD), step)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    state, expected = state_of(step + 1, rank, world_size), state_of(step, rank, world_size)
    store.open(Path(path), dist.group.WORLD).read(state)
    assert_equal(state, expected)


def test_other_numbers_of_ranks(ranks: RankPool, tmp_path: Path) -> None:
    written = ranks.run(2, save_with_default_group, str(tmp_path / "two.ckpt"), 4)
    assert min(written) > 0
    check(store.open(tmp_path / "two.ckpt", None), 4)
    save(tmp_path / "one.ckpt", 5)
    ranks.run(2, check_on_ranks, str(tmp_path / "one.ckpt"), 5)
    ranks.run(2, check_on_ranks, str(tmp_path / "two.ckpt"), 4)


def save_on_last_two(path: str) -> None:
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return  # whatever waited for the default group would wait for this rank
    save(Path(path), 6, group)
    check(store.find_newest(Path(path).parent, group), 6)


def test_uses_its_own_group_only(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(3, save_on_last_two, str(tmp_path / "step=6.ckpt"))


def test_reads_a_part(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", 1)
    state = {"model": {"low": blank()["model"]["low"]}}
    store.open(tmp_path / "a.ckpt", None).read(state)
    assert_equal(state, {"model": {"low": whole_state(1)["model"]["low"]}})


def test_what_is_not_in_the_file(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", 1)
    checkpoint = store.open(tmp_path / "a.ckpt", None)
    with pytest.raises(CheckpointError, match=r"rank 0 could not read it: .*model\.unknown"):
        checkpoint.read({"model": {"unknown": torch.zeros(1)}})
    with pytest.raises(CheckpointError, match=r"rank 0 could not read it: .*Size mismatch .* model\.low"):
        checkpoint.read({"model": {"low": torch.zeros(34)}})


def test_layout_is_that_of_lightnings_sharded_strategies(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", 1)
    loaded = _load_distributed_checkpoint(tmp_path / "a.ckpt")
    assert_equal(loaded, whole_state(1))
    assert loaded["global_step"] == 1


def test_unsafe_plain_values_are_read_only_on_request(tmp_path: Path) -> None:
    store.write(tmp_path / "a.ckpt", {"x": torch.zeros(1)}, {"tmp": Path("a")}, step=1, group=None)
    checkpoint = store.open(tmp_path / "a.ckpt", None)
    with pytest.raises(ConfigError, match=r"meta\.pt.*could run code"):
        checkpoint.meta()
    assert checkpoint.meta(weights_only=False) == {"tmp": Path("a")}


# ---- replacing

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


# ---- errors on one rank


def fail_on(rank: int, error: BaseException) -> Callable[..., Any]:
    """A state whose values cannot be pickled on one rank."""

    class Unpicklable:
        def __reduce__(self) -> Any:
            raise error

    return Unpicklable if dist.get_rank() == rank else object


def save_unpicklable(path: str, rank: int, interrupt: bool) -> str:
    error: BaseException = KeyboardInterrupt() if interrupt else TypeError("cannot pickle a lock")
    state = {"shared": torch.zeros(1), f"of {dist.get_rank()}": fail_on(rank, error)()}
    with pytest.raises((CheckpointError, KeyboardInterrupt)) as caught:
        store.write(Path(path), state, {}, step=1, group=dist.group.WORLD)
    dist.barrier()  # the group still works
    assert os.listdir(Path(path).parent) == []
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_is_raised_on_all(ranks: RankPool, tmp_path: Path, rank: int) -> None:
    errors = ranks.run(2, save_unpicklable, str(tmp_path / "a.ckpt"), rank, False)
    assert errors[0] == errors[1]
    assert errors[0] == (
        f"CheckpointError: checkpoint {tmp_path / 'a.ckpt'}: rank {rank} could not write it: TypeError: cannot pickle "
        "a lock. Hint: older checkpoints are as they were"
    )


def test_an_interrupted_rank_is_interrupted_and_the_others_are_told(ranks: RankPool, tmp_path: Path) -> None:
    errors = ranks.run(2, save_unpicklable, str(tmp_path / "a.ckpt"), 1, True)
    assert "rank 1 was interrupted by KeyboardInterrupt" in errors[0]
    assert errors[1] == "KeyboardInterrupt: "


def save_without_shared_files(path: str) -> None:
    """Rank 1 sees another file system, as on two hosts that each have a /tmp."""
    if dist.get_rank() == 1:
        stat = os.stat

        def lost(target: Any, *args: Any, **kwargs: Any) -> os.stat_result:
            if ".staging-" in os.fspath(target):
                raise FileNotFoundError(2, "No such file or directory", os.fspath(target))
            return stat(target, *args, **kwargs)

        os.stat = lost  # type: ignore[assignment]
        try:
            save(Path(path), 1, dist.group.WORLD)
        finally:
            os.stat = stat
    save(Path(path), 1, dist.group.WORLD)


def test_ranks_must_share_the_file_system(ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as caught:
        ranks.run(2, save_without_shared_files, str(tmp_path / "a.ckpt"))
    for error in caught.value.errors.values():
        assert isinstance(error, CheckpointError)
        assert error.reason.startswith("rank 1 could not write it: No such file or directory")
        assert "all ranks must see the folder" in error.hint
    assert os.listdir(tmp_path) == []


# ---- what cannot be opened


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        store.open(tmp_path / "a.ckpt", None)
    (tmp_path / "file.ckpt").write_text("x")
    with pytest.raises(CheckpointError, match="is no directory"):
        store.open(tmp_path / "file.ckpt", None)
    save(tmp_path / "epoch=0-step=7.ckpt", 7)
    (tmp_path / "epoch=0-step=7.ckpt" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"'manifest\.json' of step 7 is missing, so .* not known to be complete"):
        store.open(tmp_path / "epoch=0-step=7.ckpt", None)


def test_opens_through_a_link(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", 1)
    (tmp_path / "last.ckpt").symlink_to("a.ckpt")
    check(store.open(tmp_path / "last.ckpt", None), 1)


# ---- the newest


def test_newest_by_step_then_by_time(tmp_path: Path) -> None:
    for name, step in (("b.ckpt", 2), ("c.ckpt", 10), ("a.ckpt", 9)):
        save(tmp_path / name, step)
    assert store.find_newest(tmp_path, None).path == tmp_path / "c.ckpt"
    save(tmp_path / "0.ckpt", 10)
    (tmp_path / "last.ckpt").symlink_to("0.ckpt")
    (tmp_path / "notes").mkdir()
    newest = store.find_newest(tmp_path, None)
    assert newest.path == tmp_path / "0.ckpt"
    check(newest, 10)


def test_no_newest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint in this folder"):
        store.find_newest(tmp_path, None)
    with pytest.raises(CheckpointError, match="could not search it: No such file or directory"):
        store.find_newest(tmp_path / "missing", None)
    save(tmp_path / "last.ckpt", 1)
    (tmp_path / "last.ckpt" / "manifest.json").write_text("{}")
    with (
        pytest.warns(UserWarning, match=r"last\.ckpt: file 'manifest\.json' of unknown step is no list"),
        pytest.raises(CheckpointError, match="none of the 1 checkpoints in this folder can be read"),
    ):
        store.find_newest(tmp_path, None)


def find_with_fallback(folder: str) -> tuple[int, int]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = store.find_newest(Path(folder), dist.group.WORLD)
    check(checkpoint, checkpoint.step)
    return checkpoint.step, len([warning for warning in caught if "__1_0.distcp" in str(warning.message)])


def test_ranks_fall_back_together(ranks: RankPool, tmp_path: Path) -> None:
    for step in (1, 2):
        ranks.run(2, save_with_default_group, str(tmp_path / f"step={step}.ckpt"), step)
    (tmp_path / "step=2.ckpt" / "__1_0.distcp").unlink()
    assert ranks.run(2, find_with_fallback, str(tmp_path)) == [(1, 1), (1, 0)]


# ---- what killed processes leave


def name_of(path: Path, kind: Kind, owner: str) -> Path:
    """A hidden name of a process that is gone, lives, or ran elsewhere."""
    name = new_hidden(path, kind).name
    match owner:
        case "live":
            pass
        case "gone":
            process = subprocess.Popen(["true"])
            process.wait()
            name = name.replace(f"-{os.getpid()}-", f"-{process.pid}-")
        case "reused":  # another process has the number now: this one
            name = re.sub(rf"-{os.getpid()}-\d+-", f"-{os.getpid()}-12-", name)
        case "elsewhere":
            name = re.sub(rf"-\w+-{os.getpid()}-", "-0badcafe-1-", name)
    return path.parent / name


@pytest.mark.parametrize("owner", ["gone", "reused"])
@pytest.mark.parametrize("kind", list(Kind))
def test_leftovers_are_deleted_by_the_next_write(tmp_path: Path, kind: Kind, owner: str) -> None:
    save(tmp_path / "a.ckpt", 1)
    leftover = name_of(tmp_path / "a.ckpt", kind, owner)
    leftover.mkdir()
    (leftover / "__0_0.distcp").write_bytes(b"part")
    save(tmp_path / "other.ckpt", 2)
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "other.ckpt"]


@pytest.mark.parametrize("owner", ["live", "elsewhere"])
@pytest.mark.parametrize("kind", list(Kind))
def test_what_may_be_in_use_is_left_alone(tmp_path: Path, kind: Kind, owner: str) -> None:
    in_use = name_of(tmp_path / "a.ckpt", kind, owner)
    in_use.mkdir()
    (in_use / "__0_0.distcp").write_bytes(b"part")
    save(tmp_path / "a.ckpt", 1)
    store.remove(tmp_path / "a.ckpt")
    assert os.listdir(tmp_path) == [in_use.name]


def test_a_process_that_nobody_waited_for_is_gone(tmp_path: Path) -> None:
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
        name = new_hidden(tmp_path / "a.ckpt", Kind.STAGING).name.replace(f"-{os.getpid()}-", f"-{process.pid}-")
        (tmp_path / name).mkdir()
        save(tmp_path / "a.ckpt", 1)
        assert os.listdir(tmp_path) == ["a.ckpt"]


def leave_in_the_middle(path: Path, owner: str) -> None:
    """What a kill between the two renames leaves: nothing under the name, the old one and the new one hidden."""
    made = []
    for kind, step in ((Kind.REPLACED, 1), (Kind.STAGING, 2)):
        save(path, step)
        made.append((path.rename(path.with_suffix(f".{step}")), name_of(path, kind, owner)))
    for old, new in made:
        old.rename(new)


@pytest.mark.parametrize("owner", ["gone", "elsewhere"])
def test_a_name_that_a_kill_has_taken_is_read(tmp_path: Path, owner: str) -> None:
    path = tmp_path / "last.ckpt"
    leave_in_the_middle(path, owner)
    assert visible(tmp_path) == []
    check(store.open(path, None), 2)
    check(store.find_newest(tmp_path, None), 2)
    (newest,) = (name for name in os.listdir(tmp_path) if ".staging-" in name)
    (tmp_path / newest / "meta.pt").unlink()  # it was not complete
    check(store.open(path, None), 1)
    check(store.find_newest(tmp_path, None), 1)


def test_the_next_write_gives_the_name_back(tmp_path: Path) -> None:
    leave_in_the_middle(tmp_path / "last.ckpt", "gone")
    save(tmp_path / "step=3.ckpt", 3)
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step=3.ckpt"]
    check(store.open(tmp_path / "last.ckpt", None), 2)


def test_remove_takes_what_stands_for_the_name_too(tmp_path: Path) -> None:
    leave_in_the_middle(tmp_path / "last.ckpt", "gone")
    store.remove(tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == []


def test_what_a_live_process_works_on_is_no_checkpoint(tmp_path: Path) -> None:
    leave_in_the_middle(tmp_path / "last.ckpt", "live")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        store.open(tmp_path / "last.ckpt", None)
    with pytest.raises(CheckpointError, match="no checkpoint in this folder"):
        store.find_newest(tmp_path, None)


def test_what_cannot_be_deleted_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "last.ckpt", 1)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.warns(UserWarning, match=r"could not be deleted \(Permission denied\) and takes up space"):
        save(tmp_path / "last.ckpt", 2)
    check(store.open(tmp_path / "last.ckpt", None), 2)
    assert visible(tmp_path) == ["last.ckpt"]
