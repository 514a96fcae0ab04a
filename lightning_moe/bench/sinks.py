"""Sinks of weight gradients for measurements without a strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning_moe.weight_grad import WeightGrad
from lightning_moe.weight_grad.queue import WeightGradQueue


class QueueingSink(ABC):
    """Takes a weight's gradients at once, or by way of a queue while it captures.

    Args:
        queue: The queue.
    """

    def __init__(self, queue: WeightGradQueue) -> None:
        self._queue = queue

    @property
    def defers(self) -> bool:
        """Whether the queue captures."""
        return self._queue.capturing

    def take(self, grad: WeightGrad, *, deferrable: bool = True) -> bool:
        """Add the gradient, or put it into the queue."""
        if deferrable and self._queue.capturing:
            self._queue.put(self, grad)
        else:
            self.add(grad)
        return True

    @abstractmethod
    def add(self, grad: WeightGrad) -> None:
        """Add the gradient."""

    def drained(self) -> None:
        """Nothing of it waits in the queue."""
        return
