"""How evenly the router spreads tokens over the experts while a model trains."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_moe.moe.layer import MoELayer
from lightning_moe.moe.routing_tape import RoutingTape
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh


class ExpertLoad(Callback):
    """Logs, for each :class:`~lightning_moe.MoELayer` of any model, how unevenly its experts are used.

    The logged figures are ``expert_load/<layer>/busiest`` and ``.../idlest``, the shares of all choices that fell on
    the most and the least used expert, and ``.../imbalance``, the choices of the busiest expert over the mean (1 is
    perfect balance). ``<layer>`` counts the layers of the whole model from 0; where a pipeline spreads them over ranks,
    in the order of the numbers in their names. They cover every training batch of every rank since they were last
    logged, once in ``Trainer(log_every_n_steps=...)`` optimizer steps; in between counts are only added up on the
    device.
    """

    reads_weights = False  # so updated weights may arrive while the next forward has begun

    def __init__(self) -> None:
        self._counts: list[Tensor] = []
        self._handles: list[RemovableHandle] = []
        self._reported_step = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._detach()
        own = {name: module for name, module in pl_module.named_modules() if isinstance(module, MoELayer)}
        sizes = _of_all_stages(trainer, {name: layer.config.num_experts for name, layer in own.items()})
        counts = {
            name: torch.zeros(num_experts, dtype=torch.int64, device=pl_module.device)
            for name, num_experts in sizes.items()
        }
        self._counts = list(counts.values())
        self._handles = [
            layer.register_forward_hook(partial(self._count, counts[name]), with_kwargs=True)
            for name, layer in own.items()
        ]
        self._reported_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        # While gradients accumulate the step stands still, and one step is to be reported once.
        if not self._counts or not every or step % every or step == self._reported_step:
            return
        self._reported_step = step
        everywhere = _sum_over_ranks(trainer, torch.cat(self._counts))
        for layer, counts in enumerate(everywhere.split([len(counts) for counts in self._counts])):
            pl_module.log_dict({f"expert_load/{layer}/{name}": value for name, value in _figures(counts).items()})
        for counts in self._counts:
            counts.zero_()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._detach()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._detach()

    @staticmethod
    def _count(counts: Tensor, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        tape: RoutingTape | None = kwargs.get("saved")
        recomputed = tape is not None and tape.replaying  # activation checkpointing calls the layer once more
        if layer.training and not recomputed:
            counts.add_(output[1].tokens_per_expert)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._counts = [], []


def _figures(counts: Tensor) -> dict[str, Tensor]:
    shares = counts / counts.sum().clamp(min=1)
    return {"busiest": shares.max(), "idlest": shares.min(), "imbalance": shares.max() * len(shares)}


def _of_all_stages(trainer: pl.Trainer, own: dict[str, int]) -> dict[str, int]:
    """What the stages of a pipeline know of their layers, in the order of the whole model; a collective call."""
    mesh = getattr(trainer.strategy, "mesh", None)
    group = mesh.active_group(Axis.PIPELINE) if isinstance(mesh, ParallelMesh) else None
    if group is None:
        return own
    stages: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(stages, own, group=group)
    everything = {name: value for stage in stages for name, value in stage.items()}
    # A stage may hold several runs of blocks, so ranks are not in the order of layers.
    return {name: everything[name] for name in sorted(everything, key=_by_number)}


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _sum_over_ranks(trainer: pl.Trainer, counts: Tensor) -> Tensor:
    """Sum over the ranks, which saw different tokens or hold different layers; a collective call."""
    mesh = getattr(trainer.strategy, "mesh", None)
    if isinstance(mesh, ParallelMesh):
        group = mesh.active_group(Axis.WORLD)  # a layer counts its own slice of the tokens
        if group is not None:
            dist.all_reduce(counts, group=group)
        return counts
    total: Tensor = trainer.strategy.reduce(counts, reduce_op="sum")
    return total
