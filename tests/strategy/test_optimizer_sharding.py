"""Sharded optimizers (ZeRO stage 1) through the Trainer: every bit as without sharding."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_moe import ConfigError, MoEStrategy, ParallelConfig
from lightning_moe.parallel import gradients
from lightning_moe.parallel.main_params import gather_in_forward
from tests.distributed import RankFailure, RankPool
from tests.optimizers import Simple
from tests.parallel.test_main_params import OPTIMIZERS
from tests.strategy.tiny import TinyMoE, loader, trainer

STEPS = 20
TOPOLOGIES = {
    "data": (2, ParallelConfig()),
    "expert": (4, ParallelConfig(expert=2)),
    "tensor": (4, ParallelConfig(tensor=2, expert=2)),
}


class Model(TinyMoE):
    """Parameter groups, a schedule, clipping that bites, and overflows on one rank where a scaler is at work."""

    def __init__(self, kind: str = "adamw", overflow: bool = False, unscales: bool = False) -> None:
        super().__init__(expert_bias=True, auxiliary_loss_coefficient=0.1)
        self.kind, self.overflow, self.unscales = kind, overflow, unscales

    def configure_model(self) -> None:
        if self.layers is None:
            super().configure_model()
            assert self.layers is not None
            gather_in_forward(self.layers[0])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.overflow and batch_idx % 8 == 3 and self.trainer.global_rank == self.trainer.world_size - 1:
            loss = loss + self.head.bias.sum() * float("inf")
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.kind](
            [
                {"params": [p for p in self.parameters() if p.dim() > 1]},
                {"params": [p for p in self.parameters() if p.dim() <= 1], "weight_decay": 0.0, "lr": 0.02},
            ]
        )
        if not self.unscales:
            optimizer._step_supports_amp_scaling = False  # Lightning refuses to clip for fused optimizers otherwise
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run(
    world_size: int, parallel: ParallelConfig, sharding: bool, precision: str, model: Any, settings: dict[str, Any]
) -> tuple[list[float], dict[str, Tensor], list[float]]:
    """This rank's losses, its final weights, and the scales of the gradient scaler."""
    losses: list[float] = []
    scales: list[float] = []
    settings = dict(settings)
    module = model()
    plugins = []
    callbacks = [EMAWeightAveraging(decay=0.9)] if settings.pop("averaging", False) else []
    if precision == "16-mixed" and "accelerator" not in settings:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        plugins, precision = [MixedPrecision("16-mixed", "cpu", scaler)], None  # type: ignore[assignment]
    fit = trainer(
        world_size,
        0,
        strategy=MoEStrategy(parallel, optimizer_sharding=sharding, bucket_megabytes=0.002),
        plugins=plugins,
        callbacks=callbacks,
        precision=precision,
        max_epochs=100,
        **{"max_steps": STEPS, **settings},
    )
    step = module.training_step

    def recorded(*args: Any) -> Any:
        loss = step(*args)
        losses.append(float(loss))
        if fit.precision_plugin.precision == "16-mixed":
            scales.append(fit.precision_plugin.scaler.get_scale())  # type: ignore[attr-defined]
        return loss

    module.training_step = recorded
    shard = fit.distributed_sampler_kwargs
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    fit.fit(module, loader(8 * 9, 8, shard["num_replicas"], shard["rank"], dtype))
    return losses, {name: p.detach().clone() for name, p in module.state_dict().items()}, scales


def both(*args: Any) -> list[Any]:
    world_size, parallel, *rest = args
    return [run(world_size, parallel, sharding, *rest) for sharding in (True, False)]


def check_same(ranks: RankPool, topology: str, precision: str, model: Any, **settings: Any) -> Any:
    """Compare all bits of a run with sharding and one without, on every rank; return what one rank saw."""
    world_size, parallel = TOPOLOGIES[topology]
    results = ranks.run(world_size, both, world_size, parallel, precision, model, settings, init_process_group=False)
    for (losses, weights, scales), (expected_losses, expected_weights, expected_scales) in results:
        assert len(losses) > 1
        assert losses == expected_losses or any(loss != loss for loss in losses)  # an overflow's loss may be NaN
        assert losses[0] != losses[-1]
        assert scales == expected_scales
        for name, value in expected_weights.items():
            assert torch.equal(weights[name], value), name
            assert value.isfinite().all(), name
    return results[0][0]


WINDOWS: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
"""Nine batches an epoch: the last window is short."""


SLOW = pytest.mark.slow
RUNS = [
    pytest.param("expert", "32-true", "adamw", marks=SLOW),
    *(
        pytest.param("expert", precision, optimizer, marks=SLOW)
        for precision in ("32-true", "bf16-true", "bf16-mixed", "16-mixed")
        for optimizer in ("sgd", "adamw", "adamw-fused", "lion")
        if (precision, optimizer) not in (("32-true", "adamw"), ("16-mixed", "adamw-fused"))
    ),
    *(pytest.param("data", "32-true", optimizer, marks=SLOW) for optimizer in ("adamw-foreach", "adagrad")),
    *(pytest.param("tensor", precision, "adamw", marks=SLOW) for precision in ("32-true", "bf16-true", "16-mixed")),
    pytest.param("data", "16-true", "adamw", marks=SLOW),
    pytest.param("data", "64-true", "adamw", marks=SLOW),
]


@pytest.mark.parametrize(("topology", "precision", "optimizer"), RUNS)
def test_sharding_changes_no_bit(ranks: RankPool, topology: str, precision: str, optimizer: str) -> None:
    """Twenty steps; with a scaler there are overflows on one rank, and the step is skipped on all of them."""
    scaled = precision == "16-mixed"
    _, _, scales = check_same(ranks, topology, precision, partial(Model, optimizer, overflow=scaled), **WINDOWS)
    if scaled:
        assert min(scales) < 1024.0
        assert any(later > earlier for earlier, later in pairwise(scales))


class Duel(TinyMoE):
    """Two optimizers by hand, toggled, with accumulation; they share the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        first, second = self.optimizers()  # type: ignore[misc]
        for optimizer in (first, second):
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch)
            self.manual_backward(loss)
            if batch_idx % 2:
                self.clip_gradients(optimizer, 0.05, "norm")
                optimizer.step()
                optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
        for schedule in self.lr_schedulers():  # type: ignore[union-attr]
            schedule.step()
        return loss

    def configure_optimizers(self) -> Any:
        first = torch.optim.AdamW([*self.embed.parameters(), *self.head.parameters()], lr=0.01)
        assert self.layers is not None
        second = torch.optim.SGD([*self.layers.parameters(), *self.embed.parameters()], lr=0.05, momentum=0.9)
        return [first, second], [torch.optim.lr_scheduler.StepLR(o, 3) for o in (first, second)]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_two_optimizers_by_hand(ranks: RankPool, precision: str) -> None:
    check_same(ranks, "expert", precision, Duel)


class Constrained(TinyMoE):
    """Keeps its weights within bounds, as critics of Wasserstein GANs do, and reads them between steps."""

    def on_train_batch_end(self, *args: Any) -> None:
        for parameter in self.parameters():
            parameter.data.clamp_(-0.2, 0.2)


@pytest.mark.slow
def test_weights_that_are_changed_between_steps(ranks: RankPool) -> None:
    _, weights, _ = check_same(ranks, "expert", "32-true", Constrained)
    assert weights["embed.weight"].abs().max() == torch.tensor(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_weight_averaging_and_clipping_by_value(ranks: RankPool, precision: str) -> None:
    """The average follows the weights of all ranks, and takes their place at the end."""
    settings = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    _, averaged, _ = check_same(ranks, "expert", precision, Model, averaging=True, **settings)
    _, plain, _ = check_same(ranks, "expert", precision, Model, **settings)
    assert not torch.equal(averaged["head.weight"], plain["head.weight"])


class Norms(TinyMoE):
    """An optimizer that divides each gradient by its norm."""

    def configure_optimizers(self) -> Any:
        return Normalised(self.parameters())


class Normalised(Simple):
    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return grad / (grad.norm() + 1e-6)


def fit_normalised(sharding: bool, parallel: ParallelConfig) -> float:
    fit = trainer(2, 0, strategy=MoEStrategy(parallel, optimizer_sharding=sharding), max_steps=2)
    module = Norms()
    fit.fit(module, loader(16, 8, 2, fit.global_rank))
    return float(module.head.weight.sum())


def test_an_optimizer_that_mixes_elements_is_refused_by_name(ranks: RankPool) -> None:
    """Before a step is taken; whole parameters are for it."""
    with pytest.raises(RankFailure) as failure:
        ranks.run(2, fit_normalised, True, ParallelConfig(), init_process_group=False)
    error = failure.value.__cause__
    assert isinstance(error, ConfigError)
    assert error.value == "Normalised"
    assert "optimizer_sharding=False" in error.hint
    first, second = ranks.run(2, fit_normalised, False, ParallelConfig(), init_process_group=False)
    assert first == second


def whole_gradients(sharding: bool) -> list[float]:
    module = Model()
    fit = trainer(2, 0, strategy=MoEStrategy(ParallelConfig(), optimizer_sharding=sharding), max_steps=2)
    norms = []

    def on_before_optimizer_step(*_: Any) -> None:
        strategy = fit.strategy
        assert isinstance(strategy, MoEStrategy)
        with mock.patch.object(gradients, "start_all_gather", wraps=gradients.start_all_gather) as gather:
            grads = strategy.full_grads(module.parameters())
        num_buckets = gather.call_count
        for parameter, grad in zip(module.parameters(), grads, strict=True):
            one = strategy.full_grad(parameter)
            assert one is grad is None or torch.equal(one, grad)  # type: ignore[arg-type]
        assert (0 < num_buckets < len(grads)) == sharding
        norms.append(float(nn.utils.get_total_norm([grad for grad in grads if grad is not None])))

    module.on_before_optimizer_step = on_before_optimizer_step  # type: ignore[method-assign]
    fit.fit(module, loader(16, 8, 2, fit.global_rank))
    return norms


def test_whole_gradients_can_be_had(ranks: RankPool) -> None:
    """For callbacks that want to see them."""
    sharded = ranks.run(2, whole_gradients, True, init_process_group=False)
    assert sharded == ranks.run(2, whole_gradients, False, init_process_group=False)
    assert sharded[0] == sharded[1]
    assert len(sharded[0]) == 2
    assert min(sharded[0]) > 0
