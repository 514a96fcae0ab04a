"""Clipping and overflow checks are decisions of the whole mesh."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision

from lightning_moe import ConfigError, MoEStrategy, ParallelConfig
from lightning_moe.strategy.precision import GlobalGradScaler, MoEMixedPrecision, globalize
from tests.distributed import RankPool
from tests.strategy.tiny import Recorder, TinyMoE, loader, trainer, whole


class OverflowsOnce(TinyMoE):
    """At the second step the gradient of an expert on the last rank overflows; dense gradients stay finite."""

    def on_after_backward(self) -> None:
        if self.global_step == 1 and self.trainer.global_rank == self.trainer.world_size - 1:
            self.layers[0].experts.down_proj.grad[0, 0, 0] = float("inf")  # type: ignore[index, union-attr]


def train_with_scaler(world_size: int, expert: int) -> dict[str, Any]:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000))
    run = trainer(world_size, expert, plugins=[plugin], max_steps=3, max_epochs=10)
    module = OverflowsOnce()
    snapshots: list[torch.Tensor] = []
    scales: list[float] = []

    class Watch(Recorder):
        def on_train_batch_end(self, *args: Any) -> None:
            snapshots.append(module.head.weight.detach().clone())
            scales.append(run.precision_plugin.scaler.get_scale())  # type: ignore[attr-defined]

    run.callbacks.append(Watch())
    run.fit(module, loader(32, 8, world_size, run.global_rank))
    dense = [whole(module, "head.weight", snapshot) for snapshot in snapshots]  # asserts that replicas are equal
    return {"scales": scales, "dense": dense, "plugin": type(run.precision_plugin).__name__}


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks: RankPool) -> None:
    """Otherwise one rank halves its scale and skips while the others step, and replicas drift apart."""
    results = ranks.run(2, train_with_scaler, 2, 2, init_process_group=False)
    for result in results:
        assert result["plugin"] == "MoEMixedPrecision"
        assert result["scales"] == [1024.0, 512.0, 512.0]
        first, second, third = result["dense"]
        assert torch.equal(first, second)
        assert not torch.equal(second, third)


def found_inf_without_gradients() -> float:
    """Only rank 0 has a gradient, and it is infinite; the scaler must not stumble over the other."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = GlobalGradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    if dist.get_rank() == 0:
        parameter.grad = torch.tensor([float("inf"), 1.0])
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(parameter.detach(), torch.ones(2))
    return scaler.get_scale()


def test_scaler_on_a_rank_without_gradients(ranks: RankPool) -> None:
    assert ranks.run(2, found_inf_without_gradients) == [2.0, 2.0]


def test_scaler_keeps_the_users_settings() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=7)
    assert GlobalGradScaler.like(scaler).state_dict() == scaler.state_dict()
    assert not GlobalGradScaler.like(torch.amp.GradScaler("cpu", enabled=False)).is_enabled()


@pytest.mark.parametrize(
    "plugin",
    [Precision(), MixedPrecision("bf16-mixed", "cpu"), HalfPrecision("bf16-true"), DoublePrecision()],
    ids=lambda plugin: type(plugin).__name__,
)
def test_plugins_keep_their_precision_and_pickle(plugin: Precision) -> None:
    """Spawn pickles the strategy with its plugin."""
    twin = pickle.loads(pickle.dumps(globalize(plugin)))
    assert twin.precision == plugin.precision
    assert isinstance(twin, type(plugin))
    assert globalize(twin) is twin


def test_unknown_plugins_are_refused() -> None:
    class Exotic(Precision):
        pass

    with pytest.raises(ConfigError, match="Exotic"):
        globalize(Exotic())


def test_mixed_precision_is_kept_by_the_trainer() -> None:
    """A strategy derived from Lightning's ModelParallelStrategy would be refused 16-mixed."""
    strategy = MoEStrategy(ParallelConfig(expert=2), precision_plugin=MixedPrecision("16-mixed", "cpu"))
    run = trainer(2, 2, strategy=strategy)
    assert isinstance(run.precision_plugin, MoEMixedPrecision)
    assert isinstance(run.precision_plugin.scaler, GlobalGradScaler)
