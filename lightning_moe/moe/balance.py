"""Losses that keep the experts evenly used: pure functions of what the router decided.

T tokens, K top-k, E experts, B batch, S sequence. *Scores* sum to one over the experts (the softmax, or the
sigmoids divided by their sum). Where a mask is given, tokens that it marks False count nowhere.

[Note: means over ranks]
Gradients of dense parameters are averaged over the N ranks that see different tokens, so every loss here is
scaled such that its mean over those ranks is the loss that is meant. For the global loss this is exact for
any number of tokens per rank. The other three are means over what one rank sees (one micro-batch), so their
mean over ranks is the mean over the whole batch when all ranks hold equally many real tokens (z-loss) or
sequences (sequence-wise loss).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.moe.choices import count_choices


def auxiliary_loss(scores: Tensor, tokens_per_expert: Tensor, top_k: int, mask: Tensor | None = None) -> Tensor:
    """Load-balancing loss of one rank's micro-batch, ``E * sum_i f_i P_i`` (arXiv:2101.03961, eq. 4).

    ``f_i`` is the fraction of the ``T * K`` choices that fell on expert ``i`` and ``P_i`` the mean score of
    expert ``i``; the value is 1 when both are uniform. Megatron-core uses the same definition; Hugging Face
    leaves ``f_i`` undivided by ``K``, so its values are ``K`` times larger.

    Args:
        scores: ``[T, E]``.
        tokens_per_expert: Choices of real tokens per expert, int64 ``[E]``.
        top_k: Choices per token ``K``.
        mask: Bool ``[T]``, True for real tokens.

    Returns:
        Scalar in the dtype of ``scores``; 0 without a token. Only ``P`` carries a gradient.
    """
    return _balance(scores, tokens_per_expert, top_k, mask)


def global_auxiliary_loss(
    scores: Tensor,
    tokens_per_expert: Tensor,
    top_k: int,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Load-balancing loss of the global batch (arXiv:2501.11873): ``f`` counts the tokens of all ranks.

    With ``c_r`` the choices and ``s_r`` the summed scores of rank ``r`` and ``T`` the tokens of all ranks,
    the loss of the global batch is ``E * sum_i (sum_r c_ri / TK) * (sum_r s_ri / T)``. Rank ``r`` returns
    ``N`` times its own term of the second sum, so the mean over the ``N`` ranks is that loss, and the mean of
    the gradients its gradient, however unevenly the tokens are spread.

    Args:
        scores: ``[T, E]`` of this rank.
        tokens_per_expert: Choices of this rank's real tokens per expert, int64 ``[E]``.
        top_k: Choices per token ``K``.
        mask: Bool ``[T]``, True for real tokens.
        group: Ranks that hold different tokens (the axis ``data_context``); a collective call on all of them.
            None for a world of one.

    Returns:
        Scalar in the dtype of ``scores``; its mean over ``group`` is the loss.
    """
    if group is None:
        return _balance(scores, tokens_per_expert, top_k, mask)
    everywhere = tokens_per_expert.clone()
    dist.all_reduce(everywhere, group=group)
    return dist.get_world_size(group) * _balance(scores, everywhere, top_k, mask)


def sequence_auxiliary_loss(scores: Tensor, experts: Tensor, mask: Tensor | None = None) -> Tensor:
    """Load-balancing loss of each sequence, then their mean (DeepSeek-V3, arXiv:2412.19437, eq. 17-20).

    Args:
        scores: ``[B, S, E]``.
        experts: Chosen experts, int64 ``[B, S, K]``.
        mask: Bool ``[B, S]``, True for real tokens.

    Returns:
        Scalar in the dtype of ``scores``: the mean over the sequences that have a real token.
    """
    batch, num_experts = scores.shape[0], scores.shape[-1]
    # One counter for each (sequence, expert) pair.
    sequence = torch.arange(batch, device=scores.device)[:, None, None]
    sent = None if mask is None else mask[..., None].expand_as(experts)
    counts = count_choices(experts + num_experts * sequence, batch * num_experts, sent)
    counts = counts.view(batch, num_experts).to(scores.dtype)
    fraction = counts / counts.sum(1, keepdim=True).clamp(min=1)
    lengths = _num_tokens(scores, mask)
    mean_score = _masked(scores, mask).sum(1) / lengths.clamp(min=1)[:, None]
    per_sequence = num_experts * (fraction * mean_score).sum(1)
    return per_sequence.sum() / (lengths > 0).sum().clamp(min=1)


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the router's logits (ST-MoE, arXiv:2202.08906, eq. 5): keeps them small.

    Args:
        logits: ``[T, E]``.
        mask: Bool ``[T]``, True for real tokens.

    Returns:
        Scalar in the dtype of ``logits``; 0 without a token.
    """
    squares = torch.logsumexp(logits, dim=-1, keepdim=True).square()
    return _masked(squares, mask).sum() / _num_tokens(logits, mask).clamp(min=1)


def _balance(scores: Tensor, tokens_per_expert: Tensor, top_k: int, mask: Tensor | None) -> Tensor:
    """``E * sum_i (c_i / TK) * (s_i / T)``, with the number of tokens ``T`` taken from the counts."""
    num_choices = tokens_per_expert.sum().clamp(min=1)
    fraction = tokens_per_expert.to(scores.dtype) / num_choices
    mean_score = _masked(scores, mask).sum(0) * top_k / num_choices
    return scores.shape[-1] * (fraction * mean_score).sum()


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values.masked_fill(~mask[..., None], 0)


def _num_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Real tokens of ``values`` ``[..., T, *]``: int64, one number per leading index."""
    if mask is None:
        return torch.full(values.shape[:-2], values.shape[-2], dtype=torch.int64, device=values.device)
    return mask.sum(-1)
