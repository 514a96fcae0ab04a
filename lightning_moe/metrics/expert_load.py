"""How many tokens each expert received over an evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_moe.metrics.base import SumMetric


class ExpertLoad(SumMetric):
    """Tokens that each expert of each layer received, summed over batches and ranks.

    Args:
        num_layers: Number of MoE layers ``L``.
        num_experts: Number of routed experts ``E`` per layer.
        kwargs: Passed to :class:`torchmetrics.Metric`.
    """

    higher_is_better = None
    tokens: Tensor

    def __init__(self, num_layers: int, num_experts: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sum("tokens", num_layers, num_experts, dtype=torch.int64)

    def update(self, tokens_per_expert: Tensor) -> None:
        """Add the counts ``[L, E]`` of one batch."""
        self.tokens += tokens_per_expert

    def compute(self) -> Tensor:
        """Return the counts, int64 ``[L, E]``, in logical order of the experts."""
        return self.tokens
