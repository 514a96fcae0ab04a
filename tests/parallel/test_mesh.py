"""The mesh on real ranks: every group reaches the ranks it names, and copies and refusals behave."""

from __future__ import annotations

import copy
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.errors import ConfigError
from lightning_moe.parallel.layout import Axis, rank_lists
from lightning_moe.parallel.mesh import ParallelMesh
from tests.distributed import RankFailure, RankPool

SHAPES = [
    (2, ParallelConfig()),
    (2, ParallelConfig(expert=2)),
    (2, ParallelConfig(pipeline=2)),
    (4, ParallelConfig(expert=2)),
    (4, ParallelConfig(expert=4)),
    (4, ParallelConfig(pipeline=2, tensor=2, expert=2)),
    (4, ParallelConfig(pipeline=4)),
    (4, ParallelConfig(data=2, context=2, expert=2, expert_tensor=2)),
    (4, ParallelConfig(tensor=2, expert_tensor=2)),
]


def sums_by_axis(config: ParallelConfig) -> dict[str, float]:
    """All-reduce 2**rank over each axis: the sum tells exactly which ranks took part."""
    mesh = ParallelMesh.build(config)
    sums = {}
    for axis in Axis:
        value = torch.tensor(2.0 ** dist.get_rank(), dtype=torch.float64)
        dist.all_reduce(value, group=mesh.group(axis))
        sums[str(axis)] = value.item()
    return sums


def build(config: ParallelConfig) -> ParallelMesh:
    return ParallelMesh.build(config)


class Holder(nn.Module):
    """A layer that refers to a mesh, as MoE layers do."""

    def __init__(self, mesh: ParallelMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.weight = nn.Parameter(torch.zeros(2))


def copies_refer_to_the_same_mesh() -> bool:
    mesh = ParallelMesh.build(ParallelConfig(expert=2))
    holder = Holder(mesh)
    duplicate = copy.deepcopy(holder)
    assert duplicate.weight is not holder.weight
    return duplicate.mesh is mesh and copy.copy(mesh) is mesh and mesh.group("expert") is not None


def wait_for_a_peer_that_never_comes() -> str:
    mesh = ParallelMesh.build(ParallelConfig(expert=2), timeout=timedelta(seconds=0.5))
    message = ""
    if dist.get_rank() == 0:
        try:
            dist.all_reduce(torch.zeros(1), group=mesh.group("expert"))
        except RuntimeError as error:
            message = str(error)
    dist.barrier()
    return message


@pytest.mark.parametrize(("world_size", "config"), SHAPES, ids=str)
def test_each_group_reaches_its_ranks(ranks: RankPool, world_size: int, config: ParallelConfig) -> None:
    resolved = config.resolve(world_size)
    results = ranks.run(world_size, sums_by_axis, config)
    for axis in Axis:
        lists = rank_lists(resolved, axis)
        expected = {rank: sum(2.0**member for member in group) for group in lists for rank in group}
        assert [result[axis] for result in results] == [expected[rank] for rank in range(world_size)], axis


def test_sizes_ranks_and_positions(ranks: RankPool) -> None:
    meshes: list[ParallelMesh] = ranks.run(4, build, ParallelConfig(pipeline=2, tensor=2, expert=2))
    last = meshes[3]
    assert [mesh.global_rank for mesh in meshes] == [0, 1, 2, 3]
    assert last.config == ParallelConfig(pipeline=2, data=1, tensor=2, expert=2)
    assert last.world_size == last.size("world") == 4
    assert (last.size("tensor"), last.rank("tensor"), last.ranks("tensor")) == (2, 1, (2, 3))
    assert (last.size("pipeline"), last.rank("pipeline"), last.ranks("pipeline")) == (2, 1, (1, 3))
    assert (last.size("expert"), last.rank("expert"), last.ranks("expert")) == (2, 1, (2, 3))
    assert (last.size("data"), last.rank("data"), last.ranks("data")) == (1, 0, (3,))


def test_repr_shows_both_views() -> None:
    config = ParallelConfig(pipeline=2, data=2, tensor=2, expert=4)
    assert repr(ParallelMesh(config, 5)) == (
        "ParallelMesh(rank 5/8; dense pipeline=1/2, data=0/2, context=0/1, tensor=1/2; "
        "expert expert_data=0/1, expert=1/4, expert_tensor=0/1)"
    )


def test_single_needs_no_process_group() -> None:
    assert not dist.is_initialized()
    mesh = ParallelMesh.single()
    assert mesh.world_size == 1
    for axis in Axis:
        assert (mesh.size(axis), mesh.rank(axis), mesh.ranks(axis), mesh.group(axis)) == (1, 0, (0,), None)


def test_copies_refer_to_the_same_mesh(ranks: RankPool) -> None:
    assert ranks.run(2, copies_refer_to_the_same_mesh) == [True, True]


def test_pickling_keeps_the_sizes_and_drops_the_groups(ranks: RankPool) -> None:
    mesh: ParallelMesh = ranks.run(2, build, ParallelConfig(expert=2))[1]  # pickled on its way here
    assert isinstance(mesh, ParallelMesh)
    assert repr(mesh) == repr(ParallelMesh(ParallelConfig(data=2, expert=2), 1))
    assert all(mesh.group(axis) is None for axis in Axis)
    again = pickle.loads(pickle.dumps(Holder(mesh)))
    assert repr(again.mesh) == repr(mesh)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (ParallelConfig(expert=3), "parallel.expert", 3),
        (ParallelConfig(expert_tensor=4), "parallel.expert_tensor", 4),
        (ParallelConfig(data=4), "parallel.data", 4),
        (ParallelConfig(pipeline=3), "parallel.pipeline*context*tensor", 3),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused_on_every_rank(
    ranks: RankPool, config: ParallelConfig, field: str, value: int
) -> None:
    with pytest.raises(RankFailure) as caught:
        ranks.run(2, build, config)
    assert set(caught.value.errors) == {0, 1}
    for error in caught.value.errors.values():
        assert isinstance(error, ConfigError)
        assert (error.field, error.value) == (field, value)
        assert "2" in error.allowed  # the world size that it must fit


def test_unknown_axis_is_refused() -> None:
    mesh = ParallelMesh.single()
    for method in (mesh.size, mesh.rank, mesh.ranks, mesh.group):
        with pytest.raises(ConfigError, match="expert_data"):
            method("experts")


def test_timeout_ends_the_wait_for_a_lost_peer(ranks: RankPool) -> None:
    waited, other = ranks.run(2, wait_for_a_peer_that_never_comes, timeout=30)
    assert "imed out" in waited
    assert other == ""
