"""Moves tensors between GPUs of one host by their copy engines, through memory that the ranks map into each other.

[Note: mailboxes]
A kernel that sends and one that receives occupy processors while they wait for each other, and take them from the
computation. Here the sender copies into a mailbox in the receiver's memory (symmetric memory of
:mod:`torch.distributed._symmetric_memory`), which GPUs do without processors, and sets a signal; the receiver's stream
waits for the signal when it needs the tensors, copies them out and signals back that the place is free.

Each directed edge has a mailbox of a few places, and a stream of the sender's on which copies wait for a free place. A
tensor that is larger than a place is sent in pieces. All mailboxes are made at the beginning: mapping memory may wait
for the device, whose streams may wait for a rank that waits for this one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.pipeline.placement import Placement
from lightning_moe.pipeline.transport import Arrival, Edge, HeaderTransport, TensorSpec, as_bytes, edges_of

_PLACES = 4
_PLACE_BYTES = 8 * 2**20


def can_map_peers(group: dist.ProcessGroup | None, device: torch.device) -> bool:
    """Whether the ranks of a group are on one host with GPUs that reach each other's memory; a collective call."""
    if device.type != "cuda" or dist.get_backend(group) != "nccl" or os.environ.get("NCCL_P2P_DISABLE") == "1":
        return False
    everybody: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everybody, (device.index, _host()), group=group)
    indices, hosts = [index for index, _ in everybody], {host for _, host in everybody}
    can = len(hosts) == 1 and len(set(indices)) == len(indices)
    others = [index for index in indices if index != device.index]
    can = can and all(torch.cuda.can_device_access_peer(device.index, index) for index in others)
    verdict = torch.tensor(int(can), device=device)
    dist.all_reduce(verdict, op=dist.ReduceOp.MIN, group=group)
    return bool(verdict.item())


@dataclass
class _End:
    """One end of an edge."""

    peer: int
    """Position of the other end in the group."""
    places: list[Tensor]
    """The places of the mailbox, in the receiver's memory, uint8."""
    full: int
    """Channel of the first place's signal that it is full."""
    free: int
    """Channel of the first place's signal that it is free."""
    pieces: int = 0
    """How many pieces have gone through."""


class _Signals:
    """Signals between the ranks, on the current stream; a rank that is gone makes the device fail after a while."""

    def __init__(self, handle: Any, timeout: timedelta) -> None:
        self._handle, self._milliseconds = handle, int(1e3 * timeout.total_seconds())

    def put(self, peer: int, channel: int) -> None:
        """Set a signal; waits until the last one has been seen."""
        self._handle.put_signal(peer, channel, self._milliseconds)

    def wait(self, peer: int, channel: int) -> None:
        """Wait for a signal, and clear it."""
        self._handle.wait_signal(peer, channel, self._milliseconds)


class _Mail:
    def __init__(self, signals: _Signals, end: _End, specs: Sequence[TensorSpec], device: torch.device) -> None:
        self._signals, self._end, self._specs, self._device = signals, end, specs, device

    def wait(self) -> list[Tensor]:
        tensors = [spec.empty(self._device) for spec in self._specs]
        end = self._end
        for piece in _pieces(tensors):
            place = end.pieces % _PLACES
            self._signals.wait(end.peer, end.full + place)
            piece.copy_(end.places[place][: piece.numel()], non_blocking=True)
            self._signals.put(end.peer, end.free + place)
            end.pieces += 1
        return tensors


class CopyTransport(HeaderTransport):
    """Copies tensors into the other rank's memory (see the note at the head of this file).

    Args:
        placement: Which rank holds which stage.
        pipelines: Global ranks of every pipeline in the world, in order.
        device: Where the tensors live.
        timeout: Time after which waiting for another rank fails.
        group: The ranks of this pipeline, for which :func:`can_map_peers` holds.
    """

    lookahead = 0

    def __init__(
        self,
        placement: Placement,
        pipelines: Sequence[Sequence[int]],
        device: torch.device,
        timeout: timedelta,
        group: dist.ProcessGroup,
    ) -> None:
        from torch.distributed import _symmetric_memory

        super().__init__(placement, pipelines, timeout)
        self._device = device
        own = dist.get_rank(group)
        ends = {edge: tuple(placement.location(stage)[0] for stage in edge.stages) for edge in edges_of(placement)}
        arriving = [
            [edge for edge in ends if ends[edge][1] == rank != ends[edge][0]] for rank in range(placement.ranks)
        ]
        leaving = [[edge for edge in ends if ends[edge][0] == rank != ends[edge][1]] for rank in range(placement.ranks)]
        most = max(map(len, arriving))
        self._memory = _symmetric_memory.empty(most * _PLACES * _PLACE_BYTES, dtype=torch.uint8, device=device)
        handle = _symmetric_memory.rendezvous(self._memory, group)
        self._signals = _Signals(handle, timeout)
        self._ends: dict[Edge, _End] = {}
        self._streams: dict[Edge, torch.cuda.Stream] = {}
        for edge, (sender, receiver) in ends.items():
            if own not in (sender, receiver) or sender == receiver:
                continue
            box = arriving[receiver].index(edge)
            self._ends[edge] = _End(
                sender if own == receiver else receiver,
                [
                    handle.get_buffer(receiver, (_PLACE_BYTES,), torch.uint8, (box * _PLACES + place) * _PLACE_BYTES)
                    for place in range(_PLACES)
                ],
                full=box * _PLACES,
                free=(most + leaving[sender].index(edge)) * _PLACES,
            )
            if own == sender:
                self._streams[edge] = torch.cuda.Stream(device)

    def send(self, edge: Edge, tensors: Sequence[Tensor]) -> None:
        """Begin to copy tensors into the receiver's mailbox."""
        tensors = [tensor.detach().contiguous() for tensor in tensors]
        end, stream = self._ends[edge], self._streams[edge]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for piece in _pieces(tensors):
                place = end.pieces % _PLACES
                if end.pieces >= _PLACES:
                    self._signals.wait(end.peer, end.free + place)
                end.places[place][: piece.numel()].copy_(piece, non_blocking=True)
                self._signals.put(end.peer, end.full + place)
                end.pieces += 1
        for tensor in tensors:
            tensor.record_stream(stream)

    def receive(self, edge: Edge, specs: Sequence[TensorSpec]) -> Arrival:
        """Be ready for the next message; the current stream waits for it when it is taken."""
        return _Mail(self._signals, self._ends[edge], specs, self._device)


def _pieces(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """The bytes of contiguous tensors, in pieces of at most a place."""
    for tensor in tensors:
        yield from as_bytes(tensor).split(_PLACE_BYTES)


def _host() -> str:
    """A name that processes of one running host share."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
