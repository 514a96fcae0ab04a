"""How calls of a shape go: what was tried, the cost model, and room for messages."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from lightning_moe.config import OverlapConfig
from lightning_moe.moe.overlap.cost import LayerShape
from lightning_moe.moe.overlap.executor import ExpertOverlap
from lightning_moe.moe.overlap.plan import Chunking
from tests.moe.overlap.test_executor import RATES, SHAPE, SOURCE


def test_what_was_tried_decides() -> None:
    fast = replace(RATES, link_bytes_per_second=1e18)
    assert ExpertOverlap(OverlapConfig(), fast).choice.chunking(SHAPE) is None, "there is nothing to hide"
    assert ExpertOverlap(OverlapConfig(), fast).choice.untried(SHAPE) is None, "and nothing is to be tried"
    trials: dict[LayerShape, tuple[float, float]] = {}
    overlap = ExpertOverlap(OverlapConfig(), fast, trials=trials)
    assert overlap.choice.chunking(SHAPE) is None
    chunks = overlap.choice.untried(SHAPE)
    assert chunks is not None
    trials[SHAPE] = (1.0, 0.9)
    assert overlap.choice.untried(SHAPE) is None
    assert overlap.choice.chunking(SHAPE) == chunks
    fewer, more = replace(SHAPE, rows=SHAPE.rows / 3), replace(SHAPE, rows=SHAPE.rows * 4)
    trials[fewer] = (1.0, 0.99)
    assert overlap.choice.chunking(fewer) is None, "2 % are not worth it"
    assert overlap.choice.chunking(replace(SHAPE, rows=SHAPE.rows / 2)) is None, "nearest to the one with fewer rows"
    assert overlap.choice.chunking(more) == overlap.choice.untried(more), "nearest to the one with more"
    for n in range(6):
        assert overlap.choice.untried(replace(SHAPE, rows=10.0**n)) is not None
        trials[replace(SHAPE, rows=10.0**n)] = (1.0, 2.0)
    assert overlap.choice.untried(more) is None, "eight shapes are enough"
    forced = ExpertOverlap(SOURCE, fast, trials={SHAPE: (1.0, 2.0)})
    assert (forced.choice.chunking(SHAPE), forced.choice.untried(more)) == (Chunking("source"), None)


def test_what_was_tried_is_reported() -> None:
    said: list[str] = []
    overlap = ExpertOverlap(OverlapConfig(), RATES, trials={}, report=said.append)
    overlap.choice.add_trial(SHAPE, (0.0299, 0.0312))
    overlap.choice.add_trial(replace(SHAPE, rows=64), (0.02, 0.01))
    assert said == [
        "overlap: 2000 rows take 29.9 ms by an all-to-all, 31.2 ms with overlap: an all-to-all",
        "overlap: 64 rows take 20 ms by an all-to-all, 10 ms with overlap: overlap",
    ]
    loaded = pickle.loads(pickle.dumps(overlap))
    assert loaded.choice.trials == overlap.choice.trials
    assert loaded.choice._report is None


@pytest.mark.parametrize(("given", "ranks", "margin"), [(None, 2, 4), (None, 4, 8), (7, 4, 7), (0, 4, 0)])
def test_room_for_messages(given: int | None, ranks: int, margin: int) -> None:
    assert ExpertOverlap(replace(SOURCE, sm_margin=given), RATES).choice.sm_margin(ranks) == margin
