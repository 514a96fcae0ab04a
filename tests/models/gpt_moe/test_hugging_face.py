"""Logits equal those of Hugging Face's Mixtral, Qwen3-MoE and OLMoE; presets have the shapes of published models.

DeepSeek-V3's MoE block is compared in tests/moe; its latent attention is not part of the block here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from lightning_moe.config import GPTMoEConfig
from lightning_moe.config.gpt_size import parameter_count
from lightning_moe.models.gpt_moe import GPTMoEModel
from tests.models.gpt_moe.hugging_face import (
    CLASSES,
    NoRandomFill,
    logits_in_float64,
    our_config,
    our_state,
    random_model,
)

BATCH, SEQUENCE = 3, 24

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "mixtral with a window": ("mixtral", {"num_local_experts": 4, "sliding_window": 5, "tie_word_embeddings": True}),
    "mixtral with yarn": ("mixtral", {"num_local_experts": 4, "head_dim": 16, "rope_parameters": YARN}),
    "qwen3": (
        "qwen3_moe",
        {"num_local_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 16}
        | {"norm_topk_prob": True, "mlp_only_layers": [0], "num_hidden_layers": 3},
    ),
    "qwen3 with llama3": (
        "qwen3_moe",
        {"num_local_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "rope_parameters": LLAMA3}
        | {"tie_word_embeddings": True, "norm_topk_prob": False},
    ),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 3}),
    "olmoe with linear": ("olmoe", {"num_experts": 8, "rope_parameters": LINEAR, "tie_word_embeddings": True}),
}


def ours_of(theirs: Any) -> GPTMoEModel:
    """Our model with their weights; every name and shape has to fit."""
    model = GPTMoEModel(our_config(theirs.config)).double().eval()
    state = our_state(theirs.state_dict())
    if theirs.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str) -> None:
    kind, settings = MODELS[name]
    theirs = random_model(kind, **settings)
    tokens = torch.randint(61, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(3))
    expected = logits_in_float64(theirs, tokens)
    model = ours_of(theirs)
    with torch.no_grad():
        logits = model.logits(tokens)
    assert float((logits - expected).abs().max() / expected.abs().max()) <= 1e-11
    # The loss, whose logits never exist as a whole, is that of the same logits.
    labels = torch.cat((tokens[:, 1:], torch.full((BATCH, 1), -100)), dim=1)
    loss = model(tokens, labels).loss_sum
    reference = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, reference, rtol=1e-11, atol=0.0)


def test_options_change_the_logits() -> None:
    """What the comparison relies on is really there: each option alone moves the logits."""
    tokens = torch.arange(SEQUENCE)[None]
    base = logits_in_float64(random_model("mixtral", num_local_experts=4, head_dim=8), tokens)
    for change in ({"sliding_window": 5}, {"rope_parameters": YARN}, {"rope_parameters": LLAMA3}):
        changed = logits_in_float64(random_model("mixtral", num_local_experts=4, head_dim=8, **change), tokens)
        assert float((changed - base).abs().max()) > 1e-3


PRESETS = {
    "mixtral_8x7b": (GPTMoEConfig.mixtral_8x7b(), MixtralConfig(max_position_embeddings=32768)),
    "mixtral_8x22b": (
        GPTMoEConfig.mixtral_8x22b(),
        MixtralConfig(
            hidden_size=6144,
            intermediate_size=16384,
            num_hidden_layers=56,
            num_attention_heads=48,
            max_position_embeddings=65536,
        ),
    ),
    "qwen3_30b_a3b": (
        GPTMoEConfig.qwen3_30b_a3b(),
        Qwen3MoeConfig(
            num_hidden_layers=48,
            head_dim=128,
            norm_topk_prob=True,
            max_position_embeddings=40960,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
    ),
    "qwen3_235b_a22b": (
        GPTMoEConfig.qwen3_235b_a22b(),
        Qwen3MoeConfig(
            hidden_size=4096,
            intermediate_size=12288,
            moe_intermediate_size=1536,
            num_hidden_layers=94,
            num_attention_heads=64,
            head_dim=128,
            norm_topk_prob=True,
            max_position_embeddings=40960,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
    ),
    "olmoe_1b_7b": (GPTMoEConfig.olmoe_1b_7b(), OlmoeConfig(intermediate_size=1024)),
}
"""Our presets, and the published ``config.json`` as far as it differs from the defaults of the class."""


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_shapes_of_the_published_models(name: str) -> None:
    """Every parameter has the shape that transformers' class gives it; on the meta device, two of the equal layers."""
    preset, config = PRESETS[name]
    theirs_as_ours = our_config(config)
    # Widths of dense layers that no layer has, and sizes that are derived when left out, may be given differently.
    derived = {name: getattr(preset, name) for name in ("ffn_hidden_size", "head_size", "num_kv_heads")}
    assert preset == replace(theirs_as_ours, **derived)
    assert (preset.head_width, preset.kv_heads) == (theirs_as_ours.head_width, theirs_as_ours.kv_heads)
    total = parameter_count(preset).total
    config.num_hidden_layers, preset = 2, replace(preset, num_layers=2)
    with torch.device("meta"), NoRandomFill():
        theirs = our_state(CLASSES[config.model_type][1](config).state_dict())
        ours = GPTMoEModel(preset)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.items()
    }
    two_layers = parameter_count(preset).total
    assert two_layers == sum(parameter.numel() for parameter in ours.parameters())
    layer = sum(value.numel() for name, value in ours.named_parameters() if name.startswith("blocks.0."))
    assert total == two_layers + layer * (PRESETS[name][0].num_layers - 2)


def test_their_weights_stack_into_ours() -> None:
    """A stacked matrix holds queries, keys and values in this order, whatever the shapes hide."""
    state = {f"model.layers.0.self_attn.{part}_proj.weight": torch.full((2, 2), i) for i, part in enumerate("qkv")}
    stacked: Tensor = our_state(state)["blocks.0.attention.qkv_proj.weight"]
    assert stacked[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
