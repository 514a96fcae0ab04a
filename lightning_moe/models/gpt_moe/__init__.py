"""GPT-MoE: a decoder-only language model with mixture-of-experts layers."""

from __future__ import annotations

from lightning_moe.models.gpt_moe.model import GPTMoEModel, GPTMoEOutput
from lightning_moe.models.gpt_moe.module import GPTMoE
from lightning_moe.models.gpt_moe.sampling import Sampling

__all__ = ["GPTMoE", "GPTMoEModel", "GPTMoEOutput", "Sampling"]
