"""What takes weight gradients past autograd into buckets.

[Note: two ways into a bucket]
Layers that describe their weight gradients (see :mod:`lightning_moe.weight_grad`) write them into the bucket without
passing through autograd; everything else arrives in ``parameter.grad``. A tied embedding uses both. A parameter is
complete when autograd's node that accumulates its gradient has run: the node waits for all uses of the parameter, and
runs even when none of them returned a gradient.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from lightning_moe.parallel.buckets import Bucket
from lightning_moe.parallel.slots import Slot
from lightning_moe.weight_grad.queue import WeightGradQueue
from lightning_moe.weight_grad.sink import WeightGrad


class Collector(Protocol):
    """Whom a sink works for; a :class:`~lightning_moe.parallel.gradients.GradientReducer`."""

    queue: WeightGradQueue | None

    @property
    def takes(self) -> bool:
        """Whether gradients that arrive now are the step's."""
        ...

    @property
    def in_schedule(self) -> bool:
        """Whether the step is one of many backward passes."""
        ...

    def check_open(self, slot: Slot, bucket: Bucket) -> None:
        """Raise if the bucket's reduction has begun."""
        ...

    def count_if_complete(self, slot: Slot, bucket: Bucket) -> None:
        """Count a parameter whose gradient is complete."""
        ...


class BucketSink:
    """Takes a parameter's weight gradients into its slot while a backward pass of the strategy is under way."""

    def __init__(self, collector: Collector, slot: Slot, bucket: Bucket) -> None:
        self._collector, self._slot, self._bucket = collector, slot, bucket

    @property
    def defers(self) -> bool:
        """Whether the gradients of this moment's backward pass are put off."""
        queue = self._collector.queue
        return queue is not None and queue.capturing and self._takes and not self._slot.toggled_off

    def take(self, grad: WeightGrad, *, deferrable: bool = True) -> bool:
        """Accept a gradient, or leave it to autograd; see :class:`~lightning_moe.weight_grad.sink.WeightGradSink`."""
        slot, queue = self._slot, self._collector.queue
        if not self._takes:
            return False
        if slot.toggled_off:
            return True
        if self._collector.in_schedule:
            slot.sum_autograd_apart()
        if deferrable and self.defers:
            assert queue is not None
            slot.deferred = True
            queue.put(self, grad)
        else:
            assert not (deferrable and slot.deferred), "gradients of earlier microbatches wait in the queue"
            self.add(grad)
        return True

    def add(self, grad: WeightGrad) -> None:
        """Compute a gradient and add it to the bucket."""
        slot = self._slot
        self._collector.check_open(slot, self._bucket)
        grad.add_to(slot.view, accumulate=not slot.fresh)
        slot.fresh, slot.used = False, True
        if slot.parameter.dtype == slot.view.dtype and not slot.sunk:
            slot.parameter.grad = slot.view  # what autograd still brings is added to it

    def drained(self) -> None:
        """The queue holds nothing of the parameter any more."""
        self._slot.deferred = False
        self._collector.count_if_complete(self._slot, self._bucket)

    @property
    def _takes(self) -> bool:
        # With create_graph=True the gradient itself is to be differentiated.
        return self._collector.takes and not torch.is_grad_enabled() and not _has_hooks(self._slot.parameter)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a pickled parameter takes its attributes along; the reducer stays here


def _has_hooks(parameter: nn.Parameter) -> bool:
    """Whether somebody else has registered hooks on the parameter: autograd would call them without a gradient."""
    ours = 1
    return bool(parameter._backward_hooks) or len(parameter._post_accumulate_grad_hooks) > ours
