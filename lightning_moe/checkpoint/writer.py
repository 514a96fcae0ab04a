"""Writing a checkpoint: every rank its tensors, through DCP, into a hidden directory that then gets its name."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from lightning_moe.checkpoint.agreement import Ranks
from lightning_moe.checkpoint.commit import prepare, put_in_place
from lightning_moe.checkpoint.files import FileRecord, NewFile, sync_directory
from lightning_moe.checkpoint.manifest import MANIFEST, META, Manifest
from lightning_moe.checkpoint.recovery import discard
from lightning_moe.errors import CheckpointError


def write(
    path: Path, state: dict[str, Any], meta: Mapping[str, Any], *, step: int, group: dist.ProcessGroup | None
) -> int:
    """Write a checkpoint, in the place of the one that has its name; a collective call over ``group``.

    Returns when the checkpoint is complete, on disk, and stands under its name. Until then a checkpoint that had the
    name before stands there, whole; also after an error, and whenever the process is killed.

    Args:
        path: Directory, on a file system that all ranks see. A link of that name is replaced, not followed.
        state: Nested dictionaries and lists of tensors, as :func:`torch.distributed.checkpoint.save` takes them. In a
            background thread: tensors in host memory that nobody changes meanwhile.
        meta: Plain values, of which the first rank's are kept.
        step: Optimizer steps so far.
        group: Ranks that write, with gloo, and used by no other thread; None for one process. The default group is not
            used.

    Returns:
        Bytes that this rank wrote.

    Raises:
        CheckpointError: A rank could not write; all raise it.
        ConfigError: Something is at ``path`` that is no checkpoint.
    """
    ranks = Ranks(group, path, "write", "older checkpoints are as they were")
    staging = ranks.first(lambda: prepare(path.absolute()))
    try:
        files = _StagedFiles(staging)
        _write_state(state, path.name, files, ranks)
        ranks.first(lambda: _write_meta(meta, files))
        records = ranks.gather(files.records)
        ranks.first(lambda: _commit(path, staging, _manifest(step, meta, records)))
    except BaseException:
        if ranks.is_first:
            discard(staging)
        raise
    return sum(record.size for record in files.records.values())


def _write_state(state: dict[str, Any], name: str, files: _StagedFiles, ranks: Ranks) -> None:
    """The steps of ``torch.distributed.checkpoint.save``, in its documented order.

    That function itself would tell the ranks of an error without its cause, in an exception that ``except Exception``
    does not catch; it would make one of Ctrl-C; and it warns where there is no process group.
    """
    planner = DefaultSavePlanner()
    writer = _Writer(files, name)

    def plan_locally() -> SavePlan:
        planner.set_up_planner(state, is_coordinator=ranks.is_first)
        writer.set_up_storage_writer(ranks.is_first)
        return writer.prepare_local_plan(planner.create_local_plan())

    def plan_globally(plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = planner.create_global_plan(plans)
        return writer.prepare_global_plan(plans), metadata

    def write_data(plan: SavePlan) -> list[WriteResult]:
        return writer.write_data(planner.finish_plan(plan), planner).wait()

    local_plans = ranks.gather(ranks.agree(plan_locally))
    plans, metadata = ranks.agree(lambda: plan_globally(local_plans) if ranks.is_first else ([], None))
    plan = ranks.scatter(plans)
    results = ranks.gather(ranks.agree(lambda: write_data(plan)))
    ranks.agree(lambda: writer.finish(metadata, results) if metadata is not None else None)


def _write_meta(meta: Mapping[str, Any], files: _StagedFiles) -> None:
    with files.create_stream(files.directory / META, "wb") as stream:
        torch.save(dict(meta), stream)


def _manifest(step: int, meta: Mapping[str, Any], records: list[dict[str, FileRecord]]) -> Manifest:
    epoch = meta.get("epoch")
    files = {name: record for of_rank in records for name, record in of_rank.items()}
    return Manifest(step, epoch if type(epoch) is int and epoch >= 0 else None, time.time_ns(), files)


def _commit(path: Path, staging: Path, manifest: Manifest) -> None:
    for name, record in manifest.files.items():
        file = staging / name
        if not file.exists() or file.stat().st_size != record.size:
            raise CheckpointError(
                path,
                f"the first rank does not see {name!r} as another rank wrote it",
                "save to a file system that all ranks share",
            )
    with NewFile(staging / MANIFEST) as stream:
        stream.write(manifest.dumps())
    sync_directory(staging)
    put_in_place(staging, path.absolute())


class _StagedFiles(FileSystemBase):
    """The file system of DCP's writer: new files in one directory, which the first rank has made."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[NewFile]:
        """A new file, which is recorded once it is on the disk."""
        assert mode == "wb", mode
        stream = NewFile(path)
        try:
            with stream:
                yield stream
        except RuntimeError as error:
            # What torch.save makes of an OSError tells of a position in an archive, and nothing of a full disk.
            if stream.failure is not None:
                raise stream.failure from error
            raise
        self.records[Path(path).name] = stream.record

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file of this rank."""
        os.rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """See that the directory is there: one that is made here would be on another file system than the others'."""
        os.stat(path)

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> Path:
        """A path in the directory."""
        return Path(path) / suffix

    def init_path(self, path: str | os.PathLike[str]) -> Path:
        """The directory."""
        return Path(path)

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Whether there is a file."""
        return Path(path).exists()

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Remove a file of this rank."""
        os.unlink(path)
        self.records.pop(Path(path).name, None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Paths are checked elsewhere."""
        return True


class _Writer(FileSystemWriter):
    """DCP's writer with one file and one thread a rank.

    DCP loses what its other threads raise: their tensors would be missing without an error. Tensors are in host memory
    as a rule; if not, they are copied one at a time, and not on a stream of their own, which DCP would ask of whatever
    device is current in this thread.
    """

    def __init__(self, files: _StagedFiles, name: str) -> None:
        super().__init__(files.directory, sync_files=False, thread_count=1, per_thread_copy_ahead=0)
        self.fs = files  # type: ignore[assignment]  # declared as the local one; DCP's fsspec writer does this too
        self._name = name

    def storage_meta(self) -> StorageMeta:
        """What DCP notes of the checkpoint: its name, where the default is the path of the hidden directory."""
        return StorageMeta(checkpoint_id=self._name, save_id=self.save_id)
