"""Runs of elements as rectangular boxes, against numpy."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.checkpoint.boxes import boxes


@st.composite
def runs(draw: st.DrawFn) -> tuple[tuple[int, ...], range]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    start = draw(st.integers(0, prod(shape)))
    return shape, range(start, draw(st.integers(start, prod(shape))))


@given(runs())
def test_boxes_hold_the_elements_of_the_run_in_order(case: tuple[tuple[int, ...], range]) -> None:
    shape, run = case
    positions = np.arange(prod(shape)).reshape(shape)
    found = [
        positions[tuple(slice(o, o + size) for o, size in zip(offsets, sizes, strict=True))].ravel()
        for offsets, sizes in boxes(shape, run)
    ]
    assert all(box.size for box in found)
    assert np.concatenate([np.empty(0, dtype=int), *found]).tolist() == list(run)
    assert len(found) <= max(2 * len(shape) - 1, 1)


@pytest.mark.parametrize(
    ("shape", "run", "expected"),
    [
        ((4, 3), range(12), [((0, 0), (4, 3))]),
        ((4, 3), range(3, 9), [((1, 0), (2, 3))]),
        ((4, 3), range(4, 5), [((1, 1), (1, 1))]),
        # . . .
        # . 1 1
        # 2 2 2
        # 3 . .
        ((4, 3), range(4, 10), [((1, 1), (1, 2)), ((2, 0), (1, 3)), ((3, 0), (1, 1))]),
        # . 0   2 2
        # 1 1   3 .
        (
            (2, 2, 2),
            range(1, 7),
            [((0, 0, 1), (1, 1, 1)), ((0, 1, 0), (1, 1, 2)), ((1, 0, 0), (1, 1, 2)), ((1, 1, 0), (1, 1, 1))],
        ),
        ((5,), range(2, 4), [((2,), (2,))]),
        ((), range(1), [((), ())]),
        ((), range(0), []),
        ((4, 3), range(7, 7), []),
        ((0, 3), range(0), []),
        ((3, 0), range(0), []),
    ],
)
def test_by_hand(shape: tuple[int, ...], run: range, expected: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    assert boxes(shape, run) == expected
