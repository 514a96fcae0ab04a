from __future__ import annotations

from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.config import ParallelConfig
from lightning_moe.errors import ConfigError

SIZES = st.integers(min_value=1, max_value=6)


@given(pipeline=SIZES, data=SIZES, context=SIZES, tensor=SIZES, chosen=st.data())
def test_resolve_factors_the_world_twice(
    pipeline: int, data: int, context: int, tensor: int, chosen: st.DataObject
) -> None:
    stage = data * context * tensor
    expert = chosen.draw(st.sampled_from([n for n in range(1, stage + 1) if stage % n == 0]))
    rest = stage // expert
    expert_tensor = chosen.draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0]))
    given_data = chosen.draw(st.sampled_from([None, data]))
    config = ParallelConfig(
        pipeline=pipeline,
        data=given_data,
        context=context,
        tensor=tensor,
        expert=expert,
        expert_tensor=expert_tensor,
    )
    world = pipeline * stage
    resolved = config.resolve(world)
    assert resolved.data == data
    assert prod((resolved.pipeline, data, resolved.context, resolved.tensor)) == world
    assert resolved.expert_data * resolved.expert * resolved.expert_tensor == stage
    assert resolved.resolve(world) == resolved


@given(
    sizes=st.fixed_dictionaries(
        dict.fromkeys(("pipeline", "context", "tensor", "expert", "expert_tensor"), SIZES),
        optional={"data": SIZES},
    ),
    world=st.integers(min_value=1, max_value=64),
)
def test_resolve_refuses_exactly_what_does_not_divide(sizes: dict[str, int], world: int) -> None:
    dense = sizes["pipeline"] * sizes["context"] * sizes["tensor"]
    data = world // dense
    stage = data * sizes["context"] * sizes["tensor"]
    fits = (
        world % dense == 0
        and sizes.get("data", data) == data
        and stage % (sizes["expert"] * sizes["expert_tensor"]) == 0
    )
    config = ParallelConfig(**sizes)
    if fits:
        assert config.resolve(world).data == data
    else:
        with pytest.raises(ConfigError) as raised:
            config.resolve(world)
        assert raised.value.field.startswith("parallel.")


@pytest.mark.parametrize(
    ("sizes", "world", "field"),
    [
        ({"expert": 2}, 3, "parallel.expert"),
        ({"expert_tensor": 2}, 3, "parallel.expert_tensor"),
        ({"data": 2}, 4, "parallel.data"),
        ({"pipeline": 2, "tensor": 2}, 6, "parallel.pipeline*context*tensor"),
    ],
)
def test_resolve_names_the_field(sizes: dict[str, int], world: int, field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ParallelConfig(**sizes).resolve(world)
    assert raised.value.field == field


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "2", None])
@pytest.mark.parametrize("name", ["pipeline", "context", "tensor", "expert", "expert_tensor"])
def test_sizes_are_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        ParallelConfig(**{name: value})
    assert raised.value.field == f"parallel.{name}"
