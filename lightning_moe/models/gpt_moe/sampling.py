"""Drawing the next token from logits. B batch, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Args:
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Draw from this many most likely tokens only; None for all.
        top_p: Draw from the most likely tokens that together reach this probability (nucleus sampling,
            arXiv:1904.09751), after ``top_k``; None for all.

    Raises:
        ConfigError: A value is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise ConfigError("temperature", self.temperature, "at least 0", "0 takes the most likely token")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError("top_k", self.top_k, "at least 1, or None for all tokens")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError("top_p", self.top_p, "above 0 and at most 1, or None for all tokens")

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Draw one token for each row of logits.

        Args:
            logits: ``[B, V]``, floating.
            generator: On the device of the logits.

        Returns:
            int64 ``[B]``.
        """
        if self.temperature == 0.0:
            return logits.argmax(dim=-1)
        probabilities = self.probabilities(logits)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution ``[B, V]`` that tokens are drawn from, float32 or float64; temperature above 0."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        probabilities = logits.softmax(dim=-1)
        if self.top_p is not None:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            # A token stays while those before it have not reached top_p, so the first one always does.
            beyond = ordered.cumsum(dim=-1) - ordered >= self.top_p
            probabilities = probabilities.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
        return probabilities / probabilities.sum(dim=-1, keepdim=True)
