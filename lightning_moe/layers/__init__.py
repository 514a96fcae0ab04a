"""Dense building blocks: norm, rotary positions, attention, feed-forward and residual blocks (torch only)."""

from __future__ import annotations

from lightning_moe.layers.attention import SelfAttention
from lightning_moe.layers.feed_forward import FeedForward, ResidualBlock
from lightning_moe.layers.norm import RMSNorm
from lightning_moe.layers.rope import apply_rope, rope_tables

__all__ = ["FeedForward", "RMSNorm", "ResidualBlock", "SelfAttention", "apply_rope", "rope_tables"]
