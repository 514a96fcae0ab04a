"""``GPTMoE``: the language model as a LightningModule."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from lightning_moe.config import GPTMoEConfig, OptimizerConfig
from lightning_moe.config.gpt import ActivationCheckpointing
from lightning_moe.config.gpt_size import gpt_size
from lightning_moe.config.mapping import as_config
from lightning_moe.errors import ConfigError
from lightning_moe.metrics import BitsPerByte, ExpertLoad, MeanLoss
from lightning_moe.models.gpt_moe.generate import NextLogits, generate
from lightning_moe.models.gpt_moe.model import GPTMoEModel
from lightning_moe.models.gpt_moe.sampling import Sampling
from lightning_moe.models.optimizer import adamw
from lightning_moe.models.pipelined import run_step, take_over
from lightning_moe.models.ranks import mean_over_data_ranks, mesh_of, on_first_stage, pipeline_of
from lightning_moe.models.routing import load_imbalance
from lightning_moe.models.tasks import Predicting, Scoring, Task, Training
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.pipeline.parts import ModelPart
from lightning_moe.pipeline.spec import PipelineSpec, ScheduleResult

Batch = dict[str, Tensor]


class GPTMoE(pl.LightningModule):
    """Decoder-only language model with mixture-of-experts layers, for any Lightning strategy.

    A batch is a dict of int64 tensors ``[B, S]``: ``tokens``, ``labels`` (the token that follows; -100 where nothing is
    to be predicted), ``label_bytes`` (UTF-8 bytes that each label stands for; needed in evaluation), and optionally
    ``positions`` (in the document) and ``documents`` (number of each token's document within its sequence; tokens
    attend to their own document only). All ranks of the axes pipeline, context and tensor get the same batch.

    Logged in training: ``train_loss`` (nats per token, of the global batch), ``auxiliary_loss`` and
    ``expert_load_imbalance`` (tokens of the busiest expert over the mean, of this rank's tokens, averaged over layers).
    Logged in evaluation, with the prefix ``val_`` or ``test_``: ``loss`` (nats per token) and ``bits_per_byte``.

    Attributes:
        model: The :class:`GPTMoEModel`, once built.
        expert_load: The :class:`ExpertLoad` of the last evaluation; None for a dense model.

    Args:
        config: Sizes and blocks; the defaults when left out. A mapping (from a checkpoint) is accepted as well.
        optimizer: AdamW and its schedule; the defaults when left out. A mapping is accepted as well.
        activation_checkpointing: What is computed again in the backward pass instead of being kept: ``"none"``,
            ``"selective"`` (all but the experts), or ``"full"`` (whole blocks, except the choice of experts).
        loss_chunk_tokens: Number of tokens whose logits exist at a time; None for all.
        compile_blocks: Whether ``torch.compile`` compiles the attention and the dense feed-forward layer of each block.

    Raises:
        ConfigError: A mapping does not describe a valid configuration.
    """

    def __init__(
        self,
        config: GPTMoEConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        activation_checkpointing: ActivationCheckpointing = "none",
        loss_chunk_tokens: int | None = 1024,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.config = as_config(GPTMoEConfig, config, "config")
        self.optimizer_config = as_config(OptimizerConfig, optimizer, "optimizer")
        self.activation_checkpointing: ActivationCheckpointing = activation_checkpointing
        self.loss_chunk_tokens = loss_chunk_tokens
        self.compile_blocks = compile_blocks
        # Plain values: a checkpoint that holds our classes could not be read with weights_only=True.
        self.save_hyperparameters(
            {
                "config": asdict(self.config),
                "optimizer": asdict(self.optimizer_config),
                "activation_checkpointing": activation_checkpointing,
                "loss_chunk_tokens": loss_chunk_tokens,
                "compile_blocks": compile_blocks,
            }
        )
        self.model: GPTMoEModel | None = None
        self.mean_loss = MeanLoss()
        self.bits_per_byte = BitsPerByte()
        moe, layers = self.config.moe, self.config.moe_layers
        self.expert_load = ExpertLoad(len(layers), moe.num_experts) if moe is not None and layers else None

    # ---- building

    def setup(self, stage: str) -> None:
        """Check that the model knows every token of the data.

        Raises:
            ConfigError: The data have a larger vocabulary.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        vocab_size = getattr(datamodule, "vocab_size", None)
        if isinstance(vocab_size, int) and vocab_size > self.config.vocab_size:
            raise ConfigError(
                "config.vocab_size", self.config.vocab_size, f"at least {vocab_size}, the vocabulary of the data"
            )

    def pipeline_spec(self) -> PipelineSpec:
        """How the network is cut into stages and what its pieces cost, for strategies with pipelines."""
        costs = gpt_size(self.config).relative_costs
        return PipelineSpec(
            num_blocks=self.config.num_layers,
            build=lambda parts: self._build(mesh_of(self), parts),
            block_costs=costs.blocks,
            embed_cost=costs.embed,
            head_cost=costs.head,
        )

    def configure_model(self) -> None:
        """Build the network once: this rank's part under a strategy with a mesh, all of it otherwise.

        Of a network that was built whole before there was a mesh, as ``load_from_checkpoint`` does, this rank's part is
        kept.
        """
        runner, mesh, before = pipeline_of(self), mesh_of(self), self.model
        if runner is not None:
            if before is None or before.parts is None:
                network = runner.build_pipeline(self.pipeline_spec())
                assert isinstance(network, GPTMoEModel)
                self.model = take_over(network, before)
        elif before is None or (mesh is not None and mesh.world_size > before.mesh.world_size == 1):
            self.model = take_over(self._build(mesh), before)

    def _build(self, mesh: ParallelMesh | None, parts: Sequence[ModelPart] | None = None) -> GPTMoEModel:
        return GPTMoEModel(
            self.config,
            mesh,
            parts=parts,
            activation_checkpointing=self.activation_checkpointing,
            loss_chunk_tokens=self.loss_chunk_tokens,
            compile_blocks=self.compile_blocks,
        )

    def network(self) -> GPTMoEModel:
        """The network, built on first use."""
        self.configure_model()
        assert self.model is not None
        return self.model

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, S, V]`` of tokens ``[B, S]``; see :meth:`GPTMoEModel.logits`."""
        return self.network().logits(tokens)

    # ---- training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the labels plus the auxiliary losses of the routers."""
        mean_labels = mean_over_data_ranks(self, self.network().num_labels(batch["labels"]))
        # A batch without any label has a sum of zero; the bound only keeps 0 / 0 away.
        mean_labels = mean_labels.clamp(min=1e-9)
        result = self._run(batch, Training(mean_labels))
        mean_loss_sum = mean_over_data_ranks(self, result.metrics["loss_sum"])
        self.log("train_loss", (mean_loss_sum / mean_labels).float(), prog_bar=True)
        if self.expert_load is not None:
            # Tensors: Lightning reads them when the logger or progress bar does, not every step.
            imbalance = load_imbalance(result.metrics["tokens_per_expert"])
            auxiliary = result.metrics["auxiliary"].float()
            self.log_dict({"auxiliary_loss": auxiliary, "expert_load_imbalance": imbalance})
        return result.loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with linear warm-up and cosine decay over the whole run, moved at every step."""
        return adamw(
            self.network(),
            self.optimizer_config,
            self.trainer.estimated_stepping_batches,
            scales_loss=self.trainer.precision == "16-mixed",
        )

    def _run(self, batch: Batch, task: Task, *, outputs: bool = False) -> ScheduleResult:
        return run_step(self, self.network(), batch, task, outputs=outputs)

    # ---- evaluation

    def on_validation_epoch_start(self) -> None:
        """Begin new scores."""
        self._reset_scores()

    def on_test_epoch_start(self) -> None:
        """Begin new scores."""
        self._reset_scores()

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

    def _reset_scores(self) -> None:
        for metric in (self.mean_loss, self.bits_per_byte, self.expert_load):
            if metric is not None:
                metric.reset()

    def _score(self, batch: Batch) -> None:
        network, metrics = self.network(), self._run(batch, Scoring()).metrics
        # All stages add the same to both sides of these quotients.
        self.mean_loss.update(metrics["loss_sum"], network.num_labels(batch["labels"]))
        self.bits_per_byte.update(metrics["loss_sum"], network.own_chunk(batch["label_bytes"]))
        if self.expert_load is not None:
            self.expert_load.update(on_first_stage(self, metrics["tokens_per_expert"]))

    def _log_scores(self, stage: str) -> None:
        scores = {"loss": self.mean_loss.compute(), "bits_per_byte": self.bits_per_byte.compute()}
        for name, value in scores.items():
            # Equal on all ranks already; sync_dist only keeps Lightning from warning about each of them.
            self.log(f"{stage}_{name}", value.float(), prog_bar=True, sync_dist=True)

    # ---- text

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Continue sequences, also in the middle of training; all ranks must call it, with the same arguments.

        Args:
            tokens: int64 ``[B, S]``, one document per sequence.
            max_new_tokens: Number of tokens to add to each.
            temperature: Divides the logits; 0 takes the most likely token.
            top_k: Draw from this many most likely tokens only; None for all.
            top_p: Draw from the most likely tokens that together reach this probability; None for all.
            seed: Seed of the draws.

        Returns:
            int64 ``[B, S + max_new_tokens]`` on the model's device, the same on all ranks.

        Raises:
            ConfigError: A value is out of range, or the sequences would be longer than ``config.max_sequence_length``.
        """
        # In the trainer's precision: 16-bit training is not followed by samples in float32.
        precision = nullcontext() if self._trainer is None else self._trainer.precision_plugin.forward_context()
        network, sampling = self.network(), Sampling(temperature, top_k, top_p)
        with precision:
            return generate(network, tokens, max_new_tokens, sampling, seed, self._pipelined_logits())

    def _pipelined_logits(self) -> NextLogits | None:
        """Runs the network where it is spread over stages, which keep no keys and values of earlier tokens."""
        runner = pipeline_of(self)
        if runner is None:
            return None
        return lambda tokens: torch.cat(runner.run_schedule({"tokens": tokens}, Predicting(), outputs=True).outputs)
