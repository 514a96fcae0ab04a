"""Marks of sharded parameters, and initial weights that do not depend on who holds which slice."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.errors import ConfigError
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import (
    ShardSpec,
    even_slice,
    local_part,
    partial_grads,
    replica_axis_of,
    set_partial_grad,
    set_shard_spec,
    set_tied,
    shard_axis_of,
    shard_specs,
    sharded_init_,
    sharded_parameters,
    tied_parameters,
    whole_shape,
)
from tests.distributed import RankPool

NUM_EXPERTS = 8
SPEC = ShardSpec("expert", 0, NUM_EXPERTS, (4, 1))


class Experts(nn.Module):
    """Two experts' weights, of which one tensor is marked, beside a dense one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self.scale = nn.Parameter(torch.zeros(3))
        set_shard_spec(self, "weight", SPEC)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3, bias=False), nn.Sequential(Experts()))


def uniform_(values: Tensor, generator: torch.Generator) -> None:
    values.uniform_(-1, 1, generator=generator)


def initial_weights(config: ParallelConfig, placement: tuple[int, ...]) -> tuple[tuple[int, ...], Tensor, float]:
    """This rank's experts, their weights, and the next draw of the default generator."""
    mesh = ParallelMesh.build(config)
    local = NUM_EXPERTS // mesh.size("expert")
    index = placement[mesh.rank("expert") * local :][:local]
    weight = torch.empty(local, 2, 3)
    sharded_init_(weight, (ShardSpec("expert", 0, NUM_EXPERTS, index),), uniform_)
    return index, weight, torch.rand(()).item()


def test_marks_are_found_by_qualified_name() -> None:
    assert shard_specs(model()) == {"1.0.weight": (SPEC,)}
    assert shard_specs(Experts()) == {"weight": (SPEC,)}
    assert shard_specs(nn.Linear(2, 2)) == {}


def test_parameters_come_in_order_with_their_marks() -> None:
    root = model()
    found = sharded_parameters(root)
    assert [(name, spec) for name, _, spec in found] == [
        ("0.weight", ()),
        ("1.0.weight", (SPEC,)),
        ("1.0.scale", ()),
    ]
    assert all(parameter is own for (_, parameter, _), own in zip(found, root.parameters(), strict=True))


def test_marks_survive_copies_and_files() -> None:
    root = model()
    buffer = io.BytesIO()
    torch.save(root, buffer)
    buffer.seek(0)
    for duplicate in (
        copy.deepcopy(root),
        pickle.loads(pickle.dumps(root)),
        torch.load(buffer, weights_only=False),
    ):
        assert shard_specs(duplicate) == {"1.0.weight": (SPEC,)}


def test_marks_of_a_copy_are_its_own() -> None:
    original = Experts()
    duplicate = copy.deepcopy(original)
    set_shard_spec(duplicate, "weight", ShardSpec("expert", 0, NUM_EXPERTS, (0, 1)))
    assert shard_specs(original) == {"weight": (SPEC,)}


def test_marks_survive_new_parameter_objects() -> None:
    module = Experts()
    module.weight = nn.Parameter(torch.ones(2, 3))
    assert [(name, spec) for name, _, spec in sharded_parameters(module)] == [("weight", (SPEC,)), ("scale", ())]


def test_a_shared_parameter_is_marked_if_one_of_its_modules_marks_it() -> None:
    """Taken for a dense one, its gradient would be summed over ranks that hold other experts."""
    experts, plain = Experts(), nn.Module()
    plain.weight = experts.weight
    assert [(name, spec) for name, _, spec in sharded_parameters(nn.ModuleList([plain, experts]))] == [
        ("0.weight", (SPEC,)),
        ("1.scale", ()),
    ]


@pytest.mark.parametrize("index", [(0, 0), (-1, 2), (0, NUM_EXPERTS)], ids=str)
def test_positions_must_be_distinct_and_in_range(index: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        ShardSpec("expert", 0, NUM_EXPERTS, index)
    assert (caught.value.field, caught.value.value) == ("shard_spec.index", index)


def test_axis_must_exist() -> None:
    with pytest.raises(ConfigError, match="expert_tensor"):
        ShardSpec("experts", 0, NUM_EXPERTS, (0,))


@pytest.mark.parametrize(
    ("name", "spec", "field"),
    [
        ("weights", SPEC, "shard_spec.name"),
        ("weight", ShardSpec("expert", 0, NUM_EXPERTS, (0, 1, 2)), "shard_spec.index"),
        ("weight", ShardSpec("expert", 2, NUM_EXPERTS, (0, 1)), "shard_spec.index"),
        ("weight", ShardSpec("expert", -3, NUM_EXPERTS, (0, 1)), "shard_spec.index"),
    ],
    ids=["no such parameter", "other length", "no such dim", "no such negative dim"],
)
def test_marks_must_fit_the_parameter(name: str, spec: ShardSpec, field: str) -> None:
    module = Experts()
    with pytest.raises(ConfigError) as caught:
        set_shard_spec(module, name, spec)
    assert caught.value.field == field
    assert shard_specs(module) == {"weight": (SPEC,)}


def test_a_submodules_parameter_is_marked_there() -> None:
    with pytest.raises(ConfigError, match="Sequential"):
        set_shard_spec(model(), "0.weight", SPEC)


def test_replicas_of_experts_lie_along_expert_data() -> None:
    columns = ShardSpec("expert_tensor", 1, 4, (0, 1))
    assert replica_axis_of(()) is Axis.DATA_CONTEXT
    assert replica_axis_of((), partial_grad=True) is Axis.DATA_CONTEXT_TENSOR
    assert replica_axis_of((SPEC,)) is replica_axis_of((SPEC, columns)) is Axis.EXPERT_DATA
    assert replica_axis_of((ShardSpec("tensor", 0, 4, (0, 1)),)) is Axis.DATA_CONTEXT


def test_shards_lie_along_their_axes() -> None:
    columns = ShardSpec("expert_tensor", 1, 4, (0, 1))
    assert shard_axis_of(()) is None
    assert shard_axis_of((SPEC,)) is Axis.EXPERT
    assert shard_axis_of((columns,)) is Axis.EXPERT_TENSOR
    assert shard_axis_of((SPEC, columns)) is Axis.EXPERT_MODEL
    assert shard_axis_of((ShardSpec("tensor", 0, 4, (0, 1)),)) is Axis.TENSOR


def test_each_dim_is_sharded_once() -> None:
    with pytest.raises(ConfigError) as caught:
        set_shard_spec(Experts(), "weight", SPEC, ShardSpec("expert_tensor", -2, 4, (0, 1)))
    assert caught.value.field == "shard_spec.dim"


def test_partial_gradients_are_marked_by_module_and_name() -> None:
    root = model()
    experts = root[1][0]  # type: ignore[index]
    set_partial_grad(experts, "scale")
    assert partial_grads(root) == {experts.scale}
    twin = copy.deepcopy(root)
    assert partial_grads(twin) == {twin[1][0].scale}  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"shard_spec\.name"):
        set_partial_grad(experts, "missing")


def test_tied_parameters_are_marked_by_module_and_name() -> None:
    root = model()
    experts = root[1][0]  # type: ignore[index]
    set_tied(experts, "scale")
    assert tied_parameters(root) == {experts.scale}
    twin = pickle.loads(pickle.dumps(root))
    assert tied_parameters(twin) == {twin[1][0].scale}
    with pytest.raises(ConfigError, match=r"shard_spec\.name"):
        set_tied(experts, "missing")


def test_gradients_of_tied_parameters_are_summed_over_both_stages() -> None:
    rows = ShardSpec("tensor", 0, 4, (0, 1))
    assert replica_axis_of((), tied=True) is replica_axis_of((rows,), tied=True) is Axis.TIED
    assert replica_axis_of((rows,), tied=True, partial_grad=True) is Axis.TIED
    for specs, partial_grad in (((SPEC,), False), ((), True)):
        with pytest.raises(ConfigError, match="set_tied"):
            replica_axis_of(specs, tied=True, partial_grad=partial_grad)


@pytest.mark.parametrize("size", [8, 7, 2])
def test_even_slices_are_runs_that_differ_by_one_at_most(size: int) -> None:
    config = ParallelConfig(tensor=3, data=1)
    slices = [even_slice(size, ParallelMesh(config, rank), "tensor") for rank in range(3)]
    assert [i for part in slices for i in part] == list(range(size))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_local_part_and_whole_shape_undo_each_other() -> None:
    whole = torch.arange(24.0).view(4, 6)
    specs = (ShardSpec("expert", 0, 4, (3, 1)), ShardSpec("expert_tensor", -1, 6, (0, 1, 4)))
    part = local_part(whole, specs)
    assert torch.equal(part, whole[[3, 1]][:, [0, 1, 4]])
    assert whole_shape(part, specs) == (4, 6)
    assert local_part(whole, ()) is whole


def test_is_whole() -> None:
    assert ShardSpec("expert", 0, 2, (1, 0)).is_whole
    assert not SPEC.is_whole


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize(
    ("world_size", "config"),
    [
        (2, ParallelConfig()),
        (2, ParallelConfig(expert=2)),
        (4, ParallelConfig(expert=2)),
        (4, ParallelConfig(expert=4)),
        (4, ParallelConfig(tensor=2, expert=4)),
    ],
    ids=str,
)
def test_initial_weights_do_not_depend_on_the_topology(
    ranks: RankPool, world_size: int, config: ParallelConfig, permuted: bool
) -> None:
    torch.manual_seed(0)  # as in the workers
    whole = torch.empty(NUM_EXPERTS, 2, 3)
    sharded_init_(whole, (ShardSpec("expert", 0, NUM_EXPERTS, tuple(range(NUM_EXPERTS))),), uniform_)
    next_draw = torch.rand(()).item()

    placement = (3, 7, 0, 5, 6, 2, 1, 4) if permuted else tuple(range(NUM_EXPERTS))
    held = []
    for index, weight, draw in ranks.run(world_size, initial_weights, config, placement):
        assert torch.equal(weight, whole[list(index)])
        assert draw == next_draw
        held += index
    assert set(held) == set(range(NUM_EXPERTS))


@pytest.mark.parametrize("rows", [(), (ShardSpec("expert", 0, 4, (2, 3)),)], ids=["dense", "experts"])
def test_initial_weights_do_not_depend_on_how_other_dims_are_split(rows: tuple[ShardSpec, ...]) -> None:
    """A shard along another dim is cut out of the whole draw, and all ranks go on with the same random numbers."""
    results = []
    for index in ((0, 1, 2, 3, 4, 5), (1, 2, 5)):
        torch.manual_seed(0)
        weight = torch.empty(2 if rows else 4, 3, len(index))
        sharded_init_(weight, (*rows, ShardSpec("expert_tensor", 2, 6, index)), uniform_)
        results.append((weight, torch.rand(()).item()))
    (whole, draw), (part, other_draw) = results
    assert torch.equal(part, whole[..., [1, 2, 5]])
    assert draw == other_draw


def test_initial_slices_differ_from_each_other_and_between_calls() -> None:
    torch.manual_seed(0)
    first, second = torch.empty(4, 64), torch.empty(4, 64)
    specs = (ShardSpec("expert", 0, 4, (0, 1, 2, 3)),)
    sharded_init_(first, specs, uniform_)
    sharded_init_(second, specs, uniform_)
    slices = torch.cat([first, second])
    # Independent uniform draws: correlation has standard deviation 1/8, equal slices have 1.
    correlation = torch.corrcoef(slices) - torch.eye(8)
    assert correlation.abs().max() < 0.6


def test_initial_weights_follow_the_default_seed_and_take_the_parameters_dtype() -> None:
    results = []
    for seed, dtype in ((0, torch.float32), (0, torch.bfloat16), (1, torch.float32)):
        torch.manual_seed(seed)
        parameter = nn.Parameter(torch.empty(2, 5, dtype=dtype))
        sharded_init_(parameter, (ShardSpec("expert", 0, 2, (0, 1)),), uniform_)
        results.append(parameter.detach())
    assert torch.equal(results[0].bfloat16(), results[1])
    assert not torch.equal(results[0], results[2])
