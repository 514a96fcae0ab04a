"""How many parameters a Chronos-MoE configuration has, and where (pure arithmetic, torch-free)."""

from __future__ import annotations

from lightning_moe.config.block_size import BlockShape, ParameterSize
from lightning_moe.config.chronos import ChronosMoEConfig
from lightning_moe.config.model_size import ModelSize


def tokens_per_series(config: ChronosMoEConfig) -> int:
    """Number of tokens of one series: patches of the context, the [REG] token, patches of the horizon."""
    return config.context_length // config.patch_length + 1 + _future_patches(config)


def chronos_size(config: ChronosMoEConfig) -> ModelSize:
    """The pieces of the model that ``config`` describes."""
    width = config.hidden_size
    block = BlockShape(width, width, width, config.moe, config.ffn_hidden_size, ffn_matrices=2)
    embedding = _residual_block(3 * config.patch_length, config.ffn_hidden_size, width)
    head = _residual_block(width, config.ffn_hidden_size, len(config.quantiles) * config.patch_length)
    tokens = tokens_per_series(config)
    return ModelSize(
        ParameterSize(whole=embedding + width),  # and the [REG] token
        (block,) * config.num_layers,
        ParameterSize(whole=head + width),  # and the norm
        tied=False,
        embed_work=embedding * (tokens - 1) / tokens,
        head_work=head * _future_patches(config) / tokens,
    )


def _future_patches(config: ChronosMoEConfig) -> int:
    return -(-config.prediction_length // config.patch_length)


def _residual_block(inputs: int, inner: int, outputs: int) -> int:
    """Three matrices with biases: in, out, and past both."""
    return (inputs + 1) * inner + (inner + 1) * outputs + (inputs + 1) * outputs
