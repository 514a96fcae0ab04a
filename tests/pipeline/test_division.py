"""Division of blocks into stages, against all divisions there are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.division import blocks_by_hand, divide_blocks
from lightning_moe.pipeline.parts import ModelPart


def depths(parts: tuple[ModelPart, ...]) -> list[int]:
    return [len(part.blocks) for part in parts]


def all_divisions(blocks: int, stages: int, embed: float, head: float) -> Iterator[list[int]]:
    """The depths of every division in which no stage has nothing to do."""
    for cuts in combinations_with_replacement(range(blocks + 1), stages - 1):
        division = [stop - start for start, stop in pairwise([0, *cuts, blocks])]
        extra = [embed * (stage == 0) + head * (stage == stages - 1) for stage in range(stages)]
        if all(depth or more for depth, more in zip(division, extra, strict=True)):
            yield division


def stage_costs(division: list[int], block_costs: list[float], embed: float, head: float) -> list[float]:
    costs, start = [], 0
    for depth in division:
        costs.append(sum(block_costs[start : start + depth]))
        start += depth
    costs[0] += embed
    costs[-1] += head
    return costs


# Multiples of a quarter add up without rounding, so ties are ties.
QUARTERS = st.integers(1, 12).map(lambda quarters: quarters / 4)


@pytest.mark.slow
@settings(max_examples=250)
@given(st.data(), st.lists(QUARTERS, min_size=1, max_size=8), st.integers(1, 6))
def test_no_division_is_better(data: st.DataObject, block_costs: list[float], stages: int) -> None:
    embed, head = data.draw(st.just(0.0) | QUARTERS), data.draw(st.just(0.0) | QUARTERS)
    blocks = len(block_costs)
    choices = list(all_divisions(blocks, stages, embed, head))
    if not choices:
        with pytest.raises(ConfigError, match="pipeline stages"):
            divide_blocks(blocks, stages, block_costs=block_costs, embed_cost=embed, head_cost=head)
        return
    parts = divide_blocks(blocks, stages, block_costs=block_costs, embed_cost=embed, head_cost=head)

    def merit(division: list[int]) -> tuple[float, float, int, list[int]]:
        costs = stage_costs(division, block_costs, embed, head)
        ends = division[0] + division[-1] if stages > 1 else blocks
        return max(costs), sum(cost**2 for cost in costs), ends, division

    assert depths(parts) == min(choices, key=merit)
    assert [block for part in parts for block in part.blocks] == list(range(blocks))
    assert [part.first for part in parts] == [stage == 0 for stage in range(stages)]
    assert [part.last for part in parts] == [stage == stages - 1 for stage in range(stages)]


@pytest.mark.parametrize(
    ("blocks", "stages", "embed", "head", "expected"),
    [
        (16, 4, 0, 0, [4, 4, 4, 4]),
        (10, 4, 0, 0, [2, 3, 3, 2]),
        (9, 4, 0, 0, [2, 2, 3, 2]),
        (14, 4, 1, 1, [3, 4, 4, 3]),
        (8, 4, 0, 2, [2, 3, 3, 0]),  # no dearer than [2, 2, 3, 1], and fewer at the ends
        (2, 4, 1, 1, [0, 1, 1, 0]),
    ],
)
def test_some_divisions(blocks: int, stages: int, embed: float, head: float, expected: list[int]) -> None:
    assert depths(divide_blocks(blocks, stages, embed_cost=embed, head_cost=head)) == expected


def test_equal_costs_that_are_no_round_numbers() -> None:
    """0.1 + 0.1 + 0.1 is more than 0.3: sums in another order must not decide."""
    assert depths(divide_blocks(10, 4, block_costs=[0.1] * 10)) == [2, 3, 3, 2]


def test_more_stages_than_blocks() -> None:
    with pytest.raises(
        ConfigError, match=r"pipeline stages: 4 is not allowed; allowed: at most 3, for 2 blocks and head"
    ):
        divide_blocks(2, 4, head_cost=1.0)


def test_costs_of_other_blocks() -> None:
    with pytest.raises(ConfigError, match="3 numbers, one for each block"):
        divide_blocks(3, 2, block_costs=[1.0, 1.0])


def test_by_hand() -> None:
    parts = blocks_by_hand((0, 3, 1, 0), 4, 4)
    assert parts[0] == ModelPart(range(0), first=True)
    assert parts[1:3] == (ModelPart(range(3)), ModelPart(range(3, 4)))
    assert parts[3] == ModelPart(range(4, 4), last=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((2, 2), "3 numbers, one for each stage"),
        ((2, 2, 1), "add up to the 4 blocks"),
        ((5, -2, 1), "add up to the 4 blocks"),
        ((2, 0, 2), "at least one block for each stage between"),
    ],
)
def test_wrong_numbers_by_hand(wrong: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        blocks_by_hand(wrong, 4, 3)
