"""What a process that was killed leaves in a folder of checkpoints: what can stand for what, and what is rubbish."""

from __future__ import annotations

import os
import shutil
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lightning_moe.checkpoint.files import DamageError
from lightning_moe.checkpoint.hidden import Hidden, Kind, find_hidden
from lightning_moe.checkpoint.manifest import Manifest, load_manifest


@dataclass(frozen=True)
class StandIn:
    """A complete checkpoint under a hidden name, whose own name stands for nothing."""

    hidden: Hidden
    manifest: Manifest


def stand_ins(folder: Path) -> list[StandIn]:
    """The newest complete checkpoint for each name that a kill left without one."""
    newest: dict[Path, StandIn] = {}
    for hidden in find_hidden(folder):
        # What a live process works on is complete only for the moment before it gets its name, or is deleted.
        if hidden.kind is Kind.REMOVED or hidden.alive or os.path.lexists(hidden.visible):
            continue
        manifest = _complete(hidden.path)
        known = newest.get(hidden.visible)
        if manifest is not None and (known is None or _age(known.manifest) < _age(manifest)):
            newest[hidden.visible] = StandIn(hidden, manifest)
    return list(newest.values())


def recover(folder: Path) -> None:
    """Give names back that kills have taken, and delete what killed processes of this host left."""
    for found in stand_ins(folder):
        if found.hidden.alive is False:
            _attempt_rename(found.hidden.path, found.hidden.visible)
    kept = {found.hidden.visible for found in stand_ins(folder)}  # of other hosts, whose processes may live
    for hidden in find_hidden(folder):
        if hidden.alive is False and hidden.visible not in kept:
            discard(hidden.path)


def discard(path: Path) -> None:
    """Delete what is under a hidden name; a part that a kill leaves is not complete, and stands for nothing.

    What cannot be deleted stays, with a warning: it is no reason to lose the checkpoint that was saved.
    """
    try:
        with suppress(FileNotFoundError):  # another run cleans up too
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as error:
        warnings.warn(f"{path} could not be deleted ({error.strerror}) and takes up space", stacklevel=2)


def _attempt_rename(path: Path, visible: Path) -> None:
    with suppress(OSError):  # it can be read under its hidden name
        os.rename(path, visible)


def _complete(directory: Path) -> Manifest | None:
    """The manifest, if every file is there and as long as it says; that takes no reading of tensors."""
    try:
        manifest = load_manifest(directory)
        sizes = {name: (directory / name).lstat().st_size for name in manifest.files}
    except (DamageError, OSError):
        return None
    return manifest if all(sizes[name] == record.size for name, record in manifest.files.items()) else None


def _age(manifest: Manifest) -> tuple[int, int]:
    return manifest.step, manifest.time_ns
