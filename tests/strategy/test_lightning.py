"""Lightning's features and traps under the strategy, one test each."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_moe import ConfigError, MoEStrategy, ParallelConfig, ParallelMesh, ShardSpec, set_shard_spec
from lightning_moe.moe.layer import MoELayer
from tests.distributed import RankFailure, RankPool
from tests.strategy.tiny import (
    Recorder,
    Sequences,
    TinyMoE,
    check_losses,
    loader,
    train,
    trainer,
    whole,
)

HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class HookOrder(pl.Callback):
    """Names of hooks in order, with the norm of the dense gradient that each of them sees."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

        def recorder(name: str) -> Any:
            def hook(trainer: Any, module: Any, *_: Any) -> None:
                weight, strategy = module.head.weight, trainer.strategy
                grad = strategy.full_grad(weight) if isinstance(strategy, MoEStrategy) else weight.grad
                self.seen.append((name, 0.0 if grad is None else float(grad.norm())))

            return hook

        for name in HOOKS:
            setattr(self, name, recorder(name))


def hook_order(world_size: int, expert: int) -> list[tuple[str, float]]:
    callback = HookOrder()
    run = trainer(
        world_size,
        expert,
        precision="64-true",
        callbacks=[callback],
        max_steps=2,
        max_epochs=10,
        gradient_clip_val=0.01,
    )
    run.fit(TinyMoE(), loader(32, 8, world_size, run.global_rank, torch.float64))
    return callback.seen


def test_hooks_come_in_lightnings_order_and_see_the_reduced_gradient(ranks: RankPool) -> None:
    """``on_after_backward`` already sees the gradient of the global batch, ``on_before_optimizer_step`` unclipped."""
    seen = ranks.run(2, hook_order, 2, 2, init_process_group=False)[0]
    expected = ranks.run(1, hook_order, 1, 0, init_process_group=False)[0]
    assert [name for name, _ in seen] == [name for name, _ in expected]
    for (name, norm), (_, reference) in zip(seen, expected, strict=True):
        assert norm == pytest.approx(reference, rel=1e-12), name


def injected_samplers() -> tuple[bool, bool, list[int]]:
    seen: list[int] = []

    class Module(TinyMoE):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            seen.extend(batch["index"].tolist())
            return super().training_step(batch, batch_idx)

    run = trainer(2, 2, limit_val_batches=1)
    data = DataLoader(Sequences(16), batch_size=4)
    run.fit(Module(), data, data)
    train_sampler = run.train_dataloader.sampler  # type: ignore[union-attr]
    val_sampler = run.val_dataloaders.sampler  # type: ignore[union-attr]
    return isinstance(train_sampler, DistributedSampler), isinstance(val_sampler, DistributedSampler), seen


def test_lightning_injects_its_distributed_sampler(ranks: RankPool) -> None:
    """Lightning decides by ``is_distributed``; without it both ranks would train on the same samples."""
    (train_a, val_a, first), (train_b, val_b, second) = ranks.run(2, injected_samplers, init_process_group=False)
    assert train_a
    assert train_b
    assert val_a
    assert val_b
    assert sorted(first + second) == list(range(16))


def stop_early() -> tuple[int, float, list[float]]:
    """Each rank alone would stop at another time; the metric is shared."""
    run = trainer(
        2,
        2,
        callbacks=[EarlyStopping("val_loss", patience=1, min_delta=0.02)],
        max_epochs=40,
        use_distributed_sampler=True,
    )
    module = Plateau()
    run.fit(module, loader(32, 8, 2, run.global_rank), loader(16, 8, 2, run.global_rank))
    rates = [group["lr"] for group in run.optimizers[0].param_groups]
    return run.current_epoch, float(run.callback_metrics["val_loss"]), rates


class Plateau(TinyMoE):
    """A scheduler that depends on a metric."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def test_early_stopping_and_plateau_agree_on_all_ranks(ranks: RankPool) -> None:
    first, second = ranks.run(2, stop_early, init_process_group=False)
    assert first == second
    epochs, _, rates = first
    assert 1 < epochs < 40
    assert rates[0] < 0.5


def log_without_and_with_sync() -> dict[str, float]:
    class Module(TinyMoE):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.log("mean", float(self.trainer.global_rank), sync_dist=True)
            self.log("sum", 1.0, sync_dist=True, reduce_fx="sum")
            return super().training_step(batch, batch_idx)

    run = trainer(2, 2, max_steps=1)
    run.fit(Module(), loader(8, 8, 2, run.global_rank))
    decisions = (run.strategy.reduce_boolean_decision(run.global_rank == 0, all=True),)
    assert decisions == (False,)
    assert run.strategy.reduce_boolean_decision(run.global_rank == 0, all=False)
    return {key: float(value) for key, value in run.callback_metrics.items()}


def test_sync_dist_reduces_over_the_world(ranks: RankPool) -> None:
    first, second = ranks.run(2, log_without_and_with_sync, init_process_group=False)
    assert first["mean"] == second["mean"] == 0.5
    assert first["sum"] == second["sum"] == 2.0


def accumulate_by_schedule(world_size: int, expert: int) -> list[float]:
    recorder = Recorder()
    callbacks = [recorder, GradientAccumulationScheduler({0: 1, 1: 3})]
    run = trainer(world_size, expert, precision="64-true", callbacks=callbacks, max_epochs=3)
    run.fit(TinyMoE(), loader(32, 8, world_size, run.global_rank, torch.float64))
    losses: list[Any] = [recorder.losses]
    if world_size > 1:
        losses = [None] * world_size
        dist.all_gather_object(losses, recorder.losses)
    return [float(run.global_step), *(sum(values) / world_size for values in zip(*losses, strict=True))]


def test_accumulation_scheduler(ranks: RankPool) -> None:
    """Windows of changing length, each epoch ending in a short one."""
    run = ranks.run(2, accumulate_by_schedule, 2, 2, init_process_group=False)[0]
    expected = ranks.run(1, accumulate_by_schedule, 1, 0, init_process_group=False)[0]
    assert run[0] == expected[0] == 4 + 2 + 2
    check_losses(run[1:], expected[1:], 1e-12)


class RankDependentInit(TinyMoE):
    """No common seed: each rank draws its own weights."""

    def configure_model(self) -> None:
        if self.layers is None:
            super().configure_model()
            torch.manual_seed(100 + self.trainer.global_rank)
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.1)


@pytest.mark.slow
def test_replicas_start_equal_without_a_seed(ranks: RankPool) -> None:
    """Weights are broadcast over replicas, dense and expert ones; ``train`` checks every gradient's replicas."""
    run = ranks.run(4, train, 4, 2, steps=3, module=RankDependentInit, init_process_group=False)[0]
    assert len(run.grads) == 3


class BuiltInInit(TinyMoE):
    """Whole layers built in ``__init__``, before any mesh exists."""

    def __init__(self, **moe: Any) -> None:
        super().__init__(**moe)
        torch.manual_seed(11)
        self.embed = nn.Linear(16, 16)
        self.layers = nn.ModuleList(MoELayer(16, self.config) for _ in range(2))
        self.head = nn.Linear(16, 16)


def test_layers_built_in_init_are_spread_by_the_strategy(ranks: RankPool) -> None:
    """A module that knows nothing of the mesh trains expert-parallel all the same."""
    settings: dict[str, Any] = {"steps": 3, "module": BuiltInInit, "precision": "32-true"}
    two = ranks.run(2, train, 2, 2, init_process_group=False, **settings)[0]
    one = ranks.run(1, train, 1, 0, init_process_group=False, **settings)[0]
    check_losses(two.losses, one.losses, 1e-5)
    assert two.weights["layers.0.experts.down_proj"].shape[0] == 8


def fit_with(callbacks: list[Any]) -> None:
    run = trainer(2, 2, callbacks=callbacks, max_epochs=2, enable_checkpointing=True)
    run.fit(TinyMoE(), loader(16, 8, 2, run.global_rank))


def test_stochastic_weight_averaging_is_refused_by_name(ranks: RankPool) -> None:
    """It would copy the module before its layers exist and average nothing, without a word."""
    with pytest.raises(RankFailure) as failure:
        ranks.run(2, fit_with, [StochasticWeightAveraging(1e-2)], init_process_group=False)
    error = failure.value.__cause__
    assert isinstance(error, ConfigError)
    assert error.value == "StochasticWeightAveraging"


def test_pruning_is_refused_by_name(ranks: RankPool) -> None:
    """It renames parameters, and each rank would save its own experts as if they were all."""
    with pytest.raises(RankFailure) as failure:
        ranks.run(2, fit_with, [ModelPruning("l1_unstructured", amount=0.5)], init_process_group=False)
    error = failure.value.__cause__
    assert isinstance(error, ConfigError)
    assert error.value == "ModelPruning"


class Finetuning(BaseFinetuning):
    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        """Nothing."""

    def finetune_function(self, *args: Any) -> None:
        """Nothing."""


def refuse_finetuning() -> str:
    with pytest.raises(ConfigError) as refused:
        fit_with([Finetuning()])
    return str(refused.value.value)


def test_finetuning_of_sharded_optimizers_is_refused_by_name(ranks: RankPool) -> None:
    """It would end in a KeyError: it looks for the optimizer's parameters in the model."""
    assert ranks.run(2, refuse_finetuning, init_process_group=False) == ["Finetuning"] * 2


class InInit(TinyMoE):
    """Whole layers built in ``__init__``, and no ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        TinyMoE.configure_model(self)

    configure_model = pl.LightningModule.configure_model


def test_stochastic_weight_averaging_of_spread_experts_is_refused(ranks: RankPool) -> None:
    """Its checkpoint would keep the averages of rank 0's part of the weights only."""
    with pytest.raises(RankFailure, match="only rank 0's part of the weights"):
        ranks.run(2, average, [StochasticWeightAveraging(1e-2)], init_process_group=False)


def average(callbacks: list[Any] | None) -> tuple[int, ...]:
    run = trainer(2, 2, callbacks=callbacks or [EMAWeightAveraging(decay=0.9)], max_epochs=2)
    module = InInit()
    run.fit(module, loader(16, 8, 2, run.global_rank))
    assert module.layers is not None
    return tuple(module.layers[0].experts.down_proj.shape)  # type: ignore[union-attr, arg-type]


def test_weight_averaging_of_layers_built_in_init(ranks: RankPool) -> None:
    """The callback copies the module before ``setup``; it must copy this rank's experts and not all."""
    assert ranks.run(2, average, None, init_process_group=False) == [(4, 16, 12)] * 2


class Normed(TinyMoE):
    """With BatchNorm, whose statistics each rank gathers from its own samples."""

    def configure_model(self) -> None:
        if self.layers is None:
            super().configure_model()
            self.norm = nn.BatchNorm1d(6)
            self.seen: list[tuple[str, list[float]]] = []

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return super().loss({**batch, "input": self.norm(batch["input"])})

    def on_train_epoch_end(self) -> None:
        self.seen.append(("train", self.norm.running_mean.tolist()))  # type: ignore[union-attr, operator]

    def on_validation_batch_start(self, *args: Any) -> None:
        self.seen.append(("validate", self.norm.running_mean.tolist()))  # type: ignore[union-attr, operator]


def batch_norm(folder: str) -> tuple[list[tuple[str, list[float]]], list[float]]:
    run = trainer(2, 2, num_sanity_val_steps=0, limit_val_batches=1)
    module = Normed()
    run.fit(module, loader(32, 8, 2, run.global_rank), loader(16, 8, 2, run.global_rank))
    run.save_checkpoint(f"{folder}/norm.ckpt")
    restored = Normed()
    trainer(2, 2, limit_val_batches=1).validate(
        restored, loader(16, 8, 2, run.global_rank), ckpt_path=f"{folder}/norm.ckpt", verbose=False
    )
    return module.seen, restored.norm.running_mean.tolist()  # type: ignore[union-attr, operator]


def test_all_ranks_evaluate_and_save_one_set_of_buffers(ranks: RankPool, tmp_path: Any) -> None:
    """As under DDP, rank 0's: a checkpoint would otherwise mix the statistics of several ranks."""
    (first, first_saved), (second, second_saved) = ranks.run(2, batch_norm, str(tmp_path), init_process_group=False)
    assert [stage for stage, _ in first] == ["validate", "train"]
    assert first[0] == second[0]
    assert first[0][1] != [0.0] * 6
    assert first_saved == second_saved == first[0][1]


class LayerType(Normed):
    """Records the type of its norm when optimizers are built."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.norm_type = type(self.norm)
        return super().configure_optimizers()


def synchronized_batch_norm() -> tuple[str, str]:
    run = trainer(2, 2, sync_batchnorm=True, limit_train_batches=0)
    module = LayerType()
    run.fit(module, loader(8, 8, 2, run.global_rank))
    return module.norm_type.__name__, type(module.norm).__name__


def test_synchronized_batch_norm_is_applied_and_reverted(ranks: RankPool) -> None:
    assert ranks.run(2, synchronized_batch_norm, init_process_group=False) == [("SyncBatchNorm", "_BatchNormXd")] * 2


class ForeignParameter(TinyMoE):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([*self.parameters(), nn.Parameter(torch.ones(2))], lr=0.1)


def fit_foreign() -> None:
    run = trainer(2, 2)
    run.fit(ForeignParameter(), loader(8, 8, 2, run.global_rank))


def test_parameters_outside_of_the_module_are_refused(ranks: RankPool) -> None:
    """Nobody would reduce their gradients, and replicas would drift apart."""
    with pytest.raises(RankFailure, match="outside of the module"):
        ranks.run(2, fit_foreign, init_process_group=False)


class NoExpertOnOneRank(pl.LightningModule):
    """Three experts on rank 0, none on rank 1."""

    def configure_model(self) -> None:
        index = () if self.trainer.global_rank else (0, 1, 2)
        self.dense = nn.Parameter(torch.ones(2))
        self.experts = nn.Parameter(torch.ones(len(index), 2))
        set_shard_spec(self, "experts", ShardSpec("expert", 0, 3, index))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.experts.sum() + self.dense.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def empty_rank() -> list[float]:
    run = trainer(2, 2, max_steps=1, gradient_clip_val=1.0)
    module = NoExpertOnOneRank()
    run.fit(module, loader(8, 8, 2, run.global_rank))
    return module.dense.tolist()


def test_a_rank_without_experts(ranks: RankPool) -> None:
    """The global norm is that of two dense gradients of 1 and six expert gradients of 1/2."""
    expected = 1 - 1 / (2 + 6 / 4) ** 0.5
    for dense in ranks.run(2, empty_rank, init_process_group=False):
        assert dense == pytest.approx([expected] * 2, rel=1e-5)


def fit_compiled() -> None:
    run = trainer(2, 2)
    run.fit(torch.compile(BuiltInInit()), loader(16, 8, 2, run.global_rank))  # type: ignore[arg-type]


def test_compiled_lightning_modules_are_refused_by_lightning(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"Using a compiled model is incompatible|does not support .torch.compile"):
        ranks.run(2, fit_compiled, init_process_group=False)


def small_runs(folder: str) -> dict[str, Any]:
    """Trainer flags that take another way through the loops."""
    results: dict[str, Any] = {}
    rank = int(torch.distributed.get_rank()) if dist.is_initialized() else None
    run = trainer(2, 2, fast_dev_run=True)
    run.fit(TinyMoE(), loader(16, 8, 2, run.global_rank), loader(16, 8, 2, run.global_rank))
    results["fast_dev_run"] = run.global_step
    run = trainer(2, 2, overfit_batches=2, max_epochs=3)
    run.fit(TinyMoE(), DataLoader(Sequences(32), batch_size=4))
    results["overfit"] = run.global_step
    run = trainer(2, 2, val_check_interval=2, limit_train_batches=5, limit_val_batches=1, num_sanity_val_steps=2)
    run.fit(TinyMoE(), loader(48, 8, 2, run.global_rank), loader(16, 8, 2, run.global_rank))
    results["val_check_interval"] = run.global_step
    logger = CSVLogger(folder)
    run = trainer(2, 2, callbacks=[LearningRateMonitor()], logger=logger, log_every_n_steps=1, detect_anomaly=True)
    run.fit(Plateau(), loader(16, 8, 2, run.global_rank), loader(16, 8, 2, run.global_rank))
    results["lr"] = float(run.callback_metrics["lr-SGD"])
    run = trainer(2, 2, max_steps=20, max_epochs=20, default_root_dir=folder, enable_checkpointing=True)
    suggestion = Tuner(run).lr_find(
        TinyMoE(), loader(64, 8, 2, run.global_rank), num_training=10, attr_name="learning_rate"
    )
    assert suggestion is not None
    results["lr_find"] = len(suggestion.results["lr"])
    assert rank is None
    return results


@pytest.mark.slow
def test_trainer_flags(ranks: RankPool, tmp_path: Any) -> None:
    first, second = ranks.run(2, small_runs, str(tmp_path), init_process_group=False)
    assert first == second
    assert first == {"fast_dev_run": 1, "overfit": 6, "val_check_interval": 5, "lr": 0.5, "lr_find": first["lr_find"]}
    assert first["lr_find"] >= 9


def copies() -> str:
    run = trainer(2, 2)
    module = TinyMoE()
    run.fit(module, loader(8, 8, 2, run.global_rank))
    twin = copy.deepcopy(module.layers)
    assert twin is not None
    assert twin[0].mesh is module.layers[0].mesh  # type: ignore[index]
    restored = pickle.loads(pickle.dumps(run.strategy))
    assert restored.parallel == run.strategy.parallel  # type: ignore[attr-defined]
    mesh = pickle.loads(pickle.dumps(run.strategy.mesh))  # type: ignore[attr-defined]
    assert mesh.group("expert") is None
    return repr(mesh)


def test_modules_copy_and_strategies_pickle(ranks: RankPool) -> None:
    """Callbacks deepcopy modules and spawn pickles the strategy; process groups allow neither."""
    texts = ranks.run(2, copies, init_process_group=False)
    assert "expert=0/2" in texts[0]
    assert "expert=1/2" in texts[1]


def test_configure_model_outside_of_a_trainer_builds_the_whole_model() -> None:
    """Weight averaging calls it by itself."""
    module = TinyMoE()
    module.configure_model()
    parameters = sum(p.numel() for p in module.parameters())
    module.configure_model()
    assert sum(p.numel() for p in module.parameters()) == parameters
    assert module.layers[0].mesh.size("expert") == ParallelMesh.single().size("expert") == 1  # type: ignore[index]


def report_sizes() -> str:
    import contextlib
    import io
    import logging

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(handler)
    logging.getLogger("lightning.fabric.utilities.rank_zero").addHandler(handler)
    with contextlib.redirect_stderr(stream):
        run = trainer(2, 2, max_steps=1)
        run.fit(TinyMoE(), loader(8, 8, 2, run.global_rank))
    return stream.getvalue()


def test_the_whole_models_size_is_said(ranks: RankPool) -> None:
    """Lightning's summary counts rank 0's experts only."""
    text = ranks.run(2, report_sizes, init_process_group=False)[0]
    module = TinyMoE()
    module.configure_model()
    assert f"{sum(p.numel() for p in module.parameters()):,} parameters in the whole model" in text


def seeded_exception() -> None:
    class Fails(TinyMoE):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            raise ValueError("boom")

    run = trainer(2, 2)
    run.fit(Fails(), loader(8, 8, 2, run.global_rank))


def test_an_exception_in_a_step_comes_through(ranks: RankPool) -> None:
    with pytest.raises(RankFailure) as failure:
        ranks.run(2, seeded_exception, init_process_group=False)
    assert all(isinstance(error, ValueError) for error in failure.value.errors.values())


def gathered_weights() -> int:
    """Gathering in a callback after training must not need the strategy's internals."""
    run = trainer(2, 2, max_steps=1)
    module = TinyMoE()
    run.fit(module, loader(8, 8, 2, run.global_rank))
    value = whole(module, "layers.1.experts.gate_up_proj", module.layers[1].experts.gate_up_proj)  # type: ignore[index]
    assert value is not None
    return len(value)


def test_weights_stay_sharded_after_fit_in_process(ranks: RankPool) -> None:
    assert ranks.run(2, gathered_weights, init_process_group=False) == [8, 8]


def test_strategy_can_be_used_by_name() -> None:
    run = pl.Trainer(accelerator="cpu", devices=2, strategy="moe", logger=False)
    assert isinstance(run.strategy, MoEStrategy)
    assert run.strategy.parallel == ParallelConfig()


class DrawsRandomNumbers(TinyMoE):
    """Notes what a dropout layer would draw in training, and what is drawn outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[float] = []
        self.outside: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.inside.append(float(torch.rand(())))
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        self.outside.append(float(torch.rand(())))


def draw_random_numbers(world_size: int, expert: int, steps: int = 3) -> tuple[list[float], list[float]]:
    pl.seed_everything(7, verbose=False)
    run = trainer(world_size, expert, max_steps=steps, max_epochs=10)
    module = DrawsRandomNumbers()
    run.fit(module, loader(8 * world_size, 8, world_size, run.global_rank))
    return module.inside, module.outside


def test_data_ranks_draw_different_dropout_masks(ranks: RankPool) -> None:
    """Ranks are seeded alike; their streams in a step differ, are reproducible, and leave the generators alone."""
    first, second = ranks.run(2, draw_random_numbers, 2, 2, init_process_group=False)
    again = ranks.run(2, draw_random_numbers, 2, 2, init_process_group=False)
    assert again == [first, second]
    assert not set(first[0]) & set(second[0])
    assert first[1] == second[1]
    assert len(set(first[0])) == 3


def fit_with_lbfgs() -> None:
    class Module(TinyMoE):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters())

    run = trainer(2, 2)
    run.fit(Module(), loader(8, 8, 2, run.global_rank))


def test_lbfgs_is_refused_by_name(ranks: RankPool) -> None:
    """Its inner products run over a rank's own experts."""
    with pytest.raises(RankFailure, match="LBFGS"):
        ranks.run(2, fit_with_lbfgs, init_process_group=False)
