"""Moves the rows of chunks between the ranks of an expert group, without waiting.

All messages of a chunk are posted together, and every rank posts the chunks in the same order; NCCL's one communicator
and gloo's pairs of ranks match them by that order alone. On CUDA :meth:`Pending.wait` makes only the current stream
wait, on the CPU the caller.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from lightning_moe.moe.overlap.plan import Chunk, Message


class SimulatedLink:
    """A link of limited speed, to measure on CPUs what a slow network would show: rows arrive no sooner than it lets.

    One direction each way; transfers follow each other in the order in which they are posted.

    Args:
        bytes_per_second: Speed of each direction.
        latency: Seconds that each transfer takes besides.
    """

    def __init__(self, bytes_per_second: float, latency: float = 0.0) -> None:
        self._bytes_per_second, self._latency = bytes_per_second, latency
        self._free = 0.0
        self.busy = 0.0
        """Seconds that it has been in use, ever."""

    def cross(self, nbytes: int) -> float:
        """Queue a transfer; returns when it will be done, by :func:`time.perf_counter`."""
        seconds = nbytes / self._bytes_per_second + self._latency
        self._free = max(self._free, time.perf_counter()) + seconds
        self.busy += seconds
        return self._free


class Pending:
    """A chunk's messages that are under way. Keeps their tensors alive."""

    def __init__(self, works: Sequence[dist.Work], tensors: tuple[Tensor, Tensor], arrival: float | None) -> None:
        self._works, self._arrival = list(works), arrival
        self._tensors: tuple[Tensor, Tensor] | None = tensors

    def wait(self) -> None:
        """Wait until all have arrived; again, it does nothing (gloo hangs if one message is waited for twice)."""
        works, self._works = self._works, []
        for work in works:
            work.wait()
        if self._arrival is not None:
            time.sleep(max(0.0, self._arrival - time.perf_counter()))
            self._arrival = None
        self._tensors = None


class ChunkExchange:
    """Posts the messages of chunks.

    Args:
        group: The expert group.
        link: Simulated speed, on CPUs.
        wait_at_once: Whether to wait for each chunk where it is posted.
    """

    def __init__(self, group: dist.ProcessGroup, link: SimulatedLink | None = None, wait_at_once: bool = False) -> None:
        self._group, self._link, self._wait_at_once = group, link, wait_at_once

    def dispatch(self, chunk: Chunk, source: Tensor, region: Tensor) -> Pending:
        """Send rows to where they are computed.

        Args:
            chunk: The chunk.
            source: What this rank sends, ``[plan.num_sent, ...]``, contiguous.
            region: Where its own part of the chunk arrives, ``[chunk.rows, ...]``, contiguous.
        """
        return self._post(chunk.send, source, chunk.receive, region)

    def give_back(self, chunk: Chunk, region: Tensor, target: Tensor) -> Pending:
        """Send a chunk's results back to where its rows came from.

        Args:
            chunk: The chunk.
            region: Results, ``[chunk.rows, ...]``, contiguous.
            target: Where those of this rank's own rows arrive, ``[plan.num_sent, ...]``, contiguous.
        """
        return self._post(chunk.receive, region, chunk.send, target)

    def _post(self, send: Sequence[Message], source: Tensor, receive: Sequence[Message], target: Tensor) -> Pending:
        operations = [self._operation(dist.irecv, message, target) for message in receive]
        operations += [self._operation(dist.isend, message, source) for message in send]
        works = dist.batch_isend_irecv(operations) if operations else []
        arrival = None
        if self._link is not None:
            rows = max(sum(message.rows for message in send), sum(message.rows for message in receive))
            arrival = self._link.cross(rows * source[:1].nbytes if source.shape[0] else rows * target[:1].nbytes)
        pending = Pending(works, (source, target), arrival)
        if self._wait_at_once:
            pending.wait()
        return pending

    def _operation(self, kind: object, message: Message, tensor: Tensor) -> dist.P2POp:
        rows = tensor[message.start : message.start + message.rows]
        return dist.P2POp(kind, rows, group=self._group, group_peer=message.peer)  # type: ignore[arg-type]
