"""Pipelines whose stages have nothing to train, or nothing to compute; steps that fail; losses that are misused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moe import ConfigError, MoEStrategy, ParallelConfig, PipelineConfig
from lightning_moe.parallel.layout import Axis
from tests.distributed import RankPool
from tests.strategy.chains import Chain, train_chain
from tests.strategy.tiny import Run, Sequences

Case = dict[str, Any]


def make_trainer(strategy: MoEStrategy, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=strategy.parallel.pipeline,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        **settings,
    )


# ---- stages that have little to do


class Frozen(Chain):
    """Four blocks, some parameters without gradients."""

    def __init__(self, frozen: str, **settings: Any) -> None:
        super().__init__(4, **settings)
        self.frozen = frozen

    def configure_model(self) -> None:
        super().configure_model()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not any(part in f".{name}" for part in self.frozen.split()))


class Thaws(Frozen):
    """Freezes other parameters in the second step, and all but one stage's in the third."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.frozen = (self.frozen, ".norm .blocks.2 .head", ".embed .blocks.0 .blocks.1", "")[batch_idx]
        self.configure_model()


def train_many(cases: list[Case]) -> list[Run]:
    return [train_chain(**case) for case in cases]


def check_same(parts: list[Run], whole: Run, what: object) -> None:
    """As :func:`tests.strategy.test_pipeline.check_bitwise`, where gradients may be None."""
    for part in parts:
        assert part.losses == whole.losses, what
        for step, grads in enumerate(part.grads):
            for name, grad in grads.items():
                expected = whole.grads[step][name]
                assert (grad is None) == (expected is None), (what, step, name)
                assert grad is None or expected is None or torch.equal(grad, expected), (what, step, name)
        for name, value in part.weights.items():
            assert torch.equal(value, whole.weights[name]), (what, name)
    assert {name for part in parts for name in part.weights} == whole.weights.keys(), what
    assert len(whole.grads) == len(parts[0].grads) > 0


@pytest.mark.slow
def test_stages_with_nothing_to_train_and_chunks_without_blocks(ranks: RankPool) -> None:
    variants: list[tuple[Case, list[tuple[str, tuple[int, ...] | None]]]] = [
        (
            {"kind": Frozen, "model": {"frozen": ".embed .blocks.0 .blocks.1"}},
            [("1f1b", (2, 2)), ("zb-h1", (2, 2)), ("zb-v", (2, 1, 1, 0))],
        ),
        ({"kind": Frozen, "model": {"frozen": ".blocks.2 .blocks.3 .head"}}, [("zb-h1", (2, 2)), ("zb-v", None)]),
        ({"kind": Frozen, "model": {"frozen": ".embed .weight"}, "accumulate": 2}, [("zb-h1", None)]),
        ({"kind": Thaws, "model": {"frozen": ".embed .blocks.3"}, "steps": 4}, [("1f1b", (2, 2)), ("zb-v", None)]),
        (
            {"model": {"num_blocks": 2}},
            [("zb-h1", (2, 0)), ("zb-h1", (0, 2)), ("zb-v", (0, 1, 1, 0)), ("interleaved-1f1b", (0, 1, 1, 0))],
        ),
    ]
    references = ranks.run(1, train_many, [variant for variant, _ in variants], init_process_group=False)[0]
    cases, expected = [], []
    for (variant, schedules), reference in zip(variants, references, strict=True):
        for schedule, depths in schedules:
            config = {"blocks_per_stage": depths}
            cases.append({**variant, "pipeline": 2, "schedule": schedule, "config": config})
            expected.append(reference)
    runs = ranks.run(2, train_many, cases, init_process_group=False, timeout=240)
    for i, case in enumerate(cases):
        check_same([of_rank[i] for of_rank in runs], expected[i], case)


# ---- steps that fail


class Fails(Chain):
    """Each stage raises an exception in the middle of the second step, the last one earlier than the first."""

    def configure_model(self) -> None:
        super().configure_model()
        self.calls = 0
        last = self.trainer.strategy.mesh.rank(Axis.PIPELINE)  # type: ignore[attr-defined]
        next(iter(self.model.blocks.values())).register_forward_pre_hook(self._count(4 + 3 - last))  # type: ignore[union-attr, operator]

    def _count(self, allowed: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            self.calls += self.trainer.training
            if self.calls > allowed - 1:
                raise ArithmeticError

        return count


def validate_after_a_failure(pipeline: int) -> tuple[bool, float]:
    """Whether copies of the strategy connect, and a validation loss after a failed step of the same pipeline."""
    strategy = MoEStrategy(ParallelConfig(pipeline=pipeline), PipelineConfig(schedule="1f1b", num_microbatches=4))
    trainer = make_trainer(strategy)
    if pipeline > 1:
        with pytest.raises(ArithmeticError):
            trainer.fit(Fails(2), DataLoader(Sequences(24), batch_size=8))
    found = trainer.validate(Chain(2), DataLoader(Sequences(16), batch_size=8), verbose=False)
    return pickle.loads(pickle.dumps(strategy))._connected is None, found[0]["val_loss"]


def test_what_was_under_way_in_a_failed_step_is_not_taken_later(ranks: RankPool) -> None:
    [(_, expected)] = ranks.run(1, validate_after_a_failure, 1, init_process_group=False)
    results = ranks.run(2, validate_after_a_failure, 2, init_process_group=False, timeout=60)
    assert results == [(True, expected)] * 2


# ---- losses that are misused


class ByHand(Chain):
    """Manual optimization: whether gradients start over is known after run_schedule only."""

    def __init__(self) -> None:
        super().__init__(1)
        self.automatic_optimization = False


class Skips(Chain):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        super().training_step(batch, batch_idx)


class Penalty(Chain):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + 1e-3 * next(self.parameters()).square().sum()


class Twice(Chain):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(retain_graph=True)
        loss.backward()


def refuse(module: Chain, **settings: Any) -> str:
    with pytest.raises(ConfigError) as error:
        make_trainer(MoEStrategy(pipeline=PipelineConfig(num_microbatches=2)), **settings).fit(
            module, DataLoader(Sequences(24), batch_size=8)
        )
    return str(error.value)


def refuse_all() -> list[str]:
    return [refuse(module) for module in (ByHand(), Skips(1), Penalty(1), Twice(1))] + [
        refuse(Penalty(1), accumulate_grad_batches=2)
    ]


class Saliency(Chain):
    """Records gradients in validation."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        with torch.enable_grad():
            super().validation_step(batch, batch_idx)


def evaluate_with_grad() -> list[float]:
    """The validation loss with gradients recorded and without, from equal modules."""
    losses = []
    for kind in (Saliency, Chain):
        trainer = make_trainer(MoEStrategy(pipeline=PipelineConfig(num_microbatches=2)), inference_mode=False)
        loader = DataLoader(Sequences(16), batch_size=8)
        trainer.fit(kind(1), loader, loader)
        losses.append(float(trainer.callback_metrics["val_loss"]))
    return losses


def test_misused_losses_are_refused(ranks: RankPool) -> None:
    by_hand, skips, penalty, twice, accumulated = ranks.run(1, refuse_all, init_process_group=False)[0]
    assert "automatic_optimization" in by_hand
    assert "before run_schedule" in skips
    assert "beside those of run_schedule" in penalty
    assert "beside those of run_schedule" in accumulated
    assert "second backward" in twice


def test_evaluation_records_no_gradients(ranks: RankPool) -> None:
    recorded, plain = ranks.run(1, evaluate_with_grad, init_process_group=False)[0]
    assert recorded == plain
