"""The rules that a recipe for GPT-MoE must obey beside those of every recipe (torch-free)."""

from __future__ import annotations

from typing import Any

from lightning_moe.config.gpt_rules import num_kv_heads_of, sequence_parts
from lightning_moe.config.ranges import Rule
from lightning_moe.config.recipe_facts import MODEL, STRATEGY, model_config, parallel_config
from lightning_moe.config.text import BPE_VOCABULARY, BYTE_VOCABULARY
from lightning_moe.errors import ConfigError


def tensor_axis_divides_kv_heads(recipe: Any) -> ConfigError | None:
    """Every tensor rank holds the same number of key-value heads, with the query heads that share them."""
    parallel, heads = parallel_config(recipe), num_kv_heads_of(model_config(recipe))
    if parallel is None or heads % parallel.tensor == 0:
        return None
    return ConfigError(
        f"{STRATEGY}.parallel.tensor",
        parallel.tensor,
        f"a divisor of the number of key-value heads, {heads}",
        f"{MODEL}.num_kv_heads, or num_heads where that is null",
    )


def context_axis_divides_heads(recipe: Any) -> ConfigError | None:
    """Inside attention, context ranks share the heads of their tensor rank instead of the sequence."""
    parallel, config = parallel_config(recipe), model_config(recipe)
    if parallel is None or config.num_heads % parallel.tensor:  # that is the tensor axis's problem
        return None
    if config.num_heads // parallel.tensor % parallel.context == 0:
        return None
    return ConfigError(
        f"{STRATEGY}.parallel.context",
        parallel.context,
        f"a divisor of the query heads of one tensor rank, {config.num_heads // parallel.tensor}",
        "attention exchanges the split of the sequence for a split of the heads",
    )


def vocabulary_reaches_all_tensor_ranks(recipe: Any) -> ConfigError | None:
    """Every tensor rank holds at least one row of the embedding."""
    parallel, config = parallel_config(recipe), model_config(recipe)
    if parallel is None or config.vocab_size >= parallel.tensor:
        return None
    return ConfigError(f"{MODEL}.vocab_size", config.vocab_size, f"at least {parallel.tensor}, the tensor ranks")


def sequences_fit_the_model(recipe: Any) -> ConfigError | None:
    """Sequences are no longer than those the model is made for."""
    if recipe.data is None:
        return None
    length, longest = recipe.data.init_args.sequence_length, model_config(recipe).max_sequence_length
    if length <= longest:
        return None
    return ConfigError(
        "data.init_args.sequence_length",
        length,
        f"at most {MODEL}.max_sequence_length = {longest}",
        "shorten the sequences, or raise max_sequence_length",
    )


def sequences_are_split_evenly(recipe: Any) -> ConfigError | None:
    """Context ranks, and under sequence parallelism tensor ranks, hold equal parts of every sequence."""
    parallel = parallel_config(recipe)
    if recipe.data is None or parallel is None:
        return None
    length, parts = recipe.data.init_args.sequence_length, sequence_parts(parallel)
    if length % parts == 0:
        return None
    return ConfigError(
        "data.init_args.sequence_length",
        length,
        f"a multiple of {parts}: the context ranks times, with sequence_parallel, the tensor ranks",
        "each of them holds an equal part of every sequence",
    )


def tokens_are_in_the_vocabulary(recipe: Any) -> ConfigError | None:
    """The model knows every token that the data may give, as far as that is settled before the data are read."""
    if recipe.data is None:
        return None
    settings, known = recipe.data.init_args, model_config(recipe).vocab_size
    trained = (settings.vocab_size or BPE_VOCABULARY) if settings.tokenizer == "bpe" else None
    needed = BYTE_VOCABULARY if settings.tokenizer == "bytes" else trained
    if needed is None or needed <= known:
        return None
    return ConfigError(
        f"{MODEL}.vocab_size",
        known,
        f"at least {needed}, the vocabulary of data.init_args.tokenizer = {settings.tokenizer}",
    )


GPT_RECIPE_RULES: tuple[Rule, ...] = (
    tensor_axis_divides_kv_heads,
    context_axis_divides_heads,
    vocabulary_reaches_all_tensor_ranks,
    sequences_fit_the_model,
    sequences_are_split_evenly,
    tokens_are_in_the_vocabulary,
)
