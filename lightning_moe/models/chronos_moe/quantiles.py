"""Reading quantile levels off the levels that a model was trained on."""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_moe.errors import ConfigError


def interpolate_quantiles(quantiles: Tensor, trained: Sequence[float], wanted: Sequence[float]) -> Tensor:
    """Interpolate linearly between trained levels; outside of them the nearest one is taken, with a warning.

    Args:
        quantiles: ``[..., Q]``, ascending over the last dim.
        trained: The ``Q`` levels of that dim, ascending.
        wanted: Levels to return, each in [0, 1], in any order.

    Returns:
        ``[..., len(wanted)]``; a trained level is returned exactly.

    Raises:
        ConfigError: No level is wanted, or one is not in [0, 1].
    """
    levels = [float(level) for level in wanted]
    if not levels or any(not 0.0 <= level <= 1.0 for level in levels):
        raise ConfigError("quantile_levels", list(wanted), "at least one number, each between 0 and 1")
    if min(levels) < trained[0] or max(levels) > trained[-1]:
        warnings.warn(
            f"quantile levels {levels} reach beyond those the model was trained on "
            f"({trained[0]} to {trained[-1]}); levels outside are set to the nearest "
            "trained level, so intervals will be too narrow",
            stacklevel=3,
        )
    lower, upper, weight = [], [], []
    for level in levels:
        clamped = min(max(level, trained[0]), trained[-1])
        right = bisect.bisect_left(trained, clamped)
        left = right if trained[right] == clamped else right - 1
        lower.append(left)
        upper.append(right)
        weight.append(0.0 if left == right else (clamped - trained[left]) / (trained[right] - trained[left]))
    fraction = torch.tensor(weight, dtype=quantiles.dtype, device=quantiles.device)
    return torch.lerp(quantiles[..., lower], quantiles[..., upper], fraction)
