"""The rules that the fields of a GPT-MoE configuration must obey together (torch-free).

Sizes that follow from others are functions here, not only properties of the configuration: the values of a recipe are
checked before they form one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_moe.config.ranges import Rule, above, at_least, divisors
from lightning_moe.errors import ConfigError

if TYPE_CHECKING:
    from lightning_moe.config.gpt import GPTMoEConfig
    from lightning_moe.config.parallel import ParallelConfig


def num_kv_heads_of(config: GPTMoEConfig) -> int:
    """Number of key-value heads: as many as query heads where the configuration gives none."""
    return config.num_heads if config.num_kv_heads is None else config.num_kv_heads


def head_size_of(config: GPTMoEConfig) -> int:
    """Width of one attention head: an equal share of the hidden size where the configuration gives none."""
    return config.hidden_size // config.num_heads if config.head_size is None else config.head_size


def sequence_parts(parallel: ParallelConfig) -> int:
    """Number of equal parts that every training sequence must have: those of context and, maybe, tensor ranks."""
    return parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)


def heads_divide_hidden_size(config: GPTMoEConfig) -> ConfigError | None:
    """Without a head size of their own the heads share the hidden size equally."""
    if config.head_size is not None or config.hidden_size % config.num_heads == 0:
        return None
    return ConfigError(
        "num_heads",
        config.num_heads,
        f"a divisor of hidden_size = {config.hidden_size}: {divisors(config.hidden_size)}",
        "or set head_size",
    )


def head_size_is_even(config: GPTMoEConfig) -> ConfigError | None:
    """Rotary position encoding turns pairs of features."""
    width = head_size_of(config)
    if width % 2 == 0:
        return None
    field = "num_heads" if config.head_size is None else "head_size"
    return ConfigError(
        field,
        getattr(config, field),
        f"a value for which heads have an even width (it is {width})",
        "rotary position encoding turns pairs of features",
    )


def kv_heads_divide_heads(config: GPTMoEConfig) -> ConfigError | None:
    """Equally many query heads share each key-value head."""
    if config.num_kv_heads is None or config.num_heads % config.num_kv_heads == 0:
        return None
    return ConfigError(
        "num_kv_heads",
        config.num_kv_heads,
        f"a divisor of num_heads = {config.num_heads}: {divisors(config.num_heads)}",
        "equally many query heads share each key-value head",
    )


def dense_layers_are_layers(config: GPTMoEConfig) -> ConfigError | None:
    """The layers without experts are layers of the model, each named once."""
    layers = config.dense_layers
    if len(set(layers)) == len(layers) and all(0 <= layer < config.num_layers for layer in layers):
        return None
    return ConfigError(
        "dense_layers", list(layers), f"distinct numbers from 0 to num_layers - 1 = {config.num_layers - 1}"
    )


def dense_layers_need_experts_elsewhere(config: GPTMoEConfig) -> ConfigError | None:
    """Naming layers without experts means something only where others have them."""
    if config.moe is not None or not config.dense_layers:
        return None
    return ConfigError(
        "dense_layers", list(config.dense_layers), "[] while moe is null", "without moe every layer is dense"
    )


def routing_is_causal(config: GPTMoEConfig) -> ConfigError | None:
    """A choice of experts for the whole sequence would tell each token about those that follow it."""
    if config.moe is None or config.moe.routing_granularity == "token":
        return None
    return ConfigError(
        "moe.routing_granularity",
        config.moe.routing_granularity,
        "token",
        "routing by series would let a token see those that follow it",
    )


GPT_RULES: tuple[Rule, ...] = (
    at_least("vocab_size", 1),
    at_least("hidden_size", 1),
    at_least("num_layers", 1),
    at_least("num_heads", 1),
    at_least("head_size", 1),
    heads_divide_hidden_size,
    head_size_is_even,
    at_least("num_kv_heads", 1),
    kv_heads_divide_heads,
    at_least("ffn_hidden_size", 1),
    dense_layers_are_layers,
    dense_layers_need_experts_elsewhere,
    routing_is_causal,
    at_least("max_sequence_length", 1),
    above("rope_theta", 0.0),
    above("norm_eps", 0.0),
    at_least("sliding_window", 1, "null lets every token attend to all tokens before it"),
    above("init_std", 0.0),
)
