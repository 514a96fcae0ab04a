"""From a series with gaps to patches: NaN-aware instance norm, and the [time, value, mask] encoding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Shapes: B batch, C context steps, N patches, L patch length.

_CONSTANT_SCALE = 1e-3
"""Scale given to a constant series, as a fraction of its level."""


class InstanceStatistics(NamedTuple):
    """Level and spread of each series' observed context, each ``[B, 1]`` in float32 or float64."""

    loc: Tensor
    scale: Tensor


class NormalizedContext(NamedTuple):
    """A context in normalised units."""

    values: Tensor
    """``[B, C]``, zero where not observed."""
    observed: Tensor
    """bool ``[B, C]``."""
    statistics: InstanceStatistics
    """What it was normalised by."""


def normalize_context(context: Tensor, use_arcsinh: bool) -> NormalizedContext:
    """Bring each series to level 0 and spread 1.

    Args:
        context: ``[B, C]``, NaN or infinity where not observed; computed in its dtype, float32 at least.
        use_arcsinh: See :func:`normalize`.
    """
    context = context.to(torch.promote_types(context.dtype, torch.float32))
    observed = context.isfinite()
    values = torch.where(observed, context, 0.0)
    statistics = instance_statistics(values, observed)
    values = torch.where(observed, normalize(values, statistics, use_arcsinh), 0.0)
    return NormalizedContext(values, observed, statistics)


def instance_statistics(values: Tensor, observed: Tensor) -> InstanceStatistics:
    """Mean and standard deviation (without Bessel's correction) over the observed steps of each series.

    A series whose spread is rounding noise counts as constant and gets 1/1000 of its level as scale (1 when
    the level is 0 or nothing was observed): dividing by the noise would turn it into a signal of size one.

    Args:
        values: ``[B, C]``, finite, zero where not observed; float32 or float64.
        observed: bool ``[B, C]``.
    """
    weight = observed.to(values.dtype)
    count = weight.sum(-1, keepdim=True).clamp(min=1)
    loc = values.sum(-1, keepdim=True) / count
    deviation = (values - loc) * weight
    # Squares of values beyond 1e19 overflow in float32, those below 1e-23 vanish: take the largest out first.
    largest = deviation.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    variance = (deviation / largest).square().sum(-1, keepdim=True) / count
    level = loc.abs()
    constant = variance.sqrt() * largest <= 8 * torch.finfo(values.dtype).eps * level
    fallback = torch.where(level > 0, _CONSTANT_SCALE * level, 1.0)
    # sqrt of the *selected* variance: the gradient of sqrt at 0 is infinite, and infinity times the 0 of the
    # branch not taken is NaN.
    scale = torch.where(constant, fallback, torch.where(constant, 1.0, variance).sqrt() * largest)
    return InstanceStatistics(loc, scale)


def normalize(values: Tensor, statistics: InstanceStatistics, use_arcsinh: bool) -> Tensor:
    """``(values - loc) / scale``, then ``arcsinh``: linear near zero, logarithmic for outliers.

    Args:
        values: ``[B, T]`` finite; computed and returned in the wider of its dtype and the statistics'.
        statistics: Level and spread per series.
        use_arcsinh: Whether to apply ``arcsinh``.
    """
    standard = (values - statistics.loc) / statistics.scale
    return standard.asinh() if use_arcsinh else standard


def denormalize(normalized: Tensor, statistics: InstanceStatistics, use_arcsinh: bool) -> Tensor:
    """Invert :func:`normalize` for ``[B, Q, H]`` quantiles; monotone, so that quantiles stay quantiles."""
    standard = normalized.sinh() if use_arcsinh else normalized
    return standard * statistics.scale[..., None] + statistics.loc[..., None]


def fit_context(context: Tensor, context_length: int, patch_length: int) -> Tensor:
    """Keep the last ``context_length`` steps and pad with NaN on the left to whole patches.

    Args:
        context: ``[B, T]`` of any length ``T``.
        context_length: Most steps to keep; a multiple of ``patch_length``.
        patch_length: Steps per patch ``L``.

    Returns:
        ``[B, C]``, ``C`` a multiple of ``L`` between ``L`` and ``context_length``. A shorter context yields
        fewer tokens and the same forecast: fully padded patches are masked, and rotary positions are
        relative.
    """
    context = context[:, -context_length:]
    missing = -context.shape[1] % patch_length if context.shape[1] else patch_length
    return F.pad(context, (missing, 0), value=float("nan")) if missing else context


def context_patches(normalized: Tensor, observed: Tensor, patch_length: int, context_length: int) -> Tensor:
    """Encode a normalised context as patches of ``[time, value, mask]``.

    The time of the step ``j`` before the forecast begins is ``-j / context_length`` (Chronos-2,
    arXiv:2510.15821).

    Args:
        normalized: ``[B, C]``, zero where not observed.
        observed: bool ``[B, C]``.
        patch_length: ``L``; divides ``C``.
        context_length: Unit of time.

    Returns:
        ``[B, C / L, 3 L]`` in the dtype of ``normalized``.
    """
    batch, steps = normalized.shape
    time = torch.arange(-steps, 0, dtype=normalized.dtype, device=normalized.device) / context_length
    parts = (time.expand(batch, steps), normalized, observed.to(normalized.dtype))
    return torch.cat([part.reshape(batch, -1, patch_length) for part in parts], dim=-1)


def future_patches(num_patches: int, patch_length: int, context_length: int, like: Tensor) -> Tensor:
    """Encode the horizon as patches of ``[time, 0, 0]``.

    Returns:
        ``[num_patches, 3 * patch_length]`` in the dtype and on the device of ``like``.
    """
    steps = num_patches * patch_length
    time = torch.arange(steps, dtype=like.dtype, device=like.device) / context_length
    return F.pad(time.view(num_patches, patch_length), (0, 2 * patch_length))
