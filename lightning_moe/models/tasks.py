"""What a step wants of a network; the context that it hands to every microbatch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Training:
    """The loss, to be differentiated, and metrics.

    Attributes:
        mean_terms: Number of terms of the loss in a rank's whole batch, averaged over the ranks that see different
            terms (see :func:`~lightning_moe.models.ranks.mean_over_data_ranks`); scalar, above 0.
    """

    mean_terms: Tensor

    def loss(self, loss_sum: Tensor, weight: float) -> Tensor:
        """The loss of a microbatch, such that the losses of a batch, weighted by their samples, add up to its own.

        Args:
            loss_sum: Sum of the microbatch's terms, scalar.
            weight: Its share of the batch's samples.
        """
        return loss_sum / (self.mean_terms * weight).to(loss_sum.dtype)


@dataclass(frozen=True)
class Scoring:
    """Metrics and predictions."""


@dataclass(frozen=True)
class Predicting:
    """Predictions; the batch may have nothing but the input."""


Task = Training | Scoring | Predicting
"""What a step wants."""
