"""Who sends which rows to whom, in which chunks (torch-free).

P ranks share the experts of a layer, each holding as many *slots* (experts, or parts of them). A rank's send buffer is
sorted by slot, so what goes to one rank is one run of rows, and within it what goes to one slot is one run. What a rank
computes is cut into *chunks*, the units of exchange. Chunk 0 is its own rows; it needs no communication and covers the
head of the exchange and, with its second projection, the tail. All rows that a rank computes lie in one buffer; a chunk
consists of *pieces*, runs of rows of the buffer that are computed by one product.

[Note: two layouts]
Chunk after chunk, and within a chunk sorted by slot and then by source: a chunk is one piece, computed by one grouped
product. That is right for many small experts. Or slot after slot, and within a slot chunk after chunk: a chunk has a
piece for each slot. All rows of a slot then follow each other, so its weight gradient is a single product, which reads
and writes the float32 sum of a large expert once; and a product for each piece is as fast as a grouped one.

[Note: ring order]
Chunks and messages go by ring offset: rank r sends to r + i while it receives from r - i. That is P - 1 rounds for any
P, even or odd, in which every rank sends and receives. (The circle method of a tournament needs P rounds for an odd P
and leaves one rank idle in each.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple


class Chunking(NamedTuple):
    """How remote rows are cut into chunks, and how rows lie."""

    by: Literal["source", "expert"]
    """One chunk for each source rank, or one for each group of slots with the rows of all sources."""
    groups: int = 1
    """Groups that the slots form, with ``expert``; 1 with ``source``."""
    slot_major: bool = False
    """Whether rows lie slot after slot, instead of chunk after chunk."""


class Message(NamedTuple):
    """A run of rows to or from another rank; never empty."""

    peer: int
    """Rank within the group."""
    start: int
    """First row: in the send buffer of what is sent, in the computed buffer of what is received."""
    rows: int


class Piece(NamedTuple):
    """A run of rows that one product computes; never empty."""

    start: int
    """First row in the computed buffer."""
    first_slot: int
    """First local slot."""
    counts: tuple[int, ...]
    """Rows of each local slot from ``first_slot`` on."""

    @property
    def rows(self) -> slice:
        """Its rows of the computed buffer."""
        return slice(self.start, self.start + sum(self.counts))

    @property
    def slots(self) -> slice:
        """Its local slots."""
        return slice(self.first_slot, self.first_slot + len(self.counts))


@dataclass(frozen=True)
class Chunk:
    """Rows that are exchanged together.

    Attributes:
        sources: Ranks that they come from, in ring order; for chunk 0 this rank alone.
        pieces: What is computed, by ascending slots.
        receive: What comes, by position in the computed buffer; empty for chunk 0.
        send: What this rank sends while others receive the same chunk: positions in the send buffer.
    """

    sources: tuple[int, ...]
    pieces: tuple[Piece, ...]
    receive: tuple[Message, ...]
    send: tuple[Message, ...]

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return sum(sum(piece.counts) for piece in self.pieces)


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
        """Rows of the computed buffer."""
        return sum(chunk.rows for chunk in self.chunks)

    def segments(self, slots: slice) -> list[list[tuple[int, int]]]:
        """For each of some local slots, the runs ``(start, end)`` of its rows in the computed buffer.

        In the order of chunks; without empty runs, and with runs that follow each other as one.
        """
        found: list[list[tuple[int, int]]] = [[] for _ in range(slots.start, slots.stop)]
        for piece in (piece for chunk in self.chunks for piece in chunk.pieces):
            start = piece.start
            for slot, count in enumerate(piece.counts, piece.first_slot):
                if count and slots.start <= slot < slots.stop:
                    runs = found[slot - slots.start]
                    if runs and runs[-1][1] == start:
                        runs[-1] = (runs[-1][0], start + count)
                    else:
                        runs.append((start, start + count))
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
    sent_before = list(accumulate(counts[rank], initial=0))
    # Ring offsets and local slots of each chunk.
    cuts: list[tuple[range, range]] = [(range(1), range(local))]
    if chunking.by == "source":
        cuts += [(range(i, i + 1), range(local)) for i in range(1, ranks)]
    elif ranks > 1:
        bounds = [local * g // chunking.groups for g in range(chunking.groups + 1)]
        cuts += [(range(1, ranks), range(a, b)) for a, b in pairwise(bounds) if b > a]

    def rows_of(offset: int, slots: range) -> Sequence[int]:
        """Rows from the rank at a ring offset for some of this rank's slots."""
        first = rank * local
        return counts[(rank - offset) % ranks][first + slots.start : first + slots.stop]

    totals = [
        [sum(rows) for rows in zip(*(rows_of(i, slots) for i in offsets), strict=True)] for offsets, slots in cuts
    ]
    starts = _starts(totals, cuts, chunking)
    chunks = []
    for number, (offsets, slots) in enumerate(cuts):
        if chunking.slot_major:
            pieces = [
                Piece(*each) for each in zip(starts[number], slots, zip(totals[number], strict=True), strict=True)
            ]
        else:
            pieces = [Piece(starts[number][0], slots.start, tuple(totals[number]))]
        # One source's slots follow each other on both sides, unless rows lie slot after slot.
        joined = len(offsets) == 1 and not chunking.slot_major
        receive, send = [], []
        for slot in [slots] if joined else [range(slot, slot + 1) for slot in slots]:
            position = starts[number][slot.start - slots.start]
            for i in offsets if number else ():
                peer, rows = (rank + i) % ranks, sum(rows_of(i, slot))
                receive.append(Message((rank - i) % ranks, position, rows))
                position += rows
                first, stop = peer * local + slot.start, peer * local + slot.stop
                send.append(Message(peer, sent_before[first], sent_before[stop] - sent_before[first]))
        chunks.append(
            Chunk(
                tuple((rank - i) % ranks for i in offsets),
                tuple(piece for piece in pieces if sum(piece.counts)),
                tuple(message for message in receive if message.rows),
                tuple(message for message in send if message.rows),
            )
        )
    return ExchangePlan(rank, sent_before[-1], sent_before[rank * local], tuple(chunks))


def _starts(
    totals: Sequence[Sequence[int]], cuts: Sequence[tuple[range, range]], chunking: Chunking
) -> list[list[int]]:
    """First row in the computed buffer of each slot of each chunk."""
    if not chunking.slot_major:
        ends = list(accumulate((sum(rows) for rows in totals), initial=0))
        return [list(accumulate(rows, initial=end))[:-1] for end, rows in zip(ends, totals, strict=False)]
    starts = [[0] * len(rows) for rows in totals]
    position = 0
    for slot in cuts[0][1]:
        for number, (_, slots) in enumerate(cuts):
            if slot in slots:
                starts[number][slot - slots.start] = position
                position += totals[number][slot - slots.start]
    return starts
