"""The router: which experts each token visits, and with which weights.

T tokens, K top-k, E experts, D model width, B batch, S sequence. For input ``[B, S, D]``, ``T = B*S``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.config.moe import MoEConfig
from lightning_moe.errors import ConfigError
from lightning_moe.moe.choices import count_choices
from lightning_moe.moe.routing_tape import RoutingTape, once
from lightning_moe.parallel.sharding import whole_init_

# DeepSeek's guard against a row of sigmoids that all underflow. It vanishes beside any other sum, so it is
# added for every kind of router.
_TINY = 1e-20


class Routing(NamedTuple):
    """What the router decided; entries of masked tokens mean nothing."""

    experts: Tensor
    """Chosen logical experts, int64 ``[T, K]``, distinct within a row."""
    weights: Tensor
    """Their weights in the combined output, ``[T, K]`` in the router's dtype."""
    logits: Tensor
    """``[T, E]`` in the router's dtype."""
    scores: Tensor
    """``[T, E]``: softmax of the logits, or their sigmoids over the row's sum; for the auxiliary losses."""
    tokens_per_expert: Tensor
    """Choices of real tokens per expert, int64 ``[E]``."""


class TopKRouter(nn.Module):
    """Scores every expert for every token and chooses the best ``K``.

    Everything runs in float32 or, on request or when the tokens are float64, in float64, whatever the
    precision of the model and under autocast too: rounding the logits to half precision changes which experts
    are chosen.

    Args:
        hidden_size: Width ``D`` of the tokens.
        config: The layer's settings.

    Attributes:
        weight: ``[E, D]``.
        expert_bias: float32 buffer ``[E]``, added to the scores for the choice only; with
            ``config.expert_bias``.
        tokens_since_update: int64 buffer ``[E]``, this rank's choices since the last
            :meth:`update_expert_bias`.
    """

    expert_bias: Tensor | None
    tokens_since_update: Tensor | None

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.expert_bias else None
        counts = torch.zeros(config.num_experts, dtype=torch.int64) if config.expert_bias else None
        self.register_buffer("expert_bias", bias)
        self.register_buffer("tokens_since_update", counts, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as ``nn.Linear`` does, U(-D^-0.5, D^-0.5), and forget the expert bias."""
        whole_init_(self.weight, lambda weight: nn.init.kaiming_uniform_(weight, a=5**0.5))
        if self.expert_bias is not None and self.tokens_since_update is not None:
            self.expert_bias.zero_()
            self.tokens_since_update.zero_()

    def forward(self, hidden: Tensor, mask: Tensor | None = None, saved: RoutingTape | None = None) -> Routing:
        """Route the tokens.

        Args:
            hidden: ``[B, S, D]``, or ``[T, D]`` when tokens are routed by themselves.
            mask: Bool ``[B, S]`` or ``[T]``, True for real tokens; None for all.
            saved: Tape of the checkpointed function that the call is part of: the choices of its first run are
                repeated, and counted once.

        Raises:
            ConfigError: Routing by series got tokens that are not arranged in sequences.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self._logits(hidden, mask)
            probabilities = logits.softmax(-1) if self.config.router_score == "softmax" else logits.sigmoid()
            flat_mask = None if mask is None else mask.flatten()
            experts, counts = once(saved, lambda: self._decide(logits, probabilities, flat_mask))
            weights = self._weights(logits, probabilities, experts)
            scores = probabilities
            if self.config.router_score == "sigmoid":
                scores = probabilities / (probabilities.sum(-1, keepdim=True) + _TINY)
        return Routing(experts, weights, logits, scores, counts)

    @torch.no_grad()
    def update_expert_bias(self, group: dist.ProcessGroup | None = None) -> None:
        """Move the expert bias against the load since the last update (arXiv:2408.15664, algorithm 1).

        ``bias += rate * sign(mean load - load)``. Call it after each optimizer step, on all ranks of
        ``group``; every rank then holds the same bias. Does nothing without ``config.expert_bias``.

        Args:
            group: Ranks that routed different tokens (the axis ``data_context_tensor``); None for a world of one.
        """
        if self.expert_bias is None or self.tokens_since_update is None:
            return
        counts = self.tokens_since_update
        if group is not None:
            dist.all_reduce(counts, group=group)
        # sign(mean - count) in integers, so that a load that equals the mean never moves by a rounding error.
        direction = torch.sign(counts.sum() - self.config.num_experts * counts)
        self.expert_bias += self.config.expert_bias_update_rate * direction
        counts.zero_()

    def _logits(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """``[T, E]`` in the router's dtype."""
        dtype = torch.promote_types(hidden.dtype, getattr(torch, self.config.router_dtype))
        hidden, weight = hidden.to(dtype), self.weight.to(dtype)
        if self.config.routing_granularity == "token":
            return F.linear(hidden, weight).flatten(0, -2)
        if hidden.dim() != 3:
            raise ConfigError(
                "moe.routing_granularity",
                "series",
                f"with tokens [B, S, D], not {tuple(hidden.shape)}",
                'use "token"',
            )
        # All tokens of a series carry the decision of its mean token, so that every loss and count below
        # stays per token.
        logits = F.linear(_masked_mean(hidden, mask), weight)
        return logits[:, None].expand(-1, hidden.shape[1], -1).flatten(0, 1)

    @torch.no_grad()
    def _decide(self, logits: Tensor, probabilities: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Experts ``[T, K]``, and how many real tokens chose each, which are counted for the expert bias."""
        experts = self._balanced_choice(logits, mask) if self.config.force_balance else self._choice(probabilities)
        sent = None if mask is None else mask[:, None].expand_as(experts)
        counts = count_choices(experts, self.config.num_experts, sent)
        if self.training and self.tokens_since_update is not None:
            self.tokens_since_update += counts
        return experts, counts

    def _choice(self, probabilities: Tensor) -> Tensor:
        """Experts ``[T, K]`` with the best biased scores, inside the best groups."""
        config = self.config
        biased = probabilities
        if self.expert_bias is not None:
            biased = biased + self.expert_bias
        if config.num_groups > 1:
            biased = _limit_to_groups(biased, config.num_groups, config.top_k_groups)
        return biased.topk(config.top_k, dim=-1).indices

    def _balanced_choice(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        """Experts ``[T, K]`` dealt out in turn to the real tokens: loads differ by at most one."""
        num_tokens, num_experts = logits.shape
        real = torch.ones(num_tokens, dtype=torch.bool, device=logits.device) if mask is None else mask
        token = real.cumsum(0) - 1
        slot = torch.arange(self.config.top_k, device=logits.device)
        return (token[:, None] * self.config.top_k + slot).remainder(num_experts)

    def _weights(self, logits: Tensor, probabilities: Tensor, experts: Tensor) -> Tensor:
        """Weights ``[T, K]`` of the chosen experts."""
        config = self.config
        if config.router_score == "softmax" and not config.router_pre_softmax:
            weights = logits.gather(-1, experts).softmax(-1)
        else:
            weights = probabilities.gather(-1, experts)
            if config.renormalize:
                weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
        return weights if config.routed_scaling_factor == 1 else weights * config.routed_scaling_factor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TopKRouter:
        # module.bfloat16() converts floating-point buffers; in bf16 a bias of 0.3 no longer moves by steps of
        # 0.001.
        bias = self.expert_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if bias is not None and self.expert_bias is not None:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self


def _masked_mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of the real tokens of each sequence, ``[B, S, D]`` to ``[B, D]``; 0 for a sequence without one."""
    if mask is None:
        return hidden.mean(1)
    total = hidden.masked_fill(~mask[..., None], 0).sum(1)
    return total / mask.sum(1, keepdim=True).clamp(min=1)


def _limit_to_groups(scores: Tensor, num_groups: int, top_k_groups: int) -> Tensor:
    """Set scores outside the best groups to -inf (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

    Args:
        scores: ``[T, E]``; group ``g`` is the ``g``-th run of ``E / num_groups`` experts.
        num_groups: Number of groups.
        top_k_groups: Groups left to choose from: those with the largest sum of their two best scores.
    """
    grouped = scores.view(scores.shape[0], num_groups, scores.shape[1] // num_groups)
    best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    chosen = best.topk(top_k_groups, dim=-1).indices
    excluded = torch.ones_like(best, dtype=torch.bool).scatter_(-1, chosen, False)
    return grouped.masked_fill(excluded[..., None], float("-inf")).view_as(scores)
