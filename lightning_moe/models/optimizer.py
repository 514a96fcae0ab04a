"""AdamW as every model of the package uses it: parameter groups and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_moe.config.optimizer import OptimizerConfig

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig


def adamw(
    model: nn.Module, settings: OptimizerConfig, total_steps: float, *, scales_loss: bool = False
) -> OptimizerLRSchedulerConfig:
    """AdamW with linear warm-up and cosine decay over the whole run, moved at every step.

    Args:
        model: The network.
        settings: Learning rate, decay rates, warm-up.
        total_steps: Steps of the whole run (``trainer.estimated_stepping_batches``); infinite when it has no known end.
        scales_loss: Whether a gradient scaler is at work (precision 16-mixed). Lightning then refuses to clip for the
            fused optimizer, which unscales gradients itself.

    Returns:
        What ``LightningModule.configure_optimizers`` is to return.
    """
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=settings.betas,
        # One kernel; what is the default on CUDA passes over weights and states a dozen times.
        fused=True if not scales_loss and all(p.is_cuda for p in model.parameters()) else None,
    )
    # Lightning refuses to clip for an optimizer that could unscale gradients, in bf16-mixed as well, where nothing is
    # scaled. Without a gradient scaler nobody else reads this.
    optimizer._step_supports_amp_scaling = False
    total = None if math.isinf(total_steps) else int(total_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_schedule(settings, total))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into those that decay and those that do not.

    Gains of norms, biases and single learned tokens are vectors; decay would pull a gain towards 0 rather than
    towards doing nothing. Every matrix, the experts' included, decays.

    Args:
        model: The network.
        weight_decay: Decay of the first group.
    """
    decay = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def cosine_schedule(config: OptimizerConfig, total_steps: int | None) -> Callable[[int], float]:
    """Factor on the peak learning rate at each optimizer step.

    Linear from 1 / (warmup_steps + 1) to 1, then a half cosine down to ``min_learning_rate_ratio`` at the
    last step.

    Args:
        config: Warm-up and final ratio. A run shorter than the warm-up ends within it.
        total_steps: Steps of the whole run; None when it has no known end, which keeps the peak after the
            warm-up.
    """
    warmup, floor = config.warmup_steps, config.min_learning_rate_ratio

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if total_steps is None:
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
