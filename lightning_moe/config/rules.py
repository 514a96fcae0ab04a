"""The rules that fields of one configuration must obey together, one small function each (torch-free).

Rules run in the order of the tuples below. A rule may rely on those before it: it runs only on values that they let
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from lightning_moe.config.ranges import Rule, above, at_least, divisors, within
from lightning_moe.errors import ConfigError

if TYPE_CHECKING:
    from lightning_moe.config.chronos import ChronosMoEConfig
    from lightning_moe.config.moe import MoEConfig
    from lightning_moe.config.optimizer import OptimizerConfig

# --- MoEConfig


def top_k_within_experts(config: MoEConfig) -> ConfigError | None:
    """A token cannot visit more experts than there are."""
    if config.top_k <= config.num_experts:
        return None
    return ConfigError("top_k", config.top_k, f"at most num_experts = {config.num_experts}", "lower it or add experts")


def groups_divide_experts(config: MoEConfig) -> ConfigError | None:
    """Expert groups have equal sizes."""
    if config.num_experts % config.num_groups == 0:
        return None
    return ConfigError(
        "num_groups",
        config.num_groups,
        f"a divisor of num_experts = {config.num_experts}: {divisors(config.num_experts)}",
        "1 turns group-limited routing off",
    )


def chosen_groups_exist(config: MoEConfig) -> ConfigError | None:
    """A token cannot choose more groups than there are."""
    if config.top_k_groups <= config.num_groups:
        return None
    return ConfigError(
        "top_k_groups",
        config.top_k_groups,
        f"at most num_groups = {config.num_groups}",
        "raise num_groups, or leave both at 1",
    )


def chosen_groups_hold_top_k(config: MoEConfig) -> ConfigError | None:
    """The chosen groups together hold at least ``top_k`` experts."""
    available = config.num_experts // config.num_groups * config.top_k_groups
    if config.top_k <= available:
        return None
    return ConfigError(
        "top_k",
        config.top_k,
        f"at most {available}, the number of experts in top_k_groups = {config.top_k_groups} groups",
        "raise top_k_groups or lower num_groups",
    )


def padding_needs_capacity(config: MoEConfig) -> ConfigError | None:
    """Padding fills experts up to a capacity, so there must be one."""
    if not config.pad_to_capacity or config.capacity_factor is not None:
        return None
    return ConfigError(
        "pad_to_capacity",
        True,
        "false while capacity_factor is null (dropless)",
        "set capacity_factor, for instance to 1.25",
    )


def gate_needs_shared_expert(config: MoEConfig) -> ConfigError | None:
    """The sigmoid gate belongs to the shared expert."""
    if not config.shared_expert_gate or config.shared_expert_hidden_size > 0:
        return None
    return ConfigError(
        "shared_expert_gate",
        True,
        "false while shared_expert_hidden_size is 0 (no shared expert)",
        "set shared_expert_hidden_size",
    )


def placement_is_permutation(config: MoEConfig) -> ConfigError | None:
    """Every logical expert has exactly one physical slot."""
    placement = config.expert_placement
    if placement is None or sorted(placement) == list(range(config.num_experts)):
        return None
    return ConfigError(
        "expert_placement",
        list(placement),
        f"each of 0..{config.num_experts - 1} exactly once",
        _placement_hint(placement, config.num_experts),
    )


def _placement_hint(placement: Sequence[int], num_experts: int) -> str:
    missing = sorted(set(range(num_experts)) - set(placement))
    return f"missing: {missing}" if missing else f"{len(placement)} entries for num_experts = {num_experts}"


MOE_RULES: tuple[Rule, ...] = (
    at_least("num_experts", 1),
    at_least("top_k", 1),
    top_k_within_experts,
    at_least("expert_hidden_size", 1),
    above("routed_scaling_factor", 0.0),
    at_least("num_groups", 1, "1 turns group-limited routing off"),
    groups_divide_experts,
    at_least("top_k_groups", 1),
    chosen_groups_exist,
    chosen_groups_hold_top_k,
    at_least("expert_bias_update_rate", 0.0),
    at_least("auxiliary_loss_coefficient", 0.0, "0 turns the loss off"),
    at_least("z_loss_coefficient", 0.0, "0 turns the loss off"),
    above("capacity_factor", 0.0, "null means dropless"),
    padding_needs_capacity,
    at_least("shared_expert_hidden_size", 0, "0 means no shared expert"),
    gate_needs_shared_expert,
    placement_is_permutation,
)


# --- ChronosMoEConfig


def heads_divide_hidden_size(config: ChronosMoEConfig) -> ConfigError | None:
    """Attention heads have equal widths."""
    if config.hidden_size % config.num_heads == 0:
        return None
    return ConfigError(
        "num_heads",
        config.num_heads,
        f"a divisor of hidden_size = {config.hidden_size}: {divisors(config.hidden_size)}",
    )


def head_width_is_even(config: ChronosMoEConfig) -> ConfigError | None:
    """Rotary position encoding turns pairs of features."""
    width = config.hidden_size // config.num_heads
    if width % 2 == 0:
        return None
    return ConfigError(
        "num_heads",
        config.num_heads,
        f"a number for which hidden_size / num_heads is even (it is {width})",
        "rotary position encoding turns pairs of features",
    )


def patches_fill(field: str) -> Rule:
    """Make the rule that a length is a whole number of patches."""

    def rule(config: ChronosMoEConfig) -> ConfigError | None:
        length: int = getattr(config, field)
        if length % config.patch_length == 0:
            return None
        down = length // config.patch_length * config.patch_length
        nearest = ([down] if down else []) + [down + config.patch_length]
        return ConfigError(
            field,
            length,
            f"a multiple of patch_length = {config.patch_length}",
            "the nearest are " + " and ".join(str(n) for n in nearest),
        )

    return rule


def quantiles_are_levels(config: ChronosMoEConfig) -> ConfigError | None:
    """Quantile levels lie strictly between 0 and 1 and increase."""
    levels = config.quantiles
    increasing = all(low < high for low, high in pairwise(levels))
    if levels and increasing and levels[0] > 0.0 and levels[-1] < 1.0:
        return None
    return ConfigError(
        "quantiles",
        list(levels),
        "at least one level, strictly between 0 and 1, in increasing order",
        "for instance [0.1, 0.5, 0.9]",
    )


def median_is_a_level(config: ChronosMoEConfig) -> ConfigError | None:
    """Point forecasts and the Huber loss read the median."""
    if 0.5 in config.quantiles:
        return None
    return ConfigError(
        "quantiles",
        list(config.quantiles),
        "levels that contain 0.5",
        "the median is the point forecast",
    )


CHRONOS_RULES: tuple[Rule, ...] = (
    at_least("hidden_size", 1),
    at_least("num_layers", 1),
    at_least("num_heads", 1),
    heads_divide_hidden_size,
    head_width_is_even,
    at_least("patch_length", 1),
    at_least("context_length", 1),
    patches_fill("context_length"),
    at_least("prediction_length", 1),
    patches_fill("prediction_length"),
    at_least("ffn_hidden_size", 1),
    quantiles_are_levels,
    median_is_a_level,
    within("dropout", 0.0, 1.0),
    above("rope_theta", 0.0),
    above("huber_delta", 0.0),
)


# --- OptimizerConfig


def betas_are_decay_rates(config: OptimizerConfig) -> ConfigError | None:
    """Adam's two decay rates lie in [0, 1)."""
    if all(0.0 <= beta < 1.0 for beta in config.betas):
        return None
    return ConfigError(
        "betas",
        list(config.betas),
        "two numbers, each at least 0 and less than 1",
        "for instance [0.9, 0.98]",
    )


def ratio_is_a_fraction(config: OptimizerConfig) -> ConfigError | None:
    """The cosine ends at a fraction of the peak learning rate."""
    if 0.0 <= config.min_learning_rate_ratio <= 1.0:
        return None
    return ConfigError("min_learning_rate_ratio", config.min_learning_rate_ratio, "at least 0 and at most 1")


OPTIMIZER_RULES: tuple[Rule, ...] = (
    above("learning_rate", 0.0),
    betas_are_decay_rates,
    at_least("weight_decay", 0.0),
    at_least("warmup_steps", 0),
    ratio_is_a_fraction,
)
