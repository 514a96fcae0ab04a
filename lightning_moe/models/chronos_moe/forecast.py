"""Forecasting raw series with the methods that chronos-forecasting users know."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lightning_moe.config.chronos import ChronosMoEConfig
from lightning_moe.errors import ConfigError
from lightning_moe.models.chronos_moe.model import ChronosMoEModel
from lightning_moe.models.chronos_moe.quantiles import interpolate_quantiles

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_QUANTILE_LEVELS: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Levels returned when none are asked for."""

# Shapes: B series, T steps of history, Q trained levels, H prediction length.

# [Note: horizons beyond the trained one]
# The model emits config.prediction_length steps in one pass. A longer forecast is made in rounds: the
# median of a round is appended to the context as if it had been observed. That is what
# chronos-forecasting users expect to work, but the uncertainty of a round does not flow into the next
# one, so intervals far out are too narrow. Hence the warning.


class ForecastMixin:
    """Prediction methods for a module that holds a :class:`ChronosMoEModel`.

    When the model is spread over ranks these methods are collective calls: every rank of the mesh makes
    the same calls with the same number of series.
    """

    config: ChronosMoEConfig

    def network(self) -> ChronosMoEModel:
        """The network to forecast with, built on first use."""
        raise NotImplementedError

    def forecast(self, context: Tensor) -> Tensor:
        """Quantiles ``[B, Q, H]`` of contexts ``[B, T]`` in their units, from one pass of the network."""
        raise NotImplementedError

    def predict(
        self,
        inputs: Tensor | Sequence[Tensor],
        prediction_length: int | None = None,
        *,
        batch_size: int = 256,
        limit_prediction_length: bool = False,
    ) -> Tensor:
        """Forecast every trained quantile (``config.quantiles``) of each series.

        Args:
            inputs: One series ``[T]``, a batch ``[B, T]`` (padded with NaN on the left), or a list of 1-D
                series of any lengths, oldest value first. NaN marks a missing value.
            prediction_length: Steps to forecast; ``config.prediction_length`` when left out. Longer
                horizons are forecast in rounds that feed the median back, with a warning.
            batch_size: Series per forward pass.
            limit_prediction_length: Refuse a horizon longer than the trained one instead of warning.

        Returns:
            ``[B, Q, H]`` on the CPU, ascending over ``Q``; float64 when the inputs are, float32 otherwise.

        Raises:
            ConfigError: Malformed inputs, or a horizon that is not positive or (when limited) too long.
        """
        series = _series_list(inputs)
        quantiles = forecast_quantiles(
            self.network(),
            self.forecast,
            series,
            _checked_length(self.config, prediction_length, limit_prediction_length),
            batch_size,
        )
        return quantiles if any(one.dtype == torch.float64 for one in series) else quantiles.float()

    def predict_quantiles(
        self,
        inputs: Tensor | Sequence[Tensor],
        prediction_length: int | None = None,
        quantile_levels: Sequence[float] = DEFAULT_QUANTILE_LEVELS,
        *,
        batch_size: int = 256,
        limit_prediction_length: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Forecast the wanted quantile levels of each series, and its median as the point forecast.

        Args:
            inputs: See :meth:`predict`.
            prediction_length: See :meth:`predict`.
            quantile_levels: Levels in [0, 1]. Those between trained levels are interpolated; those beyond
                the lowest or highest trained level are set to it, with a warning.
            batch_size: See :meth:`predict`.
            limit_prediction_length: See :meth:`predict`.

        Returns:
            ``(quantiles [B, H, len(quantile_levels)], median [B, H])``, dtype and device as for
            :meth:`predict`.

        Raises:
            ConfigError: See :meth:`predict`; also for levels outside [0, 1].
        """
        forecast = self.predict(
            inputs, prediction_length, batch_size=batch_size, limit_prediction_length=limit_prediction_length
        ).transpose(1, 2)
        trained = self.config.quantiles
        median = forecast[..., trained.index(0.5)].clone()
        return interpolate_quantiles(forecast, trained, quantile_levels), median

    def predict_df(
        self,
        df: pd.DataFrame,
        id_column: str = "item_id",
        timestamp_column: str = "timestamp",
        target: str = "target",
        prediction_length: int | None = None,
        quantile_levels: Sequence[float] = DEFAULT_QUANTILE_LEVELS,
        *,
        freq: str | None = None,
        batch_size: int = 256,
        limit_prediction_length: bool = False,
    ) -> pd.DataFrame:
        """Forecast every series of a long-format frame.

        Args:
            df: One row per observation, in any order.
            id_column: Column that tells the series apart.
            timestamp_column: Column of timestamps, or of texts that pandas can read as such.
            target: Column of values; NaN marks a missing value.
            prediction_length: See :meth:`predict`.
            quantile_levels: See :meth:`predict_quantiles`.
            freq: Frequency of the timestamps, as a pandas alias; inferred for each series when left out.
            batch_size: See :meth:`predict`.
            limit_prediction_length: See :meth:`predict`.

        Returns:
            ``prediction_length`` rows per series, series in order of first appearance, with the columns
            ``id_column``, ``timestamp_column``, ``"target_name"``, ``"predictions"`` (the median) and one
            column per level, named ``str(level)``.

        Raises:
            ConfigError: A missing column, unreadable or duplicate timestamps, a frequency that cannot be
                inferred, and what :meth:`predict_quantiles` refuses.
        """
        # Imported here: pandas takes a second to import, and training does not need it.
        from lightning_moe.models.chronos_moe.dataframe import forecast_frame, split_series

        series = split_series(df, id_column, timestamp_column, target, freq)
        length = _checked_length(self.config, prediction_length, limit_prediction_length)
        quantiles, median = self.predict_quantiles(
            [torch.from_numpy(one.values) for one in series], length, quantile_levels, batch_size=batch_size
        )
        columns = (id_column, timestamp_column, target)
        return forecast_frame(series, quantiles.numpy(), median.numpy(), quantile_levels, columns)


@torch.no_grad()
def forecast_quantiles(
    model: ChronosMoEModel,
    forecast: Callable[[Tensor], Tensor],
    series: Sequence[Tensor],
    prediction_length: int,
    batch_size: int = 256,
) -> Tensor:
    """Forecast raw series batch by batch, in rounds where the horizon is longer than the trained one.

    The instance norm runs in float64 whatever the model's dtype, so that a large level does not drown the
    signal.

    Args:
        model: The network, or this rank's part of it; put into eval mode meanwhile.
        forecast: Runs it: from contexts ``[B, T]`` to quantiles ``[B, Q, H]`` in their units.
        series: 1-D tensors, oldest value first, NaN where missing.
        prediction_length: Steps ``H`` to forecast.
        batch_size: Series per forward pass.

    Returns:
        ``[B, Q, H]`` float64 on the CPU, ascending over ``Q``.
    """
    if batch_size < 1:
        raise ConfigError("batch_size", batch_size, "at least 1")
    with _eval_mode(model):
        return torch.cat(
            [
                _forecast_batch(model, forecast, series[start : start + batch_size], prediction_length)
                for start in range(0, len(series), batch_size)
            ]
        )


def _forecast_batch(
    model: ChronosMoEModel, forecast: Callable[[Tensor], Tensor], series: Sequence[Tensor], prediction_length: int
) -> Tensor:
    length = model.config.context_length
    recent = [one[-length:].to("cpu", torch.float64) for one in series]
    context = pad_sequence(recent, batch_first=True, padding_value=float("nan"), padding_side="left")
    # Apple's GPUs have no float64.
    context = context.to(model.device, torch.float32 if model.device.type == "mps" else torch.float64)
    rounds: list[Tensor] = []
    while sum(part.shape[-1] for part in rounds) < prediction_length:
        rounds.append(forecast(context))
        context = torch.cat((context, rounds[-1][:, model.config.quantiles.index(0.5)]), dim=1)
    return torch.cat(rounds, dim=-1)[..., :prediction_length].to("cpu", torch.float64)


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and restore the mode of every submodule afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _checked_length(config: ChronosMoEConfig, prediction_length: int | None, limit: bool) -> int:
    trained = config.prediction_length
    if prediction_length is None:
        return trained
    if isinstance(prediction_length, bool) or not isinstance(prediction_length, int) or prediction_length < 1:
        raise ConfigError("prediction_length", prediction_length, "an integer of at least 1")
    if prediction_length > trained:
        if limit:
            raise ConfigError(
                "prediction_length",
                prediction_length,
                f"at most the trained horizon {trained}",
                "pass limit_prediction_length=False to forecast further in rounds",
            )
        warnings.warn(
            f"prediction_length {prediction_length} is longer than the trained horizon {trained}: the "
            "forecast is made in rounds that take the previous median as observed, so later intervals are "
            "too narrow",
            stacklevel=3,
        )
    return prediction_length


def _series_list(inputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(inputs, Tensor):
        if inputs.dim() not in (1, 2):
            raise ConfigError("inputs", f"a tensor of shape {tuple(inputs.shape)}", "a tensor of shape [T] or [B, T]")
        series = list(inputs[None] if inputs.dim() == 1 else inputs)
    else:
        series = [torch.as_tensor(one) for one in inputs]
    if not series:
        raise ConfigError("inputs", [], "at least one series")
    for position, one in enumerate(series):
        if one.dim() != 1 or not one.numel() or one.is_complex():
            raise ConfigError(
                f"inputs[{position}]",
                f"a {one.dtype} tensor of shape {tuple(one.shape)}",
                "a 1-D tensor of real numbers with at least one element",
            )
    return series
