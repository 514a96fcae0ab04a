"""A checkpoint of any topology loads on any other, bit for bit: weights, main weights, optimizer state and schedule.

What a checkpoint holds is read by torch's own tool, in one process, into whole tensors. Where a rank's values belong in
them follows from the specs of its parameters, and from nothing that the package saves or loads with.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_moe import MoEStrategy, OptimizerConfig, ParallelConfig, shard_specs
from lightning_moe.parallel.sharding import ShardSpecs
from tests.distributed import RankPool
from tests.models.gpt_moe.training import CONFIGS, SeededGPTMoE, loader
from tests.strategy.tiny import trainer

SAVED_STEP = 2

Key = tuple[str, ...]
"""Where a tensor is in the file, e.g. ``("optimizer_0", "state", "model.final_norm.weight", "exp_avg")``."""


@dataclass(frozen=True)
class Topology:
    """Ranks, and whatever else must not show in a file."""

    name: str
    world_size: int
    parallel: ParallelConfig
    learning_rate: float
    """Another one everywhere, so that no value of one run is that of another."""
    optimizer_sharding: bool = True
    bucket_megabytes: float = 0.002
    expert_placement: tuple[int, ...] | None = None
    transposed: bool = False
    """Whether matrices lie in memory by columns."""


TOPOLOGIES = [
    Topology("one", 1, ParallelConfig(), 0.02),
    Topology("data", 2, ParallelConfig(data=2), 0.04, bucket_megabytes=0.01),
    Topology("data4-expert4", 4, ParallelConfig(data=4, expert=4), 0.06, expert_placement=(2, 0, 3, 1)),
    Topology(
        "data-tensor-expert",
        4,
        ParallelConfig(data=2, tensor=2, expert=2),
        0.08,
        bucket_megabytes=0.005,
        expert_placement=(3, 0, 2, 1),
    ),
    Topology(
        "data-context-expert",
        4,
        ParallelConfig(data=2, context=2, expert=2),
        0.10,
        optimizer_sharding=False,
        expert_placement=(1, 2, 0, 3),
    ),
    Topology(
        "context-tensor-expert_tensor",
        4,
        ParallelConfig(context=2, tensor=2, expert_tensor=2, sequence_parallel=False),
        0.12,
        bucket_megabytes=25.0,
        transposed=True,
    ),
]
SMALL = [
    Topology("tensor-expert", 2, ParallelConfig(tensor=2, expert=2), 0.02, expert_placement=(3, 0, 2, 1)),
    Topology("data", 2, ParallelConfig(data=2), 0.04, bucket_megabytes=0.01),
]


@dataclass(frozen=True)
class Part:
    """A rank's part of a whole tensor."""

    value: Tensor
    addresses: Tensor
    """Of each element of ``value``, its position in the whole tensor, in row-major order."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""


@dataclass(frozen=True)
class Held:
    """What a rank holds between two steps."""

    parts: list[tuple[Key, Part]]
    plain: dict[str, Any]
    """Counters, the schedule, and the settings of the optimizer's groups."""


@dataclass
class Watch(pl.Callback):
    """Saves after :data:`SAVED_STEP` steps if it has a path, and notes what is held then, and the next step's loss."""

    path: Path | None = None
    held: Held | None = None
    losses: list[float] = field(default_factory=list)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == SAVED_STEP and self.path is None:
            self.held = held(trainer, module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == SAVED_STEP and self.path is not None:
            trainer.save_checkpoint(self.path)
            self.held = held(trainer, module)
        if trainer.global_step > SAVED_STEP:
            self.losses.append(float(outputs["loss"]))


class TransposedGPTMoE(SeededGPTMoE):
    """Matrices lie in memory by columns."""

    def configure_model(self) -> None:
        super().configure_model()
        for parameter in self.parameters():
            if parameter.dim() == 2:
                parameter.data = parameter.data.t().contiguous().t()


def fit(topology: Topology, precision: Any, save: Path | None, load: Path | None) -> tuple[Held, float]:
    """Train a step beyond :data:`SAVED_STEP`; what this rank held before it, and its loss."""
    watch = Watch(save)
    run = trainer(
        topology.world_size,
        0,
        strategy=MoEStrategy(
            topology.parallel,
            optimizer_sharding=topology.optimizer_sharding,
            bucket_megabytes=topology.bucket_megabytes,
        ),
        callbacks=[watch],
        precision=precision,
        max_steps=SAVED_STEP + 1,
        max_epochs=9,
        limit_train_batches=SAVED_STEP,  # saved between two epochs: where a run goes on within one is another matter
    )
    config = CONFIGS["untied"]
    assert config.moe is not None
    config = replace(config, moe=replace(config.moe, expert_placement=topology.expert_placement))
    kind = TransposedGPTMoE if topology.transposed else SeededGPTMoE
    module = kind(config, OptimizerConfig(learning_rate=topology.learning_rate, weight_decay=0.1, warmup_steps=3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, loader(run.distributed_sampler_kwargs, documents=True), ckpt_path=load)
    assert watch.held is not None
    (loss,) = watch.losses
    return watch.held, loss


def fit_all(
    topology: Topology, precision: Any, save: Path | None, load: Sequence[Path | None]
) -> list[tuple[Held, float]]:
    """One fit after the other in the same processes."""
    return [fit(topology, precision, save, path) for path in load]


def held(trainer: pl.Trainer, module: pl.LightningModule) -> Held:
    """What this rank holds, and where it belongs."""
    specs = shard_specs(module)
    parts: list[tuple[Key, Part]] = []
    for name, value in module.state_dict().items():
        parts.append((("model", name), part(value, value, specs.get(name, ()))))
    (optimizer,) = trainer.optimizers
    strategy = trainer.strategy
    assert isinstance(strategy, MoEStrategy)
    mains = strategy._mains.by_main
    names = {parameter: name for name, parameter in module.named_parameters()}
    for main in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        parameter, run = (mains[main].parameter, mains[main].run) if main in mains else (main, None)
        name = names.pop(parameter)
        section = "model" if main.dtype == parameter.dtype else "main_weights"
        parts.append(((section, name), part(main, parameter, specs.get(name, ()), run)))
        for key, value in optimizer.state[main].items():
            assert key == "step" or value.shape == main.shape, (name, key)
            state = part(value, value, ()) if key == "step" else part(value, parameter, specs.get(name, ()), run)
            parts.append((("optimizer_0", "state", name, key), state))
    assert not names, f"stepped by no optimizer: {list(names.values())}"
    plain = {
        "global_step": trainer.global_step,
        "schedule": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
    }
    return Held(parts, plain)


def part(value: Tensor, local: Tensor, specs: ShardSpecs, run: range | None = None) -> Part:
    """Describe a value for each element of a local tensor, or for a run of its elements in the order of memory."""
    shape = list(local.shape)
    for spec in specs:
        shape[spec.dim] = spec.size
    addresses = torch.arange(prod(shape)).view(shape)
    for spec in specs:
        addresses = addresses.index_select(spec.dim, torch.tensor(spec.index))
    if run is not None:
        memory = torch.empty_strided(local.shape, local.stride(), dtype=torch.int64).copy_(addresses)
        addresses = memory.as_strided((local.numel(),), (1,))[run.start : run.stop]
    assert value.shape == addresses.shape
    return Part(value.detach().clone(), addresses.clone(), tuple(shape))


def same_bits(value: Tensor, other: Tensor) -> bool:
    """Whether two tensors have equal dtypes, shapes and bits: zeros of different signs are not equal."""
    if value.dtype != other.dtype or value.shape != other.shape:
        return False
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (value, other)))


def assemble(ranks: Sequence[Held]) -> dict[Key, Tensor]:
    """The whole tensors that the ranks hold parts of; what several of them hold must be equal."""
    whole: dict[Key, Tensor] = {}
    seen: dict[Key, Tensor] = {}
    for key, each in (entry for rank in ranks for entry in rank.parts):
        value = whole.setdefault(key, torch.zeros(each.shape, dtype=each.value.dtype)).view(-1)
        known = seen.setdefault(key, torch.zeros(each.shape, dtype=torch.bool)).view(-1)
        again = known[each.addresses]
        assert same_bits(value[each.addresses][again], each.value[again]), f"{key}: replicas differ"
        value[each.addresses], known[each.addresses] = each.value, True
    for key, known in seen.items():
        assert known.all(), f"{key}: some elements are on no rank"
    return whole


def flatten(nested: Mapping[str, Any], prefix: Key = ()) -> dict[Key, Any]:
    """Values by their keys at every level."""
    flat: dict[Key, Any] = {}
    for name, value in nested.items():
        flat |= flatten(value, (*prefix, name)) if isinstance(value, dict) else {(*prefix, name): value}
    return flat


@dataclass(frozen=True)
class Saved:
    """A checkpoint, and the run that wrote it."""

    path: Path
    ranks: list[Held]
    loss: float
    """Of the step after it, in the run that was not interrupted."""
    whole: dict[Key, Tensor]
    """What the file holds."""


def save(ranks: RankPool, topology: Topology, precision: str, folder: Path) -> Saved:
    path = folder / f"{topology.name}.ckpt"
    results = ranks.run(
        topology.world_size, fit_all, topology, precision, path, [None], init_process_group=False, timeout=300
    )
    dcp_to_torch_save(path, folder / "whole.pt")
    whole = flatten(torch.load(folder / "whole.pt", weights_only=True))
    held_by, losses = zip(*(result for (result,) in results), strict=True)
    return Saved(path, list(held_by), sum(losses) / len(losses), whole)


def check_loads(ranks: RankPool, topology: Topology, precision: str, saved: Mapping[str, Saved]) -> dict[str, float]:
    """Load every checkpoint on a topology, and compare what each rank then holds with the file.

    Returns:
        The next step's loss after each.
    """
    paths = [each.path for each in saved.values()]
    by_rank = ranks.run(
        topology.world_size, fit_all, topology, precision, None, paths, init_process_group=False, timeout=300
    )
    losses = {}
    for (name, each), *of_ranks in zip(saved.items(), *by_rank, strict=True):
        for rank, (now, _) in enumerate(of_ranks):
            where = f"saved by {name}, loaded by rank {rank} of {topology.name}"
            assert {key for key, _ in now.parts} == each.whole.keys(), where
            for key, own in now.parts:
                assert own.shape == tuple(each.whole[key].shape), f"{key} {where}"
                assert same_bits(own.value, each.whole[key].reshape(-1)[own.addresses]), f"{key} {where}"
            assert now.plain == each.ranks[0].plain, where
        losses[name] = sum(loss for _, loss in of_ranks) / len(of_ranks)
    return losses


def check_file(saved: Saved) -> None:
    """Compare whole tensors of a file with what the ranks held when they wrote it."""
    live = assemble(saved.ranks)
    assert live.keys() == saved.whole.keys()
    for key, value in live.items():
        assert same_bits(value, saved.whole[key]), key
    assert saved.ranks[0].plain["global_step"] == SAVED_STEP
    assert all(rank.plain == saved.ranks[0].plain for rank in saved.ranks)


def check_losses(losses: Mapping[str, float], saved: Mapping[str, Saved], topology: Topology) -> None:
    """The next step, in float32, has the loss of the run that was not interrupted."""
    for name, loss in losses.items():
        assert abs(loss - saved[name].loss) <= 1e-6 * saved[name].loss, f"saved by {name}, loaded by {topology.name}"


def test_a_pair(ranks: RankPool, tmp_path: Path) -> None:
    """Tensor and expert parallelism, then data parallelism alone, both with sharded optimizers."""
    first, second = SMALL
    saved = {first.name: save(ranks, first, "32-true", tmp_path)}
    check_file(saved[first.name])
    check_losses(check_loads(ranks, second, "32-true", saved), saved, second)


CASES = [("32-true", topology) for topology in TOPOLOGIES] + [("bf16-true", topology) for topology in TOPOLOGIES[3:]]
"""In bf16-true optimizers step main weights, sharded and whole ones."""

each_case = pytest.mark.parametrize(
    ("precision", "topology"), CASES, ids=lambda value: value.name if isinstance(value, Topology) else value
)


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Saved]]:
    """A checkpoint of every topology, by precision and name."""
    found: dict[str, dict[str, Saved]] = {}
    for precision, topology in CASES:
        folder = tmp_path_factory.mktemp(precision)
        found.setdefault(precision, {})[topology.name] = save(ranks, topology, precision, folder)
    return found


@pytest.mark.slow
@each_case
def test_the_file_holds_what_the_ranks_held(
    saved: dict[str, dict[str, Saved]], precision: str, topology: Topology
) -> None:
    check_file(saved[precision][topology.name])


@pytest.mark.slow
@each_case
def test_loads_what_every_topology_saved(
    ranks: RankPool, saved: dict[str, dict[str, Saved]], precision: str, topology: Topology
) -> None:
    """All 36 ordered pairs in float32, and 9 in bfloat16."""
    losses = check_loads(ranks, topology, precision, saved[precision])
    if precision == "32-true":
        check_losses(losses, saved[precision], topology)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_nothing_hides(saved: dict[str, dict[str, Saved]], precision: str) -> None:
    """No two checkpoints have a tensor in common, and main weights have digits that the weights do not have."""
    files = [each.whole for each in saved[precision].values()]
    for key in files[0]:
        if key[-1] != "step":
            same = [torch.equal(one[key], two[key]) for i, one in enumerate(files) for two in files[:i]]
            assert not any(same), key
    for whole in files:
        mains = {key[1]: value for key, value in whole.items() if key[0] == "main_weights"}
        assert bool(mains) == (precision == "bf16-true")
        for name, main in mains.items():
            weight = whole["model", name]
            assert same_bits(main.to(weight.dtype), weight), name
            assert not torch.equal(main, weight.float()), name
