"""Pipelines through ``Trainer.fit`` give, bit for bit, what one process gives."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_moe import ConfigError, MoEStrategy, ParallelConfig, ParallelMesh, PipelineConfig
from lightning_moe.pipeline.chain import ChainModel
from lightning_moe.pipeline.costs import Costs
from lightning_moe.pipeline.parts import ModelPart
from lightning_moe.pipeline.registry import make_schedule
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.simulate import peak_memory
from lightning_moe.pipeline.transport import P2PTransport
from lightning_moe.weight_grad.queue import WeightGradQueue
from tests.distributed import RankFailure, RankPool
from tests.strategy.chains import Block, Chain, Embed, Head, train_chain
from tests.strategy.tiny import Run, Sequences, relative_error

SCHEDULES = (
    "gpipe",
    "1f1b",
    "interleaved-1f1b",
    "zb-h1",
    "zb-h1-interleaved",
    "zb-h2",
    "zb-v",
    "v-half",
    "v-min",
    "auto",
)
EXPERTS: dict[str, Any] = {"experts": {"z_loss_coefficient": 1e-3}}

Case = dict[str, Any]


def train_many(cases: list[Case]) -> list[Run]:
    return [train_chain(**case) for case in cases]


def check_bitwise(parts: list[Run], whole: Run, what: object) -> None:
    """The stages' runs are, together, the whole run."""
    for part in parts:
        assert part.losses == whole.losses, what
        for name, value in whole.metrics.items():
            assert part.metrics[name] == pytest.approx(value, rel=1e-6), (what, name)  # averaged over other ranks
        for step, grads in enumerate(part.grads):
            for name, grad in grads.items():
                expected = whole.grads[step][name]
                assert grad is not None, (what, name)
                assert expected is not None
                assert torch.equal(grad, expected), (what, step, name)
        for name, value in part.weights.items():
            assert torch.equal(value, whole.weights[name]), (what, name)
    assert {name for part in parts for name in part.weights} == whole.weights.keys(), what
    assert len(whole.grads) == len(parts[0].grads) > 0


def check_against_one_process(
    ranks: RankPool, world_size: int, variants: list[Case], schedules: tuple[str, ...]
) -> None:
    """Each variant trained by each schedule on ``world_size`` stages equals the variant on one rank."""
    references = ranks.run(1, train_many, variants, init_process_group=False)[0]
    cases = [
        {**variant, "pipeline": world_size, "schedule": schedule} for variant in variants for schedule in schedules
    ]
    runs = ranks.run(world_size, train_many, cases, init_process_group=False, timeout=240)
    for i, case in enumerate(cases):
        check_bitwise([of_rank[i] for of_rank in runs], references[i // len(schedules)], case)


def test_two_stages(ranks: RankPool) -> None:
    check_against_one_process(ranks, 2, [{"steps": 2, "model": EXPERTS}], ("zb-h1", "zb-v"))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_schedule(ranks: RankPool, world_size: int) -> None:
    variant: Case = {"model": {**EXPERTS, "checkpointed": True}, "microbatches": 8, "batch": 16, "steps": 2}
    check_against_one_process(ranks, world_size, [variant], SCHEDULES)


@pytest.mark.slow
def test_ragged_batches(ranks: RankPool) -> None:
    """Microbatches of different sizes, and fewer samples than microbatches."""
    variants: list[Case] = [{"batch": 7, "steps": 2}, {"batch": 3, "steps": 2}]
    check_against_one_process(ranks, 4, variants, ("1f1b", "interleaved-1f1b", "zb-h1-interleaved", "zb-v", "auto"))


@pytest.mark.slow
def test_settings_change_no_bit(ranks: RankPool) -> None:
    """Accumulation with a short last window, precisions, caps of the queue, and shapes told each time."""
    variants: list[Case] = [
        {"accumulate": 3, "length": 8 * 4, "steps": 4, "gradient_clip_val": 0.05},
        {"accumulate": 2, "precision": "bf16-mixed", "model": EXPERTS},
        {"precision": "bf16-true", "model": EXPERTS},
        {"precision": "64-true", "strategy": {"optimizer_sharding": False}},
        {"model": {"optimizer": "sgd"}, "gradient_clip_val": 0.05},
        {"accumulate": 2, "plugins": "16-mixed"},
    ]
    references = ranks.run(1, train_many_with_scaler, variants, init_process_group=False)[0]
    schedules = ("1f1b", "zb-h1", "zb-v")
    configs: list[dict[str, Any]] = [{}, {"max_lag": 1, "dynamic_shapes": True}, {"weight_grad_megabytes": 0.001}]
    cases = [
        {**variant, "pipeline": 2, "schedule": schedule, "config": configs[i % 3]}
        for i, variant in enumerate(variants)
        for schedule in schedules
    ]
    runs = ranks.run(2, train_many_with_scaler, cases, init_process_group=False, timeout=240)
    for i, case in enumerate(cases):
        check_bitwise([of_rank[i] for of_rank in runs], references[i // len(schedules)], case)


def train_many_with_scaler(cases: list[Case]) -> list[Run]:
    """On CPUs Lightning turns 16-mixed into bf16-mixed, so its plugin is made here."""
    runs = []
    for case in cases:
        if case.get("plugins") == "16-mixed":
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
            case = {**case, "plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
        runs.append(train_chain(**case))
    return runs


@pytest.mark.slow
def test_with_expert_and_data_axes(ranks: RankPool) -> None:
    """Beside a pipeline the other axes do what they do without one."""
    case: Case = {"model": EXPERTS, "batch": 16, "strategy": {"optimizer_sharding": True}}
    for parallel in ({"expert": 2}, {}):
        references = ranks.run(2, train_chain, parallel=parallel, **case, init_process_group=False)
        for schedule in ("zb-h1", "zb-v"):
            runs = ranks.run(4, train_chain, 2, schedule, parallel=parallel, **case, init_process_group=False)
            for data in range(2):
                check_bitwise([runs[data], runs[2 + data]], references[data], (parallel, schedule, data))


def test_one_process_is_plain_autograd(ranks: RankPool) -> None:
    """The reference of the other tests against a loop in plain PyTorch, in float64."""
    run = ranks.run(1, train_chain, precision="64-true", model={"optimizer": "sgd"}, init_process_group=False)[0]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(11)
        block = partial(Block, ParallelMesh.single(), None, False)
        model = ChainModel([ModelPart.whole(8)], Embed, [block] * 8, Head, Chain.loss)
    finally:
        torch.set_default_dtype(before)
    assert model.embed is not None
    assert model.head is not None
    data = Sequences(32, torch.float64)
    for step in range(3):
        model.zero_grad()
        total = 0.0
        for k in range(4):
            rows = slice(8 * step + 2 * k, 8 * step + 2 * k + 2)
            carry = model.embed({"input": data.inputs[rows]})
            for each in model.blocks.values():
                carry = each(*carry)
            loss, _ = Chain.loss(model.head(*carry), {"target": data.targets[rows]})
            (loss / 4).backward()
            total += float(loss.detach()) / 4
        assert abs(run.losses[step] - total) <= 1e-12 * total
        for name, parameter in model.named_parameters():
            grad = run.grads[step][f"model.{name}"]
            assert grad is not None
            assert parameter.grad is not None
            assert relative_error(grad, parameter.grad) <= 1e-12, (step, name)
            with torch.no_grad():
                parameter -= 1e-2 * parameter.grad


# ---- what is counted


def count_exchanges(schedule: str) -> int:
    """All-to-alls of two steps."""
    calls = 0
    original = dist.all_to_all_single

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    dist.all_to_all_single = counted
    try:
        train_chain(2, schedule, parallel={"expert": 2}, model=EXPERTS, batch=16, steps=2)
    finally:
        dist.all_to_all_single = original
    return calls


@pytest.mark.slow
def test_no_exchange_is_repeated(ranks: RankPool) -> None:
    """A split backward pass must not run an expert layer's exchanges a second time."""
    fused, split = (ranks.run(4, count_exchanges, schedule, init_process_group=False) for schedule in ("1f1b", "zb-h1"))
    assert fused == split
    # Two steps of four microbatches through four blocks: rows there and back, forward and backward.
    assert set(fused) == {2 * 4 * 4 * 4}


class Watch(pl.Callback):
    """Live tensors and the queue after each step."""

    def __init__(self) -> None:
        self.held: list[tuple[int, int]] = []
        self.live: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        import gc

        queue = trainer.strategy._queue  # type: ignore[attr-defined]
        self.held.append((queue.num_held, queue.live_bytes))
        gc.collect()
        tensors = {
            each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
            for each in gc.get_objects()
            if isinstance(each, Tensor) and each.device.type == "cpu" and each.layout == torch.strided
        }
        self.live.append(sum(tensors.values()))


def watch(schedule: str) -> tuple[list[tuple[int, int]], list[int]]:
    callback = Watch()
    train_chain(2, schedule, model={"optimizer": "sgd"}, steps=5, callbacks=[callback], keep_grads=False)
    return callback.held, callback.live


def test_nothing_is_left_after_a_step(ranks: RankPool) -> None:
    for held, live in ranks.run(2, watch, "zb-h1", init_process_group=False):
        assert held == [(0, 0)] * 5
        assert max(live[2:]) - min(live[2:]) <= 64  # numbers that Lightning logs; an activation has more


# ---- what must not go unnoticed


def drop_a_weight_gradient() -> None:
    pop = WeightGradQueue.pop

    def forgetful(self: WeightGradQueue, microbatch: int, chunk: int = 0) -> None:
        if microbatch != 1:
            pop(self, microbatch, chunk)

    WeightGradQueue.pop = forgetful  # type: ignore[method-assign]
    try:
        train_chain(2, "zb-h1", steps=1)
    finally:
        WeightGradQueue.pop = pop  # type: ignore[method-assign]


def test_a_dropped_weight_gradient_is_noticed(ranks: RankPool) -> None:
    with pytest.raises(RankFailure) as failure:
        ranks.run(2, drop_a_weight_gradient, init_process_group=False)
    assert any(isinstance(error, AssertionError) for error in failure.value.errors.values())


def swap_receives() -> Run:
    """The first two activations that arrive are taken for each other."""
    receive = P2PTransport.receive
    kept: list[Any] = []

    def swapped(self: P2PTransport, edge: Any, specs: Any) -> Any:
        arrival = receive(self, edge, specs)
        if edge.kind == "activation" and len(kept) < 2:
            kept.append(arrival)
            return _Swapped(kept, len(kept) - 1)
        return arrival

    P2PTransport.receive = swapped  # type: ignore[method-assign]
    try:
        return train_chain(2, "gpipe", steps=1)
    finally:
        P2PTransport.receive = receive  # type: ignore[method-assign]


class _Swapped:
    def __init__(self, arrivals: list[Any], own: int) -> None:
        self._arrivals, self._own = arrivals, own

    def wait(self) -> list[Tensor]:
        return list(self._arrivals[1 - self._own].wait())


def test_swapped_receives_are_noticed(ranks: RankPool) -> None:
    reference = ranks.run(1, train_chain, steps=1, init_process_group=False)[0]
    runs = ranks.run(2, swap_receives, init_process_group=False)
    with pytest.raises(AssertionError):
        check_bitwise(runs, reference, "swapped")


# ---- a whole Trainer


class Stopping(EarlyStopping):
    def __init__(self) -> None:
        super().__init__("val_loss", patience=1, min_delta=10.0)


def fit_with_callbacks(pipeline: int, folder: str) -> dict[str, Any]:
    monitor, checkpoint = LearningRateMonitor("step"), ModelCheckpoint(folder, monitor="val_loss", save_top_k=1)
    module = Scheduled()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=pipeline,
        strategy=MoEStrategy(
            ParallelConfig(pipeline=pipeline), PipelineConfig(num_microbatches=4), bucket_megabytes=0.004
        ),
        callbacks=[monitor, checkpoint, Stopping()],
        accumulate_grad_batches=3,
        gradient_clip_val=0.05,
        max_epochs=5,
        logger=Memory(),
        enable_progress_bar=False,
        enable_model_summary=True,
    )
    loader = DataLoader(Sequences(56), batch_size=8)  # seven batches: the last window is short
    validation = DataLoader(Sequences(21), batch_size=8)  # the last batch is short, too
    trainer.fit(module, loader, validation)
    predictions = trainer.predict(module, validation)
    assert predictions is not None
    best = float(checkpoint.best_model_score)  # type: ignore[arg-type]
    return {
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "best": best,
        "score": trainer.validate(module, validation, ckpt_path=checkpoint.best_model_path, verbose=False)[0][
            "val_loss"
        ],
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "rates": list(trainer.logger.rates),  # type: ignore[union-attr]
        "squares": module.metrics,
        "predictions": torch.cat(predictions),  # type: ignore[arg-type]
    }


class Scheduled(Chain):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


class Memory(pl.loggers.Logger):
    """Remembers the learning rates that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rates += [value for key, value in metrics.items() if key.startswith("lr")]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.slow
def test_callbacks_checkpoints_and_predictions(ranks: RankPool, tmp_path: Any) -> None:
    reference = ranks.run(1, fit_with_callbacks, 1, str(tmp_path / "one"), init_process_group=False)[0]
    predictions = reference.pop("predictions")
    assert reference["steps"] == 3 * reference["epochs"] > 0
    assert reference["score"] == pytest.approx(reference["best"], rel=1e-6)
    for world_size in (2, 4):
        folder = str(tmp_path / str(world_size))
        for rank, result in enumerate(
            ranks.run(world_size, fit_with_callbacks, world_size, folder, init_process_group=False)
        ):
            assert torch.equal(result.pop("predictions"), predictions)
            if rank:
                result["rates"] = reference["rates"]  # only rank 0 has a logger
            assert result == reference, rank


# ---- errors


class Twice(Chain):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        super().training_step(batch, batch_idx)
        return super().training_step(batch, batch_idx)


class Doubled(Chain):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return 2 * super().training_step(batch, batch_idx)


class Unbuilt(Chain):
    def configure_model(self) -> None:
        self.model = nn.Linear(2, 2)


def refuse(module: type[Chain], batch: Any = None) -> str:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=MoEStrategy(pipeline=PipelineConfig(num_microbatches=2)),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=2,
    )
    with pytest.raises(ConfigError) as error:
        trainer.fit(module(), DataLoader(Sequences(8), batch_size=4))
    return str(error.value)


def test_misuse_is_refused_by_name(ranks: RankPool) -> None:
    messages = ranks.run(1, refuse_all, init_process_group=False)[0]
    twice, doubled, unbuilt = messages
    assert "run_schedule" in twice
    assert "one call" in twice
    assert "2 times" in doubled
    assert "build_pipeline" in unbuilt


def refuse_all() -> list[str]:
    return [refuse(module) for module in (Twice, Doubled, Unbuilt)]


def backwards_first(ranks: int, microbatches: int, options: Any) -> Schedule:
    """A user's schedule, which calls itself by the name of another one."""
    return replace(make_schedule("gpipe", ranks, microbatches), name="1f1b")


def test_schedules_of_users_also_run_ragged_batches() -> None:
    strategy = MoEStrategy(
        ParallelConfig(pipeline=2), PipelineConfig(schedule="tests.strategy.test_pipeline:backwards_first")
    )
    assert strategy._schedule(3).ranks == make_schedule("gpipe", 2, 3).ranks
    limited = MoEStrategy(ParallelConfig(pipeline=4), PipelineConfig(schedule="auto", memory_limit=2.5))
    for microbatches in range(1, 8):
        schedule = limited._schedule(microbatches)
        assert schedule.placement == limited._planned.placement
        assert max(peak_memory(schedule, Costs())) <= 2.5


def test_unknown_schedules_are_refused_when_the_strategy_is_made() -> None:
    with pytest.raises(ConfigError, match="zb-h3"):
        MoEStrategy(ParallelConfig(pipeline=2), PipelineConfig(schedule="zb-h3"))
