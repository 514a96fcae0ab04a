"""Runs of elements as rectangular boxes: pure arithmetic, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""``(offsets, sizes)``, one of each for every dim."""


def boxes(shape: Sequence[int], run: range) -> list[Box]:
    """Cut a run of an array's elements into rectangular boxes.

    A run begins in the middle of a row and ends in the middle of another. The whole rows between them are one box; the
    two ends are runs of the elements of a row, and are cut likewise.

    Args:
        shape: Shape of the array; ``()`` has one element.
        run: Positions of the elements in row-major order, a range with step 1.

    Returns:
        At most ``2 n - 1`` boxes for ``n`` dims (one for a scalar), in the order of the run: the elements of a box, in
        row-major order, follow on those of the box before it. None for an empty run.
    """
    if not run:
        return []
    if not shape:
        return [((), ())]
    row = prod(shape[1:])
    first, head = divmod(run.start, row)
    last, tail = divmod(run.stop, row)
    if first == last:  # begins and ends within one row
        return _in_row(first, shape[1:], range(head, tail))
    found = []
    if head:
        found += _in_row(first, shape[1:], range(head, row))
        first += 1
    if first < last:
        found.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    if tail:
        found += _in_row(last, shape[1:], range(tail))
    return found


def _in_row(row: int, shape: Sequence[int], run: range) -> list[Box]:
    return [((row, *offsets), (1, *sizes)) for offsets, sizes in boxes(shape, run)]
