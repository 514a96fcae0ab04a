"""Keeping the ranks of an expert group in step when some of them have run out of batches.

A layer's all-to-all needs every rank of its group. In evaluation the ranks may have different numbers of
batches, so a rank that is done keeps serving: it takes part in the others' exchanges with no rows of its own
and computes its experts for them.

[Note: headers]
Before each dispatch all ranks of the group gather one header each: which layer calls (or IDLE), the dtype of
its rows, which backward pass will follow, and how many rows go to each slot. The last part is needed
anyway, so saying the rest costs nothing; and ranks that have come apart (different layers, different
precisions, gradients on some ranks only) find out here, instead of exchanging rows that do not belong together
or waiting for each other until a timeout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.errors import ConfigError
from lightning_moe.moe.dispatch import RowCounts
from lightning_moe.parallel.collectives import all_gather
from lightning_moe.parallel.host_read import HostRead, NumbersOnDevice

if TYPE_CHECKING:
    from lightning_moe.moe.layer import MoELayer

IDLE = -1
"""Layer index in the header of a rank that has finished."""

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PREFIX = 3  # layer index, dtype, which gradients are recorded
_GRADS = ("sends no gradients", "sends gradients to experts alone", "sends gradients to experts and back")


def number_layers(layers: Sequence[MoELayer]) -> None:
    """Give the layers that share an expert group distinct indices, and headers of one length.

    Call it once the model is built, in the same order on all ranks; needed as soon as there are two layers.
    """
    widest = max((layer.config.num_experts for layer in layers), default=0)
    for index, layer in enumerate(layers):
        layer.layer_index = index
        layer.header_experts = widest


class AnnouncedCall:
    """A call that the group has been told of; :meth:`wait` says what every rank sends.

    Waiting is the one point of a layer's forward pass where the host waits for the device. Work that is queued before
    it keeps the device busy meanwhile, and while the host prepares what follows.
    """

    def __init__(self, headers: Tensor, num_slots: int) -> None:
        self._headers, self._num_slots = headers, num_slots
        self._read = HostRead(headers)

    def wait(self) -> RowCounts:
        """Rows that each rank sends to each slot; zeros for idle ranks.

        Raises:
            RuntimeError: The active ranks do not call the same layer in the same dtype, their backward passes differ,
                or gradients are recorded while a rank has finished.
        """
        numbers = self._read.wait()
        _check(numbers)
        return _row_counts(_Headers(self._headers, numbers), self._num_slots)


class OwnCall:
    """The call of a rank that holds all experts, which nobody else takes part in."""

    def __init__(self, sizes: Tensor) -> None:
        self._counts = RowCounts(sizes[None], [NumbersOnDevice(sizes)])

    def wait(self) -> RowCounts:
        """Rows for each slot. The host waits for nothing here, but where it first looks at a number."""
        return self._counts


def announce_call(
    layer_index: int,
    dtype: torch.dtype,
    grads: int,
    sizes: Tensor,
    header_slots: int,
    group: dist.ProcessGroup | None,
) -> AnnouncedCall | OwnCall:
    """Tell the group that this rank calls a layer.

    Args:
        layer_index: Index of the calling layer.
        dtype: Dtype of its rows.
        grads: Which gradients its backward pass will exchange: 0 for none, 1 for those of the experts' results, 2 for
            those of the rows, too.
        sizes: Rows that this rank sends to each slot, int64 ``[slots]``.
        header_slots: Most slots of any layer in the group (see :func:`number_layers`).
        group: The expert group; None when this rank holds all experts.

    Returns:
        The call, under way.

    Raises:
        ConfigError: No rank can be told of such a dtype.
    """
    if group is None:
        return OwnCall(sizes)
    if dtype not in _DTYPES:
        raise ConfigError("hidden.dtype", dtype, "one of " + ", ".join(map(str, _DTYPES)))
    prefix = (layer_index, _DTYPES.index(dtype), grads)
    parts = [_constant(prefix, sizes.device), sizes]
    if sizes.numel() < header_slots:
        parts.append(sizes.new_zeros(header_slots - sizes.numel()))
    header = torch.cat(parts)
    return AnnouncedCall(all_gather(header[None], group), sizes.numel())


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it would trace through the cache, with a warning
@cache
def _constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """The values on a device, int64; kept, since bringing them there waits for it."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


@torch.no_grad()
def serve_until_idle(layers: Sequence[MoELayer]) -> int:
    """Take part in the other ranks' calls until every rank of the expert group has finished.

    Call it on every rank when it has no batch left, in evaluation only: a rank that is done has no backward
    pass to offer. No rank returns before all have called it.

    Args:
        layers: All layers of the model that share the expert group, numbered by :func:`number_layers`.

    Returns:
        Number of calls served; 0 at once without layers or without a group.

    Raises:
        RuntimeError: The active ranks do not call the same layer in the same dtype, they record gradients, or
            they call a layer that is not in ``layers``.
    """
    if not layers or layers[0].expert_group is None:
        return 0
    by_index = {layer.layer_index: layer for layer in layers}
    if len(by_index) != len(layers):
        raise RuntimeError(
            "several MoE layers have the same layer_index; call number_layers(layers) on every rank first"
        )
    group, width = layers[0].expert_group, _PREFIX + layers[0].header_slots
    idle = torch.tensor([IDLE] + [0] * (width - 1), device=layers[0].router.weight.device)
    served = 0
    while True:
        headers = _gather(idle, group)
        call = _check(headers.numbers)
        if call is None:
            return served
        layer_index, dtype = call
        if layer_index not in by_index:
            raise RuntimeError(f"other ranks call MoE layer {layer_index}; this rank serves {sorted(by_index)}")
        layer = by_index[layer_index]
        layer.serve(dtype, _row_counts(headers, layer.num_slots))
        served += 1


@dataclass(frozen=True)
class _Headers:
    """Every rank's header, on the device and on the host."""

    tensor: Tensor
    numbers: list[list[int]]


def _gather(header: Tensor, group: dist.ProcessGroup) -> _Headers:
    headers = all_gather(header[None], group)
    return _Headers(headers, headers.tolist())


def _row_counts(headers: _Headers, num_slots: int) -> RowCounts:
    columns = slice(_PREFIX, _PREFIX + num_slots)
    return RowCounts(headers.tensor[:, columns], [header[columns] for header in headers.numbers])


def _check(headers: list[list[int]]) -> tuple[int, torch.dtype] | None:
    """The layer and dtype that all active ranks agree on; None when every rank is idle.

    All ranks see the same headers, so if one raises here, all do.
    """
    active = {rank: header for rank, header in enumerate(headers) if header[0] != IDLE}
    if not active:
        return None
    layers = {rank: header[0] for rank, header in active.items()}
    if len(set(layers.values())) > 1:
        named = ", ".join(f"rank {rank} calls layer {layer}" for rank, layer in layers.items())
        raise RuntimeError(f"the expert group is out of step: {named} (ranks count within the group)")
    dtypes = {rank: _DTYPES[header[1]] for rank, header in active.items()}
    if len(set(dtypes.values())) > 1:
        named = ", ".join(f"rank {rank} sends {dtype}" for rank, dtype in dtypes.items())
        raise RuntimeError(f"MoE layer {min(layers.values())} runs in different precisions: {named}")
    grads = {rank: header[2] for rank, header in active.items()}
    if len(set(grads.values())) > 1:
        named = ", ".join(f"rank {rank} {_GRADS[kind]}" for rank, kind in grads.items())
        raise RuntimeError(
            f"MoE layer {min(layers.values())} has different backward passes: {named}. Those that wait for gradients "
            "would wait for ever; freeze the same parts of the model on all ranks, and use torch.no_grad() on all or "
            "on none"
        )
    idle = sorted(set(range(len(headers))) - set(active))
    if idle and any(header[2] for header in active.values()):
        raise RuntimeError(
            f"ranks {idle} of the expert group have finished while others record gradients: their backward "
            "pass would wait for ever. Train with equally many batches on every rank, and evaluate under "
            "torch.no_grad()"
        )
    first = min(active)
    return layers[first], dtypes[first]
