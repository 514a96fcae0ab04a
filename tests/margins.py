"""Records which work runs while multiprocessors are left free."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType, TracebackType

import pytest
import torch

from lightning_moe.weight_grad import WeightGrad


@dataclass
class Margins:
    """What has run.

    Attributes:
        entered: The margin of each context that was entered.
        inside: How many contexts are open.
        weight_grads: Weight gradients computed outside of all contexts.
    """

    entered: list[int] = field(default_factory=list)
    inside: int = 0
    weight_grads: int = 0

    def record(self, patch: pytest.MonkeyPatch, module: ModuleType, weight_grad: type[WeightGrad]) -> None:
        """Stand in for the ``SmMargin`` of a module, and watch a kind of weight gradient, which must stay outside."""
        margins = self

        class Recorder:
            def __init__(self, count: int, device: torch.device) -> None:
                self.count = count

            def __enter__(self) -> None:
                margins.entered.append(self.count)
                margins.inside += 1

            def __exit__(
                self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
            ) -> None:
                margins.inside -= 1

        compute = weight_grad.compute

        def watched(grad: WeightGrad) -> torch.Tensor:
            assert not margins.inside
            margins.weight_grads += 1
            return compute(grad)

        patch.setattr(module, "SmMargin", Recorder)
        patch.setattr(weight_grad, "compute", watched)
