"""The layer written as loops over tokens and experts, from the definitions; nothing of the package is
used."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_moe.config.moe import MoEConfig

Choices = list[list[tuple[int, Tensor]]]
"""For each token its (expert, weight) pairs."""


def naive_expert(config: MoEConfig, state: dict[str, Tensor], prefix: str, token: Tensor, expert: int | None) -> Tensor:
    """One expert on one token; ``expert`` None for unstacked weights."""

    def matrix(name: str) -> Tensor:
        value = state[f"{prefix}.{name}"]
        return value if expert is None else value[expert]

    if config.activation == "swiglu":
        gate_up = matrix("gate_up_proj") @ token
        width = gate_up.numel() // 2
        gate, up = gate_up[:width], gate_up[width:]
        inner = gate * torch.sigmoid(gate) * up
    else:
        up = matrix("up_proj") @ token
        half = 0.5 * (1 + torch.erf(up / math.sqrt(2)))
        inner = up * half if config.activation == "gelu" else torch.where(up > 0, up, torch.zeros_like(up))
    return matrix("down_proj") @ inner


def naive_choices(config: MoEConfig, state: dict[str, Tensor], hidden: Tensor, mask: Tensor | None) -> Choices:
    """Choices for ``hidden`` ``[B, S, D]`` or ``[T, D]``; masked tokens get none."""
    sequences = [hidden] if hidden.dim() == 2 else list(hidden)
    masks = [None] * len(sequences) if mask is None else ([mask] if hidden.dim() == 2 else list(mask))
    choices: Choices = []
    for tokens, real in zip(sequences, masks, strict=True):
        flags = [True] * len(tokens) if real is None else [bool(flag) for flag in real]
        pooled = [token for token, flag in zip(tokens, flags, strict=True) if flag]
        for token, flag in zip(tokens, flags, strict=True):
            if not flag:
                choices.append([])
                continue
            source = token if config.routing_granularity == "token" else sum(pooled) / len(pooled)
            choices.append(_choose(config, state, source))
    return choices


def naive_layer(
    config: MoEConfig,
    state: dict[str, Tensor],
    hidden: Tensor,
    mask: Tensor | None = None,
    choices: Choices | None = None,
) -> Tensor:
    """Output for ``hidden``; ``choices`` overrides the router."""
    choices = naive_choices(config, state, hidden, mask) if choices is None else choices
    rows = []
    flags = [True] * len(choices) if mask is None else [bool(flag) for flag in mask.flatten()]
    for token, pairs, flag in zip(hidden.flatten(0, -2), choices, flags, strict=True):
        row = torch.zeros_like(token)
        for expert, weight in pairs:
            row = row + weight * naive_expert(config, state, "experts", token, expert)
        if flag and config.shared_expert_hidden_size:
            shared = naive_expert(config, state, "shared_expert", token, None)
            if config.shared_expert_gate:
                shared = shared * torch.sigmoid(state["shared_expert.gate"][0] @ token)
            row = row + shared
        rows.append(row)
    return torch.stack(rows).view(hidden.shape) if rows else torch.zeros_like(hidden)


def naive_capacity(config: MoEConfig, choices: Choices) -> tuple[Choices, int]:
    """Drop choices beyond the capacity; returns what is left, and how many were dropped."""
    num_tokens = sum(1 for pairs in choices if pairs)
    assert config.capacity_factor is not None
    capacity = math.ceil(num_tokens * config.top_k / config.num_experts * config.capacity_factor)
    kept: Choices = [[] for _ in choices]
    dropped = 0
    for expert in range(config.num_experts):
        takers = [(t, w) for t, pairs in enumerate(choices) for e, w in pairs if e == expert]
        if config.drop_policy == "probability":
            takers = sorted(takers, key=lambda taker: (-taker[1].item(), taker[0]))
        for token, weight in takers[:capacity]:
            kept[token].append((expert, weight))
        dropped += max(0, len(takers) - capacity)
    return kept, dropped


def _choose(config: MoEConfig, state: dict[str, Tensor], token: Tensor) -> list[tuple[int, Tensor]]:
    logits = state["router.weight"] @ token
    if config.router_score == "softmax":
        scores = torch.exp(logits) / torch.exp(logits).sum()
    else:
        scores = 1 / (1 + torch.exp(-logits))
    biased = scores.detach()
    if "router.expert_bias" in state:
        biased = biased + state["router.expert_bias"]
    allowed = list(range(config.num_experts))
    if config.num_groups > 1:
        size = config.num_experts // config.num_groups
        groups = [list(range(g * size, (g + 1) * size)) for g in range(config.num_groups)]
        best = [sum(sorted((biased[e].item() for e in group), reverse=True)[:2]) for group in groups]
        chosen = sorted(range(len(groups)), key=lambda g: -best[g])[: config.top_k_groups]
        allowed = [e for g in chosen for e in groups[g]]
    experts = sorted(allowed, key=lambda e: -biased[e].item())[: config.top_k]
    weights = [scores[e] for e in experts]
    if config.router_score == "softmax" and not config.router_pre_softmax:
        total = sum(torch.exp(logits[e]) for e in experts)
        weights = [torch.exp(logits[e]) / total for e in experts]
    elif config.renormalize:
        weights = [weight / sum(weights) for weight in weights]
    return [(e, weight * config.routed_scaling_factor) for e, weight in zip(experts, weights, strict=True)]
