"""Hugging Face's models as references: our configuration of theirs, and their weights under our names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lightning_moe.config import GPTMoEConfig, MoEConfig, RopeScaling

CLASSES: dict[str, tuple[type[PreTrainedConfig], Any]] = {
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM),
}


def our_config(theirs: Any) -> GPTMoEConfig:
    """The same model as one of their configurations."""
    rope = dict(theirs.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    names = {"original_max_position_embeddings", "factor", "low_freq_factor", "high_freq_factor"}
    scaling = None if kind == "default" else RopeScaling(type=kind, **{k: v for k, v in rope.items() if k in names})
    qwen, mixtral = theirs.model_type == "qwen3_moe", theirs.model_type == "mixtral"
    return GPTMoEConfig(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        num_kv_heads=theirs.num_key_value_heads,
        head_size=getattr(theirs, "head_dim", None),
        ffn_hidden_size=theirs.intermediate_size,
        moe=MoEConfig(
            num_experts=theirs.num_experts if theirs.model_type == "olmoe" else theirs.num_local_experts,
            top_k=theirs.num_experts_per_tok,
            expert_hidden_size=theirs.moe_intermediate_size if qwen else theirs.intermediate_size,
            renormalize=True if mixtral else theirs.norm_topk_prob,
        ),
        dense_layers=tuple(theirs.mlp_only_layers) if qwen else (),
        max_sequence_length=theirs.max_position_embeddings,
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm={"mixtral": "none", "qwen3_moe": "head", "olmoe": "projection"}[theirs.model_type],
        norm_eps=theirs.rms_norm_eps,
        tie_embeddings=theirs.tie_word_embeddings,
        sliding_window=getattr(theirs, "sliding_window", None),
    )


def our_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights under our names: queries, keys and values stacked, and the gate above the up projection."""
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".q_proj." in name:
            keys = [name, name.replace(".q_proj.", ".k_proj."), name.replace(".q_proj.", ".v_proj.")]
            name, value = name.replace(".q_proj.", ".qkv_proj."), torch.cat([state[key] for key in keys])
        elif ".gate_proj." in name:
            value = torch.cat([value, state[name.replace(".gate_proj.", ".up_proj.")]])
            name = name.replace(".gate_proj.", ".gate_up_proj.")
        elif ".k_proj." in name or ".v_proj." in name or ".up_proj." in name:
            continue
        for theirs, our in NAMES:
            name = name.replace(theirs, our)
        ours[name] = value
    return ours


NAMES = (
    ("model.embed_tokens.", "embedding."),
    ("model.norm.", "final_norm."),
    ("model.layers.", "blocks."),
    (".input_layernorm.", ".attention_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".self_attn.", ".attention."),
    (".mlp.gate.", ".ffn.router."),
    (".mlp.", ".ffn."),
)


def random_model(kind: str, **settings: Any) -> Any:
    """One of their models in float64 with weights and norms that are nowhere near 0 or 1."""
    config_class, model_class = CLASSES[kind]
    config = config_class(
        **{
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": None,
            "eos_token_id": None,
            "bos_token_id": None,
            **settings,
        }
    )
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    torch.manual_seed(7)
    model = model_class(config).double().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.12)
    model.tie_weights()
    return model


def logits_in_float64(model: Any, tokens: Tensor) -> Tensor:
    """Their logits, with every cast to float32 undone: routers, norms, softmax and rotary angles."""
    with KeepFloat64(), torch.no_grad():
        rotary = model.model.rotary_emb
        # Computed in float32 when the model was built.
        initialize = rotary.compute_default_rope_parameters
        if rotary.rope_type != "default":
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            initialize = ROPE_INIT_FUNCTIONS[rotary.rope_type]
        rotary.inv_freq, rotary.attention_scaling = initialize(model.config, device="cpu")
        out: Tensor = model(input_ids=tokens, use_cache=False).logits
    assert out.dtype == torch.float64
    return out


class KeepFloat64(TorchFunctionMode):
    """Makes casts of float64 to float32 leave it as it is, and creates float64 where float32 is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if func is Tensor.float:
            func = Tensor.double
        if func in (Tensor.to, Tensor.type):
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        return func(*args, **kwargs)


class NoRandomFill(TorchFunctionMode):
    """Makes in-place random fills do nothing: models of any size can then be built on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))
