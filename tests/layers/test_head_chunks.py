"""How heads are cut into chunks."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.layers.head_chunks import HeadChunk, head_chunks


def shown(chunks: tuple[HeadChunk, ...]) -> list[tuple[int, ...]]:
    return [(len(chunk.query), *chunk.key, len(chunk.sent)) for chunk in chunks]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "chunks", "expected"),
    [
        (8, 8, 2, 2, [(2, 0, 1, 2), (2, 2, 3, 2)]),
        (12, 12, 2, 4, [(1, 0, 1), (2, 1, 2, 2), (1, 3, 1), (2, 4, 5, 2)]),  # six heads
        (12, 4, 2, 2, [(3, 0, 1), (3, 1, 1)]),  # whole groups
        (12, 4, 2, 3, [(3, 0, 1), (1, 1, 1), (2, 1, 0)]),  # one group is cut: its second part has its key already
        (8, 2, 4, 2, [(1, 0, 1), (1, 0, 0)]),  # each key goes to two ranks
        (12, 3, 2, 3, [(2, 0, 3), (2, 1, 0), (2, 2, 0)]),  # 0, 0, 1 and 1, 2, 2 would need a key in two chunks
        (8, 4, 4, 9, [(1, 0, 1), (1, 0, 0)]),
        (4, 4, 4, 2, [(1, 0, 1)]),
    ],
)
def test_chunks(heads: int, kv_heads: int, ranks: int, chunks: int, expected: list[tuple[int, ...]]) -> None:
    assert shown(head_chunks(heads, kv_heads, ranks, chunks)) == [tuple(each) for each in expected]


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 6), st.integers(1, 40))
def test_every_head_is_in_one_chunk_and_finds_its_key(ranks: int, kv_heads: int, width: int, chunks: int) -> None:
    received = math.lcm(kv_heads, ranks) // ranks
    heads = received * ranks * width
    found = head_chunks(heads, kv_heads, ranks, chunks)
    share = heads // ranks
    assert len(found) == min(chunks, share)
    assert [head for chunk in found for head in chunk.query] == list(range(share))
    assert [key for chunk in found for key in chunk.sent] == list(range(received))
    brought = range(0)
    for chunk in found:
        brought = chunk.sent or brought
        assert len(chunk.query) > 0
        # One run of keys, all of which came with the last chunk that brought any, each serving equally many heads.
        assert set(chunk.key) <= set(brought)
        assert sorted({head // width for head in chunk.query}) == list(chunk.key)
        assert len(chunk.query) % len(chunk.key) == 0
        assert [head // width for head in chunk.query] == [
            key for key in chunk.key for _ in range(len(chunk.query) // len(chunk.key))
        ]
    if chunks <= received:
        lengths = [len(chunk.query) for chunk in found]
        assert max(lengths) - min(lengths) <= width
