"""Saving and loading training checkpoints whose tensors are spread over ranks.

A checkpoint is a directory that DCP writes, all ranks in parallel, beside ``meta.pt`` with what Lightning keeps besides
tensors (loop progress, callbacks, hyperparameters). The layout is that of Lightning's own sharded strategies: models
under ``model``, optimizers under ``optimizer_0``, ``optimizer_1``, ..., so that
``python -m lightning.pytorch.utilities.consolidate_checkpoint`` works on it. Tensors are whole and in logical order,
optimizer state is keyed by parameter name: nothing in the files depends on the number of ranks.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim import Optimizer

from lightning_moe.checkpoint.optimizer_state import (
    cut_state,
    empty_state,
    mark_sharded,
    name_optimizer_state,
    number_optimizer_state,
    unmark_sharded,
)
from lightning_moe.checkpoint.shards import LogicalShard, to_logical
from lightning_moe.errors import ConfigError
from lightning_moe.parallel.sharding import ShardSpecs, local_part, state_dict_specs, whole_shape

META_FILENAME = "meta.pt"
_MODEL = "model"
_SECTIONS = {"state_dict": _MODEL, "current_model_state": "current_model_state"}
_OBJECTS = "objects_of_"
"""Prefix of what a state dict holds besides tensors (``get_extra_state``): rank 0's is kept in ``meta.pt``."""
_GROUPS = "optimizer_param_groups"


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a directory that :func:`save_sharded` wrote."""
    return path.is_dir() and (path / ".metadata").is_file() and (path / META_FILENAME).is_file()


def save_sharded(
    path: Path,
    checkpoint: dict[str, Any],
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    writes_meta: bool,
) -> None:
    """Write a Lightning checkpoint dictionary as a sharded directory; a collective call.

    Args:
        path: Directory; created where missing.
        checkpoint: Lightning's dictionary. ``state_dict`` (and ``current_model_state``, which weight averaging adds)
            map parameter names to local tensors, ``optimizer_states`` are local states in the order of ``optimizers``.
        module: The module the names belong to.
        optimizers: Optimizers the states belong to.
        writes_meta: Whether this rank writes ``meta.pt``; exactly one rank must.
    """
    specs = state_dict_specs(module)
    rest = dict(checkpoint)
    state: dict[str, Any] = {}
    for key, section in _SECTIONS.items():
        if key in rest:
            values = rest.pop(key)
            state[section] = {name: to_logical(v, specs.get(name, ())) for name, v in values.items() if _is_tensor(v)}
            if objects := {name: v for name, v in values.items() if not _is_tensor(v)}:
                rest[_OBJECTS + key] = objects
    if "optimizer_states" in rest:
        rest[_GROUPS] = []
        for i, (optimizer, local) in enumerate(zip(optimizers, rest.pop("optimizer_states"), strict=False)):
            named = name_optimizer_state(optimizer, local, module)
            rest[_GROUPS].append(named["param_groups"])
            state[f"optimizer_{i}"] = {"state": mark_sharded(named["state"], module)}
    path.mkdir(parents=True, exist_ok=True)
    dcp_save(state, checkpoint_id=path)
    if writes_meta:
        torch.save(rest, path / META_FILENAME)


def load_sharded(
    path: Path,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    weights_only: bool | None = None,
    strict: bool = True,
) -> dict[str, Any]:
    """Read this rank's part of a sharded directory as a Lightning checkpoint dictionary; a collective call.

    Args:
        path: Directory that :func:`save_sharded` wrote, on any topology.
        module: Module with this rank's parameters; only names, shapes and ShardSpecs are used.
        optimizers: Optimizers whose local state is wanted; empty for evaluation.
        weights_only: As in :func:`torch.load`, for ``meta.pt``; None means True.
        strict: Whether the checkpoint must hold exactly the module's names; otherwise what both have is read.

    Returns:
        Lightning's dictionary with local tensors, as if this topology had saved it.

    Raises:
        ConfigError: The checkpoint holds other parameters than the module, or ``meta.pt`` holds unsafe objects.
    """
    metadata = FileSystemReader(path).read_metadata()
    specs = state_dict_specs(module)
    template = {name: value for name, value in module.state_dict().items() if _is_tensor(value)}
    _check_names(path, metadata, template, specs, strict)
    state: dict[str, Any] = {}
    saved: dict[str, set[str]] = {}
    for key in metadata.state_dict_metadata:
        section, *names = metadata.planner_data[key]
        saved.setdefault(section, set()).update(map(str, names[:1]))
    for section in _SECTIONS.values():
        if section in saved:
            state[section] = {
                name: to_logical(torch.empty_like(value), specs.get(name, ()))
                for name, value in template.items()
                if name in saved[section]
            }
    for i, optimizer in enumerate(optimizers):
        if f"optimizer_{i}" in saved:
            state[f"optimizer_{i}"] = {"state": empty_state(f"optimizer_{i}", optimizer, metadata, module)}
    dcp_load(state, checkpoint_id=path)

    checkpoint = _load_meta(path, weights_only)
    for key, section in _SECTIONS.items():
        objects = checkpoint.pop(_OBJECTS + key, {})
        if section in saved or objects or section == _MODEL:
            checkpoint[key] = {name: _unwrap(value) for name, value in state.get(section, {}).items()} | objects
    groups = checkpoint.pop(_GROUPS, None)
    if groups is not None:
        checkpoint["optimizer_states"] = []
        if optimizers and len(optimizers) != len(groups):
            raise ConfigError("configure_optimizers", f"{len(optimizers)} optimizers", f"{len(groups)}, as in {path}")
        for i, optimizer in enumerate(optimizers):
            named = state.get(f"optimizer_{i}", {"state": {}})["state"]  # absent before the first step
            whole = {"state": unmark_sharded(named), "param_groups": groups[i]}
            checkpoint["optimizer_states"].append(number_optimizer_state(optimizer, whole, module))
    return checkpoint


def localize(checkpoint: dict[str, Any], module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Cut this rank's part out of a checkpoint of whole tensors, e.g. one written by a single-device run.

    Args:
        checkpoint: Lightning's dictionary with whole tensors; optimizer states numbered as Lightning does, or keyed by
            parameter name as the consolidation tool leaves them.
        module: Module with this rank's parameters.
        optimizers: Optimizers whose local state is wanted; empty for evaluation.
    """
    specs = state_dict_specs(module)
    checkpoint = dict(checkpoint)
    for key in _SECTIONS:
        if key in checkpoint:
            whole = checkpoint[key] | checkpoint.pop(_OBJECTS + key, {})
            checkpoint[key] = {
                name: local_part(value, specs.get(name, ())) if _is_tensor(value) else value
                for name, value in whole.items()
            }
    groups = checkpoint.pop(_GROUPS, None)
    if optimizers and "optimizer_states" in checkpoint:
        states = []
        for i, (optimizer, numbered) in enumerate(zip(optimizers, checkpoint["optimizer_states"], strict=True)):
            named = (
                name_optimizer_state(optimizer, numbered, module)
                if groups is None
                else {"state": numbered["state"], "param_groups": groups[i]}
            )
            named["state"] = cut_state(named["state"], module)
            states.append(number_optimizer_state(optimizer, named, module))
        checkpoint["optimizer_states"] = states
    return checkpoint


def _load_meta(path: Path, weights_only: bool | None) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = torch.load(
            path / META_FILENAME,
            map_location="cpu",
            weights_only=True if weights_only is None else weights_only,
        )
    except pickle.UnpicklingError as error:
        raise ConfigError(
            "ckpt_path",
            str(path / META_FILENAME),
            "a file of plain values and tensors",
            f"it holds an object that could run code ({error}); if you trust it, allow its type with "
            "torch.serialization.add_safe_globals before loading",
        ) from error
    return meta


def _check_names(
    path: Path, metadata: Metadata, template: Mapping[str, Tensor], specs: Mapping[str, ShardSpecs], strict: bool
) -> None:
    """Compare names and whole shapes with the file's before anything is read, so that the message can name them."""
    saved = {
        str(metadata.planner_data[key][1]): entry
        for key, entry in metadata.state_dict_metadata.items()
        if metadata.planner_data[key][0] == _MODEL
    }
    missing, unknown = sorted(template.keys() - saved.keys()), sorted(saved.keys() - template.keys())
    if not strict:
        missing = unknown = []
    differing = [
        f"{name}: {tuple(entry.size)} in the file, {whole_shape(template[name], specs.get(name, ()))} in the model"
        for name, entry in saved.items()
        if name in template
        and isinstance(entry, TensorStorageMetadata)
        and tuple(entry.size) != whole_shape(template[name], specs.get(name, ()))
    ]
    if missing or unknown or differing:
        raise ConfigError(
            "ckpt_path",
            str(path),
            "a checkpoint of a model with the same parameters",
            f"missing in the file: {missing}; unknown to the model: {unknown}; other shapes: {differing}",
        )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _unwrap(value: Any) -> Any:
    return value.local if isinstance(value, LogicalShard) else value
