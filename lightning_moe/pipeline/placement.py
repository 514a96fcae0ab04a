"""Which rank holds which stage (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lightning_moe.errors import ConfigError

Shape = Literal["loop", "v"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Stages 0, 1, ... in the order in which a microbatch visits them, placed on the ranks of a pipeline.

    ``loop`` begins each round of chunks at rank 0 (Narayanan et al. 2021, arXiv:2104.04473); ``v`` turns around at the
    last rank, so that each rank's chunks 2i and 2i + 1 mirror each other (Qi et al. 2024, arXiv:2405.15362). With one
    chunk both are the plain pipeline.

    Attributes:
        ranks: Number of ranks.
        chunks: Number of chunks that each rank holds.
        shape: ``loop`` or ``v``.

    Raises:
        ConfigError: There is no such shape, or ``ranks`` or ``chunks`` is not a positive integer.
    """

    ranks: int
    chunks: int = 1
    shape: Shape = "loop"

    def __post_init__(self) -> None:
        for name in ("ranks", "chunks"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"placement.{name}", getattr(self, name), "an integer of at least 1")
        if self.shape not in get_args(Shape):
            raise ConfigError("placement.shape", self.shape, "one of " + ", ".join(get_args(Shape)))

    @property
    def num_stages(self) -> int:
        """Number of chunks of all ranks."""
        return self.ranks * self.chunks

    def stage(self, rank: int, chunk: int) -> int:
        """The stage that is the given chunk of the given rank."""
        backwards = self.shape == "v" and chunk % 2 == 1
        return chunk * self.ranks + (self.ranks - 1 - rank if backwards else rank)

    def location(self, stage: int) -> tuple[int, int]:
        """The rank that holds a stage, and which of its chunks the stage is."""
        chunk, position = divmod(stage, self.ranks)
        backwards = self.shape == "v" and chunk % 2 == 1
        return (self.ranks - 1 - position if backwards else position), chunk
