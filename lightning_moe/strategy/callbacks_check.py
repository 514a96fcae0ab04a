"""Lightning callbacks that would be silently wrong with a model that is spread over ranks."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_moe.errors import ConfigError
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh


def refuse_unsupported_callbacks(trainer: pl.Trainer, mesh: ParallelMesh) -> None:
    """Raise for callbacks that cannot work; called before any callback's ``setup``.

    Args:
        trainer: The trainer with its callbacks.
        mesh: The parallel mesh.

    Raises:
        ConfigError: Names the callback and what to use instead.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, StochasticWeightAveraging):
            continue
        why = ""
        if is_overridden("configure_model", trainer.lightning_module):
            # It does so in Callback.setup, before configure_model.
            why = "it copies the module before its layers exist and would average nothing"
        elif mesh.size(Axis.EXPERT) > 1:
            why = "it keeps the average in a checkpoint as its own state, where only rank 0's experts are"
        if why:
            raise ConfigError(
                "trainer.callbacks", type(callback).__name__, "EMAWeightAveraging or WeightAveraging", why
            )
