"""The settings of models and optimizers: their types, ranges and cross-field rules."""

from __future__ import annotations

import ast
import inspect
from dataclasses import FrozenInstanceError, asdict, fields
from types import ModuleType
from typing import Any

import pytest

from lightning_moe.config import ChronosMoEConfig, MoEConfig, OptimizerConfig
from lightning_moe.config import chronos as chronos_module
from lightning_moe.config import moe as moe_module
from lightning_moe.config import optimizer as optimizer_module
from lightning_moe.config import overlap as overlap_module
from lightning_moe.config import parallel as parallel_module
from lightning_moe.config import series as series_module
from lightning_moe.config import strategy as strategy_module
from lightning_moe.config import text as text_module
from lightning_moe.config.series import SeriesConfig
from lightning_moe.errors import ConfigError

REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (MoEConfig, {"num_experts": 0}, "moe.num_experts"),
    (MoEConfig, {"num_experts": 8.0}, "moe.num_experts"),
    (MoEConfig, {"top_k": 0}, "moe.top_k"),
    (MoEConfig, {"top_k": True}, "moe.top_k"),
    (MoEConfig, {"top_k": None}, "moe.top_k"),
    (MoEConfig, {"top_k": 9}, "moe.top_k"),
    (MoEConfig, {"expert_hidden_size": 0}, "moe.expert_hidden_size"),
    (MoEConfig, {"activation": "silu"}, "moe.activation"),
    (MoEConfig, {"router_dtype": "bfloat16"}, "moe.router_dtype"),
    (MoEConfig, {"routed_scaling_factor": 0.0}, "moe.routed_scaling_factor"),
    (MoEConfig, {"num_groups": 0}, "moe.num_groups"),
    (MoEConfig, {"num_groups": 3}, "moe.num_groups"),
    (MoEConfig, {"num_groups": 4, "top_k_groups": 0}, "moe.top_k_groups"),
    (MoEConfig, {"num_groups": 4, "top_k_groups": 5}, "moe.top_k_groups"),
    (MoEConfig, {"num_groups": 4, "top_k_groups": 1, "top_k": 3}, "moe.top_k"),
    (MoEConfig, {"expert_bias_update_rate": -1e-3}, "moe.expert_bias_update_rate"),
    (MoEConfig, {"auxiliary_loss_coefficient": -0.1}, "moe.auxiliary_loss_coefficient"),
    (MoEConfig, {"auxiliary_loss_coefficient": float("nan")}, "moe.auxiliary_loss_coefficient"),
    (MoEConfig, {"z_loss_coefficient": "1e-3"}, "moe.z_loss_coefficient"),
    (MoEConfig, {"capacity_factor": 0.0}, "moe.capacity_factor"),
    (MoEConfig, {"pad_to_capacity": True}, "moe.pad_to_capacity"),
    (MoEConfig, {"shared_expert_hidden_size": -1}, "moe.shared_expert_hidden_size"),
    (MoEConfig, {"shared_expert_gate": True}, "moe.shared_expert_gate"),
    (MoEConfig, {"num_experts": 3, "expert_placement": (0, 1, 1)}, "moe.expert_placement"),
    (MoEConfig, {"num_experts": 3, "expert_placement": (0, 1)}, "moe.expert_placement"),
    (MoEConfig, {"num_experts": 3, "expert_placement": (0, 1, 2, 3)}, "moe.expert_placement"),
    (ChronosMoEConfig, {"hidden_size": 0}, "config.hidden_size"),
    (ChronosMoEConfig, {"num_heads": 3}, "config.num_heads"),
    (ChronosMoEConfig, {"hidden_size": 66, "num_heads": 2}, "config.num_heads"),
    (ChronosMoEConfig, {"context_length": 100}, "config.context_length"),
    (ChronosMoEConfig, {"prediction_length": 25}, "config.prediction_length"),
    (ChronosMoEConfig, {"patch_length": 0}, "config.patch_length"),
    (ChronosMoEConfig, {"ffn_hidden_size": 0}, "config.ffn_hidden_size"),
    (ChronosMoEConfig, {"quantiles": ()}, "config.quantiles"),
    (ChronosMoEConfig, {"quantiles": (0.5, 0.5)}, "config.quantiles"),
    (ChronosMoEConfig, {"quantiles": (0.0, 0.5)}, "config.quantiles"),
    (ChronosMoEConfig, {"quantiles": (0.5, 1.0)}, "config.quantiles"),
    (ChronosMoEConfig, {"quantiles": (0.1, 0.9)}, "config.quantiles"),
    (ChronosMoEConfig, {"dropout": 1.0}, "config.dropout"),
    (ChronosMoEConfig, {"huber_delta": 0.0}, "config.huber_delta"),
    (ChronosMoEConfig, {"loss": "mse"}, "config.loss"),
    (ChronosMoEConfig, {"moe": {"num_experts": 4}}, "config.moe"),
    (OptimizerConfig, {"learning_rate": 0}, "optimizer.learning_rate"),
    (OptimizerConfig, {"betas": (0.9,)}, "optimizer.betas"),
    (OptimizerConfig, {"betas": (0.9, 1.0)}, "optimizer.betas"),
    (OptimizerConfig, {"weight_decay": -0.1}, "optimizer.weight_decay"),
    (OptimizerConfig, {"warmup_steps": -1}, "optimizer.warmup_steps"),
    (OptimizerConfig, {"min_learning_rate_ratio": 1.5}, "optimizer.min_learning_rate_ratio"),
    (SeriesConfig, {"datasets": []}, "data.datasets"),
    (SeriesConfig, {"datasets": ["m1_yearly", "m1_yearly"]}, "data.datasets"),
    (SeriesConfig, {"datasets": ["m4_yearly"]}, "data.datasets[0]"),
    (SeriesConfig, {"datasets": ["m1_yearly"], "path": "my.csv"}, "data.path"),
    (SeriesConfig, {"prediction_length": 18}, "data.prediction_length"),
    (SeriesConfig, {"season_length": 12}, "data.season_length"),
    (SeriesConfig, {"frequency": "MS"}, "data.frequency"),
    (SeriesConfig, {"batch_size": 0}, "data.batch_size"),
]


@pytest.mark.parametrize(("cls", "arguments", "field"), REFUSED)
def test_refuses(cls: Any, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        cls(**arguments)
    assert raised.value.field == field
    assert raised.value.allowed


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (MoEConfig, {"num_experts": 1, "top_k": 1}),
        (MoEConfig, {"num_groups": 4, "top_k_groups": 2, "top_k": 4}),
        (MoEConfig, {"capacity_factor": 1.25, "pad_to_capacity": True}),
        (MoEConfig, {"shared_expert_hidden_size": 16, "shared_expert_gate": True}),
        (MoEConfig, {"num_experts": 3, "expert_placement": (2, 0, 1)}),
        (MoEConfig, {"load_balancing": "none", "auxiliary_loss_coefficient": 0}),
        (ChronosMoEConfig, {"moe": None, "quantiles": (0.5,)}),
        (ChronosMoEConfig, {"patch_length": 8, "context_length": 16, "prediction_length": 8}),
        (OptimizerConfig, {"warmup_steps": 0, "weight_decay": 0, "min_learning_rate_ratio": 0}),
        (SeriesConfig, {"prediction_length": 6, "datasets": ["m1_yearly", "m3_yearly"]}),
        (SeriesConfig, {"prediction_length": 1, "path": "my.csv", "season_length": 12, "frequency": "MS"}),
    ],
)
def test_accepts(cls: Any, arguments: dict[str, Any]) -> None:
    config = cls(**arguments)
    assert {name: getattr(config, name) for name in arguments} == arguments


@pytest.mark.parametrize("cls", [MoEConfig, ChronosMoEConfig, OptimizerConfig, SeriesConfig])
def test_defaults_are_allowed_frozen_and_keyword_only(cls: Any) -> None:
    config = cls()
    first = fields(config)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(config, first, getattr(config, first))
    with pytest.raises(TypeError):
        cls(getattr(config, first))


def test_equal_settings_are_equal_whatever_their_spelling() -> None:
    listed: Any = [1, 0]  # as YAML gives it
    assert MoEConfig(num_experts=2, expert_placement=listed) == MoEConfig(num_experts=2, expert_placement=(1, 0))
    assert hash(MoEConfig(num_experts=2, expert_placement=listed)) == hash(
        MoEConfig(num_experts=2, expert_placement=(1, 0))
    )


def test_survives_a_dictionary() -> None:
    config = ChronosMoEConfig(moe=MoEConfig(num_experts=4))
    values = asdict(config)
    assert ChronosMoEConfig(**{**values, "moe": MoEConfig(**values["moe"])}) == config


@pytest.mark.parametrize(
    "module",
    [
        chronos_module,
        moe_module,
        optimizer_module,
        overlap_module,
        parallel_module,
        series_module,
        strategy_module,
        text_module,
    ],
)
def test_every_field_has_one_sentence(module: ModuleType) -> None:
    """Documentation and ``--help`` read the text under each field."""
    for cls in ast.parse(inspect.getsource(module)).body:
        if not isinstance(cls, ast.ClassDef):
            continue
        for statement, following in zip(cls.body, [*cls.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign) or "ClassVar" in ast.unparse(statement.annotation):
                continue
            name = ast.unparse(statement.target)
            assert isinstance(following, ast.Expr), f"{name} has no text"
            text = ast.literal_eval(following.value)
            assert text[0].isupper(), name
            assert text.endswith("."), name
            assert text.count(". ") == 0, f"{name}: more than one sentence"
