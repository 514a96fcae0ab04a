"""Optimizer state and main weights through files: any topology and any kind of optimizer loads any other's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.utilities.consolidate_checkpoint import _format_checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader

from lightning_moe import ConfigError, ParallelConfig, ParallelMesh, ShardSpec, set_shard_spec
from lightning_moe.checkpoint.contents import MAIN_WEIGHTS, localize, pack, targets, unpack
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.main_params import MainParam
from lightning_moe.parallel.sharding import ShardSpecs, even_slice, local_part, replica_axis_of, sharded_parameters
from tests.checkpoint.dcp import read_files, write_files
from tests.distributed import RankPool

SHAPES = {
    "conv": (4, 3, 2, 2),
    "wide": (5, 7),
    "experts": (4, 6, 3),
    "rows": (7, 3),
    "norm": (9,),
    "scale": (),
    "gain": (1,),
    "low": (6, 5),
    "low_experts": (4, 5),
    "counted": (3,),
    "nothing": (0, 3),
}
LOW = ("low", "low_experts")


def whole_of(name: str) -> Tensor:
    """Float32; exact in bfloat16 for the parameters of that dtype, and different for every element."""
    shape = torch.Size(SHAPES[name])
    return torch.arange(float(shape.numel())).view(shape) + 1 + (0 if name in LOW else 64 * list(SHAPES).index(name))


def main_of(name: str) -> Tensor:
    """Main weights have digits that the weights have not."""
    return whole_of(name) + (2.0**-10 if name in LOW else 0)


class Model(nn.Module):
    """Parameters of every kind: strides, dtypes, shard specs, one element, none."""

    def __init__(self, mesh: ParallelMesh, placement: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        super().__init__()
        experts = ShardSpec("expert", 0, 4, tuple(placement[i] for i in even_slice(4, mesh, "expert")))
        inner = even_slice(3, mesh, "expert_tensor")
        specs: dict[str, ShardSpecs] = {
            "experts": (experts, ShardSpec("expert_tensor", 1, 6, (*inner, *(3 + i for i in inner)))),
            "low_experts": (experts,),
            "rows": (ShardSpec("tensor", 0, 7, tuple(even_slice(7, mesh, "tensor"))),),
        }
        for name in SHAPES:
            value = local_part(whole_of(name), specs.get(name, ()))
            if name == "conv":
                value = value.to(memory_format=torch.channels_last)
            elif name == "wide":
                value = value.t().contiguous().t()
            elif name in LOW:
                value = value.bfloat16()
            self.register_parameter(name, nn.Parameter(value))
            set_shard_spec(self, name, *specs.get(name, ()))

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


class Counting(torch.optim.Optimizer):
    """Its state has nothing for each element."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})


class Training:
    """A rank's model and optimizers in the middle of a run.

    Args:
        mesh: The mesh.
        sharded: Whether optimizers hold runs.
        filled: Whether optimizers have state.
        placement: Which experts the ranks hold.
    """

    def __init__(
        self, mesh: ParallelMesh, sharded: bool, *, filled: bool, placement: tuple[int, ...] = (0, 1, 2, 3)
    ) -> None:
        self.mesh, self.module = mesh, Model(mesh, placement)
        parameters = dict(self.module.named_parameters())
        adam = [name for name in SHAPES if name not in (*LOW, "rows", "counted", "norm")]
        self.optimizers = [
            torch.optim.AdamW([{"params": [parameters[n] for n in adam]}, {"params": [parameters["norm"]], "lr": 0.5}]),
            torch.optim.SGD([parameters[name] for name in (*LOW, "rows")], momentum=0.9),
            Counting([parameters["counted"]]),
        ]
        self.mains: dict[Tensor, MainParam] = {}
        self.held: dict[str, Tensor] = {}
        for name, parameter, specs in sharded_parameters(self.module):
            main = self._main(name, parameter, specs, sharded)
            self.held[name] = parameter if main is None else main.main
            if main is not None:
                self.mains[main.main] = main
        by_parameter = {parameter: self.held[name] for name, parameter in parameters.items()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [by_parameter[parameter] for parameter in group["params"]]
        if filled:
            self._fill()

    def _main(self, name: str, parameter: nn.Parameter, specs: ShardSpecs, sharded: bool) -> MainParam | None:
        if not sharded:
            if parameter.dtype == torch.float32:
                return None
            return MainParam(parameter, nn.Parameter(self.part(name, main_of(name), None)), None)
        axis = replica_axis_of(specs)
        # Ranks beyond this axis cut what they all hold at different places, as they do when their buckets differ.
        shift = 2 * self.mesh.rank(Axis.TENSOR if axis == Axis.DATA_CONTEXT else Axis.EXPERT_TENSOR)
        ranks, rank, elements = self.mesh.size(axis), self.mesh.rank(axis), parameter.numel()
        cuts = [0, *(min(elements * i // ranks + shift, elements) for i in range(1, ranks)), elements]
        run = range(cuts[rank], cuts[rank + 1])
        return MainParam(parameter, nn.Parameter(self.part(name, main_of(name), run)), run)

    def part(self, name: str, whole: Tensor, run: range | None) -> Tensor:
        """The elements of a whole tensor that this rank holds, found by copying them into the parameter's memory."""
        parameter = self.module.get_parameter(name)
        specs = {name: specs for name, _, specs in sharded_parameters(self.module)}[name]
        local = torch.empty_like(parameter, dtype=whole.dtype, requires_grad=False).copy_(local_part(whole, specs))
        return local if run is None else local.as_strided((local.numel(),), (1,))[run.start : run.stop].clone()

    def expected(self, name: str, whole: Tensor) -> Tensor:
        """What the optimizer's state must hold of a whole tensor."""
        main = self.mains.get(self.held[name])
        return self.part(name, whole, None if main is None else main.run)

    def _fill(self) -> None:
        adam, sgd, counting = self.optimizers
        for name, held in self.held.items():
            moment = self.expected(name, main_of(name) + 0.25)
            if name in (*LOW, "rows"):
                sgd.state[held] = {"momentum_buffer": moment}
            elif name == "counted":
                counting.state[held] = {"step": torch.tensor(3.0), "resets": 2, "last": None}
            else:
                adam.state[held] = {"step": torch.tensor(3.0), "exp_avg": moment, "exp_avg_sq": moment + 1}

    def checkpoint(self) -> dict[str, Any]:
        return {
            "state_dict": self.module.state_dict(),
            "optimizer_states": [optimizer.state_dict() for optimizer in self.optimizers],
            "epoch": 5,
        }

    def check(self, checkpoint: dict[str, Any]) -> None:
        """Load what another run has saved, and compare every bit."""
        assert checkpoint["epoch"] == 5
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.fill_(torch.nan)
        self.module.load_state_dict(checkpoint["state_dict"])
        for name, parameter in self.module.named_parameters():
            assert torch.equal(parameter, self.part(name, whole_of(name), None).to(parameter.dtype)), name
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)
        adam, sgd, counting = self.optimizers
        assert [group["lr"] for group in adam.param_groups] == [1e-3, 0.5]
        for name, held in self.held.items():
            moment = self.expected(name, main_of(name) + 0.25)
            if name in (*LOW, "rows"):
                assert list(sgd.state[held]) == ["momentum_buffer"]
                assert torch.equal(sgd.state[held]["momentum_buffer"], moment), name
                assert sgd.state[held]["momentum_buffer"].dtype == torch.float32
            elif name == "counted":
                assert counting.state[held] == {"step": 3, "resets": 2, "last": None}
            else:
                state = adam.state[held]
                assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}, name
                assert state["step"].shape == ()
                assert state["step"] == 3
                assert torch.equal(state["exp_avg"], moment), name
                assert torch.equal(state["exp_avg_sq"], moment + 1), name
        weights = checkpoint[MAIN_WEIGHTS]
        assert weights.keys() == set(LOW)
        for name, value in weights.items():
            assert torch.equal(value, self.expected(name, main_of(name))), name
            assert value.dtype == torch.float32


def save(config: ParallelConfig, paths: dict[Path, bool]) -> None:
    """Write checkpoints of optimizers that are sharded, or are not."""
    mesh = ParallelMesh.build(config)
    for path, sharded in paths.items():
        training = Training(mesh, sharded, filled=True, placement=(2, 0, 3, 1))
        write_files(path, training.checkpoint(), training.module, training.optimizers, training.mains, mesh)


def load(config: ParallelConfig, paths: Sequence[Path], kinds: Sequence[bool]) -> None:
    """Read each checkpoint, a directory or a consolidated file, into optimizers of each kind."""
    mesh = ParallelMesh.build(config)
    for path, sharded in product(paths, kinds):
        training = Training(mesh, sharded, filled=False, placement=(0, 1, 2, 3))
        arguments = training.module, training.optimizers, training.mains
        try:
            training.check(localize(torch.load(path), *arguments) if path.is_file() else read_files(path, *arguments))
        except Exception as error:
            error.add_note(f"loading {path.name} into {'sharded' if sharded else 'whole'} optimizers")
            raise


TOPOLOGIES = [
    (1, ParallelConfig()),
    (2, ParallelConfig(expert=2)),
    (3, ParallelConfig()),
    (4, ParallelConfig()),
    (4, ParallelConfig(expert=2)),
    (4, ParallelConfig(tensor=2, expert=2, expert_tensor=1)),
    (4, ParallelConfig(tensor=2, expert_tensor=2)),
]


@pytest.mark.slow
def test_four_sharded_ranks_load_as_two_and_as_one_whole(ranks: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    ranks.run(4, save, ParallelConfig(expert=2), {path: True})
    ranks.run(2, load, ParallelConfig(), [path], [True])
    ranks.run(1, load, ParallelConfig(), [path], [False])


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of every topology with both kinds of optimizers, and one that Lightning's tool has consolidated."""
    folder = tmp_path_factory.mktemp("saved")
    paths = []
    for i, (world_size, config) in enumerate(TOPOLOGIES):
        both = {folder / f"{i}-sharded": True, folder / f"{i}-whole": False}
        ranks.run(world_size, save, config, both)
        paths += both
    torch.save(_format_checkpoint(_load_distributed_checkpoint(paths[-2])), folder / "consolidated")
    return [*paths, folder / "consolidated"]


@pytest.mark.slow
@pytest.mark.parametrize("loader", range(len(TOPOLOGIES)))
def test_any_topology_and_kind_of_optimizer_loads_any_other(ranks: RankPool, saved: list[Path], loader: int) -> None:
    world_size, config = TOPOLOGIES[loader]
    ranks.run(world_size, load, config, saved, [True, False])


@pytest.mark.slow
def test_files_do_not_show_who_wrote_them(saved: list[Path]) -> None:
    tables = [table_of(path) for path in saved if path.is_dir()]
    assert all(table == tables[0] for table in tables)
    assert tables[0][f"{MAIN_WEIGHTS}.low"] == ((6, 5), torch.float32)
    assert f"{MAIN_WEIGHTS}.wide" not in tables[0]  # its weights are the main weights


def table_of(path: Path) -> dict[str, tuple[Any, ...]]:
    """Names, whole shapes and dtypes in a file; no chunks."""
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        name: (tuple(entry.size), entry.properties.dtype) if hasattr(entry, "size") else ()
        for name, entry in entries.items()
    }


# One process without torch.distributed, from here on.


def write_alone(path: Path, **changes: Any) -> Training:
    training = Training(ParallelMesh.single(), True, filled=True)
    arguments = training.module, training.optimizers, training.mains, training.mesh
    write_files(path, {**training.checkpoint(), **changes}, *arguments)
    return training


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_evaluation_reads_weights_alone(tmp_path: Path) -> None:
    training = write_alone(tmp_path)
    metadata = FileSystemReader(tmp_path).read_metadata()
    assert targets(metadata, training.module, [], training.mains, path=tmp_path).keys() == {"model"}
    checkpoint = read_files(tmp_path, training.module, [], {})
    assert checkpoint["optimizer_states"] == []
    assert MAIN_WEIGHTS not in checkpoint
    whole = _format_checkpoint(_load_distributed_checkpoint(tmp_path))
    assert MAIN_WEIGHTS not in localize(whole, training.module, [], {})


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_consolidated_files_load_as_whole_and_as_sharded(tmp_path: Path) -> None:
    write_alone(tmp_path)
    whole = _format_checkpoint(_load_distributed_checkpoint(tmp_path))
    for sharded in (True, False):
        training = Training(ParallelMesh.single(), sharded, filled=False)
        training.check(localize(whole, training.module, training.optimizers, training.mains))


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_files_without_main_weights(tmp_path: Path) -> None:
    """Those of a float32 run, and older ones: the key is absent."""
    training = Training(ParallelMesh.single(), True, filled=True)
    state, rest = pack(training.checkpoint(), training.module, training.optimizers, training.mains, training.mesh)
    del state[MAIN_WEIGHTS]
    unpacked = unpack(state, rest, training.module, training.optimizers, training.mains, path=tmp_path)
    assert MAIN_WEIGHTS not in unpacked
    assert MAIN_WEIGHTS not in localize(unpacked, training.module, [], {})


def test_weights_alone_are_saved_without_main_weights() -> None:
    """``save_weights_only`` leaves the optimizers out of Lightning's dictionary."""
    training = Training(ParallelMesh.single(), True, filled=True)
    checkpoint = {"state_dict": training.module.state_dict()}
    state, rest = pack(checkpoint, training.module, training.optimizers, training.mains, training.mesh)
    assert state.keys() == {"model"}
    assert rest == {"objects_of_state_dict": {"_extra_state": {"steps": 3}}}
    assert checkpoint.keys() == {"state_dict"}


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_another_model_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    training = write_alone(tmp_path)
    training.module.register_parameter("new", nn.Parameter(torch.zeros(2)))
    del training.module.norm
    training.module.wide = nn.Parameter(torch.zeros(7, 5))
    with pytest.raises(ConfigError) as error:
        read_files(tmp_path, training.module, [], {})
    assert (error.value.field, error.value.value) == ("ckpt_path", str(tmp_path))
    assert "missing in the file: ['new']; unknown to the model: ['norm']" in error.value.hint
    assert "wide: (5, 7) in the file, (7, 5) in the model" in error.value.hint
    training.module.wide = nn.Parameter(torch.zeros(5, 7))
    checkpoint = read_files(tmp_path, training.module, [], {}, strict=False)
    assert checkpoint["state_dict"].keys() == {*SHAPES, "_extra_state"} - {"norm"}


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_main_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    training = write_alone(tmp_path)
    whole = _format_checkpoint(_load_distributed_checkpoint(tmp_path))
    whole[MAIN_WEIGHTS]["low"] = torch.zeros(5, 6)
    with pytest.raises(ConfigError, match="main_weights of low"):
        localize(whole, training.module, training.optimizers, training.mains)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_other_optimizers_are_refused(tmp_path: Path) -> None:
    training = write_alone(tmp_path)
    with pytest.raises(ConfigError, match="configure_optimizers"):
        read_files(tmp_path, training.module, training.optimizers[:1], training.mains)
    groups = training.optimizers[0].param_groups
    groups[0]["params"].append(groups.pop()["params"][0])
    with pytest.raises(ConfigError, match=r"optimizer.param_groups\[0\]"):
        read_files(tmp_path, training.module, training.optimizers, training.mains)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_before_the_first_step_there_is_no_state(tmp_path: Path) -> None:
    training = Training(ParallelMesh.single(), True, filled=False)
    arguments = training.module, training.optimizers, training.mains
    write_files(tmp_path, training.checkpoint(), *arguments, training.mesh)
    checkpoint = read_files(tmp_path, *arguments)
    assert [state["state"] for state in checkpoint["optimizer_states"]] == [{}, {}, {}]
    assert checkpoint[MAIN_WEIGHTS].keys() == set(LOW)
