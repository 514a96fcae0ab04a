"""Giving a complete directory its name, and taking names away: as a whole or not at all, whenever a kill comes."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from lightning_moe.checkpoint.files import exchange, sync_directory
from lightning_moe.checkpoint.hidden import Kind, find_hidden, new_hidden
from lightning_moe.checkpoint.manifest import META, METADATA
from lightning_moe.checkpoint.recovery import discard, recover
from lightning_moe.errors import CheckpointError, ConfigError

# [Note: how a name changes its checkpoint]
# A checkpoint is written under a hidden name, the manifest last, and every file is on the disk before it gets its own
# name. Where nothing has that name, this is one rename. Where a checkpoint has it, one call of the kernel swaps the
# two, and the old one is deleted. Some kernels and file systems cannot swap: there the old one is first moved to a
# hidden name. A kill between those two renames leaves nothing under the name, and two complete checkpoints under hidden
# ones: readers take the newer one, and the next writer gives it the name back (recovery.py).
# What is removed gets a hidden name too before any of its files is deleted: no visible name ever stands for a part.


def prepare(path: Path) -> Path:
    """Make the hidden directory in which the checkpoint ``path`` is written.

    Raises:
        ConfigError: Something is at ``path`` that is no checkpoint, and would be deleted.
        OSError: The directory cannot be made.
    """
    if not path.is_symlink():
        if path.exists() and not path.is_dir():
            raise ConfigError("filepath", str(path), "a new path or a checkpoint directory", "a file is in the way")
        if path.is_dir() and any(path.iterdir()) and not _holds_checkpoint(path):
            raise ConfigError(
                "filepath",
                str(path),
                "a new path or a checkpoint directory",
                "this directory has other contents, which would be deleted",
            )
    _make_folder(path.parent)
    recover(path.parent)
    staging = new_hidden(path, Kind.STAGING)
    os.mkdir(staging)
    return staging


def put_in_place(staging: Path, path: Path) -> None:
    """Give a complete checkpoint its name, in the place of what has it; see [Note: how a name changes its checkpoint].

    Raises:
        OSError: The name could not be changed; it stands for what it stood for before.
    """
    old: Path | None = None
    with ExitStack() as undo:
        if not os.path.lexists(path):
            os.rename(staging, path)
            undo.callback(os.rename, path, staging)
        elif exchange(staging, path):
            undo.callback(exchange, staging, path)
            old = staging
        else:
            old = new_hidden(path, Kind.REPLACED)
            os.rename(path, old)
            undo.callback(os.rename, old, path)
            os.rename(staging, path)
            undo.callback(os.rename, path, staging)
        sync_directory(path.parent)
        undo.pop_all()
    if old is not None:
        discard(old)


def remove(path: Path) -> None:
    """Delete a checkpoint; without an error if there is none. Of a link only the link goes. Called on one rank.

    Raises:
        CheckpointError: It cannot be removed.
    """
    path = path.absolute()
    removed = new_hidden(path, Kind.REMOVED)
    try:
        os.rename(path, removed)
        sync_directory(path.parent)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CheckpointError(
            path, f"it cannot be removed: {error.strerror}", f"check who may write in {path.parent}"
        ) from error
    if not path.parent.is_dir():
        return
    # What a killed process left for this name would otherwise get it back.
    for hidden in find_hidden(path.parent):
        if hidden.path == removed or (hidden.visible == path and hidden.alive is False):
            discard(hidden.path)


def _holds_checkpoint(path: Path) -> bool:
    """More than ``manifest.json``, which other programs write too."""
    return any((path / name).exists() for name in (METADATA, META)) or any(path.glob("*.distcp"))


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, on the disk as well: a commit must not sit in a folder that a crash takes."""
    if not folder.exists():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_directory(folder.parent)
