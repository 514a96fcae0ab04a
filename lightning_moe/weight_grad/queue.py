"""The queue of weight gradients that are computed after the backward pass that they belong to.

The backward pass of a microbatch through a chunk of the model (B) puts its weight gradients here; a later action (W)
computes them (Qi et al. 2024, arXiv:2401.10241). Between the two the queue keeps the operands of the products.

[Note: order of deferred weight gradients]
Sums in floating point depend on their order. Whatever is asked of the queue, the gradients of one weight are computed
in the order in which they were put, and by the same code as when nothing is deferred. So gradients are equal bit for
bit between schedules, and to those of a single process.

Gradients that need collectives are computed by W actions only, in an order that follows from what the backward passes
have put, not from timing or from the bytes that a rank holds. So ranks that run the same layers by the same schedule
issue the same collectives in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from lightning_moe.weight_grad.memory import KeptBytes, Storage, storages
from lightning_moe.weight_grad.sink import WeightGrad


class WeightGradOwner(Protocol):
    """What the gradients of one weight belong to; told apart by identity."""

    def add(self, grad: WeightGrad) -> None:
        """Compute a gradient and accumulate it, now."""
        ...

    def drained(self) -> None:
        """The queue holds no more gradients of this owner; called each time that its last one has been added."""
        ...


@dataclass(slots=True)
class WeightGradStatistics:
    """What a queue has done since it was made, in numbers of gradients.

    Attributes:
        captured: How many were put.
        run: How many were computed.
        run_early: How many of these because more bytes were held than allowed.
        run_within: How many of these within a budget.
        peak_bytes: Most bytes held at a time.
    """

    captured: int = 0
    run: int = 0
    run_early: int = 0
    run_within: int = 0
    peak_bytes: int = 0


@dataclass(eq=False, slots=True)
class _Task:
    owner: WeightGradOwner
    grad: WeightGrad | None
    """None once it has run, so that its tensors are freed while other tasks of its group wait."""
    storages: dict[Storage, int]
    versions: tuple[int, ...]
    """Of its tensors, when they were put."""


class WeightGradQueue:
    """Keeps weight gradients and computes them when told to.

    Owned by whoever runs the schedule, who captures each backward pass, and handed to the sinks, which put gradients in
    while :attr:`capturing`. On CUDA autograd runs backward passes in a thread of its own while the caller waits, so
    nothing here is local to a thread. Everything must happen on one stream, or on streams that wait for each other.

    Args:
        max_bytes: Most bytes that the queue may hold. What exceeds it is computed at once, the oldest first, except for
            gradients with collectives: if these alone exceed it, so does the queue. None for no limit.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self._groups: dict[tuple[int, int], list[_Task]] = {}  # by microbatch and chunk, in the order of capture
        self._open: list[_Task] | None = None
        self._held: dict[WeightGradOwner, deque[_Task]] = {}
        self._local: dict[_Task, None] = {}  # the held ones without collectives, in order; no values
        self._kept = KeptBytes()
        self._statistics = WeightGradStatistics()

    @property
    def capturing(self) -> bool:
        """Whether a backward pass is under way whose weight gradients are to be put here."""
        return self._open is not None

    @property
    def live_bytes(self) -> int:
        """Bytes that the queue keeps alive: whole storages, each counted once."""
        return self._kept.total

    @property
    def statistics(self) -> WeightGradStatistics:
        """What has been done so far; a copy."""
        return replace(self._statistics)

    @property
    def num_held(self) -> int:
        """How many gradients wait to be computed."""
        return sum(map(len, self._held.values()))

    @contextmanager
    def capture(self, microbatch: int, chunk: int = 0) -> Iterator[None]:
        """Keep the weight gradients of the backward pass inside; seals them at exit (see :meth:`flush`)."""
        assert not self.capturing, "backward passes are captured one at a time"
        assert (microbatch, chunk) not in self._groups, f"microbatch {microbatch} of chunk {chunk} is captured twice"
        group = self._open = self._groups[microbatch, chunk] = []
        try:
            yield
            if self._open is group:
                self.flush()
        finally:
            self._open = None

    def put(self, owner: WeightGradOwner, grad: WeightGrad) -> None:
        """Keep a gradient for later; called by sinks while :attr:`capturing`.

        Where the queue would hold too much, gradients are computed before this returns, perhaps this one too.
        """
        assert self._open is not None, "no backward pass is captured"
        grad = grad.compact()
        task = _Task(owner, grad, storages(grad.tensors), _versions(grad))
        self._open.append(task)
        self._held.setdefault(owner, deque()).append(task)
        if not grad.has_collective:
            self._local[task] = None
        self._kept.add(task.storages)
        self._statistics.captured += 1
        self._statistics.peak_bytes = max(self._statistics.peak_bytes, self.live_bytes)
        self._keep_to_limit()

    def flush(self) -> None:
        """Seal what has been captured: it becomes one W action, and capturing ends."""
        assert self._open is not None, "no backward pass is captured"
        self._open = None

    def pop(self, microbatch: int, chunk: int = 0) -> None:
        """Compute what is left of one sealed group, the oldest of its chunk."""
        self.run_tail([(microbatch, chunk)])

    def pop_all(self) -> None:
        """Compute everything that is sealed, one group after the other."""
        for key in [key for key, group in self._groups.items() if group is not self._open]:
            self.pop(*key)

    def run_tail(self, keys: Sequence[tuple[int, int]]) -> None:
        """Compute what is left of several sealed groups, one weight after the other.

        The weights come in the order of the first group, each with all of its gradients; so the first of them are
        complete, and can be reduced over ranks, while the others are computed.

        Args:
            keys: Microbatch and chunk of each group; for each chunk its oldest groups, in order.
        """
        by_owner: dict[WeightGradOwner, list[_Task]] = {}
        for key in keys:
            # The order of owners counts tasks that have run, which may be others on other ranks.
            for task in self._take_group(*key):
                by_owner.setdefault(task.owner, []).append(task)
        self._run_all([task for tasks in by_owner.values() for task in tasks if task.grad is not None])

    def run_within(self, budget: float, cost: Callable[[WeightGrad], float], *, reserve_bytes: int = 0) -> float:
        """Compute gradients without collectives, the oldest first, while something else is waited for.

        Those that do not fit into what is left of the budget are passed over, and with them later ones of the same
        weight. Captured gradients may be taken before they are sealed.

        Args:
            budget: What may be spent.
            cost: What computing a gradient costs, in the same unit.
            reserve_bytes: How much of :attr:`live_bytes` to leave for W actions; ends at the first gradient that would
                go below.

        Returns:
            What was spent.
        """
        spent = 0.0
        for task in list(self._local):
            # Not the oldest of its weight: one before it was passed over, or needs a collective.
            if task.grad is None or self._held[task.owner][0] is not task:
                continue
            price = cost(task.grad)
            if spent + price > budget:
                continue
            if self.live_bytes - self._kept.only_in(task.storages) < reserve_bytes:
                break
            self._run(task)
            self._statistics.run_within += 1
            spent += price
        return spent

    def clear(self) -> None:
        """Drop everything, as after an exception; owners are not told."""
        for tasks in self._held.values():
            for task in tasks:
                task.grad = None  # tracebacks may keep tasks alive
        self._open = None
        self._groups.clear()
        self._held.clear()
        self._local.clear()
        self._kept.clear()

    def _take_group(self, microbatch: int, chunk: int) -> list[_Task]:
        key = microbatch, chunk
        assert key in self._groups, f"nothing was captured of microbatch {microbatch} and chunk {chunk}"
        assert self._groups[key] is not self._open, f"microbatch {microbatch} of chunk {chunk} is not sealed"
        oldest = next(m for m, c in self._groups if c == chunk)
        assert microbatch == oldest, f"microbatch {oldest} of chunk {chunk} comes before {microbatch}"
        return self._groups.pop(key)

    def _keep_to_limit(self) -> None:
        while self.max_bytes is not None and self.live_bytes > self.max_bytes:
            task = next((task for task in self._local if self._held[task.owner][0] is task), None)
            if task is None:
                return
            self._run(task)
            self._statistics.run_early += 1

    @torch.no_grad()
    def _run_all(self, tasks: list[_Task]) -> None:
        """Compute gradients in order, each while the next one communicates."""
        collective = iter([task for task in tasks if task.grad is not None and task.grad.has_collective])
        _prefetch(next(collective, None))
        for task in tasks:
            if task.grad is not None and task.grad.has_collective:
                _prefetch(next(collective, None))
            self._run(task)

    @torch.no_grad()  # else main gradients would get a history, which would keep all operands alive
    def _run(self, task: _Task) -> None:
        # Chunks that share a weight may be popped in another order than they were captured in.
        while task.grad is not None:
            self._run_oldest(task.owner)

    def _run_oldest(self, owner: WeightGradOwner) -> None:
        tasks = self._held[owner]
        task = tasks.popleft()
        if not tasks:
            del self._held[owner]
        self._local.pop(task, None)
        self._kept.remove(task.storages)
        grad, task.grad = task.grad, None
        assert grad is not None
        if _versions(grad) != task.versions:
            # Autograd finds this out for the tensors that it saves; here it would be a wrong gradient.
            raise RuntimeError(
                "an operand of a deferred weight gradient was changed in place after the backward pass: "
                "do not reuse the inputs or outputs of layers as buffers, or compute the gradient first"
            )
        owner.add(grad)
        self._statistics.run += 1
        del grad  # before the owner goes on
        if owner not in self._held:
            owner.drained()


def _prefetch(task: _Task | None) -> None:
    if task is not None and task.grad is not None:
        task.grad.prefetch()


def _versions(grad: WeightGrad) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in grad.tensors)
