"""From settings to schedules and stages."""

from __future__ import annotations

import pytest

from lightning_moe.config import PipelineConfig
from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.planning import costs_of, parts_of, schedule_of, stage_factors


def test_the_schedule_is_the_configurations() -> None:
    schedule = schedule_of(PipelineConfig(schedule="interleaved-1f1b", chunks=3, num_microbatches=6), 2)
    assert (schedule.name, schedule.placement.chunks, schedule.microbatches) == ("interleaved-1f1b", 3, 6)
    assert schedule_of(PipelineConfig(), 4).microbatches == 8
    assert schedule_of(PipelineConfig(max_lag=0), 4).splits_backward is False
    costs = costs_of(PipelineConfig(costs=(1.0, 2.0, 0.5), communication=0.1))
    assert (costs.forward, costs.backward, costs.weight, costs.communication) == (1.0, 2.0, 0.5, 0.1)


def test_costs_of_blocks_have_any_unit() -> None:
    """The head costs two average blocks, whether blocks are given as 1 or as 1000."""
    divided = [
        parts_of(PipelineConfig(block_costs=(unit,) * 10), 3, 10, block_costs=(5.0,) * 10, head_cost=2.0)
        for unit in (1.0, 1000.0)
    ]
    assert divided[0] == divided[1]
    assert [len(part.blocks) for part in divided[0]] == [4, 4, 2]


def test_depths_by_hand_win() -> None:
    parts = parts_of(PipelineConfig(blocks_per_stage=(1, 3)), 2, 4, head_cost=9.0)
    assert [len(part.blocks) for part in parts] == [1, 3]
    with pytest.raises(ConfigError, match=r"pipeline\.blocks_per_stage.*3 numbers"):
        parts_of(PipelineConfig(blocks_per_stage=(1, 3)), 3, 4)


def test_auto_makes_the_stages_whose_depths_are_given() -> None:
    """Left alone it would choose more chunks than the depths are for."""
    assert schedule_of(PipelineConfig(schedule="auto"), 2, 8).placement.chunks > 1
    for depths in ((4, 4), (2, 2, 2, 2)):
        schedule = schedule_of(PipelineConfig(schedule="auto", blocks_per_stage=depths), 2, 8)
        assert schedule.placement.num_stages == len(depths)


def test_factors_are_relative_to_the_average_stage() -> None:
    parts = parts_of(PipelineConfig(blocks_per_stage=(2, 1)), 2, 3)
    assert stage_factors(parts) == pytest.approx((4 / 3, 2 / 3), rel=1e-12)
    # Blocks of mean 1: 0.5, 0.5, 2. Stages: 0.25 + 1, and 2 + 0.75.
    factors = stage_factors(parts, block_costs=(1.0, 1.0, 4.0), embed_cost=0.25, head_cost=0.75)
    assert factors == pytest.approx((1.25 / 2, 2.75 / 2), rel=1e-12)
