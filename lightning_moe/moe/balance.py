"""Losses that keep the experts evenly used: pure functions of what the router decided.

T tokens, K top-k, E experts, B sequences. *Scores* sum to one over the experts (the softmax, or the sigmoids divided
by their sum). Where a mask is given, tokens that it marks False count nowhere.

[Note: terms of a loss]
The tokens that are balanced together may be spread over ranks. Every loss here is a sum over tokens whose coefficients
follow from counts; given the counts of all those ranks, each rank computes its own tokens' term of the sum. Only the
scores carry gradients, so the gradient of its own term is all that a rank needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moe.moe.choices import count_choices


def auxiliary_loss(scores: Tensor, tokens_per_expert: Tensor, top_k: int, mask: Tensor | None = None) -> Tensor:
    """Load-balancing loss ``E * sum_i f_i P_i`` (arXiv:2101.03961, eq. 4).

    ``f_i`` is the fraction of the ``T * K`` choices that fell on expert ``i`` and ``P_i`` the mean score of
    expert ``i``; the value is 1 when both are uniform. Megatron-core uses the same definition; Hugging Face
    leaves ``f_i`` undivided by ``K``, so its values are ``K`` times larger.

    Args:
        scores: ``[T, E]`` of this rank.
        tokens_per_expert: Choices of real tokens per expert, int64 ``[E]``, of all ranks whose tokens are balanced
            together.
        top_k: Choices per token ``K``.
        mask: Bool ``[T]``, True for real tokens.

    Returns:
        Scalar in the dtype of ``scores``, this rank's term; 0 without a token. Only ``P`` carries a gradient.
    """
    num_choices = tokens_per_expert.sum().clamp(min=1)
    # All factors but the scores at once: each operation on E numbers is a launch, and a layer has many of them.
    coefficient = tokens_per_expert.to(scores.dtype) * (scores.shape[-1] * top_k) / num_choices.square()
    return _masked(scores, mask).sum(0).dot(coefficient)


def sequence_auxiliary_loss(
    scores: Tensor, sequence: Tensor, tokens_per_expert: Tensor, top_k: int, mask: Tensor | None = None
) -> Tensor:
    """Load-balancing loss of each sequence, then their mean (DeepSeek-V3, arXiv:2412.19437, eq. 17-20).

    Args:
        scores: ``[T, E]`` of this rank.
        sequence: Sequence of each token, int64 ``[T]``, in ``[0, B)``.
        tokens_per_expert: Choices of real tokens per sequence and expert, int64 ``[B, E]`` (see
            :func:`count_by_sequence`), of all ranks that hold tokens of these sequences.
        top_k: Choices per token ``K``.
        mask: Bool ``[T]``, True for real tokens.

    Returns:
        Scalar in the dtype of ``scores``, this rank's term of the mean over the sequences that have a real token.
    """
    choices = tokens_per_expert.sum(1, keepdim=True)
    num_sequences = (choices > 0).sum().clamp(min=1)
    choices = choices.clamp(min=1).to(scores.dtype)
    fraction = tokens_per_expert.to(scores.dtype) / choices
    coefficient = scores.shape[-1] * fraction * top_k / (choices * num_sequences)
    # Each token reads its sequence's coefficients. Adding the scores up by sequence instead would use atomics on CUDA.
    return (_masked(scores, mask) * coefficient[sequence]).sum()


def count_by_sequence(experts: Tensor, sequence: Tensor, shape: tuple[int, int], mask: Tensor | None = None) -> Tensor:
    """Choices of real tokens per sequence and expert.

    Args:
        experts: Chosen experts, int64 ``[T, K]``.
        sequence: Sequence of each token, int64 ``[T]``.
        shape: Numbers of sequences ``B`` and experts ``E``.
        mask: Bool ``[T]``, True for real tokens.

    Returns:
        int64 ``[B, E]``.
    """
    batch, num_experts = shape
    sent = None if mask is None else mask[:, None].expand_as(experts)
    return count_choices(experts + num_experts * sequence[:, None], batch * num_experts, sent).view(shape)


def z_loss(logits: Tensor, num_tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the router's logits (ST-MoE, arXiv:2202.08906, eq. 5): keeps them small.

    Args:
        logits: ``[T, E]`` of this rank.
        num_tokens: Real tokens of all ranks that the mean is taken over, int64 scalar.
        mask: Bool ``[T]``, True for real tokens.

    Returns:
        Scalar in the dtype of ``logits``, this rank's term of the mean; 0 without a token.
    """
    squares = torch.logsumexp(logits, dim=-1, keepdim=True).square()
    return _masked(squares, mask).sum() / num_tokens.clamp(min=1)


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values.masked_fill(~mask[:, None], 0)
