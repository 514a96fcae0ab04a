"""Weight gradients as the strategy takes them: summed in float32, past autograd, and put off where a queue captures."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_moe.bench.sinks import QueueingSink
from lightning_moe.weight_grad import WeightGrad, attach_sink
from lightning_moe.weight_grad.queue import WeightGradQueue


class MainGrads:
    """Buffers of some weights; attaches their sinks.

    Args:
        weights: The weights, by name.
        queue: Takes gradients while it captures.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], queue: WeightGradQueue) -> None:
        self._sinks = {name: _Sink(weight, queue) for name, weight in weights.items()}
        for name, weight in weights.items():
            attach_sink(weight, self._sinks[name])

    def gradients(self) -> dict[str, Tensor]:
        """Copies of the buffers that have been written to."""
        return {name: sink.buffer.clone() for name, sink in self._sinks.items() if not sink.fresh}

    def forget(self) -> None:
        """Let the next gradients be written, not added."""
        for sink in self._sinks.values():
            sink.fresh = True


class _Sink(QueueingSink):
    def __init__(self, weight: nn.Parameter, queue: WeightGradQueue) -> None:
        super().__init__(queue)
        self.buffer = torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
        self.fresh = True

    @override
    def add(self, grad: WeightGrad) -> None:
        """Write the gradient, or add it."""
        grad.add_to(self.buffer, accumulate=not self.fresh)
        self.fresh = False
