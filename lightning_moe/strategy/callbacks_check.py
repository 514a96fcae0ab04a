"""Lightning callbacks that would be silently wrong with a model that is spread over ranks."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_moe.errors import ConfigError


def refuse_unsupported_callbacks(trainer: pl.Trainer) -> None:
    """Raise for callbacks that cannot work; called before any callback's ``setup``.

    Raises:
        ConfigError: Names the callback and what to use instead.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging) and is_overridden(
            "configure_model", trainer.lightning_module
        ):
            # It copies the module in Callback.setup, before configure_model has built any layer, and then averages an
            # empty model for the whole run.
            raise ConfigError(
                "trainer.callbacks",
                type(callback).__name__,
                "EMAWeightAveraging or WeightAveraging for a module that builds its layers in configure_model",
                "StochasticWeightAveraging copies the module before its layers exist and would average nothing",
            )
