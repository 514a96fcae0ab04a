"""A chain of small blocks as a pipelined LightningModule, and how it is trained on ranks, for the pipeline tests."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler

from lightning_moe import MoEConfig, MoEStrategy, ParallelConfig, ParallelMesh, PipelineConfig
from lightning_moe.moe.layer import MoELayer
from lightning_moe.parallel.layout import Axis
from lightning_moe.pipeline.chain import chain_spec
from lightning_moe.pipeline.spec import PipelineSpec
from lightning_moe.weight_grad import linear
from tests.strategy.tiny import WIDTH, Recorder, Run, Sequences, gradients


class Linear(nn.Module):
    """A linear layer whose weight gradient can be deferred; the bias's cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight) + self.bias


class Block(nn.Module):
    """Residual block; hands on the auxiliary loss of the blocks so far beside the hidden states."""

    def __init__(self, mesh: ParallelMesh, experts: MoEConfig | None, checkpointed: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = Linear(), Linear()
        self.moe = None if experts is None else MoELayer(WIDTH, experts, mesh)
        self.moe_norm = None if experts is None else nn.LayerNorm(WIDTH)
        self.checkpointed = checkpointed

    def forward(self, hidden: Tensor, auxiliary: Tensor) -> tuple[Tensor, Tensor]:
        if self.checkpointed and torch.is_grad_enabled():
            hidden = checkpoint(self.dense, hidden, use_reentrant=False)
        else:
            hidden = self.dense(hidden)
        if self.moe is not None and self.moe_norm is not None:
            out, routing = self.moe(self.moe_norm(hidden))
            hidden, auxiliary = hidden + out, auxiliary + routing.auxiliary_loss + routing.z_loss
        return hidden, auxiliary

    def dense(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.tanh(self.up(self.norm(hidden))))


class Embed(Linear):
    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = super().forward(batch["input"])
        return hidden, hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))


class Head(Linear):
    def forward(self, hidden: Tensor, auxiliary: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(hidden), auxiliary


class Chain(pl.LightningModule):
    """``num_blocks`` blocks between an embedding and a head, by a strategy that is pipelined."""

    def __init__(
        self,
        num_blocks: int = 8,
        *,
        experts: dict[str, Any] | None = None,
        checkpointed: bool = False,
        optimizer: str = "adamw",
        learning_rate: float = 1e-2,
    ) -> None:
        super().__init__()
        self.num_blocks, self.optimizer, self.learning_rate = num_blocks, optimizer, learning_rate
        self.experts = None
        if experts is not None:
            self.experts = MoEConfig(**{"num_experts": 4, "top_k": 2, "expert_hidden_size": 12, **experts})
        self.checkpointed = checkpointed
        self.model: nn.Module | None = None
        self.metrics: list[dict[str, float]] = []

    def pipeline_spec(self) -> PipelineSpec:
        mesh = self.trainer.strategy.mesh  # type: ignore[attr-defined]
        block = partial(Block, mesh, self.experts, self.checkpointed)
        return chain_spec(Embed, [block] * self.num_blocks, Head, self.loss)

    @staticmethod
    def loss(prediction: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        predicted, auxiliary = prediction
        error = nn.functional.mse_loss(predicted, batch["target"])
        squares = (predicted.detach().float() - batch["target"].float()).square().sum()
        return error + auxiliary, {"squares": squares, "samples": torch.tensor(len(predicted))}

    def configure_model(self) -> None:
        if self.model is None:
            torch.manual_seed(11)
            self.model = self.trainer.strategy.build_pipeline(self.pipeline_spec())  # type: ignore[attr-defined]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        result = self.trainer.strategy.run_schedule(batch)  # type: ignore[attr-defined]
        self.metrics.append({name: float(value) for name, value in result.metrics.items()})
        self.log("train_loss", result.loss, on_step=True, on_epoch=True, sync_dist=True)
        return result.loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        result = self.trainer.strategy.run_schedule(batch)  # type: ignore[attr-defined]
        self.log("val_loss", result.loss, sync_dist=True, batch_size=len(batch["input"]))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        batch = {"input": batch["input"]}
        result = self.trainer.strategy.run_schedule(batch, outputs=True)  # type: ignore[attr-defined]
        return torch.cat([predicted for predicted, _ in result.outputs])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=self.learning_rate)
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.1)


class PipelineRecorder(Recorder):
    """A recorder whose tensors are those of this rank's stages."""

    def __init__(self, *, keep: bool = True) -> None:
        super().__init__()
        self.keep = keep

    def on_before_optimizer_step(self, trainer: Any, module: pl.LightningModule, optimizer: Any) -> None:
        if not self.keep:
            return
        found = gradients(trainer, module)
        self.grads.append({name: None if grad is None else grad.detach().clone() for name, grad in found.items()})


def train_chain(
    pipeline: int = 1,
    schedule: str = "1f1b",
    *,
    microbatches: int = 4,
    parallel: dict[str, int] | None = None,
    config: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    strategy: dict[str, Any] | None = None,
    steps: int = 3,
    batch: int = 8,
    accumulate: int = 1,
    length: int | None = None,
    keep_grads: bool = True,
    kind: type[Chain] = Chain,
    **settings: Any,
) -> Run:
    """Train on this rank; gradients and weights are those of its own stages (and its own experts)."""
    recorder = PipelineRecorder(keep=keep_grads)
    callbacks = [recorder, *settings.pop("callbacks", [])]
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": int(os.environ.get("WORLD_SIZE", "1")),
            "strategy": MoEStrategy(
                ParallelConfig(pipeline=pipeline, **(parallel or {})),
                PipelineConfig(schedule=schedule, num_microbatches=microbatches, **(config or {})),
                bucket_megabytes=0.004,
                **(strategy or {}),
            ),
            "callbacks": callbacks,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_steps": steps,
            "max_epochs": 100,
            "accumulate_grad_batches": accumulate,
            **settings,
        }
    )
    module = kind(**(model or {}))
    dtype = torch.float64 if settings.get("precision") == "64-true" else torch.float32
    shard = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    data = Sequences(length or batch * accumulate * 4, dtype)
    sampler: DistributedSampler[dict[str, Tensor]] = DistributedSampler(data, **shard, shuffle=False)
    loader = DataLoader(data, batch_size=batch // shard["num_replicas"], sampler=sampler)
    trainer.fit(module, loader)
    mesh = trainer.strategy.mesh  # type: ignore[attr-defined]
    assert mesh.size(Axis.PIPELINE) == pipeline
    return Run(
        recorder.losses,
        recorder.grads,
        {name: value.detach().clone() for name, value in module.state_dict().items()},
        {key: float(value) for key, value in trainer.callback_metrics.items()},
    )
