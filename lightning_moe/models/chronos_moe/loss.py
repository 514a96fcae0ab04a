"""Masked quantile losses on the normalised target."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

# Shapes: B batch, Q quantiles, H horizon.


def quantile_loss_sum(
    predicted: Tensor,
    target: Tensor,
    observed: Tensor,
    levels: Tensor,
    kind: Literal["pinball", "huber"] = "pinball",
    huber_delta: float = 1.0,
) -> Tensor:
    """Sum of the quantile loss over the observed points of all series and over all levels.

    Pinball (Koenker & Bassett 1978): ``2 * |(y - q) * (1[y <= q] - tau)|``; at the median this is ``|y -
    q|``. Huber (Dabney et al. 2017, arXiv:1710.10044): the same weights on ``huber(y - q) / delta``, which
    is quadratic for errors below ``delta`` and tends to the pinball loss as ``delta`` tends to 0.

    Args:
        predicted: ``[B, Q, H]`` quantiles.
        target: ``[B, H]``; finite everywhere, any value where not observed.
        observed: bool ``[B, H]``.
        levels: ``[Q]`` quantile levels ``tau`` in (0, 1).
        kind: ``"pinball"`` or ``"huber"``.
        huber_delta: Width of Huber's quadratic zone, in normalised units.

    Returns:
        Scalar in the wider of float32 and the operands' dtypes. Divide it by the number of observed points
        times ``Q``.
    """
    compute = torch.promote_types(torch.promote_types(predicted.dtype, target.dtype), torch.float32)
    tau = levels.to(compute)[:, None]
    error = target.to(compute)[:, None, :] - predicted.to(compute)
    if kind == "huber":
        size = F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=huber_delta) / huber_delta
        loss = 2 * size * torch.where(error > 0, tau, 1 - tau)
    else:
        loss = 2 * torch.maximum(tau * error, (tau - 1) * error)
    # where, not a product: a masked point must not carry inf * 0 = NaN into the sum or its gradient.
    return torch.where(observed[:, None, :], loss, 0.0).sum()
