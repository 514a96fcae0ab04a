"""Checkpoints of pipelines: any number of stages and chunks loads any other's, and files do not show who wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.utilities.consolidate_checkpoint import _format_checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader

from lightning_moe import ConfigError, ParallelConfig, ParallelMesh, ShardSpec, set_shard_spec
from lightning_moe.checkpoint.consolidate import consolidate
from lightning_moe.checkpoint.contents import MAIN_WEIGHTS, localize, pack
from lightning_moe.checkpoint.stages import Stages
from lightning_moe.checkpoint.store import write
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.main_params import MainParam
from lightning_moe.parallel.sharding import (
    even_slice,
    local_part,
    replica_axis_of,
    set_tied,
    sharded_parameters,
    tied_parameters,
)
from lightning_moe.strategy.checkpoints import RunCheckpoints
from tests.checkpoint.dcp import read_files, write_files
from tests.distributed import RankPool

BLOCKS = 4
SHAPES = {"embedding.weight": (6, 5), "embedding.bias": (5,), "final_norm.weight": (5,)} | {
    f"blocks.{i}.{name}": shape
    for i in range(BLOCKS)
    for name, shape in {"experts": (4, 2, 3), "low": (3, 5), "norm": (5,), "weight": (5, 3)}.items()
}
"""In the order of the model, as ``named_parameters`` has it."""

Chunks = tuple[tuple[int, ...], ...]
"""The blocks that each pipeline rank holds."""
PLACEMENTS: dict[str, Chunks] = {
    "whole": ((0, 1, 2, 3),),
    "plain": ((0, 1), (2, 3)),
    "uneven": ((0, 1, 2), (3,)),
    "looped": ((0, 2), (1, 3)),
    "v": ((0, 3), (1, 2)),
    "four": ((0,), (1,), (2,), (3,)),
}


def whole_of(name: str) -> Tensor:
    """Different for every element of every parameter, and exact in bfloat16 for those of that dtype."""
    values = torch.arange(float(torch.Size(SHAPES[name]).numel())).view(SHAPES[name]) + 1
    return values if name.endswith("low") else values + 64 * list(SHAPES).index(name)


def main_of(name: str) -> Tensor:
    """Main weights have digits that bfloat16 has not."""
    return whole_of(name) + (2.0**-10 if name.endswith("low") else 0)


class Block(nn.Module):
    """A block with experts, a bfloat16 weight, a buffer, and a value that is no tensor."""

    count: Tensor

    def __init__(self, number: int, mesh: ParallelMesh) -> None:
        super().__init__()
        self.number = number
        order = (0, 1, 2, 3) if mesh.size("expert") == 1 else (2, 0, 3, 1)
        experts = ShardSpec("expert", 0, 4, tuple(order[i] for i in even_slice(4, mesh, "expert")))
        for name in ("experts", "low", "norm", "weight"):
            specs = (experts,) if name == "experts" else ()
            value = local_part(whole_of(f"blocks.{number}.{name}"), specs)
            self.register_parameter(name, nn.Parameter(value.bfloat16() if name == "low" else value))
            set_shard_spec(self, name, *specs)
        self.register_buffer("count", torch.tensor(100 + number))

    def get_extra_state(self) -> dict[str, int]:
        return {"number": self.number}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"number": self.number}


def table(rows: Sequence[int]) -> nn.Module:
    """An embedding of which this rank holds some rows, and all of a bias."""
    module = nn.Module()
    module.weight = nn.Parameter(whole_of("embedding.weight")[list(rows)])
    set_shard_spec(module, "weight", ShardSpec("tensor", 0, 6, tuple(rows)))
    module.bias = nn.Parameter(whole_of("embedding.bias"))
    return module


class Model(nn.Module):
    """What one pipeline rank holds; the embedding is also the output projection.

    Args:
        mesh: The mesh.
        chunks: The blocks of each pipeline rank.
    """

    def __init__(self, mesh: ParallelMesh, chunks: Chunks) -> None:
        super().__init__()
        rank = mesh.rank("pipeline")
        first, last = 0 in chunks[rank], BLOCKS - 1 in chunks[rank]
        if first or last:
            self.embedding = table(even_slice(6, mesh, "tensor"))
            if not (first and last):
                set_tied(self.embedding, "weight")
                set_tied(self.embedding, "bias")
        self.blocks = nn.ModuleDict({str(number): Block(number, mesh) for number in chunks[rank]})
        if last:
            self.final_norm = nn.Module()
            self.final_norm.weight = nn.Parameter(whole_of("final_norm.weight"))
        self.common = nn.Module()  # every stage has this name; last, where DCP would take it from another stage
        self.common.register_buffer("runs", torch.tensor(7 + rank))


def group_of(name: str) -> int:
    """The last group is empty on most stages."""
    return 2 if name == "final_norm.weight" else 1 if name.endswith("norm") else 0


class Training:
    """A rank's model and optimizers in the middle of a run: AdamW of three groups, and SGD for the embedding.

    Args:
        mesh: The mesh.
        chunks: The blocks of each pipeline rank.
        sharded: Whether optimizers hold runs.
        filled: Whether optimizers have state.
    """

    def __init__(self, mesh: ParallelMesh, chunks: Chunks, sharded: bool, *, filled: bool) -> None:
        self.mesh, self.module = mesh, Model(mesh, chunks)
        self.mains: dict[Tensor, MainParam] = {}
        self.held: dict[str, Tensor] = {}
        self.specs = {name: specs for name, _, specs in sharded_parameters(self.module)}
        tied = tied_parameters(self.module)
        for name, parameter, specs in sharded_parameters(self.module):
            axis = replica_axis_of(specs, tied=parameter in tied)
            main = self._main(name, parameter, axis, sharded)
            self.held[name] = parameter if main is None else main.main
            if main is not None:
                self.mains[main.main] = main
        groups: list[list[Tensor]] = [[], [], []]
        for name, held in self.held.items():
            if not name.startswith("embedding"):
                groups[group_of(name)].append(held)
        adam = torch.optim.AdamW([{"params": group, "lr": 0.1 * (i + 1)} for i, group in enumerate(groups)])
        of_table = [held for name, held in self.held.items() if name.startswith("embedding")]
        self.optimizers: list[torch.optim.Optimizer] = [adam, torch.optim.SGD([{"params": of_table}], lr=0.5)]
        for name, held in self.held.items() if filled else ():
            moment = self.expected(name, main_of(name) + 0.25)
            if name.startswith("embedding"):
                self.optimizers[1].state[held] = {"momentum_buffer": moment}
            else:
                adam.state[held] = {"step": torch.tensor(3.0), "exp_avg": moment, "exp_avg_sq": moment + 1}

    def _main(self, name: str, parameter: nn.Parameter, axis: Axis, sharded: bool) -> MainParam | None:
        if not sharded:
            low = parameter.dtype == torch.bfloat16
            return MainParam(parameter, nn.Parameter(self._part(name, main_of(name), None)), None) if low else None
        ranks, rank, elements = self.mesh.size(axis), self.mesh.rank(axis), parameter.numel()
        # Tensor ranks cut what they all hold at different places, as they do when their buckets differ.
        shift = 1 + (0 if axis == Axis.EXPERT_DATA else self.mesh.rank("tensor"))
        cuts = [0, *(min(elements * i // ranks + shift, elements) for i in range(1, ranks)), elements]
        run = range(cuts[rank], cuts[rank + 1])
        return MainParam(parameter, nn.Parameter(self._part(name, main_of(name), run)), run)

    def _part(self, name: str, whole: Tensor, run: range | None) -> Tensor:
        local = local_part(whole, self.specs[name]).clone()
        return local if run is None else local.view(-1)[run.start : run.stop].clone()

    def expected(self, name: str, whole: Tensor) -> Tensor:
        """What the optimizer's state must hold of a whole tensor."""
        main = self.mains.get(self.held[name])
        return self._part(name, whole, None if main is None else main.run)

    @property
    def arguments(self) -> tuple[nn.Module, list[torch.optim.Optimizer], dict[Tensor, MainParam]]:
        return self.module, self.optimizers, self.mains

    def checkpoint(self) -> dict[str, Any]:
        return {
            "state_dict": self.module.state_dict(),
            "optimizer_states": [optimizer.state_dict() for optimizer in self.optimizers],
            "global_step": 5,
        }

    def check(self, checkpoint: dict[str, Any]) -> None:
        """Load what another run has saved, and compare every bit."""
        with torch.no_grad():
            for value in (*self.module.parameters(), *self.module.buffers()):
                value.zero_()
        self.module.load_state_dict(checkpoint["state_dict"])  # strict: nothing of other stages is there
        for name, parameter in self.module.named_parameters():
            assert torch.equal(parameter, self._part(name, whole_of(name), None).to(parameter.dtype)), name
        for number, block in self.module.blocks.items():
            assert int(block.count) == 100 + int(number)
        assert int(self.module.common.runs) == 7  # that of the first stage
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)
        adam, sgd = self.optimizers
        assert [group["lr"] for group in adam.param_groups] == [0.1, 0.2, 0.30000000000000004]
        assert len(adam.state) + len(sgd.state) == len(self.held)
        for name, held in self.held.items():
            moment = self.expected(name, main_of(name) + 0.25)
            if name.startswith("embedding"):
                assert torch.equal(sgd.state[held]["momentum_buffer"], moment)
                continue
            assert adam.state[held]["step"] == 3, name
            assert torch.equal(adam.state[held]["exp_avg"], moment), name
            assert torch.equal(adam.state[held]["exp_avg_sq"], moment + 1), name
        if MAIN_WEIGHTS in checkpoint:
            assert checkpoint[MAIN_WEIGHTS].keys() == {name for name in self.held if name.endswith("low")}
            for name, value in checkpoint[MAIN_WEIGHTS].items():
                assert torch.equal(value, self.expected(name, main_of(name))), name


def save(config: ParallelConfig, files: dict[Path, tuple[str, bool]]) -> None:
    """Write checkpoints of placements, of optimizers that are sharded or are not."""
    mesh = ParallelMesh.build(config)
    for path, (placement, sharded) in files.items():
        training = Training(mesh, PLACEMENTS[placement], sharded, filled=True)
        write_files(path, training.checkpoint(), *training.arguments, mesh)
        if path.name == "whole":  # the file of a run on a single device, too
            plain = Training(mesh, PLACEMENTS[placement], False, filled=True)
            torch.save(plain.checkpoint(), path.with_name("single-device"))


def load(config: ParallelConfig, paths: Sequence[Path], placements: Sequence[str]) -> None:
    """Read each checkpoint, a directory or a file of whole tensors, into each placement."""
    mesh = ParallelMesh.build(config)
    for i, path in enumerate(paths):
        for placement in placements:
            training = Training(mesh, PLACEMENTS[placement], bool(i % 2), filled=False)
            stages = Stages.gather(*training.arguments, mesh)
            try:
                if path.is_file():
                    loaded = localize(torch.load(path), *training.arguments, path=path, stages=stages)
                else:
                    loaded = read_files(path, *training.arguments, mesh)
                training.check(loaded)
            except Exception as error:
                error.add_note(f"loading {path.name} into {placement}, optimizers sharded: {bool(i % 2)}")
                raise


TOPOLOGIES: list[tuple[int, ParallelConfig, list[str]]] = [
    (1, ParallelConfig(), ["whole"]),
    (2, ParallelConfig(pipeline=2), ["plain", "uneven", "looped", "v"]),
    (4, ParallelConfig(pipeline=4), ["four"]),
    (4, ParallelConfig(pipeline=2), ["looped"]),
    (4, ParallelConfig(pipeline=2, expert=2), ["plain"]),
    (4, ParallelConfig(pipeline=2, tensor=2), ["plain"]),
]


@pytest.mark.slow
def test_any_pipeline_loads_any_other(ranks: RankPool, tmp_path: Path) -> None:
    saved: list[Path] = []
    for i, (world_size, config, placements) in enumerate(TOPOLOGIES):
        files = {
            tmp_path / f"{i}-{placement}-{sharded}": (placement, sharded)
            for placement in placements
            for sharded in (True, False)
        }
        if world_size == 1:
            files[tmp_path / "whole"] = ("whole", True)
        ranks.run(world_size, save, config, files)
        saved += files
    tables = [table_of(path) for path in saved]
    assert all(other == tables[0] for other in tables)
    torch.save(_format_checkpoint(_load_distributed_checkpoint(saved[-2])), tmp_path / "consolidated")
    saved += [tmp_path / "consolidated", tmp_path / "single-device"]
    for world_size, config, placements in TOPOLOGIES:
        ranks.run(world_size, load, config, saved, placements)


def table_of(path: Path) -> dict[str, tuple[Any, ...]]:
    """Names, whole shapes and dtypes in a file; no chunks."""
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        name: (tuple(entry.size), entry.properties.dtype) if hasattr(entry, "size") else ()
        for name, entry in entries.items()
    }


def write_stored(path: Path) -> None:
    """A checkpoint of two stages as runs write it."""
    mesh = ParallelMesh.build(ParallelConfig(pipeline=2))
    training = Training(mesh, PLACEMENTS["looped"], True, filled=True)
    state, rest = pack(training.checkpoint(), *training.arguments, mesh)
    write(path, state, rest, step=5, group=mesh.group("world"))


def test_one_file_of_the_whole_model(ranks: RankPool, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    ranks.run(2, write_stored, tmp_path / "stored")
    done = consolidate(tmp_path / "stored", tmp_path / "weights.safetensors")
    assert set(done.left_out) == {f"blocks.{i}._extra_state" for i in range(BLOCKS)}
    weights = load_file(tmp_path / "weights.safetensors")
    assert weights.keys() == SHAPES.keys() | {f"blocks.{i}.count" for i in range(BLOCKS)} | {"common.runs"}
    for name in SHAPES:
        assert torch.equal(weights[name].float(), whole_of(name)), name


def refuse(path: Path, single: Path) -> list[str]:
    """What is wrong with the model of one stage is raised on both, and names what is wrong."""
    mesh = ParallelMesh.build(ParallelConfig(pipeline=2))
    checkpoints = RunCheckpoints(mesh.group("world"))
    messages = []

    def attempt(training: Training, *, whole: bool) -> None:
        stages = Stages.gather(*training.arguments, mesh)
        read = partial(read_files, path, *training.arguments, mesh)
        cut = partial(localize, torch.load(single), *training.arguments, path=single, stages=stages)
        with pytest.raises(ConfigError) as error:
            # DCP's own reading is collective; nothing of it is reached where names are wrong
            checkpoints.agree(path, cut) if whole else read()
        messages.append(str(error.value))

    def stage(number: int) -> tuple[Training, bool]:
        return Training(mesh, PLACEMENTS["plain"], False, filled=False), mesh.rank("pipeline") == number

    for whole in (False, True):
        training, is_last = stage(1)
        if is_last:
            training.module.blocks["3"].register_buffer("new", torch.zeros(1))
        attempt(training, whole=whole)
        training, is_first = stage(0)
        if is_first:
            del training.module.blocks["0"].count
        attempt(training, whole=whole)
    training, is_last = stage(1)
    if is_last:
        groups = training.optimizers[0].param_groups
        groups[1]["params"], groups[2]["params"] = groups[2]["params"], groups[1]["params"]
    attempt(training, whole=True)
    training, is_last = stage(1)
    if is_last:
        training.optimizers[0].param_groups[0]["params"].reverse()
    attempt(training, whole=True)
    return messages


def test_what_one_stage_finds_wrong_all_raise(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(1, save, ParallelConfig(), {tmp_path / "whole": ("whole", True)})
    first, last = ranks.run(2, refuse, tmp_path / "whole", tmp_path / "single-device")
    assert first == last
    for i in (0, 2):
        assert "missing in the file: ['blocks.3.new']; unknown to the model: []" in first[i]
        assert "missing in the file: []; unknown to the model: ['blocks.0.count']" in first[i + 1]
    assert "optimizer.param_groups[1]" in first[4]
    assert "parameters in another order than the model's" in first[5]
