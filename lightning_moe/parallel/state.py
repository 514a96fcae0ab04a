"""Whole ("logical") state dicts of sharded modules, for files that one process reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_moe.errors import ConfigError
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import (
    ShardSpec,
    local_part,
    replica_axis_of,
    sharded_parameters,
    state_dict_specs,
    tied_parameters,
    whole_shape,
)
from lightning_moe.parallel.stages import entries_elsewhere, gather_stages


def gather_full_state_dict(module: nn.Module, mesh: ParallelMesh) -> dict[str, Any]:
    """Assemble the whole tensor of every parameter and buffer; a collective call on all ranks of the mesh.

    Peak memory on rank 0 is the whole state on the CPU plus one gathered tensor; other ranks hold one tensor at a time.

    Returns:
        On global rank 0 a state dict of CPU tensors with sharded dims in logical order, and the other values (those
        of ``get_extra_state``) of the first rank that has each; elsewhere an empty dict.
    """
    specs = state_dict_specs(module)
    values = module.state_dict()
    stage = mesh.rank(Axis.PIPELINE)
    table = {
        name: _Whole(whole_shape(value, specs.get(name, ())), value.dtype) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }
    tables = gather_stages(table, mesh)
    of_earlier = {name for table in tables[:stage] for name in table}
    sends = mesh.rank(Axis.DATA_CONTEXT_TENSOR) == 0
    state: dict[str, Any] = {}
    for name, value in values.items():
        if name in of_earlier:
            continue
        whole = value
        if isinstance(value, Tensor):
            whole = value.detach()
            for spec in specs.get(name, ()):
                whole = _gather_dim(whole, spec, mesh)
        if mesh.global_rank == 0:
            state[name] = whole.to("cpu", copy=True) if isinstance(whole, Tensor) else whole
        elif sends and isinstance(whole, Tensor) and whole.numel():
            dist.send(_as_bytes(whole.contiguous()), group=mesh.group(Axis.PIPELINE), group_dst=0)
    if mesh.global_rank == 0:
        device = next((value.device for value in values.values() if isinstance(value, Tensor)), torch.device("cpu"))
        for sender, table in enumerate(tables[1:], 1):
            new = {name: entry for name, entry in table.items() if name not in state}
            state.update((name, _receive(entry, sender, mesh, device)) for name, entry in new.items())
    return state


class _Whole(NamedTuple):
    """A whole tensor, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _receive(entry: Any, sender: int, mesh: ParallelMesh, device: torch.device) -> Any:
    if not isinstance(entry, _Whole):
        return entry
    value = torch.empty(entry.shape, dtype=entry.dtype, device=device)
    if value.numel():
        dist.recv(_as_bytes(value), group=mesh.group(Axis.PIPELINE), group_src=sender)
    return value.to("cpu")


def load_full_state_dict(module: nn.Module, state: Mapping[str, Any], mesh: ParallelMesh | None = None) -> None:
    """Load a state dict of whole tensors: every rank keeps the positions that its ShardSpecs name.

    Args:
        module: The module with this rank's part of the model.
        state: The whole model's state dict.
        mesh: Needed where the module is a stage of a pipeline: then this is a collective call, and what other stages
            have is passed over.

    Raises:
        ConfigError: A name is missing or unknown, or a shape differs; nothing has been changed then.
    """
    specs = state_dict_specs(module)
    own = module.state_dict()
    known = own.keys() | entries_elsewhere(module, mesh).keys()
    missing, unknown = sorted(known - state.keys()), sorted(state.keys() - known)
    if missing or unknown:
        raise ConfigError(
            "state_dict",
            {"missing": missing, "unknown": unknown},
            "the names of the module's own parameters and buffers",
            "was it saved from a model with another configuration?",
        )
    local = {
        name: local_part(value, specs.get(name, ())) if isinstance(value := state[name], Tensor) else value
        for name in own
    }
    for name, value in own.items():
        if isinstance(value, Tensor) and local[name].shape != value.shape:
            raise ConfigError(
                f"state_dict.{name}",
                tuple(state[name].shape),
                f"a shape that gives {tuple(value.shape)} on this rank",
            )
    module.load_state_dict(local)


def _gather_dim(value: Tensor, spec: ShardSpec, mesh: ParallelMesh) -> Tensor:
    """Gather one dim of a tensor over its axis; ranks may hold different numbers of positions."""
    # Every rank of the axis takes the same path, whatever it holds itself: one that holds all positions still has
    # peers that wait for it.
    local = value.movedim(spec.dim, 0).contiguous()
    indices, parts = [spec.index], [local]
    if mesh.size(spec.axis) > 1:
        group = mesh.group(spec.axis)
        assert group is not None, "a mesh without communication cannot hold a part of a tensor"
        indices = [()] * mesh.size(spec.axis)
        dist.all_gather_object(indices, spec.index, group=group)
        # Padded to one length: gloo gathers only equal shapes.
        padded = local.new_zeros((max(map(len, indices)), *local.shape[1:]))
        padded[: len(local)] = local
        gathered = [torch.empty_like(padded) for _ in indices]
        dist.all_gather(gathered, padded, group=group)
        parts = [part[: len(index)] for part, index in zip(gathered, indices, strict=True)]
    order = torch.tensor([i for index in indices for i in index], device=value.device)
    whole = local.new_empty((spec.size, *local.shape[1:]))
    whole[order] = torch.cat(parts)
    return whole.movedim(0, spec.dim)


def broadcast_replicas(module: nn.Module, mesh: ParallelMesh) -> None:
    """Make replicas equal: each tensor is broadcast from the first rank that holds a copy of it.

    Unsharded parameters and persistent buffers come from the first rank of ``data_context_tensor``, those sharded over
    ``tensor`` from the first of ``data_context``, experts from the first of ``expert_data``, so that a model built
    without a common seed still starts from one set of weights. Weights that the last pipeline stage has in common with
    the first come from the first.
    """
    parameters = sharded_parameters(module)
    for _, parameter, specs in parameters:
        axis = replica_axis_of(specs) if specs else Axis.DATA_CONTEXT_TENSOR
        _broadcast(parameter.detach(), axis, mesh)
    tied = tied_parameters(module)
    # By name: the two stages may list several of them in different orders.
    for _, parameter, _ in sorted(parameters, key=lambda entry: entry[0]):
        if parameter in tied:
            _broadcast(parameter.detach(), Axis.TIED, mesh)
    broadcast_buffers(module, mesh)


def broadcast_buffers(module: nn.Module, mesh: ParallelMesh) -> None:
    """Give all ranks of a pipeline stage the persistent buffers of the first one, e.g. the statistics of BatchNorm.

    Each rank gathers such statistics from its own samples. Buffers that are not persistent are a rank's own: layers may
    keep there what depends on the rank.
    """
    for buffer in _persistent_buffers(module):
        _broadcast(buffer, Axis.DATA_CONTEXT_TENSOR, mesh)


def _persistent_buffers(module: nn.Module) -> Iterator[Tensor]:
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                yield buffer


def _broadcast(value: Tensor, axis: Axis, mesh: ParallelMesh) -> None:
    group = mesh.group(axis)
    if group is None or mesh.size(axis) == 1 or not value.numel():
        return
    values = value.contiguous()
    dist.broadcast(_as_bytes(values), src=mesh.ranks(axis)[0], group=group)
    if values is not value:
        value.copy_(values)


def _as_bytes(value: Tensor) -> Tensor:
    """A contiguous tensor as backends carry it: none of them knows every dtype."""
    return value.view(-1).view(torch.uint8)
