"""Flat layouts: every element lies in exactly one shard, and cuts keep the ends of vectors together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.parallel.flat import ALIGNMENT, FlatLayout

SIZES = st.lists(st.one_of(st.integers(0, 5), st.integers(60, 70), st.integers(0, 5000)), min_size=1, max_size=12)


@given(SIZES, st.integers(1, 9))
def test_runs_partition_every_parameter(sizes: list[int], ranks: int) -> None:
    layout = FlatLayout(tuple(sizes), ranks)
    for index, size in enumerate(sizes):
        runs = [layout.run(index, rank) for rank in range(ranks)]
        assert [position for run in runs for position in run] == list(range(size))
        for rank, run in enumerate(runs):
            placed = range(layout.offsets[index] + run.start, layout.offsets[index] + run.stop)
            assert not run or (placed.start in layout.shard(rank) and placed[-1] in layout.shard(rank))


@given(SIZES, st.integers(1, 9))
def test_cuts_are_aligned_and_nothing_overlaps(sizes: list[int], ranks: int) -> None:
    layout = FlatLayout(tuple(sizes), ranks)
    end = 0
    for index, (offset, size) in enumerate(zip(layout.offsets, sizes, strict=True)):
        assert offset >= end
        assert offset % ALIGNMENT == 0
        end = offset + size
        for rank in range(ranks):
            run = layout.run(index, rank)
            assert not run or run.start % ALIGNMENT == 0
    assert end <= layout.total == ranks * layout.shard_size
    assert layout.shard_size % ALIGNMENT == 0


@given(SIZES, st.integers(1, 9))
def test_shards_are_as_small_as_alignment_allows(sizes: list[int], ranks: int) -> None:
    layout = FlatLayout(tuple(sizes), ranks)
    gaps = ALIGNMENT * len(sizes)
    assert layout.total <= sum(sizes) + gaps + ranks * ALIGNMENT
