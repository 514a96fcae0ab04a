"""Ranks that do something together, and of which all fail where one does."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from lightning_moe.errors import CheckpointError, ConfigError

_T = TypeVar("_T")

_REMEDIES = {
    errno.ENOSPC: "free space there, or use another folder",
    errno.EDQUOT: "your quota is used up: free space there, or use another folder",
    errno.EFBIG: "the file system or a limit of the shell (ulimit -f) does not take such large files",
    errno.EACCES: "check the owner and the permissions of the folder",
    errno.EPERM: "check the owner and the permissions of the folder",
    errno.EROFS: "the file system is mounted read-only: use another folder",
    errno.ENOENT: "all ranks must see the folder, on one file system",
}


class Ranks:
    """The ranks that save or load a checkpoint together.

    Where one of them fails, all raise the same error: a rank that went on alone would wait for the others until the
    time-out of its process group, and the run would end with that.

    Args:
        group: Process group whose collectives may be used; None for one process.
        path: The checkpoint, for messages.
        task: What they do with it, for messages: "rank 0 could not {task} it".
        consequence: Ends the hint of an error.
    """

    def __init__(self, group: dist.ProcessGroup | None, path: Path, task: str, consequence: str = "") -> None:
        self._group = group
        self._path = path
        self._task = task
        self._consequence = consequence
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that does what only one may do."""
        return self.rank == 0

    def agree(self, work: Callable[[], _T]) -> _T:
        """Do this rank's part; returns when all ranks have done theirs.

        Raises:
            CheckpointError: A rank could not do its part.
            ConfigError: A rank found a mistake of the user.
        """
        values, error, cause = self._attempt(work)
        errors = [error]
        if self._group is not None:
            errors = [None] * self.size
            dist.all_gather_object(errors, error, group=self._group)
            errors[self.rank] = error  # itself, not a copy without its traceback
        _raise_any(errors, cause)
        return values[0]

    def first(self, work: Callable[[], _T]) -> _T:
        """Let the first rank do something, and give its result to all.

        Raises:
            CheckpointError: It could not do it.
            ConfigError: It found a mistake of the user.
        """
        values, error, cause = self._attempt(work) if self.is_first else ([], None, None)
        if self._group is not None:
            shared = [(values, error)]
            dist.broadcast_object_list(shared, group=self._group, group_src=0)
            if not self.is_first:
                values, error = shared[0]
        _raise_any([error], cause)
        return values[0]

    def gather(self, value: _T) -> list[_T]:
        """Every rank's value, in their order, on the first rank; nothing on the others."""
        if self._group is None:
            return [value]
        values: list[_T] | None = [value] * self.size if self.is_first else None
        dist.gather_object(value, values, group=self._group, group_dst=0)
        return values or []

    def scatter(self, values: Sequence[_T]) -> _T:
        """This rank's one of the first rank's values."""
        if self._group is None:
            return values[0]
        received: list[_T | None] = [None]
        dist.scatter_object_list(received, list(values) if self.is_first else None, group=self._group, group_src=0)
        return received[0]  # type: ignore[return-value]  # it is one of the values now

    def _attempt(self, work: Callable[[], _T]) -> tuple[list[_T], Exception | None, BaseException | None]:
        """The result of ``work``, in a list; or the error that all ranks are to raise, and what it was here."""
        try:
            return [work()], None, None
        except (CheckpointError, ConfigError) as error:
            return [], error, None
        except BaseException as cause:
            return [], self._explain(cause), cause

    def _explain(self, cause: BaseException) -> CheckpointError:
        remedy = ""
        match cause:
            case OSError(errno=int(code), strerror=str(text)):
                reason = f"could not {self._task} it: {text}"
                reason += f" ({os.fsdecode(cause.filename)})" if isinstance(cause.filename, str | bytes) else ""
                remedy = _REMEDIES.get(code, "")
            case Exception():
                reason = f"could not {self._task} it: {type(cause).__name__}: {cause}"
            case _:
                reason = f"was interrupted by {type(cause).__name__}"
        hint = "; ".join(part for part in (remedy, self._consequence) if part)
        return CheckpointError(self._path, f"rank {self.rank} {reason}", hint)


def _raise_any(errors: Sequence[Exception | None], cause: BaseException | None) -> None:
    """Raise the first error, if any; who was interrupted goes on with the interruption."""
    if cause is not None and not isinstance(cause, Exception):
        raise cause
    for error in errors:
        if error is not None:
            raise error from cause
