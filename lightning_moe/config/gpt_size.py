"""How many parameters a GPT-MoE configuration has, and where (pure arithmetic, torch-free)."""

from __future__ import annotations

from typing import NamedTuple

from lightning_moe.config.block_size import BlockShape, ParameterSize
from lightning_moe.config.gpt import GPTMoEConfig
from lightning_moe.config.model_size import ModelSize


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
    size = gpt_size(config)
    blocks = [shape.parameters for shape in size.blocks]
    ends = size.embedding.total + size.head.total - (size.head.split if size.tied else 0)
    return ParameterCount(ends + sum(block.total for block in blocks), ends + sum(block.active for block in blocks))


def gpt_size(config: GPTMoEConfig) -> ModelSize:
    """The pieces of the model that ``config`` describes."""
    width, queries, keys = config.hidden_size, config.num_heads * config.head_width, config.kv_heads * config.head_width
    norms = {"none": 0, "head": 2 * config.head_width, "projection": queries + keys}[config.qk_norm]
    with_experts = config.moe_layers
    blocks = tuple(
        BlockShape(
            width,
            queries,
            keys,
            config.moe if layer in with_experts else None,
            config.ffn_hidden_size,
            ffn_matrices=3,
            norm_parameters=norms,
        )
        for layer in range(config.num_layers)
    )
    matrix = config.vocab_size * width
    head = ParameterSize(matrix, width)
    # Looking rows up multiplies nothing.
    return ModelSize(ParameterSize(matrix), blocks, head, config.tie_embeddings, embed_work=0.0, head_work=matrix)
