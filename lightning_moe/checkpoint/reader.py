"""A checkpoint that has been verified, and reading it without running code from it."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from lightning_moe.checkpoint.agreement import Ranks
from lightning_moe.checkpoint.files import DamageError, check_file, read_checked
from lightning_moe.checkpoint.manifest import MANIFEST, META, METADATA, Manifest, load_manifest, step_of
from lightning_moe.checkpoint.metadata import MetadataError, load_metadata
from lightning_moe.checkpoint.recovery import stand_ins
from lightning_moe.errors import CheckpointError, ConfigError


class Checkpoint:
    """A complete checkpoint whose files are those that were written.

    Attributes:
        path: Its directory.
        step: Optimizer steps at which it was written.
        metadata: DCP's table of contents: names, shapes and dtypes of the tensors.
    """

    def __init__(self, path: Path, manifest: Manifest, metadata: Metadata, group: dist.ProcessGroup | None) -> None:
        self.path = path
        self.step = manifest.step
        self.metadata = metadata
        self._manifest = manifest
        self._group = group

    def meta(self, weights_only: bool | None = None) -> dict[str, Any]:
        """The plain values beside the tensors.

        Args:
            weights_only: As in :func:`torch.load`; None means True.

        Raises:
            ConfigError: They hold an object that could run code, and ``weights_only`` is not False.
            CheckpointError: The file cannot be read.
        """
        data = _checked(self.path, META, self._manifest)
        try:
            meta = torch.load(
                io.BytesIO(data), map_location="cpu", weights_only=True if weights_only is None else weights_only
            )
        except pickle.UnpicklingError as error:
            raise ConfigError(
                "ckpt_path",
                str(self.path / META),
                "a file of plain values and tensors",
                f"it holds an object that could run code ({error}); if you trust it, allow its type with "
                "torch.serialization.add_safe_globals before loading",
            ) from error
        except Exception as error:  # not what torch.save writes: anything can come out of it
            raise self._unreadable(META, error) from error
        if not isinstance(meta, dict):
            raise self._unreadable(META, TypeError(f"{type(meta).__name__} is not dict"))
        return meta

    def read(self, state: dict[str, Any]) -> None:
        """Fill tensors from the files; a collective call over the group that opened the checkpoint.

        Args:
            state: Nested dictionaries and lists as they were saved, or a part of them, on any topology. Tensors are
                filled in place; other values are replaced.

        Raises:
            CheckpointError: A value is not in the checkpoint, has another shape there, or cannot be read without
                running code; all ranks raise it.
        """
        Ranks(self._group, self.path, "read").agree(lambda: self._read(state))

    def _read(self, state: dict[str, Any]) -> None:
        """The steps of ``torch.distributed.checkpoint.load`` that are not about its own table of contents.

        Ranks need not tell each other what they read: DCP's default planner leaves every rank's plan as it is.
        """
        planner, reader = _SafePlanner(), _ChunkReader(self.path)
        planner.set_up_planner(state, self.metadata, is_coordinator=True)
        reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        try:
            plan = planner.create_local_plan()
            reader.read_data(planner.finish_plan(plan), planner).wait()
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                self.path,
                f"a tensor or value of step {self.step} cannot be read without running code that the file names",
                "do not load checkpoints that you do not trust",
            ) from error

    def _unreadable(self, name: str, error: Exception) -> CheckpointError:
        return _damaged(self.path, name, f"step {self.step}", f"cannot be read: {type(error).__name__}: {error}")


class _ChunkReader(FileSystemReader):
    """DCP's reader loads a stored chunk again for each part of it that is wanted.

    That may be dozens: experts that lie elsewhere, the boxes of a sharded optimizer's run, both halves of a fused
    projection.
    """

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        parts: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            parts.setdefault(item.storage_index, []).append(item)
        for index in sorted(parts, key=lambda index: self._place(index)):
            name, _ = self._place(index)
            with self.fs.create_stream(self.fs.concat_path(self.path, name), "rb") as stream:
                chunk = self._slice_file(stream, self.storage_data[index])
                if parts[index][0].type == LoadItemType.BYTE_IO:
                    planner.load_bytes(parts[index][0], io.BytesIO(chunk.read(-1)))
                    continue
                stored = torch.load(chunk, map_location="cpu", weights_only=True)
            for item in parts[index]:
                part = stored
                for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    part = part.narrow(dim, offset, length)
                target = planner.resolve_tensor(item).detach()
                if target.shape != part.shape:
                    raise ValueError(f"{index.fqn} holds {tuple(part.shape)} where {tuple(target.shape)} is announced")
                target.copy_(part)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _place(self, index: MetadataIndex) -> tuple[str, int]:
        info = self.storage_data[index]
        return info.relative_path, info.offset


class _SafePlanner(DefaultLoadPlanner):
    """DCP's planner loads values that are no tensors with ``weights_only=False``.

    And where a part of a checkpoint is read it tries the keys of torch 2.3, by a global variable that would also change
    the keys of what is saved at that moment.
    """

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        return create_default_local_load_plan(self.state_dict, self.metadata)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        *path, last = self.mappings[read_item.dest_index.fqn]
        target: Any = self.original_state_dict
        for key in path:
            target = target[key]
        target[last] = torch.load(value, map_location="cpu", weights_only=True)


def open(path: Path, group: dist.ProcessGroup | None) -> Checkpoint:
    """Verify a checkpoint and open it; a collective call over ``group``.

    Every file is compared with the manifest before anything in it is used; the ranks divide the work.

    Args:
        path: The checkpoint's directory, or a link to it.
        group: Ranks that read; None for one process.

    Raises:
        CheckpointError: There is no checkpoint, it is not complete, or a file is damaged; all ranks raise it.
    """
    ranks = Ranks(group, path, "read")
    directory, manifest = ranks.first(lambda: _find(path))
    ranks.agree(lambda: _verify(directory, manifest, _share(manifest, ranks)))
    metadata = ranks.agree(lambda: _load_metadata(directory, manifest))
    return Checkpoint(directory, manifest, metadata, group)


def _find(path: Path) -> tuple[Path, Manifest]:
    directory = path.absolute()
    if not os.path.lexists(directory):
        found = [known for known in stand_ins(directory.parent) if known.hidden.visible == directory]
        if not found:
            raise CheckpointError(path, "there is no such checkpoint")
        directory = found[0].hidden.path
    if not directory.exists():
        raise CheckpointError(path, "it is a link that leads to nothing", "load what stands beside it")
    if not directory.is_dir():
        raise CheckpointError(path, "it is no directory that this library wrote as a checkpoint")
    try:
        manifest = load_manifest(directory)
    except DamageError as error:
        problem = f"{error}, so the checkpoint is not known to be complete"
        raise _damaged(directory, MANIFEST, step_of(directory), problem) from error
    for name in (METADATA, META):
        if name not in manifest.files:
            raise _damaged(directory, MANIFEST, f"step {manifest.step}", f"does not list {name!r}")
    return directory, manifest


def _share(manifest: Manifest, ranks: Ranks) -> list[str]:
    """The files that this rank verifies: of all ranks about as many bytes."""
    shares: list[list[str]] = [[] for _ in range(ranks.size)]
    loads = [0] * ranks.size
    for name, record in sorted(manifest.files.items(), key=lambda item: -item[1].size):
        rank = loads.index(min(loads))
        shares[rank].append(name)
        loads[rank] += record.size
    return shares[ranks.rank]


def _verify(directory: Path, manifest: Manifest, names: list[str]) -> None:
    for name in names:
        try:
            check_file(directory / name, manifest.files[name])
        except DamageError as error:
            raise _damaged(directory, name, f"step {manifest.step}", str(error)) from error


def _load_metadata(directory: Path, manifest: Manifest) -> Metadata:
    data = _checked(directory, METADATA, manifest)
    try:
        return load_metadata(data, manifest.files)
    except MetadataError as error:
        raise _damaged(directory, METADATA, f"step {manifest.step}", str(error)) from error


def _checked(directory: Path, name: str, manifest: Manifest) -> bytes:
    """What a file that will be unpickled holds; compared again, here where it is used."""
    try:
        return read_checked(directory / name, manifest.files[name])
    except DamageError as error:
        raise _damaged(directory, name, f"step {manifest.step}", str(error)) from error


def _damaged(directory: Path, name: str, step: str, problem: str) -> CheckpointError:
    return CheckpointError(
        directory, f"file {name!r} of {step} {problem}", "load another checkpoint, or restore this one from a copy"
    )
