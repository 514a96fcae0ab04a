"""A schedule: what every rank of a pipeline does, as data (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_moe.pipeline.actions import Actions, Kind
from lightning_moe.pipeline.placement import Placement


@dataclass(frozen=True, slots=True)
class Schedule:
    """The action lists of all ranks of a pipeline.

    Attributes:
        name: Its name in the registry.
        placement: Which rank holds which stage.
        microbatches: Number of microbatches.
        ranks: The actions of each rank, in order.
    """

    name: str
    placement: Placement
    microbatches: int
    ranks: tuple[Actions, ...]

    @property
    def splits_backward(self) -> bool:
        """Whether some weight gradients are computed apart from the input gradients."""
        return any(action.kind is Kind.W for actions in self.ranks for action in actions)
