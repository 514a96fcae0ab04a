"""What killed processes leave in a folder of checkpoints, and what becomes of it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from lightning_moe.checkpoint import store
from lightning_moe.checkpoint.hidden import Hidden, Kind, new_hidden
from lightning_moe.errors import CheckpointError
from tests.checkpoint.known import check, save, visible


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
        start = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
        name = new_hidden(tmp_path / "a.ckpt", Kind.STAGING).name
        (tmp_path / re.sub(rf"-{os.getpid()}-\d+-", f"-{process.pid}-{start}-", name)).mkdir()
        save(tmp_path / "a.ckpt", 1)
        assert os.listdir(tmp_path) == ["a.ckpt"]


def test_systems_that_do_not_tell_when_a_process_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    monkeypatch.setattr(os.path, "exists", lambda path: False)  # no /proc
    live = new_hidden(tmp_path / "a.ckpt", Kind.STAGING)
    gone = live.with_name(live.name.replace(f"-{os.getpid()}-", f"-{process.pid}-"))
    other_user = live.with_name(live.name.replace(f"-{os.getpid()}-", "-1-"))
    assert [Hidden.parse(path).alive for path in (live, gone, other_user)] == [True, False, True]


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
