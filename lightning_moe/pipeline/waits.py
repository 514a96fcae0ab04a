"""What an action waits for and what it hands on (torch-free)."""

from __future__ import annotations

from typing import NamedTuple

from lightning_moe.pipeline.actions import Action, Kind
from lightning_moe.pipeline.placement import Placement


class Message(NamedTuple):
    """A microbatch's tensors on the way from one stage to a neighbouring one.

    Activations go to the next stage, gradients to the one before.
    """

    source: int
    """The stage they come from."""
    target: int
    """The stage they go to."""
    microbatch: int


def received(placement: Placement, rank: int, action: Action) -> Message | None:
    """What an action needs from another stage; None for W, and at both ends of the pipeline."""
    if action.kind is Kind.W:
        return None
    stage = placement.stage(rank, action.chunk)
    source = stage - 1 if action.kind is Kind.F else stage + 1
    return Message(source, stage, action.microbatch) if 0 <= source < placement.num_stages else None


def sent(placement: Placement, rank: int, action: Action) -> Message | None:
    """What an action gives to another stage; None for W, and at both ends of the pipeline."""
    if action.kind is Kind.W:
        return None
    stage = placement.stage(rank, action.chunk)
    target = stage + 1 if action.kind is Kind.F else stage - 1
    return Message(stage, target, action.microbatch) if 0 <= target < placement.num_stages else None
