"""What of a model a stage holds (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelPart:
    """A run of consecutive blocks, with what comes before the first and after the last block where it belongs.

    Attributes:
        blocks: Numbers of the blocks; may be empty.
        first: Whether the part has what comes before the blocks (the embedding).
        last: Whether the part has what comes after the blocks (the head and the loss).
    """

    blocks: range
    first: bool = False
    last: bool = False

    @classmethod
    def whole(cls, num_blocks: int) -> ModelPart:
        """The part that is a whole model."""
        return cls(range(num_blocks), first=True, last=True)
