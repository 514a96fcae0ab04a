"""GPT-MoE trained, scored, sampled and resumed through pipelines gives, bit for bit, what one stage gives."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_moe import ConfigError, GPTMoE, GPTMoEConfig, OptimizerConfig
from lightning_moe.config.gpt import ActivationCheckpointing
from tests.distributed import RankPool
from tests.models.gpt_moe.training import CONFIGS, InTurn, PackedText, SeededGPTMoE
from tests.models.staged import Staged, StageRecorder, StageRun, check_stages, sharded

SCHEDULES = ("1f1b", "interleaved-1f1b", "zb-h1", "zb-h2", "zb-v")


def config_of(name: str, num_layers: int, **moe: Any) -> GPTMoEConfig:
    """With all losses of routers, and a router bias."""
    config = CONFIGS[name]
    assert config.moe is not None
    moe = {"z_loss_coefficient": 0.01, "expert_bias": True, "expert_bias_update_rate": 0.01, **moe}
    return replace(config, num_layers=num_layers, moe=replace(config.moe, **moe))


@dataclass(frozen=True)
class Case:
    """A model, how it is spread, and how much of it is looked at."""

    config: str = "untied"
    staged: Staged = field(default_factory=Staged)
    num_layers: int = 4
    moe: dict[str, Any] = field(default_factory=dict)
    checkpointing: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")
    """Of each step, in turn."""
    steps: int = 3
    batch: int = 5
    """Rows of a step; by default one more than microbatches, then fewer, as an epoch has 8 rows."""
    rows: int = 8
    evaluate: bool = True
    load: Path | None = None
    save: Path | None = None


class Samples(pl.Callback):
    """Generates in the middle of training, as :class:`~lightning_moe.callbacks.TextSamples` does."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            prompt = torch.arange(8).view(2, 4)
            self.tokens += [module.generate(prompt, 2, temperature=0.0), module.generate(prompt, 2, seed=3)]


def train(case: Case) -> StageRun:
    """Train on this rank, then test."""
    recorder, samples = StageRecorder(), Samples()
    callbacks = [InTurn(case.checkpointing), recorder, *[samples] * case.evaluate]
    trainer = case.staged.trainer(*callbacks, max_steps=case.steps)
    module = SeededGPTMoE(
        config_of(case.config, case.num_layers, **case.moe),
        OptimizerConfig(learning_rate=0.2, warmup_steps=19),  # warm-up is all there is: runs differ in their last step
        loss_chunk_tokens=5,
    )
    data = PackedText(case.rows, documents=case.config == "untied")
    found: dict[str, Tensor] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = sharded(data, case.batch, trainer)
        trainer.fit(module, loader, ckpt_path=case.load)
        if case.evaluate:
            (scores,) = trainer.test(module, loader, verbose=False)
            recorder.logged.append(dict(scores))
            assert module.expert_load is not None
            found["expert load"] = module.expert_load.compute()
            found |= {f"sample {i}": tokens for i, tokens in enumerate(samples.tokens)}
    if case.save is not None:
        trainer.save_checkpoint(case.save)
    return recorder.run(module, **found)


def train_all(cases: list[Case]) -> list[StageRun]:
    """One after the other in the same processes."""
    return [train(case) for case in cases]


def check(
    ranks: RankPool, world_size: int, pipeline: int, cases: list[Case], *schedules: str, tolerance: float = 0.0
) -> None:
    """Each case by each schedule is the case on one stage."""
    references = ranks.run(world_size // pipeline, train_all, cases, init_process_group=False)
    staged = [
        replace(case, staged=replace(case.staged, schedule=schedule, pipeline=pipeline))
        for case in cases
        for schedule in schedules
    ]
    runs = ranks.run(world_size, train_all, staged, init_process_group=False, timeout=300)
    for i, case in enumerate(staged):
        check_stages([run[i] for run in runs], [run[i // len(schedules)] for run in references], case, tolerance)


def test_two_stages(ranks: RankPool) -> None:
    check(ranks, 2, 2, [Case("tied", steps=2)], "zb-h1")


@pytest.mark.slow
def test_every_schedule(ranks: RankPool) -> None:
    """With every kind of activation checkpointing, on batches that are no multiple of the microbatches."""
    for pipeline in (2, 4):
        cases = [Case(name, num_layers=2 * pipeline, evaluate=False) for name in CONFIGS]
        check(ranks, pipeline, pipeline, cases, *SCHEDULES)


@pytest.mark.slow
def test_scores_and_samples(ranks: RankPool) -> None:
    """Also where a rank has the ends of the model, and where it has blocks that lie apart."""
    for pipeline in (2, 4):
        cases = [Case("tied", num_layers=2 * pipeline, steps=2)]
        check(ranks, pipeline, pipeline, cases, "zb-v", "interleaved-1f1b")


@pytest.mark.slow
def test_with_other_axes(ranks: RankPool) -> None:
    expert = Case(staged=Staged(axes={"expert": 2}), batch=10, rows=16, evaluate=False)
    sliced = Case("tied", Staged(axes={"tensor": 2, "expert": 2}), evaluate=False)
    copied = Case("tied", Staged(axes={"tensor": 2, "sequence_parallel": False}), evaluate=False)
    context = Case(staged=Staged(axes={"context": 2}))
    for schedule, cases in {"zb-h1": [expert, sliced, copied], "zb-v": [sliced, context]}.items():
        check(ranks, 4, 2, cases, schedule)
    # A tied embedding is summed over stages and data ranks at once, in an order of its own.
    double = {"precision": "64-true"}
    tied = [
        Case("tied", Staged(axes={axis: 2}, settings=double), batch=10, rows=16, evaluate=False)
        for axis in ("expert", "context")
    ]
    check(ranks, 4, 2, tied, "zb-h1", tolerance=1e-12)


@pytest.mark.slow
def test_with_other_settings(ranks: RankPool) -> None:
    """Precisions; accumulation with a short last window; clipping, for which a tied embedding must count once."""
    accumulate: dict[str, Any] = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 3}
    cases = [
        Case(name, Staged(settings=each), rows=20, evaluate=False)
        for name, each in {
            "untied": accumulate | {"precision": "bf16-mixed"},
            "tied": {"precision": "bf16-true"},
        }.items()
    ]
    check(ranks, 2, 2, [*cases, Case(staged=Staged(settings=accumulate), rows=20)], "zb-h1")
    # The two gradients of a tied embedding are each summed over accumulated batches before they are added.
    tied = Case("tied", Staged(settings=accumulate | {"precision": "64-true"}), rows=20, evaluate=False)
    check(ranks, 2, 2, [tied], "zb-v", tolerance=1e-12)


# ---- against one piece

WITHOUT: dict[str, Any] = {"auxiliary_loss_coefficient": 0.0, "z_loss_coefficient": 0.0}
ADDITIVE: dict[str, Any] = {"load_balancing": "sequence", "z_loss_coefficient": 0.0}
"""Losses of routers that the microbatches of a batch add up to."""
DOUBLE = {"precision": "64-true"}


@pytest.mark.slow
def test_microbatches_add_up_to_the_batch(ranks: RankPool) -> None:
    """The reference of the other tests against steps in one piece, in float64."""
    cases = [
        Case("untied", Staged(None, settings=DOUBLE), moe=WITHOUT),
        Case("tied", Staged(None, settings=DOUBLE), moe=ADDITIVE),
    ]
    staged = [replace(case, staged=replace(case.staged, schedule="1f1b")) for case in cases]
    runs = ranks.run(1, train_all, [*cases, *staged], init_process_group=False)[0]
    for case, whole, cut in zip(cases, runs[:2], runs[2:], strict=True):
        check_stages([cut], [whole], case, tolerance=1e-12)


# ---- evaluation


def score(staged: Staged, first: int, second: int) -> tuple[dict[str, float], Tensor]:
    """Scores of so many rows on the first and on the second data rank, in batches of three."""
    trainer = staged.trainer(use_distributed_sampler=False)
    data_rank = trainer.distributed_sampler_kwargs["rank"]  # type: ignore[index]
    rows = range(first, first + second) if data_rank else range(first)
    module = SeededGPTMoE(config_of("tied", 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = DataLoader(Subset(PackedText(first + second, documents=True), rows), batch_size=3)
        (scores,) = trainer.validate(module, loader, verbose=False)
    assert module.expert_load is not None
    return dict(scores), module.expert_load.compute()


@pytest.mark.slow
def test_uneven_evaluation(ranks: RankPool) -> None:
    """Data ranks that share experts have three batches and one, of fewer samples than microbatches."""
    expected, load = ranks.run(1, score, Staged(None), 8, 0, init_process_group=False)[0]
    for first, second in ((7, 1), (2, 6)):
        for schedule in ("zb-h1", "zb-v"):
            staged = Staged(schedule, pipeline=2, axes={"expert": 2})
            for scores, counts in ranks.run(4, score, staged, first, second, init_process_group=False):
                assert scores == pytest.approx(expected, rel=1e-6)
                assert torch.equal(counts, load)


# ---- checkpoints


@pytest.mark.slow
def test_a_run_goes_on_on_other_stages(ranks: RankPool, tmp_path: Path) -> None:
    """Two steps each in one piece, on two stages of two chunks, on four stages, in microbatches, and in one piece."""
    spread = [
        Staged(None, settings=DOUBLE),
        Staged("zb-v", 2, settings=DOUBLE),
        Staged("zb-h1", 4, settings=DOUBLE),
        Staged("1f1b", 1, settings=DOUBLE),
        Staged(None, settings=DOUBLE),
    ]
    cases = [Case(name, spread[0], moe=ADDITIVE, steps=2 * len(spread), evaluate=False) for name in CONFIGS]
    whole = ranks.run(1, train_all, cases, init_process_group=False)[0]
    for i, staged in enumerate(spread):
        rest = [
            replace(
                case,
                staged=staged,
                steps=2 * i + 2,
                load=tmp_path / f"{case.config}{i - 1}" if i else None,
                save=tmp_path / f"{case.config}{i}",
            )
            for case in cases
        ]
        for runs in ranks.run(staged.pipeline, train_all, rest, init_process_group=False):
            for run, expected in zip(runs, whole, strict=True):
                assert run.losses == pytest.approx(expected.losses[2 * i : 2 * i + 2], rel=1e-12), i
    for run, expected in zip(runs, whole, strict=True):
        last = replace(expected, losses=expected.losses[-2:], logged=expected.logged[-2:], grads=expected.grads[-2:])
        check_stages([run], [last], "the end", tolerance=1e-11)


def save_whole(path: Path) -> None:
    """A checkpoint of a module that one process trains without any of this."""
    torch.manual_seed(11)
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=1, logger=False, enable_progress_bar=False)
    trainer.fit(GPTMoE(config_of("tied", 4)), DataLoader(PackedText(4, documents=True), batch_size=4))
    trainer.save_checkpoint(path)


def train_loaded(staged: Staged, path: Path) -> StageRun:
    """Train what ``load_from_checkpoint`` makes of it, with a frozen block."""
    module = GPTMoE.load_from_checkpoint(path, weights_only=True)
    module.network().blocks.get_submodule("2").requires_grad_(False)
    recorder = StageRecorder()
    trainer = staged.trainer(recorder, max_steps=2)
    trainer.fit(module, sharded(PackedText(8, documents=True), 4, trainer))
    return recorder.run(module)


@pytest.mark.slow
def test_a_whole_model_is_loaded_and_cut(ranks: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "whole.ckpt"
    ranks.run(1, save_whole, path, init_process_group=False)
    whole = ranks.run(1, train_loaded, Staged(), path, init_process_group=False)
    assert whole[0].grads[0]["model.blocks.2.attention.qkv_proj.weight"] is None
    check_stages(ranks.run(2, train_loaded, Staged("zb-h1", 2), path, init_process_group=False), whole, "loaded")


# ---- one module and several Trainers


def fit_again_and_again() -> tuple[list[dict[str, float]], list[str]]:
    """Scores after each of several Trainers on one module, and how one with another pipeline refuses it."""
    module = SeededGPTMoE(config_of("tied", 4), OptimizerConfig(learning_rate=1e-2, warmup_steps=1))
    scores: list[dict[str, float]] = []
    messages = []
    for schedule in ("1f1b", "zb-h1"):  # both put the same blocks on the same ranks
        trainer = Staged(schedule, 2).trainer(max_steps=2)
        loader = sharded(PackedText(8, documents=True), 4, trainer)
        trainer.fit(module, loader, loader)
        scores += [{key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val")}]
        scores += [
            dict(each.validate(module, loader, verbose=False)[0]) for each in (trainer, Staged(schedule, 2).trainer())
        ]
    for staged in (Staged("zb-v", 2), Staged("1f1b", 1), Staged(None, 1)):
        with pytest.raises(ConfigError) as error:
            staged.trainer(max_steps=2).fit(module, loader)
        messages.append(str(error.value))
        with pytest.raises(ConfigError) as error:
            staged.trainer().validate(module, loader)
        messages.append(str(error.value))
    return scores, messages


@pytest.mark.slow
def test_several_trainers(ranks: RankPool) -> None:
    for scores, messages in ranks.run(2, fit_again_and_again, init_process_group=False):
        assert scores[0] == scores[1] == scores[2]
        assert scores[3] == scores[4] == scores[5]
        assert scores[3]["val_loss"] < scores[0]["val_loss"]
        for message in messages:
            assert "build a new module for another pipeline" in message
