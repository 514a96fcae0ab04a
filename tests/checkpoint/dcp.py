"""Checkpoint contents through files, by DCP alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, load, save
from torch.optim import Optimizer

from lightning_moe.checkpoint.contents import pack, targets, unpack
from lightning_moe.checkpoint.stages import Stages
from lightning_moe.parallel.main_params import MainParam
from lightning_moe.parallel.mesh import ParallelMesh


def write_files(
    path: Path,
    checkpoint: Mapping[str, Any],
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    mains: Mapping[Tensor, MainParam],
    mesh: ParallelMesh,
) -> None:
    """Write what all ranks have as a directory; a collective call."""
    state, rest = pack(checkpoint, module, optimizers, mains, mesh)
    save(state, checkpoint_id=path)
    if mesh.global_rank == 0:
        torch.save(rest, path / "meta.pt")


def read_files(
    path: Path,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    mains: Mapping[Tensor, MainParam],
    mesh: ParallelMesh | None = None,
    *,
    strict: bool = True,
) -> dict[str, Any]:
    """Read this rank's part of a directory; a collective call."""
    metadata = FileSystemReader(path).read_metadata()
    stages = Stages.gather(module, optimizers, mains, mesh)
    state = targets(metadata, module, optimizers, mains, path=path, strict=strict, stages=stages)
    load(state, checkpoint_id=path)
    return unpack(state, torch.load(path / "meta.pt"), module, optimizers, mains, path=path, stages=stages)
