"""Lightning's precision plugins with the two decisions that must be global: the gradient norm and found-inf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_moe.errors import ConfigError


class GlobalGradScaler(torch.amp.GradScaler):
    """Gradient scaler whose ranks agree on whether a step overflowed.

    With experts spread over ranks an overflow can occur on one rank alone; scaling each rank by itself would let that
    one skip the step and halve its scale while the others step, and the replicas drift apart without an error.
    """

    @classmethod
    def like(cls, scaler: torch.amp.GradScaler) -> GlobalGradScaler:
        """A scaler with the settings and state of ``scaler``."""
        new = cls(device=scaler._device, enabled=scaler.is_enabled())
        if scaler.is_enabled():
            new.load_state_dict(scaler.state_dict())
        return new

    @override
    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        if dist.is_initialized():
            anywhere = torch.stack([flag.to(found_inf.device) for flag in found.values()] or [found_inf]).max()
            dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
            if not found:  # this rank has no gradients, but GradScaler.step wants at least one verdict
                found[found_inf.device] = found_inf
            for flag in found.values():
                flag.copy_(anywhere)
        return found


class _GlobalClipping(Precision):
    """Clips by the norm over all axes; the strategy hands in the function that knows the mesh."""

    clip_by_global_norm: Callable[[list[Tensor], float], None] | None = None

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        assert self.clip_by_global_norm is not None, "MoEStrategy.setup sets it"
        self.clip_by_global_norm(list(self.main_params(optimizer)), float(clip_val))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "clip_by_global_norm": None}


class MoEPrecision(_GlobalClipping):
    """32-bit training."""


class MoEMixedPrecision(_GlobalClipping, MixedPrecision):
    """``16-mixed`` and ``bf16-mixed``."""


class MoEHalfPrecision(_GlobalClipping, HalfPrecision):
    """``16-true`` and ``bf16-true``."""


class MoEDoublePrecision(_GlobalClipping, DoublePrecision):
    """``64-true``."""


def globalize(plugin: Precision) -> _GlobalClipping:
    """Return the global twin of a Lightning precision plugin.

    Raises:
        ConfigError: The plugin is of a type whose clipping and scaling cannot be made global.
    """
    if type(plugin) is Precision:
        return MoEPrecision()
    if isinstance(plugin, _GlobalClipping):
        return plugin
    if type(plugin) is MixedPrecision:
        scaler = None if plugin.scaler is None else GlobalGradScaler.like(plugin.scaler)
        return MoEMixedPrecision(plugin.precision, plugin.device, scaler)  # type: ignore[arg-type]
    if type(plugin) is HalfPrecision:
        return MoEHalfPrecision(plugin.precision)
    if type(plugin) is DoublePrecision:
        return MoEDoublePrecision()
    raise ConfigError(
        "trainer.precision",
        type(plugin).__name__,
        "32-true, 64-true, bf16-true, 16-true, bf16-mixed, 16-mixed",
        "MoEStrategy clips gradients and checks for overflow over all axes, which it cannot do for this plugin",
    )
