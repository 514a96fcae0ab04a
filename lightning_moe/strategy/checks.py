"""What cannot work with a model that is spread over ranks, refused by name before anything is lost."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Sized
from typing import Any, TypeGuard

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_moe.errors import ConfigError
from lightning_moe.parallel.layout import Axis, coordinate
from lightning_moe.parallel.main_params import MainParams
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import sharded_parameters, tied_parameters, whole_shape
from lightning_moe.parallel.stages import gather_stages


def check_callbacks(trainer: pl.Trainer, mesh: ParallelMesh) -> None:
    """Refuse callbacks that would be silently wrong or hang; called before any callback's ``setup``.

    Args:
        trainer: The trainer with its callbacks.
        mesh: The parallel mesh.

    Raises:
        ConfigError: Names the callback and what to use instead.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        allowed, why = "", ""
        if isinstance(callback, StochasticWeightAveraging):
            allowed = "EMAWeightAveraging or WeightAveraging"
            if is_overridden("configure_model", trainer.lightning_module):
                # It does so in Callback.setup, before configure_model.
                why = "it copies the module before its layers exist and would average nothing"
            elif any(mesh.size(axis) > 1 for axis in (Axis.PIPELINE, Axis.TENSOR, Axis.EXPERT_MODEL)):
                why = (
                    "it keeps the average in a checkpoint as its own state, where only rank 0's part of the weights is"
                )
        if isinstance(callback, ModelPruning) and mesh.world_size > 1:
            allowed = "pruning of the consolidated weights, on one rank"
            why = "it renames parameters, and how they are split is known by name; each rank would prune its own part"
        if why:
            raise ConfigError("trainer.callbacks", type(callback).__name__, allowed, why)


def check_finetuning(trainer: pl.Trainer, mains: MainParams) -> None:
    """Refuse callbacks that look the optimizer's parameters up in the model, where main parameters are not.

    Raises:
        ConfigError: Names the callback and what to use instead.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning) and mains.by_main:
            raise ConfigError(
                "trainer.callbacks",
                type(callback).__name__,
                "requires_grad_() and optimizer.add_param_group() in on_train_epoch_start",
                "it names the parameters that optimizers hold, which are main parameters; float32 weights with "
                "MoEStrategy(optimizer_sharding=False) have none",
            )


def check_optimizers(
    optimizers: Sequence[Optimizer], module: pl.LightningModule, mesh: ParallelMesh | None = None
) -> None:
    """Refuse optimizers whose steps would differ between ranks; a collective call where there is a pipeline.

    Args:
        optimizers: The optimizers.
        module: The module with this rank's parameters.
        mesh: The parallel mesh; None in a process that has none.

    Raises:
        ConfigError: Names the optimizer, and the parameter where it is one.
    """
    _check_groups(optimizers, mesh)
    own = set(module.parameters())
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError(
                "configure_optimizers",
                name,
                "an optimizer that treats parameters separately, such as AdamW or SGD",
                "it takes inner products over the parameters of a rank, which are different experts and layers on each",
            )
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if parameter not in own:  # each rank would train it by itself
                raise ConfigError(
                    f"configure_optimizers: {name}",
                    f"a parameter of shape {tuple(parameter.shape)} outside of the module",
                    "parameters of the LightningModule",
                    "assign it to an attribute of the module; keep lists of parameters in an nn.ParameterList; make "
                    "a new optimizer for each fit, as one that has been in a fit may hold shards",
                )


def _check_groups(optimizers: Sequence[Optimizer], mesh: ParallelMesh | None) -> None:
    """Stages must have the same groups, each with its own parameters.

    Schedulers and checkpoints know a group by its number: where a stage leaves out a group that would be empty, it
    would take the learning rate, and in a resumed run the state, of another one.
    """
    settings: _Groups = [
        (type(optimizer).__name__, [_settings(group) for group in optimizer.param_groups]) for optimizer in optimizers
    ]
    stages = gather_stages(settings, mesh)
    for number, stage in enumerate(stages):
        if stage != stages[0]:
            here, there = _differing(stage, stages[0])
            raise ConfigError(
                "configure_optimizers",
                f"{here} on stage {number} of the pipeline, {there} on stage 0",
                "the same optimizers with the same groups and settings on all stages",
                "give every stage all groups; a group may be empty: [{'params': decayed}, {'params': []}]",
            )


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """The settings of a group that can be compared between processes."""
    plain = {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in group.items()}
    kinds = (bool, int, float, str, tuple, list, type(None))
    return {
        key: value for key, value in plain.items() if isinstance(value, kinds) and key not in ("params", "param_names")
    }


_Groups = list[tuple[str, list[dict[str, Any]]]]
"""The name of each optimizer, and the settings of its groups."""


def _differing(one: _Groups, other: _Groups) -> tuple[str, str]:
    """In what two stages differ, in the words of each."""
    described = [", ".join(f"{name} of {len(groups)} groups" for name, groups in each) for each in (one, other)]
    if described[0] == described[1]:
        for (name, groups), (_, others) in zip(one, other, strict=True):
            for i, (own, its) in enumerate(zip(groups, others, strict=True)):
                keys = [key for key in own | its if own.get(key) != its.get(key)]
                if keys:
                    described = [f"{keys[0]}={each.get(keys[0])} in group {i} of {name}" for each in (own, its)]
    return described[0] or "no optimizer", described[1] or "no optimizer"


def check_shards(module: pl.LightningModule, mesh: ParallelMesh) -> None:
    """Refuse parts that do not make up whole tensors, and stages that do not make up a model; a collective call.

    So are those of layers that were built before there was a mesh (``load_from_checkpoint`` does): every rank holds all
    of them. The ranks would do the same work, and each would count in the gradient norm.

    Raises:
        ConfigError: Names the parameter.
    """
    _check_stages(module, mesh)
    parts = [(name, spec) for name, _, specs in sharded_parameters(module) for spec in specs]
    held: list[dict[tuple[str, int], int]] = _gather({(name, spec.dim): len(spec.index) for name, spec in parts}, mesh)
    for name, spec in parts:
        total = sum(held[rank].get((name, spec.dim), 0) for rank in mesh.ranks(spec.axis))
        if total != spec.size:
            raise ConfigError(
                f"parameter {name}",
                f"{total} positions along dim {spec.dim} on the {mesh.size(spec.axis)} ranks of the axis {spec.axis}",
                f"{spec.size}, each on one rank",
                "layers that are split must be built in configure_model, from self.trainer.strategy.mesh; a module "
                "that has been built before holds all positions on every rank",
            )


def _check_stages(module: pl.LightningModule, mesh: ParallelMesh) -> None:
    """Each parameter must be on one stage, or tied and on the first and the last.

    Copies on several stages would be trained apart, each on the gradients of its own stage; and of different parameters
    of one name a checkpoint would keep one.
    """
    if mesh.size(Axis.PIPELINE) == 1:
        return
    tied = tied_parameters(module)
    own = {
        name: (parameter in tied, whole_shape(parameter, specs), str(parameter.dtype), parameter.requires_grad)
        for name, parameter, specs in sharded_parameters(module)
    }
    stages = gather_stages(own, mesh)
    for name in sorted({name for stage in stages for name in stage}):
        holders = [number for number, stage in enumerate(stages) if name in stage]
        found = {stage[name] for stage in stages if name in stage}
        is_tied = any(marked for marked, *_ in found)
        if not is_tied and len(holders) == 1:
            continue
        if not is_tied or holders != [0, len(stages) - 1] or len(found) > 1:
            raise ConfigError(
                f"parameter {name}",
                f"{'tied' if is_tied else 'not tied'}, on stages {holders} of the pipeline: "
                + ", ".join(f"{shape} {dtype}" for _, shape, dtype, _ in sorted(found)),
                "a parameter of one stage; or, alike on both, of the first and the last one and marked by set_tied",
                "what pipeline_spec() builds must have the names of the whole model; build nothing with parameters "
                "beside it",
            )


def check_training_lengths(num_batches: float, mesh: ParallelMesh) -> None:
    """Refuse training loops of different lengths: the shorter rank would leave the others waiting; a collective call.

    Raises:
        ConfigError: Gives the number of batches on every rank.
    """
    lengths: list[float] = _gather(num_batches, mesh)
    if len(set(lengths)) > 1:
        raise ConfigError(
            "train_dataloader",
            f"{lengths} batches on ranks 0..{len(lengths) - 1}",
            "the same number of batches on every rank",
            "let Lightning inject its DistributedSampler, drop the last incomplete round, or set "
            "trainer.limit_train_batches",
        )


def check_same_batch(batch: Any, mesh: ParallelMesh) -> None:
    """Refuse batches that differ between ranks which share their samples; a collective call.

    Ranks along ``pipeline``, ``context`` and ``tensor`` work on one batch. Where each draws a batch of its own
    (shuffling without a common seed and without Lightning's sampler), their parts do not belong together, and nothing
    else tells.

    Raises:
        ConfigError: Names the ranks.
    """
    if mesh.config.model_size == 1:
        return
    prints = [_fingerprint(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    for ranks, found in _sharing_samples(_gather(prints, mesh), mesh):
        if any(other != found[0] for other in found):
            raise ConfigError(
                "train_dataloader",
                f"different batches on ranks {ranks}",
                "the same batch on all ranks that share a sample (axes pipeline, context and tensor)",
                "let Lightning inject its DistributedSampler, use trainer.distributed_sampler_kwargs for your own, or "
                "call seed_everything before shuffling",
            )


def _sharing_samples(values: Sequence[Any], mesh: ParallelMesh) -> list[tuple[list[int], list[Any]]]:
    """Group what all ranks have by the ranks that work on the same samples: those ranks, and their values."""
    members: dict[int, list[int]] = {}
    for rank in range(mesh.world_size):
        members.setdefault(coordinate(mesh.config, Axis.DATA, rank), []).append(rank)
    return [(ranks, [values[rank] for rank in ranks]) for ranks in members.values()]


def _fingerprint(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], str]:
    data = tensor.detach().to("cpu").contiguous()
    digest = hashlib.blake2b(data.reshape(-1).view(torch.uint8).numpy().tobytes(), digest_size=16)
    return str(tensor.dtype), tuple(tensor.shape), digest.hexdigest()


def check_evaluation_lengths(dataloader: object, mesh: ParallelMesh) -> None:
    """Refuse an evaluation loader that lets ranks wait for each other for ever; a collective call.

    Ranks that share samples need equal numbers of batches. Those that share experts need at least one: Lightning skips
    the loop on a rank without any, which then serves its experts to nobody.

    Raises:
        ConfigError: Gives the number of batches on every rank.
    """
    if not _has_len(dataloader):
        return
    lengths: list[int] = _gather(len(dataloader), mesh)
    found = f"{lengths} batches on ranks 0..{len(lengths) - 1}"
    if any(len(set(shared)) > 1 for _, shared in _sharing_samples(lengths, mesh)):
        raise ConfigError(
            "dataloader",
            found,
            "the same number of batches on all ranks that share a sample (axes pipeline, context and tensor)",
            "let Lightning inject its DistributedSampler, or use trainer.distributed_sampler_kwargs for your own",
        )
    if any(lengths) and not all(lengths) and mesh.size(Axis.EXPERT_MODEL) > 1:
        raise ConfigError(
            "dataloader",
            found,
            "at least one batch on every rank",
            "evaluate on fewer devices, or on more samples: a rank without a batch cannot serve its experts",
        )


def _gather(value: Any, mesh: ParallelMesh) -> list[Any]:
    values: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(values, value)
    return values


def _has_len(dataloader: object) -> TypeGuard[Sized]:
    """Whether the number of batches is known; iterable data sets have a ``__len__`` that raises."""
    try:
        len(dataloader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return False
    return True
