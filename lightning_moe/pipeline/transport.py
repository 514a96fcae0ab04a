"""How tensors get from stage to stage.

[Note: one communicator for each directed edge]
Between two neighbouring stages activations flow one way and gradients the other. Each such directed edge has a
communicator of its own: sends and receives on one communicator are matched by order, and the two ranks need not reach
the sends of several edges in the same order; with one communicator for all edges NCCL deadlocks, and with V placements,
where two ranks are neighbours twice, tensors of one edge would be taken for those of another.

[Note: receives just in time]
A receive that is posted on NCCL before its tensor is there occupies processors of the GPU while it waits: with two
posted ahead, a 1F1B step at two stages takes 1.2 times as long, and four stages hang. So on CUDA a receive is posted
when its action is due. On gloo waiting costs nothing, and posting ahead overlaps the transfer with computation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.placement import Placement


class Edge(NamedTuple):
    """A way from a stage to a neighbouring one.

    Activations go from ``boundary`` to ``boundary + 1``, gradients back.
    """

    boundary: int
    kind: Literal["activation", "gradient"]

    @property
    def stages(self) -> tuple[int, int]:
        """The stages that send and receive."""
        ends = self.boundary, self.boundary + 1
        return ends if self.kind == "activation" else (ends[1], ends[0])


@dataclass(frozen=True)
class TensorSpec:
    """What a receiver must know of a tensor before it arrives."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """The spec of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)

    def empty(self, device: torch.device) -> Tensor:
        """Memory for such a tensor."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


class Arrival(Protocol):
    """Tensors that are under way to this rank."""

    def wait(self) -> list[Tensor]:
        """The tensors; on CUDA the current stream waits for them, not the host."""
        ...


class Transport(Protocol):
    """Moves tensors along edges, in order on each edge."""

    lookahead: int
    """How many actions ahead receives should be posted."""

    def send(self, edge: Edge, tensors: Sequence[Tensor]) -> None:
        """Begin to send tensors, which must not be changed any more; returns at once."""
        ...

    def receive(self, edge: Edge, specs: Sequence[TensorSpec]) -> Arrival:
        """Begin to receive the next tensors of an edge."""
        ...

    def send_specs(self, edge: Edge, specs: Sequence[TensorSpec]) -> None:
        """Tell the receiver what the next tensors are.

        Raises:
            ConfigError: There are too many, or they have too many dims or an unknown dtype.
        """
        ...

    def receive_specs(self, edge: Edge) -> list[TensorSpec]:
        """What the sender has told; the host waits for it."""
        ...

    def finish(self) -> None:
        """Wait until everything has been sent; on CUDA the current stream waits."""
        ...


class _Receives:
    def __init__(self, tensors: list[Tensor], works: list[dist.Work]) -> None:
        self._tensors, self._works = tensors, works

    def wait(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        return self._tensors


class HeaderTransport:
    """Tells, from host to host, what will be sent; the part that all transports have in common.

    Creating one is a collective call of the world.

    Args:
        placement: Which rank holds which stage.
        pipelines: Global ranks of every pipeline in the world, in order.
        timeout: Time after which a send or receive fails.
    """

    def __init__(self, placement: Placement, pipelines: Sequence[Sequence[int]], timeout: timedelta) -> None:
        own = dist.get_rank()
        ranks = next(ranks for ranks in pipelines if own in ranks)
        self._peers: dict[Edge, int] = {}
        """Global rank of the other end of each of this rank's edges."""
        for edge in edges_of(placement):
            sender, receiver = (ranks[placement.location(stage)[0]] for stage in edge.stages)
            if own in (sender, receiver) and sender != receiver:
                self._peers[edge] = receiver if own == sender else sender
        self._headers = dist.new_group(timeout=timeout, backend="gloo", group_desc="pipeline_headers")
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    def send_specs(self, edge: Edge, specs: Sequence[TensorSpec]) -> None:
        """Tell what the next tensors are; see :class:`Transport`."""
        self._send(_encode(specs), self._peers[edge], self._headers, _tag(edge))

    def receive_specs(self, edge: Edge) -> list[TensorSpec]:
        """Wait for what the sender tells."""
        header = torch.empty(_HEADER, dtype=torch.int64)
        dist.recv(header, self._peers[edge], group=self._headers, tag=_tag(edge))
        return _decode(header)

    def finish(self) -> None:
        """Wait until everything has been sent."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def _send(self, tensor: Tensor, peer: int, group: dist.ProcessGroup | None, tag: int = 0) -> None:
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        work = dist.isend(tensor, peer, group=group, tag=tag)
        assert work is not None
        self._sent.append((work, tensor))  # it must live until it has been sent


class P2PTransport(HeaderTransport):
    """Sends and receives over one communicator for each directed edge (see the notes at the head of this file).

    Creating one is a collective call of the world. (torch can create groups among their members alone, but names them
    by how many groups a rank has, and ranks in the middle of a pipeline have more than those at its ends.)

    Args:
        placement: Which rank holds which stage.
        pipelines: Global ranks of every pipeline in the world, in order.
        device: Where the tensors live.
        timeout: Time after which a send or receive fails.
    """

    def __init__(
        self, placement: Placement, pipelines: Sequence[Sequence[int]], device: torch.device, timeout: timedelta
    ) -> None:
        super().__init__(placement, pipelines, timeout)
        self._device = device
        self.lookahead = 2 if device.type == "cpu" else 0
        own = dist.get_rank()
        self._groups: dict[Edge, dist.ProcessGroup] = {}
        for ranks in pipelines:
            for edge in edges_of(placement):
                pair = [ranks[placement.location(stage)[0]] for stage in edge.stages]
                if pair[0] == pair[1]:
                    continue
                group = dist.new_group(sorted(pair), timeout=timeout, group_desc=f"{edge.kind}_{edge.boundary}")
                if own in pair:
                    assert isinstance(group, dist.ProcessGroup)
                    self._groups[edge] = group
        self._warm_up(own)

    def send(self, edge: Edge, tensors: Sequence[Tensor]) -> None:
        """Begin to send tensors; see :class:`Transport`."""
        for tensor in tensors:
            if tensor.numel():
                self._send(as_bytes(tensor), self._peers[edge], self._groups[edge])

    def receive(self, edge: Edge, specs: Sequence[TensorSpec]) -> Arrival:
        """Begin to receive; see :class:`Transport`."""
        tensors = [spec.empty(self._device) for spec in specs]
        works = [
            dist.irecv(as_bytes(tensor), self._peers[edge], group=self._groups[edge])
            for tensor in tensors
            if tensor.numel()
        ]
        return _Receives(tensors, [work for work in works if work is not None])

    def _warm_up(self, own: int) -> None:
        """Connect every edge now: the first use of a communicator waits for both ends, which may want others first."""
        for edge, group in self._groups.items():
            peer = self._peers[edge]
            flag = torch.zeros(1, device=self._device)
            # Not by stages: both ranks may hold the sending stage's number of some edge.
            if (own < peer) == (edge.kind == "activation"):
                dist.send(flag, peer, group=group)
            else:
                dist.recv(flag, peer, group=group)


def edges_of(placement: Placement) -> list[Edge]:
    """All edges of a pipeline, in the order in which every rank connects them."""
    boundaries = range(placement.num_stages - 1)
    return [edge for each in boundaries for edge in (Edge(each, "activation"), Edge(each, "gradient"))]


def as_bytes(tensor: Tensor) -> Tensor:
    """The elements of a tensor, without its history, as backends carry them: none of them knows every dtype.

    Shares memory with contiguous tensors.
    """
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


_MOST_TENSORS, _MOST_DIMS = 16, 8
_HEADER = 1 + _MOST_TENSORS * (3 + _MOST_DIMS)
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)


def _tag(edge: Edge) -> int:
    return 2 * edge.boundary + (edge.kind == "gradient")


def _encode(specs: Sequence[TensorSpec]) -> Tensor:
    if len(specs) > _MOST_TENSORS:
        raise ConfigError("PartOutput.carry", f"{len(specs)} tensors", f"at most {_MOST_TENSORS}", "stack some of them")
    numbers = [len(specs)]
    for spec in specs:
        if len(spec.shape) > _MOST_DIMS:
            raise ConfigError("PartOutput.carry", f"a tensor of {len(spec.shape)} dims", f"at most {_MOST_DIMS} dims")
        if spec.dtype not in _DTYPES:
            raise ConfigError("PartOutput.carry", spec.dtype, ", ".join(map(str, _DTYPES)))
        dims = [*spec.shape, *[0] * (_MOST_DIMS - len(spec.shape))]
        numbers += [_DTYPES.index(spec.dtype), int(spec.requires_grad), len(spec.shape), *dims]
    return torch.tensor(numbers + [0] * (_HEADER - len(numbers)), dtype=torch.int64)


def _decode(header: Tensor) -> list[TensorSpec]:
    numbers = header.tolist()
    width = 3 + _MOST_DIMS
    entries = [numbers[1 + i * width : 1 + (i + 1) * width] for i in range(numbers[0])]
    return [TensorSpec(tuple(entry[3 : 3 + entry[2]]), _DTYPES[entry[0]], bool(entry[1])) for entry in entries]
