"""Which expert lives in which slot of which rank: pure arithmetic, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_moe.errors import ConfigError


@dataclass(frozen=True)
class ExpertPlacement:
    """A permutation between logical experts and physical slots.

    *Logical* ids are those of the router's outputs, of checkpoints and of everything a user sees. *Slots* are
    rank-major: slot ``s`` is position ``s % slots_per_rank`` on expert rank ``s // slots_per_rank``. Sorting
    rows by slot therefore puts all rows for one rank next to each other.

    Args:
        num_experts: Number of experts ``E``.
        expert_parallel: Number of ranks that the experts are spread over; divides ``E``.
        order: Logical expert of each slot, a permutation of ``0 .. E-1``; None for the identity.

    Raises:
        ConfigError: The ranks do not divide the experts, or ``order`` is not a permutation.
    """

    num_experts: int
    expert_parallel: int
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_experts < 1 or self.num_experts % self.expert_parallel:
            raise ConfigError(
                "moe.num_experts",
                self.num_experts,
                f"a multiple of parallel.expert = {self.expert_parallel}",
                "every expert rank holds the same number of experts",
            )
        if self.order is not None and sorted(self.order) != list(range(self.num_experts)):
            raise ConfigError(
                "moe.expert_placement",
                self.order,
                f"each of 0 .. {self.num_experts - 1} exactly once",
                "the entry at position s is the expert that lives in slot s",
            )

    @property
    def slots_per_rank(self) -> int:
        """Number of experts that each rank holds."""
        return self.num_experts // self.expert_parallel

    @property
    def expert_of_slot(self) -> tuple[int, ...]:
        """Logical expert of each slot."""
        return tuple(range(self.num_experts)) if self.order is None else tuple(self.order)

    @property
    def slot_of_expert(self) -> tuple[int, ...]:
        """Slot of each logical expert: the inverse of :attr:`expert_of_slot`."""
        slots = [0] * self.num_experts
        for slot, expert in enumerate(self.expert_of_slot):
            slots[expert] = slot
        return tuple(slots)

    def local_experts(self, rank: int) -> tuple[int, ...]:
        """Logical experts on expert rank ``rank``, in the order of its slots."""
        first = rank * self.slots_per_rank
        return self.expert_of_slot[first : first + self.slots_per_rank]

    def rank_of_expert(self, expert: int) -> int:
        """Expert rank that holds the logical expert ``expert``."""
        return self.slot_of_expert[expert] // self.slots_per_rank
