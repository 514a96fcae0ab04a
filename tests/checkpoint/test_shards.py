"""Tensors that are split along several dims, and along rows that are no single run, in files and in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_moe import ParallelConfig, ParallelMesh, ShardSpec, set_shard_spec
from lightning_moe.checkpoint.sharded import load_sharded, localize, save_sharded
from lightning_moe.parallel.sharding import even_slice, local_part, shard_specs
from lightning_moe.parallel.state import gather_full_state_dict, load_full_state_dict
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
    save_sharded(Path(path), checkpoint, module, [optimizer], writes_meta=mesh.global_rank == 0)


def load(config: ParallelConfig, path: str) -> None:
    module = Sharded(ParallelMesh.build(config), placement=(0, 1, 2, 3))
    optimizer = torch.optim.AdamW(module.parameters())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    checkpoint = load_sharded(Path(path), module, [optimizer])
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
    cut = localize({"state_dict": {name: 3 * value for name, value in whole_tensors().items()}}, module, [])
    module.load_state_dict(cut["state_dict"])
    check(module, 3.0)
    return gather_full_state_dict(module, mesh)


@pytest.mark.parametrize(("world_size", "config"), CONFIGS, ids=str)
def test_whole_tensors_in_memory(ranks: RankPool, world_size: int, config: ParallelConfig) -> None:
    gathered = ranks.run(world_size, through_memory, config)[0]
    assert gathered.keys() == whole_tensors().keys()
    for name, value in whole_tensors().items():
        assert torch.equal(gathered[name], 3 * value)
