"""Sinks and gradients for tests of the queue: real sums, and gradients that only say who they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_moe.weight_grad import WeightGrad, WeightGradQueue, attach_sink


class MainGrad:
    """Adds the gradients of one weight up in at least float32: at once, or by way of a queue while it captures."""

    def __init__(self, weight: nn.Parameter, queue: WeightGradQueue | None) -> None:
        self.queue = queue
        self.sum = torch.full_like(weight, torch.nan, dtype=torch.promote_types(weight.dtype, torch.float32))
        self.added = self.drains = 0
        attach_sink(weight, self)

    @property
    def defers(self) -> bool:
        return self.queue is not None and self.queue.capturing

    def take(self, grad: WeightGrad, *, deferrable: bool = True) -> bool:
        if self.defers and deferrable:
            assert self.queue is not None
            self.queue.put(self, grad)
        else:
            self.add(grad)
        return True

    def add(self, grad: WeightGrad) -> None:
        assert not torch.is_grad_enabled()
        grad.add_to(self.sum, accumulate=self.added > 0)
        self.added += 1

    def drained(self) -> None:
        self.drains += 1


@dataclass(frozen=True, eq=False)
class NamedGrad(WeightGrad):
    """Has a name, some tensors and a cost, but no value."""

    name: str
    kept: tuple[Tensor, ...] = ()
    collective: bool = False
    cost: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.kept

    @property
    def flops(self) -> float:
        return self.cost

    @property
    def has_collective(self) -> bool:
        return self.collective

    def compute(self) -> Tensor:
        raise NotImplementedError

    def add_to(self, main_grad: Tensor, *, accumulate: bool) -> None:
        raise NotImplementedError


class Recorder:
    """Writes down, in a list shared with others, what is added and when it is drained."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def add(self, grad: WeightGrad) -> None:
        assert isinstance(grad, NamedGrad)
        self.events.append(grad.name)

    def drained(self) -> None:
        self.events.append(f"{self.name} drained")


def flops(grad: WeightGrad) -> float:
    return grad.flops
