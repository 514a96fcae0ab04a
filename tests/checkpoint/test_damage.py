"""Files change after they were written: a bit, a block, their end, or all of them."""

from __future__ import annotations

import os
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_moe.checkpoint import metadata, store
from lightning_moe.errors import CheckpointError
from tests.checkpoint.known import assert_equal, blank, check, save
from tests.distributed import RankPool

NEWEST, OLDER = "epoch=0-step=20.ckpt", "epoch=0-step=10.ckpt"


def flip_a_bit(data: bytes, generator: random.Random) -> bytes | None:
    damaged = bytearray(data)
    damaged[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    return bytes(damaged)


def zero_a_block(data: bytes, generator: random.Random) -> bytes | None:
    """A block that was zero already is not damaged by this: another one is taken."""
    length = min(len(data), generator.choice([16, 64, 512, 4096]))
    while True:
        start = generator.randrange(len(data) - length + 1)
        damaged = data[:start] + bytes(length) + data[start + length :]
        if damaged != data:
            return damaged


def truncate(data: bytes, generator: random.Random) -> bytes | None:
    return data[: generator.randrange(len(data))]


def delete(data: bytes, generator: random.Random) -> bytes | None:
    return None


DAMAGES = [flip_a_bit, zero_a_block, truncate, delete]


def save_both(folder: str) -> None:
    for name, step in ((OLDER, 10), (NEWEST, 20)):
        save(Path(folder, name), step, dist.group.WORLD)


@pytest.fixture
def folder(ranks: RankPool, tmp_path: Path) -> Path:
    """Two checkpoints of two ranks."""
    ranks.run(2, save_both, str(tmp_path))
    return tmp_path


def refuse(*arguments: object, **named: object) -> None:
    raise AssertionError("something in a damaged checkpoint was used")


def damage(file: Path, kind: Callable[[bytes, random.Random], bytes | None], generator: random.Random) -> bytes:
    """Damage a file; gives what it held."""
    data = file.read_bytes()
    damaged = kind(data, generator)
    assert damaged != data
    if damaged is None:
        file.unlink()
    else:
        file.write_bytes(damaged)
    return data


@pytest.mark.parametrize("number", [32, pytest.param(300, marks=pytest.mark.slow)])
def test_damages_are_found_before_anything_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    generator = random.Random(0)
    files = sorted((folder / NEWEST).iterdir())
    assert len(files) == 5
    tensors = [file for file in files if file.suffix == ".distcp"]
    for trial in range(number):
        file = generator.choice([*files, *tensors])
        original = damage(file, DAMAGES[trial % 4], generator)
        pattern = rf"checkpoint \S*{NEWEST}: file '{re.escape(file.name)}' of step 20 is (damaged|missing|no list)"
        state = blank()
        with monkeypatch.context() as patch:
            for module, name in ((torch, "load"), (pickle, "load"), (metadata, "_Unpickler")):
                patch.setattr(module, name, refuse)
            with pytest.raises(CheckpointError, match=pattern):
                store.open(folder / NEWEST, None).read(state)
        assert_equal(state, blank())
        with pytest.warns(UserWarning, match="because of " + pattern):
            newest = store.find_newest(folder, None)
        assert newest.path == folder / OLDER
        check(newest, 10)
        file.write_bytes(original)
    check(store.find_newest(folder, None), 20)


def open_damaged(folder: str) -> list[str]:
    """Damage each file in turn; gives the errors of this rank."""
    errors = []
    for name in sorted(file.name for file in Path(folder, NEWEST).iterdir()):
        file = Path(folder, NEWEST, name)
        if dist.get_rank() == 0:
            original = damage(file, flip_a_bit, random.Random(0))
        dist.barrier()
        with pytest.raises(CheckpointError) as caught:
            store.open(Path(folder, NEWEST), dist.group.WORLD)
        errors.append(str(caught.value))
        dist.barrier()
        if dist.get_rank() == 0:
            file.write_bytes(original)
    return errors


def test_all_ranks_learn_what_one_of_them_finds(ranks: RankPool, folder: Path) -> None:
    first, second = ranks.run(2, open_damaged, str(folder))
    assert first == second
    for name, error in zip(
        [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "meta.pt"], first, strict=True
    ):
        assert f"file '{name}' of step 20 is" in error


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.pt", "manifest.json"])
@pytest.mark.parametrize("kind", ["link", "directory", "pipe"])
def test_only_regular_files_are_read(folder: Path, name: str, kind: str) -> None:
    """A link could lead anywhere, also to a file with the right contents; a pipe would be waited for."""
    file = folder / NEWEST / name
    kept = file.rename(folder / "kept")
    match kind:
        case "link":
            file.symlink_to(kept)
        case "directory":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
    with pytest.raises(CheckpointError, match=rf"file '{re.escape(name)}' of step 20 is (a link|no regular file)"):
        store.open(folder / NEWEST, None)


def test_files_are_compared_again_where_they_are_unpickled(folder: Path) -> None:
    checkpoint = store.open(folder / NEWEST, None)
    damage(folder / NEWEST / "meta.pt", flip_a_bit, random.Random(0))
    with pytest.raises(CheckpointError, match=r"file 'meta\.pt' of step 20 is damaged"):
        checkpoint.meta()


def test_files_beside_those_of_the_checkpoint_do_not_matter(folder: Path) -> None:
    (folder / NEWEST / "notes.txt").write_text("good run")
    (folder / NEWEST / "__7_0.distcp").write_bytes(b"of nobody")
    check(store.find_newest(folder, None), 20)
