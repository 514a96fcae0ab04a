"""GPT-MoE's settings: rules, published sizes, and dictionaries."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from lightning_moe.config import GPTMoEConfig, MoEConfig, RopeScaling
from lightning_moe.config import gpt as gpt_module
from lightning_moe.config.gpt_size import parameter_count
from lightning_moe.config.mapping import from_mapping
from lightning_moe.errors import ConfigError
from tests.config.test_models import test_every_field_has_one_sentence as check_every_field_has_one_sentence

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size": 0}, "config.vocab_size"),
    ({"num_heads": 3}, "config.num_heads"),
    ({"hidden_size": 60, "num_heads": 4}, "config.num_heads"),
    ({"head_size": 7}, "config.head_size"),
    ({"num_kv_heads": 3}, "config.num_kv_heads"),
    ({"num_kv_heads": 8}, "config.num_kv_heads"),
    ({"ffn_hidden_size": 0}, "config.ffn_hidden_size"),
    ({"dense_layers": (2,)}, "config.dense_layers"),
    ({"dense_layers": (0, 0)}, "config.dense_layers"),
    ({"dense_layers": (0,), "moe": None}, "config.dense_layers"),
    ({"moe": MoEConfig(routing_granularity="series")}, "config.moe.routing_granularity"),
    ({"max_sequence_length": 0}, "config.max_sequence_length"),
    ({"rope_theta": 0.0}, "config.rope_theta"),
    ({"rope_scaling": {"type": "linear"}}, "config.rope_scaling"),
    ({"qk_norm": "layer"}, "config.qk_norm"),
    ({"norm_eps": 0.0}, "config.norm_eps"),
    ({"sliding_window": 0}, "config.sliding_window"),
    ({"init_std": 0.0}, "config.init_std"),
]


@pytest.mark.parametrize(("arguments", "field"), REFUSED)
def test_refuses(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        GPTMoEConfig(**arguments)
    assert raised.value.field == field
    assert raised.value.allowed


def test_sizes_that_follow_from_others() -> None:
    config = GPTMoEConfig(hidden_size=60, num_heads=6, num_layers=4, dense_layers=(0, 2))
    assert (config.kv_heads, config.head_width, config.moe_layers) == (6, 10, (1, 3))
    config = replace(config, num_kv_heads=2, head_size=16, dense_layers=(), moe=None)
    assert (config.kv_heads, config.head_width, config.moe_layers) == (2, 16, ())


def test_survives_a_dictionary_and_json() -> None:
    config = GPTMoEConfig(
        moe=MoEConfig(num_experts=4),
        rope_scaling=RopeScaling(type="linear", factor=2.0),
        dense_layers=(1,),
    )
    assert from_mapping(GPTMoEConfig, asdict(config), "config") == config
    assert from_mapping(GPTMoEConfig, json.loads(json.dumps(asdict(config))), "config") == config
    assert from_mapping(GPTMoEConfig, {"moe": None}, "config").moe is None


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"hidden": 64}, "config.hidden"),
        ({"moe": {"num_expert": 4}}, "config.moe.num_expert"),
        ({"rope_scaling": {"kind": "yarn"}}, "config.rope_scaling.kind"),
    ],
)
def test_dictionaries_with_unknown_fields(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        from_mapping(GPTMoEConfig, values, "config")
    assert raised.value.field == field


PUBLISHED = [
    # billions of parameters in all and active for a token, as the papers and model cards give them
    (GPTMoEConfig.mixtral_8x7b(), 46.7, 12.9),
    (GPTMoEConfig.mixtral_8x22b(), 141, 39),
    (GPTMoEConfig.qwen3_30b_a3b(), 30.5, 3.3),
    (GPTMoEConfig.qwen3_235b_a22b(), 235, 22),
    (GPTMoEConfig.olmoe_1b_7b(), 6.9, 1.3),
    (GPTMoEConfig.deepseek_moe_16b(), 16.4, 2.8),
]


@pytest.mark.parametrize(("config", "total", "active"), PUBLISHED)
def test_presets_have_the_published_numbers_of_parameters(config: GPTMoEConfig, total: float, active: float) -> None:
    """To the rounding of the published figures; 2 % covers "3.3 B" for 3.35."""
    count = parameter_count(config)
    assert count.total == pytest.approx(total * 1e9, rel=0.005)
    assert count.active == pytest.approx(active * 1e9, rel=0.02)


def test_exact_totals() -> None:
    """As the safetensors index of the published weights counts them."""
    assert parameter_count(GPTMoEConfig.mixtral_8x7b()).total == 46_702_792_704
    assert parameter_count(GPTMoEConfig.qwen3_30b_a3b()).total == 30_532_122_624
    assert parameter_count(GPTMoEConfig.olmoe_1b_7b()).total == 6_919_161_856


def test_a_dense_model_uses_all_it_has() -> None:
    count = parameter_count(GPTMoEConfig(moe=None))
    assert count.active == count.total


def test_every_field_has_one_sentence() -> None:
    check_every_field_has_one_sentence(gpt_module)
