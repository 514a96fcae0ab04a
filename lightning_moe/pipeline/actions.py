"""What a rank does in a pipeline step, one action after the other (torch-free)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from lightning_moe.errors import ConfigError


class Kind(StrEnum):
    """Kinds of actions."""

    F = "F"
    """Forward of one microbatch through one chunk."""
    B = "B"
    """Gradient with respect to the chunk's input only."""
    W = "W"
    """Gradients with respect to the weights, after the B of the same microbatch and chunk."""
    BW = "BW"
    """Both gradients at once."""


@dataclass(frozen=True, slots=True)
class Action:
    """One piece of work of one rank.

    Attributes:
        kind: What is computed.
        microbatch: Number of the microbatch, from 0.
        chunk: Number of the chunk among those of the rank, from 0, in the order in which a microbatch visits them.
    """

    kind: Kind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        """``F3``, or ``BW2.1`` for chunk 1."""
        return f"{self.kind}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that ``str`` writes as ``text``.

        Raises:
            ConfigError: The text is no action.
        """
        match = re.fullmatch(r"(F|BW|B|W)(\d+)(?:\.(\d+))?", text)
        if match is None:
            raise ConfigError("action", text, "F, B, W or BW, the microbatch, and .chunk unless it is 0: F3, BW2.1")
        kind, microbatch, chunk = match.groups()
        return cls(Kind(kind), int(microbatch), int(chunk or 0))


Actions = tuple[Action, ...]
"""What one rank does, in order."""


def format_actions(ranks: tuple[Actions, ...]) -> str:
    """One line for each rank: ``F0 F1 BW0 ...``."""
    return "\n".join(" ".join(map(str, actions)) for actions in ranks)


def parse_actions(text: str) -> tuple[Actions, ...]:
    """What :func:`format_actions` has written.

    Raises:
        ConfigError: A word is no action.
    """
    return tuple(tuple(Action.parse(word) for word in line.split()) for line in text.split("\n"))
