"""Writing and opening checkpoints, errors on one rank of several, and the newest of a folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.load import _load_distributed_checkpoint

from lightning_moe.checkpoint import store
from lightning_moe.errors import CheckpointError, ConfigError
from tests.checkpoint.known import assert_equal, blank, check, hidden, save, state_of, whole_state
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
