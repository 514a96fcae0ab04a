"""Moves the rows of chunks between the ranks of an expert group, without waiting.

All messages of a chunk are posted together, and every rank posts the chunks in the same order; NCCL's one communicator
and gloo's pairs of ranks match them by that order alone. On CUDA :meth:`Pending.wait` makes only the current stream
wait, on the CPU the caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.moe.overlap.plan import Chunk, Message

T = TypeVar("T")
U = TypeVar("U")


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

    def __init__(self, works: Sequence[dist.Work], tensors: Sequence[Tensor], arrival: float | None) -> None:
        self._works, self._arrival, self._tensors = list(works), arrival, list(tensors)

    def wait(self) -> None:
        """Wait until all have arrived; again, it does nothing (gloo hangs if one message is waited for twice)."""
        works, self._works = self._works, []
        for work in works:
            work.wait()
        if self._arrival is not None:
            time.sleep(max(0.0, self._arrival - time.perf_counter()))
            self._arrival = None
        self._tensors.clear()


def wait_for_all(pending: list[Pending]) -> None:
    """Wait for messages, the first first, and empty the list."""
    while pending:
        pending.pop(0).wait()


def post_between(
    posts: Sequence[Callable[[], T]], works: Sequence[Callable[[], U]], device: torch.device
) -> tuple[list[T], list[U]]:
    """Post messages, and do work that needs none of them and that they do not need.

    On the CPU work is done when it is called, so the messages go first. On CUDA it is only queued, and posting takes
    the host so long that the device would be idle meanwhile. So a piece of work is queued before each message, and the
    messages are posted from another stream, which waits for nothing of it.

    Args:
        posts: Each posts messages; what it posts must not be waited for inside, except on the CPU.
        works: Each does a piece of the work.
        device: Where.

    Returns:
        What all return, in their order.
    """
    if device.type != "cuda":
        return [post() for post in posts], [work() for work in works]
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    posted, done = [], []
    for post, work in zip_longest(posts, works):
        if work is not None:
            done.append(work())
        if post is not None:
            with torch.cuda.stream(beside):
                posted.append(post())
    return posted, done


class ChunkExchange:
    """Posts the messages of chunks.

    Args:
        group: The expert group.
        link: Simulated speed, on CPUs.
        wait_at_once: Whether to wait for each chunk where it is posted.
    """

    def __init__(self, group: dist.ProcessGroup, link: SimulatedLink | None = None, wait_at_once: bool = False) -> None:
        self._group, self._link, self.wait_at_once = group, link, wait_at_once

    def dispatch(self, chunk: Chunk, source: Tensor, buffer: Tensor) -> Pending:
        """Send rows to where they are computed.

        Args:
            chunk: The chunk.
            source: What this rank sends, ``[plan.num_sent, ...]``, contiguous.
            buffer: Where what it computes arrives, ``[plan.num_computed, ...]``, contiguous.
        """
        return self._post(
            [(message, source[message.start :]) for message in chunk.send],
            [(message, buffer[message.start :]) for message in chunk.receive],
        )

    def give_back(self, chunk: Chunk, results: Sequence[Tensor], target: Tensor) -> Pending:
        """Send a chunk's results back to where its rows came from.

        Args:
            chunk: The chunk.
            results: Those of each of its pieces, contiguous.
            target: Where those of this rank's own rows arrive, ``[plan.num_sent, ...]``, contiguous.
        """
        return self._post(
            [(message, _within(chunk, results, message)) for message in chunk.receive],
            [(message, target[message.start :]) for message in chunk.send],
        )

    def _post(self, send: Sequence[tuple[Message, Tensor]], receive: Sequence[tuple[Message, Tensor]]) -> Pending:
        incoming = [(message.peer, rows[: message.rows]) for message, rows in receive]
        outgoing = [(message.peer, rows[: message.rows]) for message, rows in send]
        operations = [self._operation(dist.irecv, *each) for each in incoming]
        operations += [self._operation(dist.isend, *each) for each in outgoing]
        works = dist.batch_isend_irecv(operations) if operations else []
        arrival = None
        if self._link is not None:
            arrival = self._link.cross(max(sum(rows.nbytes for _, rows in way) for way in (incoming, outgoing)))
        pending = Pending(works, [rows for _, rows in (*incoming, *outgoing)], arrival)
        if self.wait_at_once:
            pending.wait()
        return pending

    def _operation(self, kind: object, peer: int, rows: Tensor) -> dist.P2POp:
        return dist.P2POp(kind, rows, group=self._group, group_peer=peer)  # type: ignore[arg-type]


def _within(chunk: Chunk, results: Sequence[Tensor], message: Message) -> Tensor:
    """Results from the message's first row on."""
    for piece, rows in zip(chunk.pieces, results, strict=True):
        if piece.rows.start <= message.start < piece.rows.stop:
            return rows[message.start - piece.rows.start :]
    raise AssertionError(f"{message} is in no piece of the chunk")
