"""Orders of F and B that repeat one pattern for every microbatch (torch-free)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from lightning_moe.pipeline.actions import Action, Actions, Kind
from lightning_moe.pipeline.placement import Placement

_INCREMENTS = range(1, 5)
"""Slots from one rank to the next: 1 hands on at once; 4 and 2 in turn are ZB-V."""


class BuildingBlock(NamedTuple):
    """When the passes of one microbatch run, in slots as long as one pass.

    Source: Qi et al. 2024, arXiv:2405.15362, section 3. The next microbatch repeats the block one period later, that
    is one slot for each F, B and W of a rank.
    """

    slots: tuple[tuple[tuple[int, Kind, int], ...], ...]
    """For each rank, its passes as (slot, kind, chunk)."""
    lifespan: float
    """How long the activations live on the rank where they live longest, as the number of microbatches of a whole rank
    that are alive at a time."""

    def orders(self, microbatches: int, backward: Kind = Kind.B) -> tuple[Actions, ...]:
        """F and B of every rank in the order of their slots."""
        return tuple(
            tuple(
                Action(Kind.F if kind is Kind.F else backward, microbatch, chunk)
                for _, kind, microbatch, chunk in sorted(
                    (slot + microbatch * len(passes) * 3 // 2, kind, microbatch, chunk)
                    for slot, kind, chunk in passes
                    for microbatch in range(microbatches)
                )
            )
            for passes in self.slots
        )


def building_blocks(placement: Placement) -> Iterator[BuildingBlock]:
    """The building blocks that advance from rank to rank by a fixed number of slots in every pass.

    Odd and even passes may differ in it, and so may forwards and backwards. Passes follow each other as closely as they
    can without any two on a rank falling into the same slot of the period.
    """
    for increments in product(_INCREMENTS, repeat=4):
        block = _building_block(placement, increments)
        if block is not None:
            yield block


def _building_block(placement: Placement, increments: tuple[int, ...]) -> BuildingBlock | None:
    ranks, chunks = placement.ranks, placement.chunks
    period = 3 * chunks
    passes = [(Kind.F, chunk) for chunk in range(chunks)] + [(Kind.B, chunk) for chunk in reversed(range(chunks))]
    taken: list[set[int]] = [set() for _ in range(ranks)]
    slots: list[list[tuple[int, Kind, int]]] = [[] for _ in range(ranks)]
    begin = 0
    for index, (kind, chunk) in enumerate(passes):
        increment = increments[index % 2 + (2 if kind is Kind.B else 0)]
        stages = range(chunk * ranks, (chunk + 1) * ranks)
        way = [placement.location(stage)[0] for stage in (stages if kind is Kind.F else reversed(stages))]
        for start in range(begin, begin + period):
            if all((start + increment * hop) % period not in taken[rank] for hop, rank in enumerate(way)):
                break
        else:
            return None
        for hop, rank in enumerate(way):
            slots[rank].append((start + increment * hop, kind, chunk))
            taken[rank].add((start + increment * hop) % period)
        begin = start + increment * (ranks - 1) + 1
    alive = [sum(slot + 1 if kind is Kind.B else -slot for slot, kind, _ in on_rank) for on_rank in slots]
    return BuildingBlock(tuple(map(tuple, slots)), max(alive) / period / chunks)
