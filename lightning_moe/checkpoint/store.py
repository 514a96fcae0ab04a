"""Checkpoints as files: directories that exist whole or not at all, are verified before use, and run no code.

A checkpoint is a directory of this layout, which tools for torch's distributed checkpoints read as well::

    last.ckpt/
        .metadata         DCP's table of contents: tensors, and where their chunks are
        __0_0.distcp ...  chunks of tensors, a file for every rank that wrote
        meta.pt           plain values
        manifest.json     step, epoch, size and crc32 of every other file; written last

Nothing here knows of models, optimizers or Lightning.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch.distributed as dist

from lightning_moe.checkpoint.agreement import Ranks
from lightning_moe.checkpoint.commit import remove
from lightning_moe.checkpoint.files import DamageError
from lightning_moe.checkpoint.hidden import Hidden
from lightning_moe.checkpoint.manifest import is_checkpoint, load_manifest, step_in_name
from lightning_moe.checkpoint.reader import Checkpoint, open
from lightning_moe.checkpoint.recovery import stand_ins
from lightning_moe.checkpoint.writer import write
from lightning_moe.errors import CheckpointError

__all__ = ["Checkpoint", "find_newest", "is_checkpoint", "open", "remove", "write"]


def find_newest(folder: Path, group: dist.ProcessGroup | None) -> Checkpoint:
    """Open the newest checkpoint in a folder that is complete and undamaged; a collective call over ``group``.

    The newest is that of the highest step, and of those the one that was written last. Damaged ones are passed over
    with a warning that names the file and the step. A checkpoint whose name a kill has taken counts as well.

    Args:
        folder: The folder; checkpoints in folders below it do not count.
        group: Ranks that read; None for one process.

    Raises:
        CheckpointError: No checkpoint in the folder can be read.
    """
    ranks = Ranks(group, folder, "search")
    candidates = ranks.first(lambda: _newest_first(folder.absolute()))
    for candidate in candidates:
        try:
            return open(candidate, group)
        except CheckpointError as error:
            if ranks.is_first:
                warnings.warn(f"Looking for an older checkpoint, because of {error}", stacklevel=2)
    raise CheckpointError(
        folder,
        f"none of the {len(candidates)} checkpoints in this folder can be read"
        if candidates
        else "there is no checkpoint in this folder",
    )


def _newest_first(folder: Path) -> list[Path]:
    ages: dict[Path, tuple[float, int]] = {}
    known: set[str] = set()
    # Links come last: what they lead to is known already if it is in the same folder.
    for path in sorted(folder.iterdir(), key=Path.is_symlink):
        real = os.path.realpath(path)
        if real in known or Hidden.parse(path) is not None or not is_checkpoint(path):
            continue
        known.add(real)
        try:
            manifest = load_manifest(path)
            ages[path] = manifest.step, manifest.time_ns
        except DamageError:
            # Of unknown step it may be the newest: it comes first, so that it is not passed over without a warning.
            step = step_in_name(path)
            ages[path] = (float("inf") if step is None else step), 0
    for found in stand_ins(folder):
        ages[found.hidden.path] = found.manifest.step, found.manifest.time_ns
    return sorted(ages, key=ages.__getitem__, reverse=True)
