from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.config.placement import ExpertPlacement
from lightning_moe.errors import ConfigError


@st.composite
def placements(draw: st.DrawFn) -> ExpertPlacement:
    ranks, slots = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    order = draw(st.none() | st.permutations(range(ranks * slots)).map(tuple))
    return ExpertPlacement(ranks * slots, ranks, order)


@given(placements())
def test_slots_and_experts_are_inverse(placement: ExpertPlacement) -> None:
    for slot, expert in enumerate(placement.expert_of_slot):
        assert placement.slot_of_expert[expert] == slot
        assert placement.rank_of_expert(expert) == slot // placement.slots_per_rank
        local = placement.local_experts(placement.rank_of_expert(expert))
        assert local[slot % placement.slots_per_rank] == expert


@given(placements())
def test_ranks_share_out_the_experts(placement: ExpertPlacement) -> None:
    held = [placement.local_experts(rank) for rank in range(placement.expert_parallel)]
    assert {len(experts) for experts in held} == {placement.slots_per_rank}
    assert sorted(sum(held, ())) == list(range(placement.num_experts))


def test_hand_written_order() -> None:
    placement = ExpertPlacement(6, 3, (4, 0, 5, 1, 3, 2))
    assert placement.local_experts(1) == (5, 1)
    assert placement.slot_of_expert == (1, 3, 5, 4, 0, 2)
    assert placement.rank_of_expert(2) == 2


@pytest.mark.parametrize(
    ("num_experts", "ranks", "order", "field"),
    [
        (6, 4, None, "moe.num_experts"),
        (0, 1, None, "moe.num_experts"),
        (4, 2, (0, 1, 2), "moe.expert_placement"),
        (4, 2, (0, 1, 2, 2), "moe.expert_placement"),
        (4, 2, (1, 2, 3, 4), "moe.expert_placement"),
    ],
)
def test_refuses(num_experts: int, ranks: int, order: tuple[int, ...] | None, field: str) -> None:
    with pytest.raises(ConfigError) as error:
        ExpertPlacement(num_experts, ranks, order)
    assert error.value.field == field


def test_imports_no_torch() -> None:
    code = "import sys, lightning_moe.config.placement; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
