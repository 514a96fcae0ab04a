"""Schedules found in the course of a simulation: a free rank takes the best action that it can (torch-free)."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from lightning_moe.pipeline.actions import Action, Actions, Kind
from lightning_moe.pipeline.costs import Costs
from lightning_moe.pipeline.placement import Placement
from lightning_moe.pipeline.simulate import durations, memory_growth

_ROUNDING = 1e-9
"""Relative difference below which two times, or two amounts of memory, count as equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a rank takes when it is free.

    Attributes:
        order: For each rank its F and B, which it takes in this order; None lets it take those whose input has arrived.
        forward_first: Whether F goes before B, as long as there is memory for it.
        oldest_first: Whether the B of the oldest microbatch goes first; else that of the latest chunk does.
        patience: A rank waits for input that is known to arrive within this share of a W rather than begin a W.
        memory: Memory that no F may go beyond; without an ``order`` it includes the chunks that the microbatch has yet
            to visit on the rank, so that the oldest microbatch can always go on. One microbatch is always allowed.
        max_lag: Most microbatches that W may lag behind B; None sets no limit.
    """

    order: tuple[Actions, ...] | None = None
    forward_first: bool = False
    oldest_first: bool = True
    patience: float = 0.0
    memory: float = inf
    max_lag: int | None = None


class Listed(NamedTuple):
    """What :func:`list_schedule` has found."""

    makespan: float
    peak: float
    ranks: tuple[Actions, ...]


@dataclass(slots=True)
class _Rank:
    """A rank in the course of the simulation."""

    forwards: list[int]
    """The next microbatch of each chunk to go forward."""
    backwards: list[int]
    """The next microbatch of each chunk to go backward."""
    taken: list[Action] = field(default_factory=list)
    deferred: deque[Action] = field(default_factory=deque)
    free_at: float = 0.0
    held: float = 0.0
    peak: float = 0.0


def list_schedule(placement: Placement, microbatches: int, costs: Costs, policy: Policy) -> Listed:
    """Find a schedule by list scheduling.

    A free rank takes F and B by the policy, and W when there is neither, or no memory for F, or too many of them.

    Raises:
        ConfigError: ``costs.stage_factors`` has not one entry for each stage.
    """
    return _ListScheduling(placement, microbatches, costs, policy).run()


class _ListScheduling:
    """One run of :func:`list_schedule`."""

    def __init__(self, placement: Placement, microbatches: int, costs: Costs, policy: Policy) -> None:
        self.placement = placement
        self.microbatches = microbatches
        self.communication = costs.communication
        self.policy = policy
        self.times, self.growth = durations(costs, placement), memory_growth(costs, placement)
        self.most_deferred = inf if policy.max_lag is None else policy.max_lag * placement.chunks
        self.backward = Kind.BW if policy.max_lag == 0 else Kind.B
        chunks = range(placement.chunks)
        self.stages = [[placement.stage(rank, chunk) for chunk in chunks] for rank in range(placement.ranks)]
        self.rank_of = [placement.location(stage)[0] for stage in range(placement.num_stages)]
        # When each stage has what the F, and the B, of each microbatch needs; infinite while nobody knows.
        self.activations_at = [[inf] * microbatches for _ in self.rank_of]
        self.activations_at[0] = [0.0] * microbatches
        self.gradients_at = [[inf] * microbatches for _ in self.rank_of]
        # Memory that an F needs; without an order also that of its microbatch's later visits.
        self.needs = [
            [
                sum(
                    self.growth[stage][Kind.F]
                    for stage in (stages[chunk:] if policy.order is None else [stages[chunk]])
                )
                for chunk in chunks
            ]
            for stages in self.stages
        ]
        self.most_memory = max(policy.memory, *(max(needs) for needs in self.needs)) * (1 + _ROUNDING)
        self.ranks = [_Rank([0 for _ in chunks], [0 for _ in chunks]) for _ in range(placement.ranks)]
        self.wake_ups = [(0.0, rank) for rank in range(placement.ranks)]

    def run(self) -> Listed:
        while self.wake_ups:
            now, number = heapq.heappop(self.wake_ups)
            if self.ranks[number].free_at <= now:
                self._act(number, now)
        assert all(count == self.microbatches for rank in self.ranks for count in rank.backwards)
        makespan = max(rank.free_at for rank in self.ranks)
        peak = max(rank.peak for rank in self.ranks)
        return Listed(makespan, peak, tuple(tuple(rank.taken) for rank in self.ranks))

    def _act(self, number: int, now: float) -> None:
        """Let a free rank take an action, or go to sleep until something arrives."""
        rank = self.ranks[number]
        action, next_arrival = self._greedy(number, now) if self.policy.order is None else self._ordered(number, now)
        if action is None and rank.deferred:
            weight = rank.deferred[0]
            time = self.times[self.stages[number][weight.chunk]][Kind.W]
            if next_arrival - now < self.policy.patience * time:
                heapq.heappush(self.wake_ups, (next_arrival, number))
                return
            action = weight
        if action is not None:
            self._take(number, action, now)

    def _greedy(self, number: int, now: float) -> tuple[Action | None, float]:
        """The best F or B whose input is there, if any, and when more input arrives as far as is known."""
        rank, policy = self.ranks[number], self.policy
        may_defer = self._may_defer(rank)
        best: tuple[int, int, Kind, int, int] | None = None
        next_arrival, soon = inf, now * (1 + _ROUNDING)
        for chunk, stage in enumerate(self.stages[number]):
            microbatch = rank.backwards[chunk]
            if may_defer and microbatch < rank.forwards[chunk]:
                arrival = self.gradients_at[stage][microbatch]
                if arrival <= soon:
                    age = microbatch if policy.oldest_first else -chunk
                    candidate = (1, age, self.backward, microbatch, chunk)
                    best = candidate if best is None else min(best, candidate)
                else:
                    next_arrival = min(next_arrival, arrival)
            microbatch = rank.forwards[chunk]
            if microbatch < self.microbatches and rank.held + self.needs[number][chunk] <= self.most_memory:
                arrival = self.activations_at[stage][microbatch]
                if arrival <= soon:
                    candidate = (0 if policy.forward_first else 2, -chunk, Kind.F, microbatch, chunk)
                    best = candidate if best is None else min(best, candidate)
                else:
                    next_arrival = min(next_arrival, arrival)
        return (None if best is None else Action(*best[2:])), next_arrival

    def _ordered(self, number: int, now: float) -> tuple[Action | None, float]:
        """The next action in the order if its input is there, and when its input arrives as far as is known."""
        assert self.policy.order is not None
        rank, order = self.ranks[number], self.policy.order[number]
        position = sum(rank.forwards) + sum(rank.backwards)
        if position == len(order):
            return None, inf
        action = order[position]
        arrivals = self.activations_at if action.kind is Kind.F else self.gradients_at
        arrival = arrivals[self.stages[number][action.chunk]][action.microbatch]
        if arrival > now * (1 + _ROUNDING):
            return None, arrival
        fits = action.kind is not Kind.F or rank.held + self.needs[number][action.chunk] <= self.most_memory
        # With nothing left to free, the order goes beyond the memory rather than come to a standstill.
        return (action if (fits and self._may_defer(rank)) or not rank.deferred else None), inf

    def _may_defer(self, rank: _Rank) -> bool:
        return len(rank.deferred) < self.most_deferred or not rank.deferred

    def _take(self, number: int, action: Action, now: float) -> None:
        rank, kind, microbatch, chunk = self.ranks[number], action.kind, action.microbatch, action.chunk
        stage = self.stages[number][chunk]
        end = now + self.times[stage][kind]
        rank.taken.append(action)
        rank.free_at = end
        rank.held += self.growth[stage][kind]
        rank.peak = max(rank.peak, rank.held)
        heapq.heappush(self.wake_ups, (end, number))
        if kind is Kind.W:
            rank.deferred.popleft()
        elif kind is Kind.F:
            rank.forwards[chunk] += 1
            if stage + 1 < len(self.rank_of):
                self.activations_at[stage + 1][microbatch] = self._arrival(number, stage + 1, end)
            else:
                self.gradients_at[stage][microbatch] = end
        else:
            rank.backwards[chunk] += 1
            if kind is Kind.B:
                rank.deferred.append(Action(Kind.W, microbatch, chunk))
            if stage > 0:
                self.gradients_at[stage - 1][microbatch] = self._arrival(number, stage - 1, end)

    def _arrival(self, number: int, target: int, end: float) -> float:
        """When a tensor arrives at the stage ``target``, whose rank will look for work then."""
        to = self.rank_of[target]
        arrival = end if to == number else end + self.communication
        heapq.heappush(self.wake_ups, (arrival, to))
        return arrival
