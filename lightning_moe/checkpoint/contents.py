"""What a training checkpoint holds: Lightning's dictionary on one side, tensors for DCP and plain values on the other.

The layout is that of Lightning's own sharded strategies: models under ``model``, optimizers under ``optimizer_0``,
``optimizer_1``, ..., and plain values (loop progress, callbacks, hyperparameters) apart, so that
``python -m lightning.pytorch.utilities.consolidate_checkpoint`` works on it. ``main_weights`` holds what an optimizer
steps where the model's weights have fewer digits. Tensors are whole and in logical order, optimizer state and main
weights are keyed by parameter name: nothing depends on the number of ranks, on what stages of a pipeline they hold, nor
on how an optimizer is sharded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from lightning_moe.checkpoint.mains import MainShard, main_shards
from lightning_moe.checkpoint.optimizer_state import (
    cut_state,
    empty_state,
    mark_sharded,
    name_optimizer_state,
    number_optimizer_state,
    unmark_sharded,
)
from lightning_moe.checkpoint.shards import LogicalShard, to_logical
from lightning_moe.checkpoint.stages import Stages, held_before, merge_groups, merge_objects
from lightning_moe.errors import ConfigError
from lightning_moe.parallel.main_params import MainParam
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import local_part, state_dict_specs

MAIN_WEIGHTS = "main_weights"
"""Key, in Lightning's dictionary as in files, of the main parameters that have more digits than the model's."""

_MODEL = "model"
_SECTIONS = {"state_dict": _MODEL, "current_model_state": "current_model_state"}
_OBJECTS = "objects_of_"
"""Prefix of what a state dict holds besides tensors (``get_extra_state``): kept with the plain values, from the first
rank that has it."""
_GROUPS = "optimizer_param_groups"


def pack(
    checkpoint: Mapping[str, Any],
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    mains: Mapping[Tensor, MainParam],
    mesh: ParallelMesh | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide a Lightning checkpoint dictionary into what all ranks write and what one rank writes.

    A collective call where there are several pipeline stages.

    Args:
        checkpoint: Lightning's dictionary. ``state_dict`` (and ``current_model_state``, which weight averaging adds)
            map parameter names to local tensors, ``optimizer_states`` are local states in the order of ``optimizers``.
        module: The module the names belong to.
        optimizers: Optimizers the states belong to.
        mains: The main parameters that the optimizers hold in the place of the module's.
        mesh: The parallel mesh; None in a process that has none, and no sharded main parameters either.

    Returns:
        Tensors as DCP writes them, in the memory of the module and the optimizers; and all other values.

    Raises:
        ConfigError: An optimizer's state differs between ranks in a way that no file can hold.
    """
    specs = state_dict_specs(module)
    rest = dict(checkpoint)
    state: dict[str, Any] = {}
    for key, section in _SECTIONS.items():
        if key in rest:
            values = rest.pop(key)
            before = held_before(values, mesh)
            state[section] = {
                name: to_logical(value, specs.get(name, ()))
                for name, value in values.items()
                if _is_tensor(value) and name not in before
            }
            if objects := merge_objects({name: v for name, v in values.items() if not _is_tensor(v)}, mesh):
                rest[_OBJECTS + key] = objects
    if "optimizer_states" in rest:
        rest[_GROUPS] = []
        for i, (optimizer, local) in enumerate(zip(optimizers, rest.pop("optimizer_states"), strict=False)):
            named = name_optimizer_state(optimizer, local, module, mains)
            rest[_GROUPS].append(merge_groups(named["param_groups"], mesh))
            state[f"optimizer_{i}"] = {"state": mark_sharded(named["state"], module, mains, mesh)}
        if shards := _main_weights(module, mains, mesh):
            state[MAIN_WEIGHTS] = {name: shard.wrap(shard.main.main.detach()) for name, shard in shards.items()}
    return state, rest


def targets(
    metadata: Metadata,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    mains: Mapping[Tensor, MainParam],
    *,
    path: Path,
    strict: bool = True,
    stages: Stages | None = None,
) -> dict[str, Any]:
    """Empty tensors for reading this rank's part of a checkpoint, as DCP fills them.

    Args:
        metadata: The checkpoint's table of contents, of any topology.
        module: Module with this rank's parameters; only names, shapes and ShardSpecs are used.
        optimizers: Optimizers whose local state is wanted; empty for evaluation.
        mains: The main parameters that the optimizers hold in the place of the module's.
        path: The checkpoint, for messages.
        strict: Whether the checkpoint must hold exactly the model's names; otherwise what both have is read.
        stages: What pipeline stages hold; needed where there are several.

    Raises:
        ConfigError: The checkpoint holds other parameters than the module, or state of another kind of optimizer.
    """
    specs = state_dict_specs(module)
    template = {name: value for name, value in module.state_dict().items() if _is_tensor(value)}
    saved: dict[str, dict[str, Any]] = {}
    for key, entry in metadata.state_dict_metadata.items():
        section, *names = metadata.planner_data[key]
        saved.setdefault(section, {}).update({str(name): entry for name in names[:1]})
    stages = stages or Stages.gather(module, optimizers, mains)
    _check_same(path, saved.get(_MODEL, {}), stages.tensors, names=strict)

    state: dict[str, Any] = {}
    for section in _SECTIONS.values():
        if section in saved:
            state[section] = {
                # In the file's digits: a weight average may have more of them than the module.
                name: to_logical(torch.empty_like(value, dtype=_dtype(saved[section][name])), specs.get(name, ()))
                for name, value in template.items()
                if name in saved[section]
            }
    for i, optimizer in enumerate(optimizers):
        if f"optimizer_{i}" in saved:
            state[f"optimizer_{i}"] = {"state": empty_state(f"optimizer_{i}", optimizer, metadata, module, mains)}
    if optimizers and MAIN_WEIGHTS in saved:
        shards = _main_weights(module, mains)
        _check_same(path, saved[MAIN_WEIGHTS], {n: shard.whole_shape for n, shard in shards.items()}, names=False)
        state[MAIN_WEIGHTS] = {
            name: shard.empty(shard.main.main.dtype) for name, shard in shards.items() if name in saved[MAIN_WEIGHTS]
        }
    return state


def unpack(
    state: Mapping[str, Any],
    rest: Mapping[str, Any],
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    mains: Mapping[Tensor, MainParam],
    *,
    path: Path,
    stages: Stages | None = None,
) -> dict[str, Any]:
    """Put a checkpoint together that has been read.

    Args:
        state: The filled :func:`targets`.
        rest: The plain values that :func:`pack` returned.
        module: Module with this rank's parameters.
        optimizers: Optimizers whose local state is wanted; empty for evaluation.
        mains: The main parameters that the optimizers hold in the place of the module's.
        path: The checkpoint, for messages.
        stages: What pipeline stages hold; needed where there are several.

    Returns:
        Lightning's dictionary with local tensors, as if this topology had saved it. ``main_weights`` maps names to
        tensors in the shape of the main parameters; it is left out where the file has none.

    Raises:
        ConfigError: The optimizers are others than the saved ones.
    """
    stages = stages or Stages.gather(module, optimizers, mains)
    checkpoint = dict(rest)
    for key, section in _SECTIONS.items():
        objects = stages.present(checkpoint.pop(_OBJECTS + key, {}))
        if section in state or objects or section == _MODEL:
            checkpoint[key] = _unwrap(state.get(section, {})) | objects
    groups = checkpoint.pop(_GROUPS, None)
    if groups is not None:
        checkpoint["optimizer_states"] = []
        if optimizers and len(optimizers) != len(groups):
            raise ConfigError("configure_optimizers", f"{len(optimizers)} optimizers", f"{len(groups)}, as in {path}")
        for i, optimizer in enumerate(optimizers):
            named = state.get(f"optimizer_{i}", {"state": {}})["state"]  # absent before the first step
            whole = {"state": unmark_sharded(named), "param_groups": groups[i]}
            elsewhere = stages.groups_elsewhere(i)
            checkpoint["optimizer_states"].append(number_optimizer_state(optimizer, whole, module, mains, elsewhere))
    if MAIN_WEIGHTS in state:
        checkpoint[MAIN_WEIGHTS] = _unwrap(state[MAIN_WEIGHTS])
    return checkpoint


def localize(
    checkpoint: Mapping[str, Any],
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    mains: Mapping[Tensor, MainParam],
    *,
    path: Path = Path(),
    strict: bool = True,
    stages: Stages | None = None,
) -> dict[str, Any]:
    """Cut this rank's part out of a checkpoint of whole tensors, e.g. one written by a single-device run.

    Args:
        checkpoint: Lightning's dictionary with whole tensors; optimizer states numbered as Lightning does, or keyed by
            parameter name as the consolidation tool leaves them.
        module: Module with this rank's parameters.
        optimizers: Optimizers whose local state is wanted; empty for evaluation.
        mains: The main parameters that the optimizers hold in the place of the module's.
        path: The checkpoint, for messages.
        strict: Whether the checkpoint must hold exactly the model's names. Only looked at where there are several
            pipeline stages: of others' names, ``load_state_dict`` knows nothing.
        stages: What pipeline stages hold; needed where there are several.

    Raises:
        ConfigError: The optimizers are others than the saved ones, or main weights have other shapes; or a pipeline
            stage finds other parameters than the model's.
    """
    specs = state_dict_specs(module)
    stages = stages or Stages.gather(module, optimizers, mains)
    checkpoint = dict(checkpoint)
    order = list(checkpoint.get("state_dict", ()))
    if stages.elsewhere:
        saved = {name: value for name, value in checkpoint.get("state_dict", {}).items() if _is_tensor(value)}
        _check_same(path, saved, stages.tensors, names=strict)
    for key in _SECTIONS:
        if key in checkpoint:
            whole = stages.present(checkpoint[key] | checkpoint.pop(_OBJECTS + key, {}))
            checkpoint[key] = {
                name: local_part(value, specs.get(name, ())) if _is_tensor(value) else value
                for name, value in whole.items()
            }
    groups = checkpoint.pop(_GROUPS, None)
    if optimizers and "optimizer_states" in checkpoint:
        states = []
        for i, (optimizer, numbered) in enumerate(zip(optimizers, checkpoint["optimizer_states"], strict=True)):
            if groups is not None:
                named = {"state": numbered["state"], "param_groups": groups[i]}
            elif stages.elsewhere:
                named = stages.name_state(i, numbered, order)
            else:
                named = name_optimizer_state(optimizer, numbered, module, mains)
            named["state"] = cut_state(named["state"], module, mains)
            states.append(number_optimizer_state(optimizer, named, module, mains, stages.groups_elsewhere(i)))
        checkpoint["optimizer_states"] = states
    weights = checkpoint.pop(MAIN_WEIGHTS, None)
    if optimizers and weights is not None:
        cut = checkpoint[MAIN_WEIGHTS] = {}
        for name, shard in _main_weights(module, mains).items():
            if name not in weights:
                continue
            shape = tuple(weights[name].shape)
            if shape != shard.whole_shape:
                raise ConfigError(f"{MAIN_WEIGHTS} of {name}", shape, f"the parameter's shape {shard.whole_shape}")
            cut[name] = shard.cut(weights[name]).to(shard.main.main.dtype)
    return checkpoint


def _main_weights(
    module: nn.Module, mains: Mapping[Tensor, MainParam], mesh: ParallelMesh | None = None
) -> dict[str, MainShard]:
    """The main parameters that the model's weights cannot be traced back to, by name."""
    shards = main_shards(module, mains, mesh)
    return {name: shard for name, shard in shards.items() if shard.main.main.dtype != shard.main.parameter.dtype}


def _check_same(
    path: Path, saved: Mapping[str, Any], own: Mapping[str, tuple[int, ...]], *, names: bool = True
) -> None:
    """Compare names and whole shapes with the file's before anything is read, so that the message can name them."""
    missing, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    if not names:
        missing = unknown = []
    differing = [
        f"{name}: {shape} in the file, {own[name]} in the model"
        for name, entry in saved.items()
        if name in own and (shape := _shape(entry)) not in (None, own[name])
    ]
    if missing or unknown or differing:
        raise ConfigError(
            "ckpt_path",
            str(path),
            "a checkpoint of a model with the same parameters",
            f"missing in the file: {missing}; unknown to the model: {unknown}; other shapes: {differing}",
        )


def _shape(entry: Any) -> tuple[int, ...] | None:
    match entry:
        case TensorStorageMetadata():
            return tuple(entry.size)
        case Tensor():
            return tuple(entry.shape)
        case _:
            return None


def _dtype(entry: Any) -> torch.dtype | None:
    return entry.properties.dtype if isinstance(entry, TensorStorageMetadata) else None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _unwrap(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.local if isinstance(value, LogicalShard) else value for name, value in values.items()}
