"""Stages on ranks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.placement import Placement, Shape


@given(st.integers(1, 16), st.integers(1, 6), st.sampled_from(["loop", "v"]))
def test_every_stage_has_one_place(ranks: int, chunks: int, shape: Shape) -> None:
    placement = Placement(ranks, chunks, shape)
    places = [placement.location(stage) for stage in range(placement.num_stages)]
    assert sorted(places) == [(rank, chunk) for rank in range(ranks) for chunk in range(chunks)]
    assert [placement.stage(*place) for place in places] == list(range(placement.num_stages))
    assert [chunk for _, chunk in places] == sorted(chunk for _, chunk in places)  # in the order of visits


@pytest.mark.parametrize(
    ("arguments", "field"),
    [((0,), "ranks"), ((2.0,), "ranks"), ((2, 0), "chunks"), ((2, 2, "zigzag"), "shape")],
)
def test_placements_that_there_are_not(arguments: tuple[Any, ...], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"placement\.{field}: "):
        Placement(*arguments)


@pytest.mark.parametrize(
    ("shape", "ranks"), [("loop", [0, 1, 2, 0, 1, 2, 0, 1, 2]), ("v", [0, 1, 2, 2, 1, 0, 0, 1, 2])]
)
def test_way_of_a_microbatch(shape: Shape, ranks: list[int]) -> None:
    placement = Placement(3, 3, shape)
    assert [placement.location(stage)[0] for stage in range(9)] == ranks
