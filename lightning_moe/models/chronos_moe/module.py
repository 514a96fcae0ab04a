"""``ChronosMoE``: the forecaster as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Self

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from lightning_moe.config import ChronosMoEConfig, OptimizerConfig
from lightning_moe.errors import ConfigError
from lightning_moe.models.chronos_moe.forecast import ForecastMixin
from lightning_moe.models.chronos_moe.loss import quantile_loss_sum
from lightning_moe.models.chronos_moe.model import ChronosMoEModel, ChronosMoEOutput
from lightning_moe.models.chronos_moe.optimizer import cosine_schedule, parameter_groups
from lightning_moe.models.chronos_moe.pretrained import (
    config_from_dict,
    load_config,
    load_weights,
    optimizer_from_dict,
    save_model,
)
from lightning_moe.models.chronos_moe.scores import ExpertLoad, ForecastScores
from lightning_moe.parallel.mesh import ParallelMesh

Batch = dict[str, Tensor]

_POOLED = ("all",)
"""Name under which scores are pooled when the data do not say which data sets they hold."""


class ChronosMoE(pl.LightningModule, ForecastMixin):
    """Quantile forecaster with mixture-of-experts layers, for any Lightning strategy.

    A batch is a dict of ``context`` ``[B, C]`` and ``target`` ``[B, H]`` (floating, NaN where missing),
    ``scale`` and ``seasonal_error`` ``[B]`` float64 (factor to original units; error of the seasonal naive
    forecast in original units), ``series_index`` and ``dataset_index`` ``[B]`` int64.

    Logged in training: ``train_loss``, ``auxiliary_loss`` and ``expert_load_imbalance`` (tokens of the
    busiest expert over the mean, of this rank's batch, averaged over layers). Logged in evaluation, with
    the prefix ``val_`` or ``test_``: ``loss``, ``mase``, ``wql``, ``smape`` and ``coverage`` over all data
    sets, and each of them as ``mase/<data set>``.

    Attributes:
        model: The :class:`ChronosMoEModel`, once built.
        scores: The :class:`ForecastScores` of the last evaluation.
        expert_load: The :class:`ExpertLoad` of the last evaluation; None for a dense model.

    Args:
        config: Sizes and loss; the defaults when left out. A mapping (from a checkpoint) is accepted as well.
        optimizer: AdamW and its schedule; the defaults when left out. A mapping is accepted as well.

    Raises:
        ConfigError: A mapping does not describe a valid configuration.
    """

    def __init__(self, config: ChronosMoEConfig | None = None, optimizer: OptimizerConfig | None = None) -> None:
        super().__init__()
        config = config_from_dict(config) if isinstance(config, Mapping) else config or ChronosMoEConfig()
        optimizer = optimizer_from_dict(optimizer) if isinstance(optimizer, Mapping) else optimizer or OptimizerConfig()
        self.config = config
        self.optimizer_config = optimizer
        # Plain dicts: a checkpoint that holds our classes could not be read with weights_only=True.
        self.save_hyperparameters({"config": asdict(config), "optimizer": asdict(optimizer)})
        self.model: ChronosMoEModel | None = None
        self.scores: ForecastScores | None = None
        self.expert_load = None if config.moe is None else ExpertLoad(config.num_layers, config.moe.num_experts)

    # ---- building

    def configure_model(self) -> None:
        """Build the network once: this rank's experts under a strategy with a mesh, all of them otherwise."""
        if self.model is None:
            self.model = ChronosMoEModel(self.config, self._mesh() or ParallelMesh.single())

    def network(self) -> ChronosMoEModel:
        """The network, built on first use."""
        self.configure_model()
        assert self.model is not None
        return self.model

    def forward(self, context: Tensor) -> ChronosMoEOutput:
        """Forecast; see :meth:`ChronosMoEModel.forward`."""
        output: ChronosMoEOutput = self.network()(context)
        return output

    def _mesh(self) -> ParallelMesh | None:
        """The strategy's mesh, while there is one."""
        strategy = self._trainer.strategy if self._trainer is not None else None
        try:
            mesh = getattr(strategy, "mesh", None)
        except RuntimeError:  # the strategy has one, but not in this process (the main process of spawn)
            return None
        return mesh if isinstance(mesh, ParallelMesh) else None

    # ---- training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Forecast loss plus the auxiliary losses of the routers."""
        output = self.network()(batch["context"])
        loss_sum, valid = self._loss(output, batch["target"])
        # A batch without any valid point has a sum of zero; the bound only keeps 0 / 0 away.
        loss = loss_sum / self._mean_over_data_ranks(valid).clamp(min=1e-9).to(loss_sum.dtype)
        logs = {"train_loss": loss.detach()}
        if output.routing:
            auxiliary = torch.stack([routed.auxiliary_loss + routed.z_loss for routed in output.routing]).sum()
            tokens = torch.stack([routed.tokens_per_expert for routed in output.routing]).float()
            logs["auxiliary_loss"] = auxiliary.detach()
            logs["expert_load_imbalance"] = (tokens.amax(-1) / tokens.mean(-1).clamp(min=1e-9)).mean()
            loss = loss + auxiliary
        self.log("train_loss", logs.pop("train_loss"), prog_bar=True)
        self.log_dict(logs)  # tensors: Lightning reads them when the logger or progress bar does, not every step
        return loss

    def _loss(self, output: ChronosMoEOutput, target: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the quantile loss, and the number of terms in it (observed points times levels)."""
        network = self.network()
        horizon = target.shape[1]
        if horizon > self.config.prediction_length:
            raise ConfigError(
                "data.prediction_length",
                horizon,
                f"at most config.prediction_length = {self.config.prediction_length}",
            )
        normalized, observed = network.normalize_target(target, output.statistics)
        quantiles = output.quantiles[..., :horizon]
        levels = network.quantile_levels(quantiles)
        config = self.config
        loss_sum = quantile_loss_sum(quantiles, normalized, observed, levels, config.loss, config.huber_delta)
        return loss_sum, observed.sum() * len(config.quantiles)

    def _mean_over_data_ranks(self, count: Tensor) -> Tensor:
        """Mean of ``count`` over the ranks that see different samples.

        Gradients are averaged over these ranks. Dividing each local sum by the *mean* count makes that
        average the gradient of the global sum over the global count, however unevenly missing values are
        spread over ranks.
        """
        mesh = self._mesh()
        count = count.to(torch.float64 if count.device.type != "mps" else torch.float32)
        if mesh is not None:
            group = mesh.group("data_context")
            if group is not None and mesh.size("data_context") > 1:
                dist.all_reduce(count, group=group)
                count /= mesh.size("data_context")
            return count
        if self._trainer is not None and self._trainer.world_size > 1:
            mean: Tensor = self._trainer.strategy.reduce(count, reduce_op="mean")
            return mean
        return count

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with linear warm-up and cosine decay over the whole run, moved at every step."""
        settings = self.optimizer_config
        optimizer = torch.optim.AdamW(
            parameter_groups(self.network(), settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
        )
        steps = self.trainer.estimated_stepping_batches
        total = None if math.isinf(steps) else int(steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_schedule(settings, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ---- evaluation

    def on_validation_epoch_start(self) -> None:
        """Begin new scores."""
        self._begin_scores()

    def on_test_epoch_start(self) -> None:
        """Begin new scores."""
        self._begin_scores()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the scores."""
        self._score(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the scores."""
        self._score(batch)

    def on_validation_epoch_end(self) -> None:
        """Reduce the scores over ranks and log them as ``val_...``."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Reduce the scores over ranks and log them as ``test_...``."""
        self._log_scores("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the quantiles ``[B, H, Q]`` of a batch in original units, float64."""
        return self._original_units(self.network()(batch["context"]), batch["scale"]).transpose(1, 2)

    def _begin_scores(self) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        names = tuple(getattr(datamodule, "dataset_names", ())) or _POOLED
        if self.scores is None or self.scores.datasets != names:
            self.scores = ForecastScores(names, self.config.quantiles).to(self.device)
        self.scores.reset()
        if self.expert_load is not None:
            self.expert_load.reset()

    def _score(self, batch: Batch) -> None:
        assert self.scores is not None, "Lightning calls the epoch-start hook first"
        output = self.network()(batch["context"])
        loss_sum, valid = self._loss(output, batch["target"])
        self.scores.loss.update(loss_sum, valid)
        target = batch["target"].double() * batch["scale"].double()[:, None]
        quantiles = self._original_units(output, batch["scale"])[..., : target.shape[1]]
        index = batch["dataset_index"]
        if self.scores.datasets == _POOLED:
            index = torch.zeros_like(index)
        self.scores.update(quantiles, target, batch["seasonal_error"], index)
        if self.expert_load is not None:
            self.expert_load.update(torch.stack([routed.tokens_per_expert for routed in output.routing]))

    def _log_scores(self, stage: str) -> None:
        assert self.scores is not None
        for name, value in self.scores.compute().items():
            # Equal on all ranks already; sync_dist only keeps Lightning from warning about each of them.
            self.log(f"{stage}_{name}", value.float(), prog_bar=name in ("mase", "wql"), sync_dist=True)

    def _original_units(self, output: ChronosMoEOutput, scale: Tensor) -> Tensor:
        return self.network().denormalize(output).double() * scale.double()[:, None, None]

    # ---- files

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` with whole experts.

        Every rank must call it when the experts are spread over ranks; rank 0 writes.

        Args:
            directory: Created if missing.
        """
        save_model(self.network(), directory, self._mesh())

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        mesh: ParallelMesh | None = None,
        optimizer: OptimizerConfig | None = None,
    ) -> Self:
        """Load what :meth:`save_pretrained` wrote.

        Args:
            directory: The directory.
            mesh: Where the experts are to live; None loads all of them into this process. A module that was
                loaded whole can be handed to a Trainer with any strategy, too.
            optimizer: Settings for further training.

        Raises:
            ConfigError: The directory is incomplete, damaged, or not a Chronos-MoE model.
        """
        module = cls(load_config(directory), optimizer)
        module.model = ChronosMoEModel(module.config, mesh or ParallelMesh.single())
        load_weights(module.model, directory)
        return module
