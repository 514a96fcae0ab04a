"""When a run's checkpoints are written, read and removed, and by whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.utilities import rank_zero_warn

from lightning_moe.checkpoint import store
from lightning_moe.checkpoint.agreement import Ranks
from lightning_moe.checkpoint.background import BackgroundWriter
from lightning_moe.checkpoint.staging import HostCopy
from lightning_moe.errors import CheckpointError, ConfigError

_T = TypeVar("_T")

_NEWEST = "last"
"""How the names begin that Lightning gives to the newest checkpoint (``ModelCheckpoint.CHECKPOINT_NAME_LAST``)."""


class RunCheckpoints:
    """The checkpoints of one run; all methods are collective calls unless they say otherwise.

    Args:
        group: Ranks that write together; on a background thread, so it is used for nothing else. None for one process.
        background: Whether :meth:`save` returns as soon as there is a copy in host memory, between :meth:`start` and
            :meth:`finish`.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, background: bool = False) -> None:
        self._group = group
        self._writer = BackgroundWriter() if background else None
        self._host = HostCopy()
        self._obsolete: list[Path] = []
        self._saving = False
        self._running = False

    def start(self) -> None:
        """A run begins, which will end with :meth:`finish`; on this rank alone."""
        self._running = True

    def save(
        self,
        path: Path,
        state: dict[str, Any],
        meta: Mapping[str, Any],
        late: Callable[[dist.ProcessGroup | None], Mapping[str, Any]],
        step: int,
        *,
        at_once: bool = False,
    ) -> None:
        """Write a checkpoint, now or in the background.

        Args:
            path: Directory to write.
            state: What DCP writes.
            meta: Plain values.
            late: Gives more plain values; called where the checkpoint is written, with the group to communicate over.
            step: Optimizer steps so far.
            at_once: Whether it must be on disk when this returns.

        Raises:
            CheckpointError: This checkpoint, or the one before that was written in the background, failed.
        """
        self.wait()  # the host copy of the one before is free again
        # After the end of a run nobody would wait, and the process may end while the checkpoint is being written.
        if self._writer is None or at_once or not self._running:
            _write(path, state, meta, late, step, self._group)
            return
        copied, plain = self._host.take(state), deepcopy(dict(meta))
        self._saving = True
        self._writer.submit(partial(_write, path, copied, plain, late, step, self._group))

    def remove(self, path: Path) -> None:
        """Remove a checkpoint once everything that was saved before is on disk; called on one rank."""
        if self._writer is None:
            store.remove(path)
        else:
            self._obsolete.append(path)

    def open(self, path: Path) -> store.Checkpoint:
        """Open a checkpoint for reading: the directory itself, or the newest valid one in a folder of them.

        The name that Lightning gives to the newest checkpoint stands for the newest one that is valid.

        Raises:
            CheckpointError: There is no such checkpoint, or it is damaged.
        """
        self.wait()
        if path.is_dir() and not store.is_checkpoint(path):
            return store.find_newest(path, self._group)
        try:
            return store.open(path, self._group)
        except CheckpointError as error:
            if not path.name.startswith(_NEWEST):
                raise
            rank_zero_warn(f"{error} Looking for the newest valid checkpoint beside it.")
            return store.find_newest(path.parent, self._group)

    def agree(self, path: Path, work: Callable[[], _T]) -> _T:
        """Do this rank's part of reading a checkpoint, which holds no collective call; where one fails, all do.

        Raises:
            ConfigError: A rank has another model or other optimizers than the checkpoint.
            CheckpointError: Something else went wrong.
        """
        return Ranks(self._group, path, "read").agree(work)

    @property
    def unfinished(self) -> bool:
        """Whether a checkpoint may still be under way, the same on all ranks; not a collective call."""
        return self._saving

    def wait(self) -> None:
        """Wait until everything that was saved is on disk, and what it replaces is gone.

        Raises:
            CheckpointError: Writing in the background has failed. What was to be replaced is kept then.
        """
        obsolete, self._obsolete, self._saving = self._obsolete, [], False
        if self._writer is not None:
            self._writer.wait()
        for path in obsolete:
            store.remove(path)

    def finish(self) -> None:
        """The run ends: wait, and give the memory of the copies back.

        Raises:
            CheckpointError: Writing in the background has failed.
        """
        self._running = False
        try:
            self.wait()
        finally:
            self._host = HostCopy()


def are_linked(trainer: pl.Trainer) -> bool:
    """Whether a callback makes ``last.ckpt`` a link to each checkpoint as soon as saving it returns.

    The link would lead to nothing until the checkpoint is there, and after a kill for good: ``ckpt_path="last"`` would
    begin anew, silently. Where not even the folder is there yet, Lightning fails.
    """
    return any(getattr(callback, "save_last", None) == "link" for callback in trainer.checkpoint_callbacks)


def local_path(path: str | Path) -> Path:
    """The absolute path on the local file system; the working directory may change before it is used.

    Raises:
        ConfigError: It is a remote one; ``Path("s3://bucket/a")`` would be a directory ``s3:`` on the local disk.
    """
    if not _is_local_file_protocol(path):
        raise ConfigError("filepath", str(path), "a local path", "copy the directory there after the run")
    return Path(str(path).removeprefix("file://")).absolute()


def _write(
    path: Path,
    state: dict[str, Any],
    meta: Mapping[str, Any],
    late: Callable[[dist.ProcessGroup | None], Mapping[str, Any]],
    step: int,
    group: dist.ProcessGroup | None,
) -> None:
    store.write(path, state, {**meta, **late(group)}, step=step, group=group)
