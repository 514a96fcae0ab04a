"""Optimizer state between its two forms: numbered by position (torch) and keyed by parameter name (files).

Positions mean nothing on another topology; names do. A state tensor with as many dims as its parameter and the same
length along the sharded one (``exp_avg``, Adafactor's ``row_var``) is sharded like the parameter; values of one element
(``step``) are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from lightning_moe.checkpoint.shards import LogicalShard
from lightning_moe.errors import ConfigError
from lightning_moe.parallel.sharding import ShardSpecs, local_part, sharded_parameters

NamedState = dict[str, dict[str, Any]]
"""``{parameter name: {"exp_avg": tensor, "step": tensor, ...}}``."""


def name_optimizer_state(optimizer: Optimizer, numbered: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Key a ``state_dict`` of ``optimizer`` by parameter name; groups list names too."""
    names = _names(optimizer, module)
    state = {names[position]: dict(values) for position, values in numbered["state"].items()}
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in numbered["param_groups"]]
    return {"state": state, "param_groups": groups}


def number_optimizer_state(optimizer: Optimizer, named: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """The inverse of :func:`name_optimizer_state`, in the parameter order of ``optimizer``.

    Raises:
        ConfigError: The optimizer has other parameter groups than the saved one.
    """
    names = _names(optimizer, module)
    saved = [sorted(group["params"]) for group in named["param_groups"]]
    position = 0
    groups = []
    for i, group in enumerate(optimizer.param_groups):
        positions = list(range(position, position + len(group["params"])))
        position += len(positions)
        own = sorted(names[p] for p in positions)
        if i >= len(saved) or own != saved[i]:
            found = f"{len(saved[i])} parameters" if i < len(saved) else "no such group"
            raise ConfigError(
                f"optimizer.param_groups[{i}]",
                f"{len(own)} parameters",
                f"the group that the checkpoint holds ({found})",
                "configure_optimizers must build the same groups as in the run that saved the checkpoint",
            )
        groups.append({**named["param_groups"][i], "params": positions})
    numbers = {name: i for i, name in enumerate(names)}
    state = {numbers[name]: dict(values) for name, values in named["state"].items() if name in numbers}
    return {"state": state, "param_groups": groups}


def mark_sharded(state: NamedState, module: nn.Module) -> NamedState:
    """Wrap the tensors that are sharded like their parameter for DCP.

    Raises:
        ConfigError: A value of a sharded parameter differs between ranks in a way that no file can hold.
    """
    parameters = {name: (parameter, specs) for name, parameter, specs in sharded_parameters(module)}
    marked: NamedState = {}
    for name, values in state.items():
        parameter, specs = parameters[name]
        marked[name] = _mark(name, values, parameter, specs) if specs else dict(values)
    return marked


def _mark(name: str, values: Mapping[str, Any], parameter: Tensor, specs: ShardSpecs) -> dict[str, Any]:
    marked = dict(values)
    for key, value in values.items():
        if not isinstance(value, Tensor):
            continue
        follows = _following(tuple(value.shape), parameter, specs, whole=False)
        if follows is not None:
            marked[key] = LogicalShard.wrap(value, follows)
        elif value.numel() != 1:
            # Saved as a replicated value, it would be one rank's, and the others would lose theirs without an error.
            raise ConfigError(
                f"optimizer state {key!r} of {name}",
                tuple(value.shape),
                "one value, or "
                + " and ".join(f"{len(spec.index)} along dim {spec.dim}" for spec in specs)
                + f" as in the parameter {tuple(parameter.shape)}",
                "this optimizer mixes the shards of a rank; use one that treats elements separately",
            )
    return marked


def _following(shape: tuple[int, ...], parameter: Tensor, specs: ShardSpecs, *, whole: bool) -> ShardSpecs | None:
    """The specs by which a state tensor of this shape is sharded like its parameter; None if it is not.

    A dim that no rank splits may have another length, as in Adafactor's row and column statistics.

    Args:
        shape: Shape of the state tensor.
        parameter: The local parameter.
        specs: Its specs.
        whole: Whether ``shape`` is that of the whole state, not of this rank's part.
    """
    if len(shape) != parameter.dim():
        return None
    follows = []
    for spec in specs:
        if shape[spec.dim] == (spec.size if whole else len(spec.index)):
            follows.append(spec)
        elif not spec.is_whole:
            return None
    return tuple(follows)


def unmark_sharded(state: NamedState) -> NamedState:
    """The inverse of :func:`mark_sharded`."""
    return {
        name: {key: value.local if isinstance(value, LogicalShard) else value for key, value in values.items()}
        for name, values in state.items()
    }


def cut_state(state: NamedState, module: nn.Module) -> NamedState:
    """This rank's part of a state of whole tensors."""
    cut: NamedState = {}
    for name, parameter, specs in sharded_parameters(module):
        for key, value in state.get(name, {}).items():
            sharded = isinstance(value, Tensor) and value.dim() == parameter.dim()
            cut.setdefault(name, {})[key] = local_part(value, specs) if sharded else value
    return cut


def empty_state(section: str, optimizer: Optimizer, metadata: Metadata, module: nn.Module) -> NamedState:
    """Targets for reading every saved value of the parameters that ``optimizer`` holds.

    Args:
        section: Name of the optimizer in the file, e.g. ``"optimizer_0"``.
        optimizer: The optimizer to load into; its own state may still be empty.
        metadata: The file's table of contents.
        module: Module that the parameters belong to.
    """
    own = set(_names(optimizer, module))
    parameters = {name: (parameter, specs) for name, parameter, specs in sharded_parameters(module) if name in own}
    state: NamedState = {}
    for key, entry in metadata.state_dict_metadata.items():
        path = metadata.planner_data[key]
        if tuple(path[:2]) != (section, "state") or path[2] not in parameters:
            continue
        name, field = str(path[2]), str(path[3])
        parameter, specs = parameters[name]
        values = state.setdefault(name, {})
        if not isinstance(entry, TensorStorageMetadata):
            values[field] = None  # DCP puts the object that it reads here
            continue
        follows = _following(tuple(entry.size), parameter, specs, whole=True)
        if follows:
            shape = list(entry.size)
            for spec in follows:
                shape[spec.dim] = len(spec.index)
            empty = torch.empty(shape, dtype=entry.properties.dtype, device=parameter.device)
            values[field] = LogicalShard.wrap(empty, follows)
        else:
            values[field] = torch.empty(entry.size, dtype=entry.properties.dtype)
    return state


def _names(optimizer: Optimizer, module: nn.Module) -> list[str]:
    """Name of the parameter at each position of the optimizer.

    Raises:
        ConfigError: A parameter is not the module's.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        if parameter not in names:
            raise ConfigError(
                f"{type(optimizer).__name__}.param_groups",
                f"a parameter of shape {tuple(parameter.shape)}",
                "parameters of the LightningModule",
                "assign it to an attribute of the module, or keep lists of them in an nn.ParameterList",
            )
    return [names[parameter] for parameter in parameters]
