"""The Chronos-MoE network: an encoder over patches that emits every quantile of the horizon in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_moe.config.chronos import ChronosMoEConfig
from lightning_moe.layers import ResidualBlock, RMSNorm, rope_tables
from lightning_moe.models.chronos_moe.block import ChronosBlock
from lightning_moe.models.chronos_moe.patching import (
    InstanceStatistics,
    context_patches,
    denormalize,
    fit_context,
    future_patches,
    instance_statistics,
    normalize,
)
from lightning_moe.moe.layer import MoELayer, RoutingInfo
from lightning_moe.moe.participation import number_layers
from lightning_moe.parallel.mesh import ParallelMesh

# Shapes: B batch, C context steps, H horizon steps, L patch length, N patches, S tokens, D model width, Q
# quantiles.


class ChronosMoEOutput(NamedTuple):
    """What one forward pass gives."""

    quantiles: Tensor
    """``[B, Q, H]`` in normalised units, the model's dtype."""
    statistics: InstanceStatistics
    """Level and spread of each context, to normalise the target and to return to original units."""
    routing: tuple[RoutingInfo, ...]
    """What each MoE layer's router did; empty for a dense model."""


class ChronosMoEModel(nn.Module):
    """Encoder-only forecaster in the manner of Chronos-2 (arXiv:2510.15821) with MoE feed-forward layers.

    The tokens are the patches of the context, a learned [REG] token and one token per patch of the horizon.
    A patch without any observation is neither attended to nor routed to experts.

    Args:
        config: Sizes of the network.
        mesh: Where the experts live; None builds all of them here.
    """

    def __init__(self, config: ChronosMoEConfig, mesh: ParallelMesh | None = None) -> None:
        super().__init__()
        self.config = config
        patch_features = 3 * config.patch_length
        self.num_future_patches = -(-config.prediction_length // config.patch_length)
        self.patch_embedding = ResidualBlock(patch_features, config.ffn_hidden_size, config.hidden_size)
        self.reg_token = nn.Parameter(torch.randn(config.hidden_size) * 0.02)
        self.blocks = nn.ModuleList(ChronosBlock(config, mesh) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size)
        self.quantile_head = ResidualBlock(
            config.hidden_size, config.ffn_hidden_size, len(config.quantiles) * config.patch_length
        )
        number_layers([module for module in self.modules() if isinstance(module, MoELayer)])
        # Not a buffer: casting the module to bfloat16 would turn the level 0.1 into 0.10009765625.
        self._levels = torch.tensor(config.quantiles, dtype=torch.float64)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.reg_token.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.reg_token.device

    def quantile_levels(self, like: Tensor) -> Tensor:
        """The trained quantile levels ``[Q]`` on ``like``'s device and in its dtype (float32 at least)."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        self._levels = self._levels.to(like.device)
        return self._levels.to(dtype)

    def forward(self, context: Tensor) -> ChronosMoEOutput:
        """Forecast ``config.prediction_length`` steps.

        Args:
            context: ``[B, T]`` of any length, oldest first, NaN (or infinity) where nothing was observed.
                Only the last ``config.context_length`` steps are used. The instance norm runs in its dtype,
                float32 at least.

        Returns:
            Normalised quantiles with what is needed to return to original units; see :meth:`denormalize`.
        """
        config = self.config
        context = fit_context(context, config.context_length, config.patch_length)
        context = context.to(torch.promote_types(context.dtype, torch.float32))
        observed = context.isfinite()
        values = torch.where(observed, context, 0.0)
        statistics = instance_statistics(values, observed)
        normalized = torch.where(observed, normalize(values, statistics, config.use_arcsinh), 0.0)

        patches = context_patches(normalized, observed, config.patch_length, config.context_length).to(self.dtype)
        future = future_patches(self.num_future_patches, config.patch_length, config.context_length, patches)
        batch = patches.shape[0]
        past = self.patch_embedding(patches)
        rest = torch.cat((self.reg_token[None].to(past.dtype), self.patch_embedding(future)))
        # Under autocast the embedding is in 16 bits; the residual stream keeps the weights' precision.
        hidden = torch.cat((past, rest.expand(batch, -1, -1)), dim=1).to(self.dtype)
        has_data = observed.view(batch, -1, config.patch_length).any(-1)
        mask = torch.cat((has_data, has_data.new_ones(batch, rest.shape[0])), dim=1)

        head_size = config.hidden_size // config.num_heads
        rope = rope_tables(hidden.shape[1], head_size, config.rope_theta, self.dtype, hidden.device)
        routing = []
        for block in self.blocks:
            hidden, routed = block(hidden, rope, mask)
            if routed is not None:
                routing.append(routed)

        head = self.quantile_head(self.final_norm(hidden[:, -self.num_future_patches :]))
        per_patch = head.view(batch, self.num_future_patches, len(config.quantiles), config.patch_length)
        quantiles = per_patch.transpose(1, 2).reshape(batch, len(config.quantiles), -1)
        return ChronosMoEOutput(quantiles[..., : config.prediction_length], statistics, tuple(routing))

    def normalize_target(self, target: Tensor, statistics: InstanceStatistics) -> tuple[Tensor, Tensor]:
        """Bring a target ``[B, H]`` with gaps into normalised units.

        Returns:
            The normalised target, zero where nothing was observed, and the bool mask ``[B, H]`` of what was.
        """
        observed = target.isfinite()
        values = torch.where(observed, target, statistics.loc)
        return normalize(values, statistics, self.config.use_arcsinh), observed

    def denormalize(self, output: ChronosMoEOutput) -> Tensor:
        """The quantiles ``[B, Q, H]`` of an output in the units of its context, ascending over ``Q``.

        Computed in the statistics' dtype. Sorting removes crossings, which never hurts the pinball loss.
        """
        quantiles = output.quantiles.to(output.statistics.loc.dtype)
        return denormalize(quantiles, output.statistics, self.config.use_arcsinh).sort(dim=1).values
