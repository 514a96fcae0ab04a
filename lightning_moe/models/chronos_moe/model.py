"""The Chronos-MoE network: an encoder over patches that emits every quantile of the horizon in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_moe.config.chronos import ChronosMoEConfig
from lightning_moe.errors import ConfigError
from lightning_moe.layers import ResidualBlock, RMSNorm, rope_tables
from lightning_moe.models.chronos_moe.block import ChronosBlock
from lightning_moe.models.chronos_moe.loss import quantile_loss_sum
from lightning_moe.models.chronos_moe.patching import (
    InstanceStatistics,
    NormalizedContext,
    context_patches,
    denormalize,
    fit_context,
    future_patches,
    normalize,
    normalize_context,
)
from lightning_moe.models.pipelined import NetworkInParts
from lightning_moe.models.routing import as_metric, auxiliary_loss, routing_metrics
from lightning_moe.models.tasks import Predicting, Training
from lightning_moe.moe.layer import MoELayer, RoutingInfo
from lightning_moe.moe.participation import number_layers
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.pipeline.parts import ModelPart
from lightning_moe.pipeline.spec import Carry, Microbatch, PartOutput

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


class ChronosMoEModel(NetworkInParts):
    """Encoder-only forecaster in the manner of Chronos-2 (arXiv:2510.15821) with MoE feed-forward layers.

    The tokens are the patches of the context, a learned [REG] token and one token per patch of the horizon.
    A patch without any observation is neither attended to nor routed to experts.

    Args:
        config: Sizes of the network.
        mesh: Where the experts live; None builds all of them here.
        parts: What of the model to keep, for a pipeline; None keeps all of it. The names and the initial weights are
            those of a whole model that is built with the same seed.

    Attributes:
        parts: What has been kept; None for a model that was not cut for a pipeline.
    """

    def __init__(
        self,
        config: ChronosMoEConfig,
        mesh: ParallelMesh | None = None,
        *,
        parts: Sequence[ModelPart] | None = None,
    ) -> None:
        super().__init__(config.num_layers, parts)
        self.config = config
        own = self.own_parts
        first, last = any(part.first for part in own), any(part.last for part in own)
        layers = {layer for part in own for layer in part.blocks}
        patch_features, width = 3 * config.patch_length, config.hidden_size
        self.num_future_patches = -(-config.prediction_length // config.patch_length)
        # Everything is built, and what is not kept is dropped at once: torch's own layers draw their initial weights
        # from a common generator, one after the other.
        patch_embedding = ResidualBlock(patch_features, config.ffn_hidden_size, width)
        reg_token = nn.Parameter(torch.randn(width) * 0.02)
        self.patch_embedding = patch_embedding if first else None
        self.reg_token = reg_token if first else None
        self.blocks = nn.ModuleList()
        for layer in range(config.num_layers):
            block = ChronosBlock(config, mesh)
            if layer in layers:
                self.blocks.add_module(str(layer), block)
        quantile_head = ResidualBlock(width, config.ffn_hidden_size, len(config.quantiles) * config.patch_length)
        self.final_norm = RMSNorm(width) if last else None
        self.quantile_head = quantile_head if last else None
        number_layers([module for module in self.modules() if isinstance(module, MoELayer)])
        # Not a buffer: casting the module to bfloat16 would turn the level 0.1 into 0.10009765625.
        self._levels = torch.tensor(config.quantiles, dtype=torch.float64)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

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

        Raises:
            ConfigError: Only a part of the model is held.
        """
        normalized = self._normalized(context)
        hidden, routing = self._through(self.whole(), None, normalized)
        return ChronosMoEOutput(self._quantiles(hidden), normalized.statistics, tuple(routing.values()))

    # ---- parts

    @override
    def _run(self, part: ModelPart, carry: Carry, microbatch: Microbatch) -> PartOutput:
        """Parts hand on the tokens ``[B, S, D]``; the last predicts quantiles ``[B, Q, H]`` in the context's units."""
        task, normalized = microbatch.context, self._normalized(microbatch.data["context"])
        hidden, routing = self._through(part, carry[0] if carry else None, normalized)
        metrics = routing_metrics(routing, self.config.num_layers, microbatch.weight)
        loss = quantiles = None
        if part.last:
            output = ChronosMoEOutput(self._quantiles(hidden), normalized.statistics, tuple(routing.values()))
            predicting = isinstance(task, Predicting)
            loss_sum = hidden.new_zeros(()) if predicting else self.loss_sum(output, microbatch.data["target"])
            metrics["loss_sum"] = as_metric(loss_sum)
            if isinstance(task, Training):
                loss = task.loss(loss_sum, microbatch.weight)
            else:
                quantiles = self.denormalize(output)
        if isinstance(task, Training) and routing:
            auxiliary = auxiliary_loss(routing.values())
            loss = auxiliary if loss is None else loss + auxiliary
        return PartOutput(() if part.last else (hidden,), loss, metrics, quantiles)

    def _normalized(self, context: Tensor) -> NormalizedContext:
        config = self.config
        return normalize_context(fit_context(context, config.context_length, config.patch_length), config.use_arcsinh)

    def _through(
        self, part: ModelPart, hidden: Tensor | None, context: NormalizedContext
    ) -> tuple[Tensor, dict[int, RoutingInfo]]:
        """Tokens ``[B, S, D]`` after a part's blocks, and what the routers did, by layer."""
        config = self.config
        if part.first:
            hidden = self._embed(context)
        assert hidden is not None, "the part before it gives them"
        batch, length = hidden.shape[:2]
        has_data = context.observed.view(batch, -1, config.patch_length).any(-1)
        mask = torch.cat((has_data, has_data.new_ones(batch, length - has_data.shape[1])), dim=1)
        head_size = config.hidden_size // config.num_heads
        rope = rope_tables(length, head_size, config.rope_theta, self.dtype, hidden.device)
        routing: dict[int, RoutingInfo] = {}
        for layer in part.blocks:
            hidden, routed = self.blocks.get_submodule(str(layer))(hidden, rope, mask)
            if routed is not None:
                routing[layer] = routed
        assert hidden is not None
        return hidden, routing

    def _embed(self, context: NormalizedContext) -> Tensor:
        """Tokens ``[B, S, D]``: patches of the context, the [REG] token, patches of the horizon."""
        config = self.config
        assert self.patch_embedding is not None
        assert self.reg_token is not None
        patches = context_patches(context.values, context.observed, config.patch_length, config.context_length)
        patches = patches.to(self.dtype)
        future = future_patches(self.num_future_patches, config.patch_length, config.context_length, patches)
        past = self.patch_embedding(patches)
        rest = torch.cat((self.reg_token[None].to(past.dtype), self.patch_embedding(future)))
        # Under autocast the embedding is in 16 bits; the residual stream keeps the weights' precision.
        return torch.cat((past, rest.expand(len(past), -1, -1)), dim=1).to(self.dtype)

    def _quantiles(self, hidden: Tensor) -> Tensor:
        """Quantiles ``[B, Q, H]`` in normalised units, from the tokens of the horizon."""
        config = self.config
        assert self.final_norm is not None
        assert self.quantile_head is not None
        head = self.quantile_head(self.final_norm(hidden[:, -self.num_future_patches :]))
        per_patch = head.view(len(hidden), self.num_future_patches, len(config.quantiles), config.patch_length)
        quantiles = per_patch.transpose(1, 2).reshape(len(hidden), len(config.quantiles), -1)
        forecast: Tensor = quantiles[..., : config.prediction_length]
        return forecast

    # ---- targets and units

    def loss_sum(self, output: ChronosMoEOutput, target: Tensor) -> Tensor:
        """Sum of the quantile loss over observed points and levels (see :meth:`num_terms`), scalar.

        Args:
            output: Of :meth:`forward`.
            target: ``[B, H]`` in the units of the context, of at most ``config.prediction_length`` steps.

        Raises:
            ConfigError: The target is longer than the horizon.
        """
        config, horizon = self.config, target.shape[1]
        if horizon > config.prediction_length:
            raise ConfigError(
                "data.prediction_length", horizon, f"at most config.prediction_length = {config.prediction_length}"
            )
        normalized, observed = self.normalize_target(target, output.statistics)
        quantiles = output.quantiles[..., :horizon]
        levels = self.quantile_levels(quantiles)
        return quantile_loss_sum(quantiles, normalized, observed, levels, config.loss, config.huber_delta)

    def num_terms(self, target: Tensor) -> Tensor:
        """Number of terms of the loss of a target, int64 scalar: observed points times levels."""
        return target.isfinite().sum() * len(self.config.quantiles)

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
