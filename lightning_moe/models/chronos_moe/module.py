"""``ChronosMoE``: the forecaster as a LightningModule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from lightning_moe.config import ChronosMoEConfig, OptimizerConfig
from lightning_moe.config.chronos_size import chronos_size
from lightning_moe.config.mapping import as_config
from lightning_moe.errors import ConfigError
from lightning_moe.metrics import ExpertLoad
from lightning_moe.models.chronos_moe.forecast import ForecastMixin
from lightning_moe.models.chronos_moe.model import ChronosMoEModel, ChronosMoEOutput
from lightning_moe.models.chronos_moe.pretrained import load_config, load_weights, save_model
from lightning_moe.models.chronos_moe.scores import ForecastScores
from lightning_moe.models.optimizer import adamw
from lightning_moe.models.pipelined import run_step, take_over
from lightning_moe.models.ranks import mean_over_data_ranks, mesh_of, on_first_stage, pipeline_of
from lightning_moe.models.routing import load_imbalance
from lightning_moe.models.tasks import Predicting, Scoring, Task, Training
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.pipeline.parts import ModelPart
from lightning_moe.pipeline.spec import PipelineSpec, ScheduleResult

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
        self.config = as_config(ChronosMoEConfig, config, "config")
        self.optimizer_config = as_config(OptimizerConfig, optimizer, "optimizer")
        # Plain dicts: a checkpoint that holds our classes could not be read with weights_only=True.
        self.save_hyperparameters({"config": asdict(self.config), "optimizer": asdict(self.optimizer_config)})
        self.model: ChronosMoEModel | None = None
        self.scores: ForecastScores | None = None
        moe = self.config.moe
        self.expert_load = None if moe is None else ExpertLoad(self.config.num_layers, moe.num_experts)

    # ---- building

    def pipeline_spec(self) -> PipelineSpec:
        """How the network is cut into stages and what its pieces cost, for strategies with pipelines."""
        costs = chronos_size(self.config).relative_costs
        return PipelineSpec(
            num_blocks=self.config.num_layers,
            build=self._build,
            block_costs=costs.blocks,
            embed_cost=costs.embed,
            head_cost=costs.head,
        )

    def configure_model(self) -> None:
        """Build the network once: this rank's blocks and experts under a strategy with a mesh, all of it otherwise.

        Raises:
            ConfigError: The mesh splits sequences or dense layers, which this model does not.
        """
        runner, before = pipeline_of(self), self.model
        if runner is not None:
            if before is None or before.parts is None:
                network = runner.build_pipeline(self.pipeline_spec())
                assert isinstance(network, ChronosMoEModel)
                self.model = take_over(network, before)
        elif before is None:
            self.model = self._build()

    def _build(self, parts: Sequence[ModelPart] | None = None) -> ChronosMoEModel:
        mesh = mesh_of(self) or ParallelMesh.single()
        for axis in (Axis.CONTEXT, Axis.TENSOR):
            if mesh.size(axis) > 1:
                raise ConfigError(
                    f"parallel.{axis}",
                    mesh.size(axis),
                    "1 with ChronosMoE",
                    "its dense layers are not split; spread its blocks (pipeline), its experts (expert, expert_tensor) "
                    "and the data",
                )
        return ChronosMoEModel(self.config, mesh, parts=parts)

    def network(self) -> ChronosMoEModel:
        """The network, built on first use."""
        self.configure_model()
        assert self.model is not None
        return self.model

    def forward(self, context: Tensor) -> ChronosMoEOutput:
        """Forecast; see :meth:`ChronosMoEModel.forward`."""
        output: ChronosMoEOutput = self.network()(context)
        return output

    # ---- training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Forecast loss plus the auxiliary losses of the routers."""
        mean_terms = mean_over_data_ranks(self, self.network().num_terms(batch["target"]))
        # A batch without any valid point has a sum of zero; the bound only keeps 0 / 0 away.
        mean_terms = mean_terms.clamp(min=1e-9)
        result = self._run(batch, Training(mean_terms))
        self.log("train_loss", (result.metrics["loss_sum"] / mean_terms).float(), prog_bar=True)
        if self.expert_load is not None:
            # Tensors: Lightning reads them when the logger or progress bar does, not every step.
            imbalance = load_imbalance(result.metrics["tokens_per_expert"])
            auxiliary = result.metrics["auxiliary"].float()
            self.log_dict({"auxiliary_loss": auxiliary, "expert_load_imbalance": imbalance})
        return result.loss

    def _run(self, batch: Batch, task: Task, *, outputs: bool = False) -> ScheduleResult:
        return run_step(self, self.network(), batch, task, outputs=outputs)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with linear warm-up and cosine decay over the whole run, moved at every step."""
        return adamw(
            self.network(),
            self.optimizer_config,
            self.trainer.estimated_stepping_batches,
            scales_loss=self.trainer.precision == "16-mixed",
        )

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
        return self._original_units(self.forecast(batch["context"]), batch["scale"]).transpose(1, 2)

    def forecast(self, context: Tensor) -> Tensor:
        """Quantiles ``[B, Q, H]`` of contexts ``[B, T]`` in their units, on all ranks that share the model."""
        return torch.cat(self._run({"context": context}, Predicting(), outputs=True).outputs)

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
        result = self._run(batch, Scoring(), outputs=True)
        # All stages of a pipeline add the same: every score but the load of experts is a quotient of what they add.
        self.scores.loss.update(result.metrics["loss_sum"], self.network().num_terms(batch["target"]))
        target = batch["target"].double() * batch["scale"].double()[:, None]
        quantiles = self._original_units(torch.cat(result.outputs), batch["scale"])[..., : target.shape[1]]
        index = batch["dataset_index"]
        if self.scores.datasets == _POOLED:
            index = torch.zeros_like(index)
        self.scores.update(quantiles, target, batch["seasonal_error"], index)
        if self.expert_load is not None:
            self.expert_load.update(on_first_stage(self, result.metrics["tokens_per_expert"]))

    def _log_scores(self, stage: str) -> None:
        assert self.scores is not None
        for name, value in self.scores.compute().items():
            # Equal on all ranks already; sync_dist only keeps Lightning from warning about each of them.
            self.log(f"{stage}_{name}", value.float(), prog_bar=name in ("mase", "wql"), sync_dist=True)

    def _original_units(self, quantiles: Tensor, scale: Tensor) -> Tensor:
        return quantiles.double() * scale.double()[:, None, None]

    # ---- files

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` with whole experts.

        Every rank must call it when the experts are spread over ranks; rank 0 writes.

        Args:
            directory: Created if missing.
        """
        save_model(self.network(), directory, mesh_of(self))

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
