"""Who sends which rows to whom, in which chunks (torch-free).

P ranks share the experts of a layer, each holding as many *slots* (experts, or parts of them). A rank's send buffer is
sorted by slot, so what goes to one rank is one run of rows, and within it what goes to one slot is one run. What a rank
computes is cut into *chunks*. Chunk 0 is its own rows; it needs no communication and covers the head of the exchange
and, with its second projection, the tail. Every other chunk has a *region* of rows, sorted by slot and within a slot by
source, so that each chunk is one grouped product.

[Note: ring order]
Chunks and messages go by ring offset: rank r sends to r + i while it receives from r - i. That is P - 1 rounds for any
P, even or odd, in which every rank sends and receives. (The circle method of a tournament needs P rounds for an odd P
and leaves one rank idle in each.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple


class Chunking(NamedTuple):
    """How remote rows are cut into chunks."""

    by: Literal["source", "expert"]
    """One chunk for each source rank, or one for each group of slots with the rows of all sources."""
    groups: int = 1
    """Groups that the slots form, with ``expert``; 1 with ``source``."""


class Message(NamedTuple):
    """A run of rows to or from another rank; never empty."""

    peer: int
    """Rank within the group."""
    start: int
    """First row: in the send buffer of what is sent, in the chunk's region of what is received."""
    rows: int


@dataclass(frozen=True)
class Chunk:
    """Rows that are computed together.

    Attributes:
        sources: Ranks that they come from, in ring order; for chunk 0 this rank alone.
        first_slot: First local slot.
        counts: Rows of each local slot from ``first_slot`` on.
        receive: What comes, by position in the region; empty for chunk 0.
        send: What this rank sends while others receive the same chunk: positions in the send buffer.
    """

    sources: tuple[int, ...]
    first_slot: int
    counts: tuple[int, ...]
    receive: tuple[Message, ...]
    send: tuple[Message, ...]

    @property
    def rows(self) -> int:
        """Rows of the region."""
        return sum(self.counts)

    @property
    def slots(self) -> slice:
        """Local slots that it computes."""
        return slice(self.first_slot, self.first_slot + len(self.counts))


@dataclass(frozen=True)
class ExchangePlan:
    """The chunks of one layer call on one rank.

    Attributes:
        rank: This rank within the group.
        num_sent: Rows of the send buffer, own ones included.
        own_start: First own row in the send buffer.
        chunks: The own rows, then what comes from others, in the order in which it is exchanged.
    """

    rank: int
    num_sent: int
    own_start: int
    chunks: tuple[Chunk, ...]

    @property
    def num_computed(self) -> int:
        """Rows of all chunks."""
        return sum(chunk.rows for chunk in self.chunks)

    @property
    def starts(self) -> tuple[int, ...]:
        """First row of each chunk where all chunks lie one after the other."""
        starts = [0]
        for chunk in self.chunks[:-1]:
            starts.append(starts[-1] + chunk.rows)
        return tuple(starts)

    def segments(self, slots: slice) -> list[list[tuple[int, int]]]:
        """For each of some local slots, the runs ``(start, end)`` of its rows where chunks lie one after the other.

        In the order of chunks; runs without rows are left out.
        """
        found: list[list[tuple[int, int]]] = [[] for _ in range(slots.start, slots.stop)]
        for start, chunk in zip(self.starts, self.chunks, strict=True):
            for slot, count in enumerate(chunk.counts, chunk.first_slot):
                if count and slots.start <= slot < slots.stop:
                    found[slot - slots.start].append((start, start + count))
                start += count
        return found


def plan_exchange(counts: Sequence[Sequence[int]], rank: int, chunking: Chunking) -> ExchangePlan:
    """Work out a rank's chunks.

    Args:
        counts: Rows that each rank sends to each slot of all ranks, ``[P][P * slots]``.
        rank: This rank within the group.
        chunking: How to cut; every rank must say the same.
    """
    ranks = len(counts)
    local = len(counts[0]) // ranks
    sent_before = [0]
    for rows in counts[rank]:
        sent_before.append(sent_before[-1] + rows)

    def group(offsets: Sequence[int], first: int, stop: int) -> Chunk:
        sources = [(rank - i) % ranks for i in offsets]
        receive, send, totals, position = [], [], [], 0
        for slot in range(first, stop):
            start = position
            for source in sources:
                rows = counts[source][rank * local + slot]
                receive.append(Message(source, position, rows))
                position += rows
            totals.append(position - start)
            for i in offsets:
                peer = (rank + i) % ranks
                column = peer * local + slot
                send.append(Message(peer, sent_before[column], counts[rank][column]))
        return Chunk(tuple(sources), first, tuple(totals), _messages(receive), _messages(send))

    own = counts[rank][rank * local : (rank + 1) * local]
    chunks = [Chunk((rank,), 0, tuple(own), (), ())]
    if chunking.by == "source":
        chunks += [group([i], 0, local) for i in range(1, ranks)]
    elif ranks > 1:
        bounds = [local * g // chunking.groups for g in range(chunking.groups + 1)]
        chunks += [group(range(1, ranks), a, b) for a, b in pairwise(bounds) if b > a]
    return ExchangePlan(rank, sent_before[-1], sent_before[rank * local], tuple(chunks))


def _messages(pieces: list[Message]) -> tuple[Message, ...]:
    """One message for all pieces if a single peer is concerned, else one for each; none without rows."""
    if len({piece.peer for piece in pieces}) == 1:
        # One source's slots follow each other on both sides. With several sources they need not on the receiver's.
        pieces = [pieces[0]._replace(rows=sum(piece.rows for piece in pieces))]
    return tuple(piece for piece in pieces if piece.rows)
