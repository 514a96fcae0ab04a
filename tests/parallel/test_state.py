"""Whole state dicts: what rank 0 assembles is what one process would hold, and it loads anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.errors import ConfigError
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import ShardSpec, set_shard_spec, set_tied, shard_specs, state_dict_specs
from lightning_moe.parallel.state import broadcast_replicas, gather_full_state_dict, load_full_state_dict
from tests.distributed import RankPool

NUM_EXPERTS = 5

WHOLE = {
    "dense": torch.arange(3.0, dtype=torch.float64),
    "rows": torch.arange(NUM_EXPERTS * 2.0).view(NUM_EXPERTS, 2),
    "columns": -torch.arange(NUM_EXPERTS * 2.0).view(2, NUM_EXPERTS).bfloat16(),
    "count": torch.tensor(7),
}


class Sharded(nn.Module):
    """A dense parameter and a buffer beside two sharded ones, the second along its last dim."""

    def __init__(self, index: Sequence[int]) -> None:
        super().__init__()
        count = len(index)
        self.dense = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.rows = nn.Parameter(torch.zeros(count, 2))
        self.columns = nn.Parameter(torch.zeros(2, count, dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(0))
        set_shard_spec(self, "rows", ShardSpec("expert", 0, NUM_EXPERTS, tuple(index)))
        set_shard_spec(self, "columns", ShardSpec("expert", -1, NUM_EXPERTS, tuple(index)))


def filled(index: Sequence[int]) -> Sharded:
    """The module that holds the positions ``index`` of WHOLE, filled without the functions under test."""
    module, positions = Sharded(index), list(index)
    with torch.no_grad():
        module.dense.copy_(WHOLE["dense"])
        module.rows.copy_(WHOLE["rows"][positions])
        module.columns.copy_(WHOLE["columns"][:, positions])
        module.get_buffer("count").copy_(WHOLE["count"])
    return module


def local_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_states_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def gather(config: ParallelConfig, placement: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    mesh = ParallelMesh.build(config)
    return gather_full_state_dict(filled(placement[mesh.rank("expert")]), mesh)


def broadcast(config: ParallelConfig, placement: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Fill every tensor with the rank's number, then make replicas equal."""
    mesh = ParallelMesh.build(config)
    module = Sharded(placement[mesh.rank("expert")])
    with torch.no_grad():
        for value in module.state_dict().values():
            value.fill_(dist.get_rank())
    broadcast_replicas(module, mesh)
    return local_state(module)


@pytest.mark.parametrize(
    ("world_size", "config", "placement"),
    [
        (2, ParallelConfig(), [(0, 1, 2, 3, 4)]),
        (2, ParallelConfig(), [(3, 1, 4, 0, 2)]),
        (2, ParallelConfig(expert=2), [(0, 1, 2), (3, 4)]),
        (2, ParallelConfig(expert=2), [(4, 0), (2, 3, 1)]),
        (2, ParallelConfig(expert=2), [(), (2, 3, 1, 0, 4)]),
        (4, ParallelConfig(expert=2), [(4, 0), (2, 3, 1)]),
        (4, ParallelConfig(expert=4), [(4,), (2, 3), (), (1, 0)]),
    ],
    ids=str,
)
def test_rank_zero_assembles_the_whole_state(
    ranks: RankPool, world_size: int, config: ParallelConfig, placement: list[tuple[int, ...]]
) -> None:
    first, *others = ranks.run(world_size, gather, config, placement)
    assert_states_equal(first, WHOLE)
    assert others == [{}] * (world_size - 1)


def test_a_world_of_one_puts_positions_in_logical_order() -> None:
    module = filled((3, 1, 4, 0, 2))
    state = gather_full_state_dict(module, ParallelMesh.single())
    assert_states_equal(state, WHOLE)
    state["dense"].zero_()
    assert torch.equal(module.dense, WHOLE["dense"])  # the state dict is a copy


@pytest.mark.parametrize("index", [(0, 1, 2, 3, 4), (3, 1, 4, 0, 2), (4, 0), ()], ids=str)
def test_loading_keeps_the_positions_of_the_rank(index: tuple[int, ...]) -> None:
    module = Sharded(index)
    parameters = list(module.parameters())
    load_full_state_dict(module, WHOLE)
    assert_states_equal(local_state(module), local_state(filled(index)))
    assert all(new is old for new, old in zip(module.parameters(), parameters, strict=True))


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in WHOLE.items() if key != name}


@pytest.mark.parametrize(
    ("state", "field", "mentions"),
    [
        (without("rows"), "state_dict", "rows"),
        (WHOLE | {"more": torch.zeros(1)}, "state_dict", "more"),
        (WHOLE | {"rows": torch.zeros(NUM_EXPERTS + 1, 2)}, "state_dict.rows", "(6, 2)"),
        (WHOLE | {"rows": torch.zeros(NUM_EXPERTS, 3)}, "state_dict.rows", "(5, 3)"),
        (WHOLE | {"rows": torch.tensor(1.0)}, "state_dict.rows", "()"),
        (WHOLE | {"columns": torch.zeros(NUM_EXPERTS)}, "state_dict.columns", "(5,)"),
        (WHOLE | {"dense": torch.zeros(4)}, "state_dict.dense", "(4,)"),
    ],
    ids=["missing", "unknown", "more experts", "other width", "scalar", "vector", "dense"],
)
def test_a_state_that_does_not_fit_changes_nothing(state: dict[str, Tensor], field: str, mentions: str) -> None:
    module = filled((4, 0))
    before = local_state(module)
    with pytest.raises(ConfigError) as caught:
        load_full_state_dict(module, state)
    assert caught.value.field == field
    assert mentions in str(caught.value)
    assert_states_equal(local_state(module), before)


def test_replicas_become_equal_and_shards_stay_apart(ranks: RankPool) -> None:
    placement = [(0, 1, 2), (3, 4)]
    states = ranks.run(4, broadcast, ParallelConfig(expert=2), placement)
    for rank, state in enumerate(states):
        assert {name: value.unique().tolist() for name, value in state.items()} == {
            "dense": [0],
            "count": [0],
            "rows": [rank % 2],  # ranks 0 and 2 hold the same experts, and so do 1 and 3
            "columns": [rank % 2],
        }


def test_a_world_of_one_has_nothing_to_broadcast() -> None:
    module = filled((0, 1, 2, 3, 4))
    broadcast_replicas(module, ParallelMesh.single())
    assert_states_equal(local_state(module), WHOLE)


class Stage(nn.Module):
    """A stage of a pipeline: a table that the first and the last one have, experts, and what is no tensor."""

    count: Tensor

    def __init__(self, mesh: ParallelMesh) -> None:
        super().__init__()
        stage, last = mesh.rank("pipeline"), mesh.size("pipeline") - 1
        self.blocks = nn.ModuleDict({str(number): Sharded((3, 0, 1, 2, 4)) for number in (stage, stage + last + 1)})
        if stage in (0, last):
            self.table = nn.Parameter(torch.full((2, 3), 7.0 + mesh.global_rank))
            set_tied(self, "table")
        self.register_buffer("count", torch.tensor(10 + stage))
        self.note = f"stage {stage}"

    def get_extra_state(self) -> str:
        return self.note

    def set_extra_state(self, state: str) -> None:
        self.note = state


def pass_through_rank_zero(config: ParallelConfig) -> tuple[float, dict[str, Tensor]]:
    """Make replicas equal, collect the whole state, and load it into stages that hold other values."""
    mesh = ParallelMesh.build(config)
    module = Stage(mesh)
    for block in module.blocks.values():
        load_full_state_dict(block, WHOLE)
    broadcast_replicas(module, mesh)
    table = float(module.table.detach().mean()) if hasattr(module, "table") else 0.0
    whole = gather_full_state_dict(module, mesh)
    everywhere = [whole]
    dist.broadcast_object_list(everywhere)
    before = local_state(module.blocks)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    load_full_state_dict(module, everywhere[0], mesh)
    assert_states_equal(local_state(module.blocks), before)
    assert module.note == "stage 0"  # all have this name: the first one's counts
    assert int(module.count) == 10
    for wrong in ({"new": torch.zeros(1)}, {"blocks.1.rows": None}):
        state = {name: value for name, value in (everywhere[0] | wrong).items() if value is not None}
        with pytest.raises(ConfigError, match=next(iter(wrong))):  # on all stages, whichever has or misses it
            load_full_state_dict(module, state, mesh)
    return table, whole


@pytest.mark.parametrize(
    "config", [ParallelConfig(pipeline=2), ParallelConfig(pipeline=4), ParallelConfig(pipeline=2, tensor=2)], ids=str
)
def test_stages_make_up_one_state(ranks: RankPool, config: ParallelConfig) -> None:
    world_size = config.pipeline * config.tensor
    (_, whole), *others = results = ranks.run(world_size, pass_through_rank_zero, config)
    assert [state for _, state in others] == [{}] * (world_size - 1)
    ends = {0, config.pipeline - 1}
    assert [table for table, _ in results] == [7.0 * (rank // config.tensor in ends) for rank in range(world_size)]
    extra, table, count = (whole.pop(name) for name in ("_extra_state", "table", "count"))
    assert (extra, int(count)) == ("stage 0", 10)
    assert torch.equal(table, torch.full((2, 3), 7.0))
    blocks = range(2 * config.pipeline)
    assert_states_equal(whole, {f"blocks.{i}.{name}": value for i in blocks for name, value in WHOLE.items()})


class ManyDtypes(nn.Module):
    """Dtypes and layouts that backends do not carry, a buffer that is the rank's own, and a value that is no tensor."""

    as_int64: Tensor
    transposed: Tensor
    own: Tensor

    def __init__(self, value: int) -> None:
        super().__init__()
        dtypes = (
            torch.int16,
            torch.bool,
            torch.uint8,
            torch.float8_e4m3fn,
            torch.bfloat16,
            torch.complex64,
            torch.int64,
        )
        for dtype in dtypes:
            self.register_buffer(str(dtype).replace("torch.", "as_"), torch.full((), float(value)).to(dtype))
        self.register_buffer("transposed", torch.full((2, 3), value).t())
        self.register_buffer("own", torch.tensor(value), persistent=False)
        self.weight = nn.Parameter(torch.full((2, 3, 4, 4), float(value)).to(memory_format=torch.channels_last))
        self.value = value

    def get_extra_state(self) -> dict[str, int]:
        return {"value": self.value}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def broadcast_many() -> tuple[list[float], int, list[int]]:
    mesh = ParallelMesh.build(ParallelConfig())
    module = ManyDtypes(1 - dist.get_rank())
    strides = module.weight.stride(), module.transposed.stride()
    broadcast_replicas(module, mesh)
    assert (module.weight.stride(), module.transposed.stride()) == strides
    tensors = [value for value in module.state_dict().values() if isinstance(value, Tensor)]
    values = [float(value.flatten()[0].real.float()) for value in tensors]
    state = gather_full_state_dict(module, mesh)
    restored = ManyDtypes(5)
    if state:
        load_full_state_dict(restored, state)
    return values, int(module.own), [restored.value, int(restored.as_int64), int(restored.weight.mean())]


def test_replicas_of_every_dtype_and_layout(ranks: RankPool) -> None:
    """Rank 0 gathers what all then have; another rank has nothing to load."""
    assert ranks.run(2, broadcast_many) == [([1.0] * 9, 1, [1, 1, 1]), ([1.0] * 9, 0, [5, 5, 5])]


class Renamed(nn.Module):
    """One sharded module in two places, under names that ``state_dict`` changes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Sharded((1, 0))
        self.again = self.inner

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
        state = super().state_dict(*args, **kwargs)  # type: ignore[call-overload]
        return {f"net.{name}": value for name, value in state.items()}


def test_shared_and_renamed_parameters_keep_their_specs() -> None:
    """Without its spec an expert weight would be broadcast over ranks that hold other experts."""
    module = Renamed()
    names = {f"{place}.{name}" for place in ("inner", "again") for name in ("rows", "columns")}
    assert shard_specs(module).keys() == names
    assert state_dict_specs(module).keys() == {f"net.{name}" for name in names}
