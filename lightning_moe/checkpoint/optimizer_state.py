"""Optimizer state between its two forms: numbered by position (torch) and keyed by parameter name (files).

Positions mean nothing on another topology; names do. A state tensor with as many dims as its parameter and the same
length along the sharded one (``exp_avg``, Adafactor's ``row_var``) is sharded like the parameter; values of one element
(``step``) are the same everywhere. Where the optimizer steps a run of the parameter's elements (see
:mod:`lightning_moe.parallel.main_params`), a state tensor of the run's shape holds these elements of the whole one.
Files do not show which kind of optimizer wrote them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice, repeat
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from lightning_moe.checkpoint.mains import NO_MAINS, MainShard, main_shards
from lightning_moe.checkpoint.shards import LogicalShard
from lightning_moe.errors import ConfigError
from lightning_moe.parallel.main_params import MainParam
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import ShardSpecs, local_part, sharded_parameters, whole_shape

NamedState = dict[str, dict[str, Any]]
"""``{parameter name: {"exp_avg": tensor, "step": tensor, ...}}``."""


def name_optimizer_state(
    optimizer: Optimizer, numbered: Mapping[str, Any], module: nn.Module, mains: Mapping[Tensor, MainParam] = NO_MAINS
) -> dict[str, Any]:
    """Key a ``state_dict`` of ``optimizer`` by parameter name; groups list names too."""
    names = _names(optimizer, module, mains)
    state = {names[position]: dict(values) for position, values in numbered["state"].items()}
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in numbered["param_groups"]]
    return {"state": state, "param_groups": groups}


def group_names(
    optimizer: Optimizer, module: nn.Module, mains: Mapping[Tensor, MainParam] = NO_MAINS
) -> list[list[str]]:
    """The names of the parameters in each group of ``optimizer``, in their order."""
    names = iter(_names(optimizer, module, mains))
    return [list(islice(names, len(group["params"]))) for group in optimizer.param_groups]


def number_optimizer_state(
    optimizer: Optimizer,
    named: Mapping[str, Any],
    module: nn.Module,
    mains: Mapping[Tensor, MainParam] = NO_MAINS,
    elsewhere: Sequence[Collection[str]] = (),
) -> dict[str, Any]:
    """The inverse of :func:`name_optimizer_state`, in the parameter order of ``optimizer``.

    Args:
        optimizer: The optimizer to load into.
        named: State and groups by name.
        module: Module that the parameters belong to.
        mains: The main parameters that the optimizer holds in the place of the module's.
        elsewhere: Names in each group that only other pipeline stages have.

    Raises:
        ConfigError: The optimizer has other parameter groups than the saved one.
    """
    names = _names(optimizer, module, mains)
    others = [*elsewhere, *repeat((), len(named["param_groups"]) - len(elsewhere))]
    saved = [
        sorted(set(group["params"]).difference(away))
        for group, away in zip(named["param_groups"], others, strict=False)
    ]
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
        settings = {key: value for key, value in named["param_groups"][i].items() if key != "param_names"}
        if "param_names" in group:
            settings["param_names"] = group["param_names"]
        groups.append({**settings, "params": positions})
    numbers = {name: i for i, name in enumerate(names)}
    state = {numbers[name]: dict(values) for name, values in named["state"].items() if name in numbers}
    return {"state": state, "param_groups": groups}


def mark_sharded(
    state: NamedState,
    module: nn.Module,
    mains: Mapping[Tensor, MainParam] = NO_MAINS,
    mesh: ParallelMesh | None = None,
) -> NamedState:
    """Wrap the tensors that are sharded like their parameter, or hold a run of its elements, for DCP.

    Args:
        state: State of one optimizer.
        module: Module that the parameters belong to.
        mains: The main parameters that the optimizer holds in the place of the module's.
        mesh: The parallel mesh; needed where main parameters are sharded.

    Raises:
        ConfigError: A value of a sharded parameter differs between ranks in a way that no file can hold.
    """
    shards = main_shards(module, mains, mesh)
    parameters = {name: (parameter, specs) for name, parameter, specs in sharded_parameters(module)}
    shared = _shared_fields(
        (field, value.numel(), (shards[name].main.main if name in shards else parameters[name][0]).numel())
        for name, values in state.items()
        for field, value in values.items()
        if isinstance(value, Tensor)
    )
    marked: NamedState = {}
    for name, values in state.items():
        parameter, specs = parameters[name]
        shard = shards.get(name)
        if shard is not None and shard.flat is not None:
            marked[name] = _mark_runs(name, values, shard, shared)
        else:
            marked[name] = _mark(name, values, parameter, specs) if specs else dict(values)
    return marked


def _mark_runs(name: str, values: Mapping[str, Any], shard: MainShard, shared: set[str]) -> dict[str, Any]:
    marked = dict(values)
    for key, value in values.items():
        if isinstance(value, Tensor) and _is_element_wise(name, key, value.shape, shard.main.main.shape, shared):
            marked[key] = shard.wrap(value)
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


def cut_state(state: NamedState, module: nn.Module, mains: Mapping[Tensor, MainParam] = NO_MAINS) -> NamedState:
    """This rank's part of a state of whole tensors.

    Raises:
        ConfigError: A main parameter is sharded, and a value of its state is none for each element.
    """
    shards = main_shards(module, mains)
    parameters = sharded_parameters(module)
    shared = _shared_fields(
        (field, value.numel(), prod(whole_shape(parameter, specs)))
        for name, parameter, specs in parameters
        for field, value in state.get(name, {}).items()
        if isinstance(value, Tensor)
    )
    cut: NamedState = {}
    for name, parameter, specs in parameters:
        shard = shards.get(name)
        for key, value in state.get(name, {}).items():
            part = value
            if not isinstance(value, Tensor):
                pass
            elif shard is not None and shard.flat is not None:
                if _is_element_wise(name, key, value.shape, shard.whole_shape, shared):
                    part = shard.cut(value)
            elif value.dim() == parameter.dim():
                part = local_part(value, specs)
            cut.setdefault(name, {})[key] = part
    return cut


def empty_state(
    section: str,
    optimizer: Optimizer,
    metadata: Metadata,
    module: nn.Module,
    mains: Mapping[Tensor, MainParam] = NO_MAINS,
) -> NamedState:
    """Targets for reading every saved value of the parameters that ``optimizer`` holds.

    Args:
        section: Name of the optimizer in the file, e.g. ``"optimizer_0"``.
        optimizer: The optimizer to load into; its own state may still be empty.
        metadata: The file's table of contents.
        module: Module that the parameters belong to.
        mains: The main parameters that the optimizer holds in the place of the module's.

    Raises:
        ConfigError: A main parameter is sharded, and a value of its saved state is none for each element.
    """
    own = set(_names(optimizer, module, mains))
    shards = main_shards(module, mains)
    parameters = {name: (parameter, specs) for name, parameter, specs in sharded_parameters(module) if name in own}
    paths = ((metadata.planner_data[key], entry) for key, entry in metadata.state_dict_metadata.items())
    entries = {
        (str(path[2]), str(path[3])): entry
        for path, entry in paths
        if tuple(path[:2]) == (section, "state") and path[2] in parameters
    }
    shared = _shared_fields(
        (field, prod(entry.size), prod(whole_shape(*parameters[name])))
        for (name, field), entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    )
    state: NamedState = {}
    for (name, field), entry in entries.items():
        values = state.setdefault(name, {})
        if not isinstance(entry, TensorStorageMetadata):
            values[field] = None  # DCP puts the object that it reads here
            continue
        shard = shards.get(name)
        if shard is None or shard.flat is None:
            values[field] = _empty_like_parameter(entry, *parameters[name])
        elif _is_element_wise(name, field, entry.size, shard.whole_shape, shared):
            values[field] = shard.empty(entry.properties.dtype)
        else:
            values[field] = torch.empty(entry.size, dtype=entry.properties.dtype)
    return state


def _empty_like_parameter(entry: TensorStorageMetadata, parameter: Tensor, specs: ShardSpecs) -> Tensor:
    follows = _following(tuple(entry.size), parameter, specs, whole=True)
    if not follows:
        return torch.empty(entry.size, dtype=entry.properties.dtype)
    shape = list(entry.size)
    for spec in follows:
        shape[spec.dim] = len(spec.index)
    return LogicalShard.wrap(torch.empty(shape, dtype=entry.properties.dtype, device=parameter.device), follows)


def _is_element_wise(name: str, key: str, shape: torch.Size, elements: Sequence[int], shared: set[str]) -> bool:
    """Whether a value in the state of a sharded main parameter is one for each element, and not a single one.

    Args:
        name: Name of the parameter.
        key: Name of the value.
        shape: Shape of the value.
        elements: Shape of the main parameter, or of the whole parameter for a whole value.
        shared: Names of values that are single ones (see :func:`_shared_fields`).

    Raises:
        ConfigError: It is neither.
    """
    if tuple(shape) == tuple(elements) and not (prod(shape) == 1 and key in shared):
        return True
    if prod(shape) == 1:
        return False
    raise ConfigError(
        f"optimizer state {key!r} of {name}",
        tuple(shape),
        f"one value, or one for each element of {tuple(elements)}",
        "a sharded optimizer must treat elements separately; use optimizer_sharding=False with this one",
    )


def _shared_fields(sizes: Iterable[tuple[str, int, int]]) -> set[str]:
    """Names of the values of which a parameter has one, however many elements it has.

    A shape does not tell for a parameter of one element. The parameters of other sizes do; without any, it is ``step``,
    which ``Optimizer.load_state_dict`` treats apart as well.

    Args:
        sizes: Name, number of elements of the value, and number of elements of the parameter, for each value.
    """
    return {"step", *(key for key, value, parameter in sizes if value == 1 != parameter)}


def _names(optimizer: Optimizer, module: nn.Module, mains: Mapping[Tensor, MainParam]) -> list[str]:
    """Name of the module's parameter at each position of the optimizer.

    Raises:
        ConfigError: A parameter is not the module's.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parameters = [mains[parameter].parameter if parameter in mains else parameter for parameter in held]
    for parameter in parameters:
        if parameter not in names:
            raise ConfigError(
                f"{type(optimizer).__name__}.param_groups",
                f"a parameter of shape {tuple(parameter.shape)}",
                "parameters of the LightningModule",
                "assign it to an attribute of the module, or keep lists of them in an nn.ParameterList",
            )
    return [names[parameter] for parameter in parameters]
