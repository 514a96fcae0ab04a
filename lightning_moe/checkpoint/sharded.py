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
from lightning_moe.checkpoint.shards import LogicalShard, to_logical, whole_shape
from lightning_moe.errors import ConfigError
from lightning_moe.parallel.sharding import ShardSpec, shard_specs
from lightning_moe.parallel.state import local_part

META_FILENAME = "meta.pt"
_MODEL = "model"
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
    specs = shard_specs(module)
    rest = dict(checkpoint)
    state: dict[str, Any] = {}
    for key, section in (("state_dict", _MODEL), ("current_model_state", "current_model_state")):
        if key in rest:
            state[section] = {name: to_logical(name, value, specs) for name, value in rest.pop(key).items()}
    groups = []
    for i, (optimizer, local) in enumerate(zip(optimizers, rest.pop("optimizer_states", []), strict=False)):
        named = name_optimizer_state(optimizer, local, module)
        groups.append(named["param_groups"])
        state[f"optimizer_{i}"] = {"state": mark_sharded(named["state"], module)}
    if groups:
        rest[_GROUPS] = groups
    path.mkdir(parents=True, exist_ok=True)
    dcp_save(state, checkpoint_id=path)
    if writes_meta:
        torch.save(rest, path / META_FILENAME)


def load_sharded(
    path: Path, module: nn.Module, optimizers: Sequence[Optimizer], *, weights_only: bool | None = None
) -> dict[str, Any]:
    """Read this rank's part of a sharded directory as a Lightning checkpoint dictionary; a collective call.

    Args:
        path: Directory that :func:`save_sharded` wrote, on any topology.
        module: Module with this rank's parameters; only names, shapes and ShardSpecs are used.
        optimizers: Optimizers whose local state is wanted; empty for evaluation.
        weights_only: As in :func:`torch.load`, for ``meta.pt``; None means True.

    Returns:
        Lightning's dictionary with local tensors, as if this topology had saved it.

    Raises:
        ConfigError: The checkpoint holds other parameters than the module, or ``meta.pt`` holds unsafe objects.
    """
    metadata = FileSystemReader(path).read_metadata()
    specs = shard_specs(module)
    template = {name: value.detach().clone() for name, value in module.state_dict().items()}
    _check_names(path, metadata, template, specs)
    state: dict[str, Any] = {}
    sections = {metadata.planner_data[key][0] for key in metadata.state_dict_metadata}
    for section in (_MODEL, "current_model_state"):
        if section in sections:
            state[section] = {name: to_logical(name, value.clone(), specs) for name, value in template.items()}
    for i, optimizer in enumerate(optimizers):
        if f"optimizer_{i}" in sections:
            state[f"optimizer_{i}"] = {"state": empty_state(f"optimizer_{i}", optimizer, metadata, module)}
    dcp_load(state, checkpoint_id=path)

    checkpoint = _load_meta(path, weights_only)
    checkpoint["state_dict"] = {name: _unwrap(value) for name, value in state[_MODEL].items()}
    if "current_model_state" in state:
        checkpoint["current_model_state"] = {k: _unwrap(v) for k, v in state["current_model_state"].items()}
    groups = checkpoint.pop(_GROUPS, [])
    if optimizers and groups:
        checkpoint["optimizer_states"] = []
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
    specs = shard_specs(module)
    checkpoint = dict(checkpoint)
    checkpoint["state_dict"] = {name: local_part(v, specs.get(name)) for name, v in checkpoint["state_dict"].items()}
    groups = checkpoint.pop(_GROUPS, None)
    if optimizers and "optimizer_states" in checkpoint:
        states = []
        for i, (optimizer, whole) in enumerate(zip(optimizers, checkpoint["optimizer_states"], strict=True)):
            named = (
                name_optimizer_state(optimizer, whole, module)
                if groups is None
                else {"state": whole["state"], "param_groups": groups[i]}
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
    path: Path, metadata: Metadata, template: Mapping[str, Tensor], specs: Mapping[str, ShardSpec]
) -> None:
    """Compare names and whole shapes with the file's before anything is read, so that the message can name them."""
    saved = {
        str(metadata.planner_data[key][1]): entry
        for key, entry in metadata.state_dict_metadata.items()
        if metadata.planner_data[key][0] == _MODEL
    }
    missing, unknown = sorted(template.keys() - saved.keys()), sorted(saved.keys() - template.keys())
    differing = [
        f"{name}: {tuple(entry.size)} in the file, {whole_shape(template[name], specs.get(name))} in the model"
        for name, entry in saved.items()
        if name in template
        and isinstance(entry, TensorStorageMetadata)
        and tuple(entry.size) != whole_shape(template[name], specs.get(name))
    ]
    if missing or unknown or differing:
        raise ConfigError(
            "ckpt_path",
            str(path),
            "a checkpoint of a model with the same parameters",
            f"missing in the file: {missing}; unknown to the model: {unknown}; other shapes: {differing}",
        )


def _unwrap(value: Any) -> Any:
    return value.local if isinstance(value, LogicalShard) else value
