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

from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.errors import ConfigError
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.main_params import MainParams
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import sharded_parameters


def check_axes(parallel: ParallelConfig) -> None:
    """Refuse axes that the mesh has but this release does not train with.

    Raises:
        ConfigError: Names the axis.
    """
    if parallel.pipeline != 1:
        raise ConfigError("parallel.pipeline", parallel.pipeline, "1", "this release trains without pipeline stages")


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
            elif mesh.size(Axis.EXPERT_MODEL) > 1 or mesh.size(Axis.TENSOR) > 1:
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


def check_optimizers(optimizers: Sequence[Optimizer], module: pl.LightningModule) -> None:
    """Refuse optimizers whose steps would differ between ranks.

    Raises:
        ConfigError: Names the optimizer, and the parameter where it is one.
    """
    own = set(module.parameters())
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError(
                "configure_optimizers",
                name,
                "an optimizer that treats parameters separately, such as AdamW or SGD",
                "it takes inner products over the parameters of a rank, which are different experts on each",
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


def check_shards(module: pl.LightningModule, mesh: ParallelMesh) -> None:
    """Refuse parts that do not make up whole tensors; a collective call.

    So are those of layers that were built before there was a mesh (``load_from_checkpoint`` does): every rank holds all
    of them. The ranks would do the same work, and each would count in the gradient norm.

    Raises:
        ConfigError: Names the parameter.
    """
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

    Ranks along ``context`` and ``tensor`` hold parts of one batch. Where each draws a batch of its own (shuffling
    without a common seed and without Lightning's sampler), the parts do not belong together, and nothing else tells.

    Raises:
        ConfigError: Names the ranks.
    """
    group = mesh.active_group(Axis.CONTEXT_TENSOR)
    if group is None:
        return
    prints = [_fingerprint(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    everybody: list[Any] = [None] * mesh.size(Axis.CONTEXT_TENSOR)
    dist.all_gather_object(everybody, prints, group=group)
    if any(other != everybody[0] for other in everybody):
        raise ConfigError(
            "train_dataloader",
            f"different batches on ranks {list(mesh.ranks(Axis.CONTEXT_TENSOR))}",
            "the same batch on all ranks that share a sample (axes context and tensor)",
            "let Lightning inject its DistributedSampler, use trainer.distributed_sampler_kwargs for your own, or call "
            "seed_everything before shuffling",
        )


def _fingerprint(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], str]:
    data = tensor.detach().to("cpu").contiguous()
    digest = hashlib.blake2b(data.reshape(-1).view(torch.uint8).numpy().tobytes(), digest_size=16)
    return str(tensor.dtype), tuple(tensor.shape), digest.hexdigest()


def check_evaluation_lengths(dataloader: object, mesh: ParallelMesh) -> None:
    """Refuse an evaluation loader that leaves a rank without any batch; a collective call.

    Lightning skips the loop on such a rank, which then serves its experts to nobody.

    Raises:
        ConfigError: Gives the number of batches on every rank.
    """
    if not _has_len(dataloader):
        return
    lengths: list[int] = _gather(len(dataloader), mesh)
    if any(lengths) and not all(lengths):
        raise ConfigError(
            "dataloader",
            f"{lengths} batches on ranks 0..{len(lengths) - 1}",
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
