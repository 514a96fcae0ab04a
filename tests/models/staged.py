"""Training our modules with and without a pipeline, and comparing what the stages saw with what one rank sees."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_moe import MoEStrategy, OverlapConfig, ParallelConfig, PipelineConfig
from tests.strategy.tiny import gradients, relative_error


@dataclass(frozen=True)
class Staged:
    """How a run is spread over ranks."""

    schedule: str | None = "1f1b"
    """None for a strategy without a pipeline, which runs each batch in one piece."""
    pipeline: int = 1
    microbatches: int = 4
    axes: dict[str, Any] = field(default_factory=dict)
    """The other axes."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the Trainer."""
    config: dict[str, Any] = field(default_factory=dict)
    """More of the PipelineConfig."""
    overlap: OverlapConfig | None = None

    def trainer(self, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
        pipeline = None
        if self.schedule is not None:
            pipeline = PipelineConfig(schedule=self.schedule, num_microbatches=self.microbatches, **self.config)
        parallel = ParallelConfig(pipeline=self.pipeline, **self.axes)
        strategy = MoEStrategy(parallel, pipeline, self.overlap, bucket_megabytes=0.004)
        defaults = {
            "accelerator": "cpu",
            "devices": int(os.environ["WORLD_SIZE"]),
            "strategy": strategy,
            "callbacks": list(callbacks),
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_epochs": 100,
        }
        return pl.Trainer(**{**defaults, **self.settings, **settings})


@dataclass
class StageRun:
    """What one rank saw of a run; tensors of its own stages only."""

    losses: list[float]
    logged: list[dict[str, float]]
    """After every step of training, and then of evaluations."""
    grads: list[dict[str, Tensor | None]]
    weights: dict[str, Tensor]
    """Parameters and buffers."""
    found: dict[str, Tensor]
    """Whatever else a test looks at: predictions, generated tokens, loads of experts."""


class StageRecorder(pl.Callback):
    """Losses, logged values and gradients of every step, before clipping."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.logged: list[dict[str, float]] = []
        self.grads: list[dict[str, Tensor | None]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    def on_before_optimizer_step(self, trainer: Any, module: pl.LightningModule, optimizer: Any) -> None:
        found = gradients(trainer, module)
        self.grads.append({name: None if grad is None else grad.detach().clone() for name, grad in found.items()})

    def run(self, module: pl.LightningModule, **found: Tensor) -> StageRun:
        """What has been recorded, with the weights of now."""
        weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
        return StageRun(self.losses, self.logged, self.grads, weights, found)


def sharded(dataset: Dataset[dict[str, Tensor]], batch: int, trainer: pl.Trainer) -> DataLoader[dict[str, Tensor]]:
    """Batches such that the data ranks' batches of one step are, together, ``batch`` rows in order."""
    shard = trainer.distributed_sampler_kwargs
    assert shard is not None
    sampler: DistributedSampler[dict[str, Tensor]] = DistributedSampler(dataset, **shard, shuffle=False)
    return DataLoader(dataset, batch_size=batch // shard["num_replicas"], sampler=sampler)


def check_stages(stages: Sequence[StageRun], whole: Sequence[StageRun], what: object, tolerance: float = 0.0) -> None:
    """The ranks' runs are, together, those of the ranks of a run with one stage.

    Ranks of a pipeline lie furthest apart: rank ``r`` does what rank ``r % len(whole)`` does without it.

    Args:
        stages: Of every rank.
        whole: Of every rank of the run with one stage.
        what: Named where they differ.
        tolerance: Largest relative error of anything; 0 compares all bits.
    """
    for place, expected in enumerate(whole):
        pipeline = stages[place :: len(whole)]
        for rank, run in enumerate(pipeline):
            where = (what, place, rank)
            assert len(run.losses) == len(expected.losses) > 0, where
            assert len(run.logged) == len(expected.logged), where
            for one, other in zip(_numbers(run), _numbers(expected), strict=True):
                assert one.keys() == other.keys(), where
                for key, value in other.items():
                    # The layers' losses are added up stage by stage, and then rounded to float32.
                    allowed = max(tolerance, 2**-23 if key == "auxiliary_loss" else 0.0)
                    assert abs(one[key] - value) <= allowed * abs(value), (where, key, one[key], value)
            _check_tensors(run.found, expected.found, tolerance, where)
            assert run.found.keys() == expected.found.keys(), where
            for step, (grads, references) in enumerate(zip(run.grads, expected.grads, strict=True)):
                _check_tensors(grads, references, tolerance, (*where, step))
            _check_tensors(run.weights, expected.weights, tolerance, where)
        assert {name for run in pipeline for name in run.weights} == expected.weights.keys(), what
        assert {name for run in pipeline for name in run.grads[0]} == expected.grads[0].keys(), what


def _numbers(run: StageRun) -> list[dict[str, float]]:
    return [*run.logged, *({"loss": loss} for loss in run.losses)]


def _check_tensors(
    values: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], tolerance: float, where: object
) -> None:
    for name, value in values.items():
        other = expected[name]
        assert (value is None) == (other is None), (where, name)
        if value is None or other is None or torch.equal(value, other):
            continue
        assert tolerance > 0.0, (where, name, "other bits")
        assert value.is_floating_point(), (where, name)
        assert relative_error(value, other) <= tolerance, (where, name)
