"""The seasonal naive forecast, the baseline that scores are taken relative to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lightning_moe.errors import ConfigError


class SeasonalNaive:
    """Forecasts that the last season repeats, with the same value at every quantile level.

    Where the last season misses an observation, the most recent one of the same phase stands in; where a
    phase was never observed, the most recent observation of any phase does.

    Args:
        season_length: Observations per season, at least 1; 1 repeats the last observation.

    Raises:
        ConfigError: ``season_length`` is less than 1.
    """

    def __init__(self, season_length: int) -> None:
        if season_length < 1:
            raise ConfigError("season_length", season_length, "an integer of at least 1")
        self.season_length = season_length

    def predict_quantiles(
        self,
        contexts: Tensor | Sequence[ArrayLike | Tensor],
        prediction_length: int,
        quantile_levels: Sequence[float],
    ) -> Tensor:
        """Forecast a batch of series.

        Args:
            contexts: Observations, oldest first, in any unit: a tensor [B, C] whose rows are padded by NaN on
                the left, or B sequences of any length. NaN marks a missing value.
            prediction_length: Observations to forecast, H.
            quantile_levels: Levels to forecast, Q of them.

        Returns:
            Forecasts float64 [B, Q, H] in the unit of ``contexts``; NaN for series without any observation.
        """
        seasons = self._seasons(contexts)
        phases = _last_observed(seasons)
        anywhere = _last_observed(seasons.flatten(1)[..., None])
        season = torch.where(torch.isnan(phases), anywhere, phases)
        steps = torch.arange(prediction_length, device=season.device) % self.season_length
        return season[:, None, steps].repeat(1, len(quantile_levels), 1)

    def _seasons(self, contexts: Tensor | Sequence[ArrayLike | Tensor]) -> Tensor:
        """Observations by season and phase, float64 [B, seasons, season_length]; NaN on the left."""
        rows = [torch.as_tensor(row, dtype=torch.float64) for row in contexts]
        longest = max((len(row) for row in rows), default=0)
        num_seasons = max(1, -(-longest // self.season_length))
        width = num_seasons * self.season_length
        device = rows[0].device if rows else None
        padded = torch.full((len(rows), width), torch.nan, dtype=torch.float64, device=device)
        for index, row in enumerate(rows):
            padded[index, width - len(row) :] = row
        return padded.view(len(rows), num_seasons, self.season_length)


def _last_observed(values: Tensor) -> Tensor:
    """Last entry along the second dimension that is not NaN: [B, N, M] to [B, M]; NaN where there is none."""
    order = torch.arange(1, values.shape[1] + 1, device=values.device)[:, None]
    last = ((~torch.isnan(values)) * order).argmax(dim=1, keepdim=True)
    return values.gather(1, last)[:, 0]
