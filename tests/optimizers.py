"""Optimizers as users write them, for tests of what the package does with an optimizer it does not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Simple(Optimizer):
    """Steps by ``update`` of the gradient; subclasses say what that is."""

    def __init__(self, params: Any, lr: Any = 0.1, weight_decay: float = 0.01, **defaults: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **defaults})

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(group["lr"] * self.update(p, p.grad, self.state[p], group))
        return loss


class Lion(Simple):
    """Sign of an interpolated momentum (Chen et al., 2023)."""

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        average = state.setdefault("exp_avg", torch.zeros_like(p))
        update = average.lerp(grad, 0.1).sign()
        average.lerp_(grad, 0.01)
        return update
