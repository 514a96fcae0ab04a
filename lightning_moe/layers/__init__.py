"""Building blocks of transformers, dense and split over ranks (torch only)."""

from __future__ import annotations

from lightning_moe.layers.attention import SelfAttention
from lightning_moe.layers.attention_mask import attention_mask
from lightning_moe.layers.causal_attention import CausalSelfAttention
from lightning_moe.layers.cross_entropy import linear_cross_entropy, loss_peak_bytes
from lightning_moe.layers.embedding import VocabParallelEmbedding
from lightning_moe.layers.feed_forward import FeedForward, ResidualBlock, SwiGLU
from lightning_moe.layers.kv_cache import KVCache
from lightning_moe.layers.linear import ColumnParallelLinear, Linear, RowParallelLinear
from lightning_moe.layers.logits import whole_logits
from lightning_moe.layers.norm import ParallelRMSNorm, RMSNorm
from lightning_moe.layers.rope import apply_rope, rope_frequencies, rope_tables, rope_tables_at
from lightning_moe.layers.swiglu import swiglu
from lightning_moe.layers.token_layout import TokenLayout
from lightning_moe.layers.vocabulary import VocabularyShard

__all__ = [
    "CausalSelfAttention",
    "ColumnParallelLinear",
    "FeedForward",
    "KVCache",
    "Linear",
    "ParallelRMSNorm",
    "RMSNorm",
    "ResidualBlock",
    "RowParallelLinear",
    "SelfAttention",
    "SwiGLU",
    "TokenLayout",
    "VocabParallelEmbedding",
    "VocabularyShard",
    "apply_rope",
    "attention_mask",
    "linear_cross_entropy",
    "loss_peak_bytes",
    "rope_frequencies",
    "rope_tables",
    "rope_tables_at",
    "swiglu",
    "whole_logits",
]
