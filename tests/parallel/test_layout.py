"""Rank lists against Megatron-core's, member by member and in order; group creation likewise."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.errors import ConfigError
from lightning_moe.parallel.layout import Axis, axis_named, axis_size, coordinate, rank_lists
from lightning_moe.parallel.mesh import ParallelMesh

ORDER = "tp-cp-ep-dp-pp"
DENSE_TOKENS = {
    Axis.WORLD: "tp-cp-dp-pp",
    Axis.DATA_CONTEXT: "dp-cp",
    Axis.DATA: "dp",
    Axis.CONTEXT: "cp",
    Axis.TENSOR: "tp",
    Axis.PIPELINE: "pp",
    Axis.DATA_CONTEXT_TENSOR: "tp-dp-cp",
    Axis.CONTEXT_TENSOR: "tp-cp",
}
EXPERT_TOKENS = {
    Axis.PIPELINE: "pp",
    Axis.EXPERT: "ep",
    Axis.EXPERT_TENSOR: "tp",
    Axis.EXPERT_MODEL: "tp-ep",
    Axis.EXPERT_DATA: "dp",
}
GROUP_NAMES = {
    "DATA_PARALLEL_GROUP_WITH_CP": Axis.DATA_CONTEXT,
    "DATA_PARALLEL_GROUP": Axis.DATA,
    "CONTEXT_PARALLEL_GROUP": Axis.CONTEXT,
    "TENSOR_MODEL_PARALLEL_GROUP": Axis.TENSOR,
    "PIPELINE_MODEL_PARALLEL_GROUP": Axis.PIPELINE,
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": Axis.DATA_CONTEXT_TENSOR,
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": Axis.CONTEXT_TENSOR,
    "EXPERT_MODEL_PARALLEL_GROUP": Axis.EXPERT,
    "EXPERT_TENSOR_PARALLEL_GROUP": Axis.EXPERT_TENSOR,
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": Axis.EXPERT_MODEL,
    "EXPERT_DATA_PARALLEL_GROUP": Axis.EXPERT_DATA,
}


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def random_configs(count: int) -> list[ParallelConfig]:
    """Distinct resolved shapes of up to 64 ranks, world sizes that are no powers of two included."""
    generator = random.Random(0)
    found: dict[ParallelConfig, None] = {}
    while len(found) < count:
        world_size = generator.choice([2, 4, 6, 8, 12, 16, 18, 24, 32, 36, 48, 60, 64])
        sizes, remaining = {}, world_size
        for axis in generator.sample(["pipeline", "context", "tensor"], 3):
            sizes[axis] = generator.choice(divisors(remaining))
            remaining //= sizes[axis]
        expert = generator.choice(divisors(world_size // sizes["pipeline"]))
        expert_tensor = generator.choice(divisors(world_size // sizes["pipeline"] // expert))
        config = ParallelConfig(expert=expert, expert_tensor=expert_tensor, **sizes)
        found[config.resolve(world_size)] = None
    return list(found)


CONFIGS = random_configs(300)


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    parallel_state: ModuleType = pytest.importorskip("megatron.core.parallel_state")
    return parallel_state


def test_the_random_shapes_exercise_every_axis() -> None:
    for name in ("pipeline", "data", "context", "tensor", "expert", "expert_tensor", "expert_data"):
        assert sum(getattr(config, name) > 1 for config in CONFIGS) >= 50, name


def test_dense_rank_lists_equal_megatron(megatron: ModuleType) -> None:
    for config in CONFIGS:
        generator = megatron.RankGenerator(
            tp=config.tensor, ep=1, dp=config.data, pp=config.pipeline, cp=config.context, order=ORDER
        )
        for axis, token in DENSE_TOKENS.items():
            expected = [tuple(ranks) for ranks in generator.get_ranks(token)]
            assert rank_lists(config, axis) == expected, (config, axis)


def test_expert_rank_lists_equal_megatron(megatron: ModuleType) -> None:
    for config in CONFIGS:
        generator = megatron.RankGenerator(
            tp=config.expert_tensor,
            ep=config.expert,
            dp=config.expert_data,
            pp=config.pipeline,
            cp=1,
            order=ORDER,
        )
        for axis, token in EXPERT_TOKENS.items():
            expected = [tuple(ranks) for ranks in generator.get_ranks(token)]
            assert rank_lists(config, axis) == expected, (config, axis)


def test_sizes_and_coordinates_agree_with_the_lists() -> None:
    for config in CONFIGS:
        (world,) = rank_lists(config, Axis.WORLD)
        for axis in set(Axis) - {Axis.TIED}:
            lists = rank_lists(config, axis)
            assert sorted(rank for ranks in lists for rank in ranks) == list(world)
            assert {len(ranks) for ranks in lists} == {axis_size(config, axis)}
            for ranks in lists:
                assert [coordinate(config, axis, rank) for rank in ranks] == list(range(len(ranks)))


@settings(max_examples=40)
@given(pipeline=st.integers(1, 5), data=st.integers(1, 4), context=st.integers(1, 3), tensor=st.integers(1, 4))
def test_tied_joins_the_first_stage_to_the_last(pipeline: int, data: int, context: int, tensor: int) -> None:
    config = ParallelConfig(pipeline=pipeline, data=data, context=context, tensor=tensor)
    world = range(pipeline * data * context * tensor)
    lists = rank_lists(config, Axis.TIED)
    assert sorted(rank for ranks in lists for rank in ranks) == list(world)  # a partition
    assert [ranks[0] for ranks in lists] == sorted(ranks[0] for ranks in lists)
    for ranks in lists:
        stages = {coordinate(config, Axis.PIPELINE, rank) for rank in ranks}
        assert list(ranks) == sorted(ranks)
        assert len({coordinate(config, Axis.TENSOR, rank) for rank in ranks}) == 1
        if stages & {0, pipeline - 1}:
            assert stages == {0, pipeline - 1}
            assert len(ranks) == data * context * len(stages)
        else:
            assert ranks in rank_lists(config, Axis.DATA_CONTEXT)
        mesh = ParallelMesh(config, ranks[-1])
        assert (mesh.ranks("tied"), mesh.size("tied"), mesh.rank("tied")) == (ranks, len(ranks), len(ranks) - 1)


@pytest.fixture
def fake_world() -> Iterator[int]:
    """A world of 16 ranks of which only rank 5 exists: enough to see which groups are created, and when."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=16)
    try:
        yield 16
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "config",
    [
        ParallelConfig(pipeline=2, context=2, tensor=2, expert=2, expert_tensor=2),
        ParallelConfig(pipeline=2, tensor=4, expert=4),
        ParallelConfig(expert=8),
    ],
    ids=repr,
)
def test_groups_are_created_in_the_order_of_megatron(
    megatron: ModuleType, fake_world: int, config: ParallelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_theirs, create_ours = megatron.create_group, dist.new_group
    theirs: list[tuple[Axis, tuple[int, ...]]] = []
    ours: list[tuple[Axis, tuple[int, ...]]] = []
    alone: list[tuple[int, ...]] = []

    def record_theirs(ranks: list[int], group_desc: str, **kwargs: Any) -> object:
        if group_desc in GROUP_NAMES:
            theirs.append((GROUP_NAMES[group_desc], tuple(ranks)))
        return create_theirs(ranks, group_desc=group_desc, **kwargs)

    def record_ours(ranks: list[int], group_desc: str, **kwargs: Any) -> object:
        if len(ranks) > 1:
            ours.append((Axis(group_desc), tuple(ranks)))
        else:
            alone.append(tuple(ranks))
        return create_ours(ranks, group_desc=group_desc, **kwargs)

    monkeypatch.setattr(megatron, "create_group", record_theirs)
    megatron.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_tensor,
        order=ORDER,
        create_gloo_process_groups=False,
    )
    megatron.destroy_model_parallel()

    monkeypatch.setattr(dist, "new_group", record_ours)
    mesh = ParallelMesh.build(config)

    assert set(GROUP_NAMES.values()) == set(Axis) - {Axis.WORLD, Axis.TIED}
    assert [made for made in ours if made[0] is not Axis.TIED] == [made for made in theirs if len(made[1]) > 1]
    resolved = config.resolve(fake_world)
    created = [axis for axis in Axis if axis not in (Axis.WORLD, *([Axis.TIED] if config.pipeline == 1 else []))]
    wanted = [(axis, ranks) for axis in created for ranks in rank_lists(resolved, axis)]
    assert ours == [(axis, ranks) for axis, ranks in wanted if len(ranks) > 1]
    assert alone == ([(rank,) for rank in range(fake_world)] if len(ours) < len(wanted) else [])
    for axis in Axis:
        group = mesh.group(axis)
        assert group is not None
        assert tuple(dist.get_process_group_ranks(group)) == mesh.ranks(axis)


def test_unknown_axis_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        axis_named("experts")
    assert (caught.value.field, caught.value.value) == ("axis", "experts")
    assert "expert_data" in caught.value.allowed
