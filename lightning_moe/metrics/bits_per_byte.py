"""Bits per byte: how well a language model would compress a text."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lightning_moe.metrics.base import SumMetric


class BitsPerByte(SumMetric):
    """Negative log-likelihood of the predicted tokens in bits, over the UTF-8 bytes that they stand for.

    Unlike the loss per token it does not depend on the vocabulary, and it is comparable with the size of the text
    after compression. Tokens without bytes, such as the end of a document, add to the numerator alone.

    Ranks that hold copies of the same batch may all report it; ranks that hold parts of a sequence report their parts.

    Args:
        kwargs: Passed to :class:`torchmetrics.Metric`.
    """

    nats: Tensor
    num_bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sum("nats")
        self._add_sum("num_bytes")

    def update(self, nats: Tensor, num_bytes: Tensor) -> None:
        """Add predictions.

        Args:
            nats: Negative log-likelihoods in nats, of any shape; their sum counts.
            num_bytes: Bytes that the predicted tokens stand for, of any shape; their sum counts.
        """
        self.nats += nats.detach().double().sum()
        self.num_bytes += num_bytes.double().sum()

    def compute(self) -> Tensor:
        """Return the bits per byte, float64 scalar; NaN without any byte."""
        return (self.nats / math.log(2.0)) / self.num_bytes
