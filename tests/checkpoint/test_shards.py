"""Tensors that are split along several dims, and along rows that are no single run, in files and in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from lightning_moe import ParallelConfig, ParallelMesh, ShardSpec, set_shard_spec
from lightning_moe.checkpoint.contents import localize
from lightning_moe.checkpoint.shards import FlatRun, LogicalShard
from lightning_moe.parallel.sharding import even_slice, local_part, shard_specs
from lightning_moe.parallel.state import gather_full_state_dict, load_full_state_dict
from tests.checkpoint.dcp import read_files, write_files
from tests.distributed import RankPool

E, F, D, V = 4, 4, 3, 7


def whole_tensors() -> dict[str, Tensor]:
    """Every element differs from all others."""
    sizes = {"up": (E, 2 * F, D), "down": (E, D, F), "rows": (V, D), "dense": (D,)}
    numbers = torch.arange(float(sum(torch.Size(size).numel() for size in sizes.values())))
    parts = numbers.split([torch.Size(size).numel() for size in sizes.values()])
    return {name: part.view(size).clone() for (name, size), part in zip(sizes.items(), parts, strict=True)}


class Sharded(nn.Module):
    """Experts split over two axes (gate rows, then up rows), an uneven vocabulary over tensor, a dense vector."""

    def __init__(self, mesh: ParallelMesh, placement: tuple[int, ...] = (2, 0, 3, 1)) -> None:
        super().__init__()
        experts = tuple(placement[i] for i in even_slice(E, mesh, "expert"))
        inner = even_slice(F, mesh, "expert_tensor")
        by_expert = ShardSpec("expert", 0, E, experts)
        specs = {
            "up": (by_expert, ShardSpec("expert_tensor", 1, 2 * F, (*inner, *(F + i for i in inner)))),
            "down": (by_expert, ShardSpec("expert_tensor", -1, F, tuple(inner))),
            "rows": (ShardSpec("tensor", 0, V, tuple(even_slice(V, mesh, "tensor"))),),
            "dense": (),
        }
        for name, value in whole_tensors().items():
            self.register_parameter(name, nn.Parameter(local_part(value, specs[name]).clone()))
            set_shard_spec(self, name, *specs[name])


def check(module: nn.Module, factor: float) -> None:
    specs = shard_specs(module)
    for name, value in whole_tensors().items():
        assert torch.equal(module.get_parameter(name).detach(), factor * local_part(value, specs[name])), name


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    """AdamW whose first moments equal the weights."""
    optimizer = torch.optim.AdamW(module.parameters())
    for parameter in module.parameters():
        state = {"exp_avg": parameter.detach().clone(), "exp_avg_sq": parameter.detach() + 1, "step": torch.tensor(3.0)}
        optimizer.state[parameter] = state
    return optimizer


def save(config: ParallelConfig, path: str) -> None:
    mesh = ParallelMesh.build(config)
    module = Sharded(mesh)
    optimizer = optimizer_of(module)
    checkpoint = {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    write_files(Path(path), checkpoint, module, [optimizer], {}, mesh)


def load(config: ParallelConfig, path: str) -> None:
    module = Sharded(ParallelMesh.build(config), placement=(0, 1, 2, 3))
    optimizer = torch.optim.AdamW(module.parameters())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    checkpoint = read_files(Path(path), module, [optimizer], {})
    module.load_state_dict(checkpoint["state_dict"])
    check(module, 1.0)
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    for parameter in module.parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], parameter)
        assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], parameter + 1)
        assert optimizer.state[parameter]["step"] == 3


CONFIGS = [
    (1, ParallelConfig()),
    (2, ParallelConfig(tensor=2, expert_tensor=2)),
    (4, ParallelConfig(tensor=2, expert=2, expert_tensor=2)),
    (4, ParallelConfig(tensor=2, context=2, expert=4)),
]


@pytest.mark.slow
@pytest.mark.parametrize("saver", range(len(CONFIGS)))
@pytest.mark.parametrize("loader", range(len(CONFIGS)))
def test_any_topology_reads_what_any_other_wrote(ranks: RankPool, tmp_path: Path, saver: int, loader: int) -> None:
    world_size, config = CONFIGS[saver]
    ranks.run(world_size, save, config, str(tmp_path / "saved"))
    world_size, config = CONFIGS[loader]
    ranks.run(world_size, load, config, str(tmp_path / "saved"))


def through_memory(config: ParallelConfig) -> dict[str, Tensor]:
    mesh = ParallelMesh.build(config)
    module = Sharded(mesh)
    load_full_state_dict(module, {name: 2 * value for name, value in whole_tensors().items()})
    check(module, 2.0)
    cut = localize({"state_dict": {name: 3 * value for name, value in whole_tensors().items()}}, module, [], {})
    module.load_state_dict(cut["state_dict"])
    check(module, 3.0)
    return gather_full_state_dict(module, mesh)


@pytest.mark.parametrize(("world_size", "config"), CONFIGS, ids=str)
def test_whole_tensors_in_memory(ranks: RankPool, world_size: int, config: ParallelConfig) -> None:
    gathered = ranks.run(world_size, through_memory, config)[0]
    assert gathered.keys() == whole_tensors().keys()
    for name, value in whole_tensors().items():
        assert torch.equal(gathered[name], 3 * value)


@dataclass(frozen=True)
class Split:
    """A whole tensor on several ranks, each with a run of the elements of its part."""

    whole: Tensor
    shards: list[LogicalShard]


@st.composite
def splits(draw: st.DrawFn) -> Split:
    """Any positions of any dims, parts of any memory layout, runs of any length."""
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    whole = torch.arange(float(prod(shape)), dtype=torch.float64).view(shape)
    indices: list[list[list[int]]] = []  # of each dim, the positions of each part
    for size in shape:
        positions = draw(st.permutations(range(size)) | st.just(list(range(size))))
        bounds = sorted(draw(st.lists(st.integers(0, size), max_size=2 if prod(map(len, indices)) < 4 else 0)))
        indices.append([positions[start:stop] for start, stop in pairwise([0, *bounds, size])])
    order = draw(st.permutations(range(len(shape))))
    shards = []
    for part in product(*indices):
        specs = tuple(
            ShardSpec("tensor", dim - len(shape) * draw(st.booleans()), shape[dim], tuple(index))
            for dim, index in enumerate(part)
            if index != list(range(shape[dim]))
        )
        local = local_part(whole, specs).permute(order).contiguous()
        memory = local.reshape(-1)
        local = local.permute([order.index(dim) for dim in range(len(shape))])
        bounds = sorted(draw(st.lists(st.integers(0, memory.numel()), max_size=3)))
        for start, stop in pairwise([0, *bounds, memory.numel()]):
            flat = memory[start:stop].clone()
            shards.append(LogicalShard.wrap(flat, specs, FlatRun.of(local, range(start, stop))))
    return Split(whole, shards)


def region(whole: Tensor, chunk: Any) -> Tensor:
    return whole[tuple(slice(o, o + size) for o, size in zip(chunk.offsets, chunk.sizes, strict=True))]


def plan(states: Sequence[dict[str, Any]]) -> tuple[list[SavePlan], Metadata]:
    """What DCP would write of each rank's state; DCP checks that chunks cover whole tensors and do not overlap."""
    plans = []
    for rank, state in enumerate(states):
        planner = DefaultSavePlanner()
        planner.set_up_planner(state, is_coordinator=rank == 0)
        plans.append(planner.create_local_plan())
    return DefaultSavePlanner().create_global_plan(plans)


@settings(max_examples=200)
@given(splits())
def test_runs_of_elements_are_chunks_of_the_whole_tensor(split: Split) -> None:
    """Each element is in one chunk, at its place; and reading by these chunks restores the runs."""
    written, times = torch.zeros_like(split.whole), torch.zeros_like(split.whole)
    for shard in split.shards:
        assert shard.size() == split.whole.size()
        values = shard.local.clone()
        chunks = shard.__create_chunk_list__()
        assert len(chunks) == len(shard.__create_write_items__("x", shard))
        assert sum(prod(chunk.sizes) for chunk in chunks) == values.numel()
        pieces = prod(len(spec.index) for spec in shard.specs)
        assert len(chunks) <= max(2 * split.whole.dim() - 1, 1) * pieces
        if not shard.specs:
            assert len(chunks) <= max(2 * split.whole.dim() - 1, 1)
        for chunk in chunks:
            view = shard.__get_tensor_shard__(MetadataIndex("x", chunk.offsets))
            region(written, chunk).copy_(view)
            region(times, chunk).add_(1)
        host = torch.full_like(values, torch.nan)
        for target in (shard, shard.with_local(host)):
            target.local.fill_(torch.nan)
            for chunk in target.__create_chunk_list__():
                target.__get_tensor_shard__(MetadataIndex("x", chunk.offsets)).copy_(region(split.whole, chunk))
            assert torch.equal(target.local, values)
        assert torch.equal(host, values)
    assert torch.equal(times, torch.ones_like(times))
    assert torch.equal(written, split.whole)
    plan([{"x": shard} for shard in split.shards])


def run_of(parameter: Tensor, run: range, *, writes: bool = True, specs: tuple[ShardSpec, ...] = ()) -> LogicalShard:
    return LogicalShard.wrap(torch.zeros(len(run)), specs, FlatRun.of(parameter, run, writes=writes))


def test_runs_of_replicas_are_written_once() -> None:
    """Two ranks hold each run; the first half has two chunks, the second half one."""
    parameter = torch.empty(4, 3)
    plans, metadata = plan([{"x": run_of(parameter, run)} for run in (range(5), range(5, 12)) for _ in range(2)])
    assert sorted(len(each.items) for each in plans) == [1, 1, 1, 1]
    assert sum(prod(chunk.sizes) for chunk in metadata.state_dict_metadata["x"].chunks) == 12


def test_replicas_that_are_cut_elsewhere_need_one_writer() -> None:
    parameter = torch.empty(12)
    first = [{"x": run_of(parameter, run)} for run in (range(5), range(5, 12))]
    for writes in (True, False):
        second = [{"x": run_of(parameter, run, writes=writes)} for run in (range(8), range(8, 12))]
        if writes:
            with pytest.raises(ValueError, match="Failed to validate global plan"):
                plan(first + second)
        else:
            plan(first + second)
            assert second[0]["x"].__create_chunk_list__()  # for reading


def test_a_tensor_without_elements_is_in_the_file() -> None:
    _, metadata = plan([{"x": run_of(torch.empty(3, 0), range(0))} for _ in range(2)])
    assert metadata.state_dict_metadata["x"].size == (3, 0)


def test_runs_in_memory_order() -> None:
    """The elements of a run are neighbours in memory, whatever the strides."""
    image = torch.arange(24.0).view(2, 2, 3, 2).to(memory_format=torch.channels_last)
    flat = FlatRun.of(image, range(3, 9))
    assert flat.order == (0, 2, 3, 1)
    assert flat.take(image).tolist() == image.as_strided((24,), (1,))[3:9].tolist()
    # A slice has gaps in memory: its gradient, and what an optimizer makes of it, is dense.
    assert FlatRun.of(torch.empty(4, 6)[:, ::2], range(0)).order == (0, 1)
    assert FlatRun.of(torch.empty(6, 4).t(), range(0)).order == (1, 0)


def test_other_memory_has_the_same_chunks() -> None:
    specs = (ShardSpec("expert", 0, 4, (2, 0)),)
    shard = LogicalShard.wrap(torch.ones(2, 3), specs)
    other = shard.with_local(torch.zeros(2, 3))
    assert other.__create_chunk_list__() == shard.__create_chunk_list__()
    assert other.local.sum() == 0
