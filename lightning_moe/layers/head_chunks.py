"""Which heads are exchanged together where an exchange is cut into chunks (torch-free).

C context ranks, N query heads, M key and value heads (both of one tensor rank). While attending, a rank has N / C query
heads and lcm(M, C) / C key and value heads, each of which serves a group of its query heads (see the note in
:mod:`lightning_moe.layers.ulysses`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class HeadChunk:
    """Some of the heads that a rank attends with; counted from its first one, and the same on every rank.

    Attributes:
        query: Query heads.
        key: Key and value heads that they attend to.
        sent: Those that are exchanged with this chunk. Empty where an earlier one has brought what this one needs.
    """

    query: range
    key: range
    sent: range


def head_chunks(num_heads: int, num_kv_heads: int, ranks: int, chunks: int) -> tuple[HeadChunk, ...]:
    """Cut a rank's heads into chunks, as even as whole groups of query heads allow.

    Groups are cut only where there are more chunks than groups. Then the first chunk of a group brings its key and
    value head. Key and value heads that are sent to several ranks all travel with the first chunk, so that none is
    projected twice.

    Args:
        num_heads: Query heads ``N``, a multiple of ``ranks`` and of ``num_kv_heads``.
        num_kv_heads: Key and value heads ``M``.
        ranks: Context ranks ``C``.
        chunks: How many chunks are wanted.

    Returns:
        At most ``N / C`` chunks, in the order of their query heads; none is empty.
    """
    share, groups = num_heads // ranks, math.lcm(num_kv_heads, ranks) // ranks
    width = share // groups
    count = min(chunks, share)
    found = []
    if count <= groups:
        for key in _cut(groups, count):
            found.append(HeadChunk(range(key.start * width, key.stop * width), key, key))
    else:
        for group, pieces in enumerate(_cut(count, groups)):
            key = range(group, group + 1)
            for query in _cut(width, len(pieces)):
                first = group * width
                sent = key if query.start == 0 else range(0)
                found.append(HeadChunk(range(first + query.start, first + query.stop), key, sent))
    if num_kv_heads % ranks:
        sent_first = [range(groups)] + [range(0)] * (count - 1)
        found = [HeadChunk(chunk.query, chunk.key, sent) for chunk, sent in zip(found, sent_first, strict=True)]
    return tuple(found)


def _cut(length: int, pieces: int) -> list[range]:
    """Ranges of ``range(length)`` that differ by one at most."""
    bounds = [length * i // pieces for i in range(pieces + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]
