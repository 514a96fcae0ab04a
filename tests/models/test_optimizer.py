"""Learning-rate schedule and parameter groups."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_moe.config import OptimizerConfig
from lightning_moe.models.chronos_moe import ChronosMoEModel
from lightning_moe.models.optimizer import adamw, cosine_schedule, parameter_groups
from tests.models.chronos_moe.configs import small_config


def test_schedule_at_its_corners() -> None:
    factor = cosine_schedule(OptimizerConfig(warmup_steps=9, min_learning_rate_ratio=0.2), 110)
    assert [factor(step) for step in (0, 4, 8)] == pytest.approx([0.1, 0.5, 0.9])
    assert factor(9) == 1.0
    assert factor(59) == pytest.approx(0.6)  # half way
    assert factor(109) == pytest.approx(0.2)
    assert factor(500) == pytest.approx(0.2)
    assert factor(34) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_schedule_of_runs_without_end_or_shorter_than_the_warm_up() -> None:
    endless = cosine_schedule(OptimizerConfig(warmup_steps=2), None)
    assert [endless(step) for step in (1, 2, 10**6)] == pytest.approx([2 / 3, 1.0, 1.0])
    short = cosine_schedule(OptimizerConfig(warmup_steps=100), 10)
    assert [short(step) for step in (0, 9)] == pytest.approx([1 / 101, 10 / 101])
    assert cosine_schedule(OptimizerConfig(warmup_steps=0), 1)(0) == 1.0


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = ChronosMoEModel(small_config())
    decay, others = parameter_groups(model, 0.3)
    assert (decay["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {id(p) for p in decay["params"]} | {id(p) for p in others["params"]} == {id(p) for p in model.parameters()}
    assert len(decay["params"]) + len(others["params"]) == len(list(model.parameters()))
    named = {id(p): name for name, p in model.named_parameters()}
    without = {named[id(p)] for p in others["params"]}
    assert {"reg_token", "final_norm.weight", "patch_embedding.hidden_proj.bias"} <= without
    assert not any("experts" in name or "router" in name for name in without)
    assert all(isinstance(p, torch.nn.Parameter) for p in decay["params"])


def test_lightning_clips_for_the_fused_optimizer_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(5, 3)
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(torch.Tensor, "is_cuda", True)
        optimizer = adamw(layer, OptimizerConfig(), math.inf)["optimizer"]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"]
    layer.weight.grad = torch.full_like(layer.weight, 2.0)
    MixedPrecision("bf16-mixed", "cpu").clip_gradients(optimizer, 1.0)
    torch.testing.assert_close(layer.weight.grad.norm(), torch.tensor(1.0))
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
