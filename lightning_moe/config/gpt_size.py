"""How many parameters a GPT-MoE configuration has (pure arithmetic, torch-free)."""

from __future__ import annotations

from typing import NamedTuple

from lightning_moe.config.gpt import GPTMoEConfig
from lightning_moe.config.moe import MoEConfig


class ParameterCount(NamedTuple):
    """Numbers of parameters of a whole model."""

    total: int
    """All of them."""
    active: int
    """Those that one token uses, embedding and output projection included: all but the experts it does not visit."""


def parameter_count(config: GPTMoEConfig) -> ParameterCount:
    """Count the parameters of the model that ``config`` describes, without building it.

    The bias that steers the choice of experts (``moe.expert_bias``) is adapted without gradients and not counted.
    """
    width = config.hidden_size
    norms = 2 * width
    dense = config.num_layers * (norms + _attention(config))
    dense += (1 if config.tie_embeddings else 2) * config.vocab_size * width + width
    num_moe = len(config.moe_layers)
    dense += (config.num_layers - num_moe) * 3 * width * config.ffn_hidden_size
    if config.moe is None:
        return ParameterCount(dense, dense)
    expert = _matrices(config.moe) * width * config.moe.expert_hidden_size
    dense += num_moe * (config.moe.num_experts * width + _shared_expert(width, config.moe))
    return ParameterCount(
        dense + num_moe * config.moe.num_experts * expert,
        dense + num_moe * config.moe.top_k * expert,
    )


def _attention(config: GPTMoEConfig) -> int:
    queries, keys = config.num_heads * config.head_width, config.kv_heads * config.head_width
    norms = {"none": 0, "head": 2 * config.head_width, "projection": queries + keys}[config.qk_norm]
    return 2 * config.hidden_size * (queries + keys) + norms


def _shared_expert(width: int, moe: MoEConfig) -> int:
    gate = width if moe.shared_expert_gate else 0
    return _matrices(moe) * width * moe.shared_expert_hidden_size + gate


def _matrices(moe: MoEConfig) -> int:
    """Matrices of one expert: up and down, and SwiGLU's gate."""
    return 3 if moe.activation == "swiglu" else 2
