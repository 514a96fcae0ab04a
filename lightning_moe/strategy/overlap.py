"""Who reads weights between an optimizer's step and the next forward pass."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch import callbacks
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_moe.parallel.main_params import MainParams

_HOOKS = (
    "on_train_batch_end",
    "on_train_batch_start",
    "on_before_batch_transfer",
    "on_after_batch_transfer",
    "transfer_batch_to_device",
    "lr_scheduler_step",
    "optimizer_step",
    "on_validation_model_eval",
)
"""Hooks that run in that time and are not the strategy's own."""

_HARMLESS = (
    callbacks.DeviceStatsMonitor,
    callbacks.EarlyStopping,
    callbacks.GradientAccumulationScheduler,
    callbacks.LearningRateMonitor,
    callbacks.ModelCheckpoint,
    callbacks.ModelSummary,
    callbacks.ProgressBar,
    callbacks.ThroughputMonitor,
    callbacks.Timer,
)
"""Callbacks of Lightning that read no weights then; a checkpoint asks the strategy for them."""


def forward_alone_reads_weights(trainer: pl.Trainer) -> bool:
    """Whether nobody but forward passes reads weights between optimizer steps, as far as can be known.

    Code of users counts as a reader: a callback (unless it has an attribute ``reads_weights = False``) or a module that
    overrides a hook of that time. So does manual optimization, which goes on in the same ``training_step``.
    """
    module = trainer.lightning_module
    if not module.automatic_optimization or any(is_overridden(hook, module) for hook in _HOOKS):
        return False
    return not any(
        getattr(callback, "reads_weights", True)
        and not isinstance(callback, _HARMLESS)
        and any(is_overridden(hook, callback, pl.Callback) for hook in _HOOKS if hasattr(pl.Callback, hook))
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )


class WaitForWeights(pl.Callback):
    """Waits for weights where training pauses: hooks at these places may read them, and are not counted as readers.

    It has to be the first callback. The strategy itself does not learn in time that an epoch ends: a timer may stop
    training after any step, and some data loaders know their last batch afterwards only.
    """

    reads_weights = False

    def __init__(self, mains: MainParams) -> None:
        self._mains = mains

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mains.wait()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mains.wait()
