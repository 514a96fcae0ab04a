"""The rules that the parts of a recipe must obey together, one small function each (torch-free).

A rule here takes a whole recipe and names fields by their full dotted path. It sees a model's or strategy's
arguments only where the class is one of ours.
"""

from __future__ import annotations

from typing import Any

from lightning_moe.config.optimizer import OptimizerConfig
from lightning_moe.config.ranges import Rule
from lightning_moe.config.recipe_facts import (
    MODEL,
    STRATEGY,
    model_config,
    model_name,
    overlap_config,
    parallel_config,
    world_size,
)
from lightning_moe.config.recipe_gpt_rules import GPT_RECIPE_RULES
from lightning_moe.config.recipe_pipeline_rules import PIPELINE_RECIPE_RULES
from lightning_moe.config.trainer import full_precision_name
from lightning_moe.errors import ConfigError


def only_for(name: str, *rules: Rule) -> tuple[Rule, ...]:
    """Restrict rules to recipes that train our model ``name``."""

    def restrict(rule: Rule) -> Rule:
        return lambda recipe: rule(recipe) if model_name(recipe) == name else None

    return tuple(restrict(rule) for rule in rules)


def chronos_is_not_split(axis: str) -> Rule:
    """Make the rule that an axis which would split the dense layers of Chronos-MoE has size one."""

    def rule(recipe: Any) -> ConfigError | None:
        parallel = parallel_config(recipe)
        size = 1 if parallel is None else getattr(parallel, axis)
        if size == 1:
            return None
        return ConfigError(
            f"{STRATEGY}.parallel.{axis}",
            size,
            "1 with ChronosMoE",
            "its dense layers are not split; spread its experts (expert, expert_tensor) and the data",
        )

    return rule


def axes_factor_the_world(recipe: Any) -> ConfigError | None:
    """The parallel axes factor the world of ``devices * num_nodes`` ranks."""
    parallel, world = parallel_config(recipe), world_size(recipe)
    if parallel is None or world is None:
        return None
    try:
        parallel.resolve(world)
    except ConfigError as problem:
        return problem.under(STRATEGY)
    return None


def expert_axis_divides_experts(recipe: Any) -> ConfigError | None:
    """Every expert rank holds the same number of experts."""
    parallel, moe = parallel_config(recipe), model_config(recipe).moe
    if parallel is None or moe is None or moe.num_experts % parallel.expert == 0:
        return None
    return ConfigError(
        f"{STRATEGY}.parallel.expert",
        parallel.expert,
        f"a divisor of {MODEL}.moe.num_experts = {moe.num_experts}",
        "every expert rank holds the same number of experts",
    )


def expert_tensor_axis_divides_experts(recipe: Any) -> ConfigError | None:
    """Every rank that shares an expert holds an equal part of its inner width."""
    parallel, moe = parallel_config(recipe), model_config(recipe).moe
    if parallel is None or moe is None or moe.expert_hidden_size % parallel.expert_tensor == 0:
        return None
    return ConfigError(
        f"{STRATEGY}.parallel.expert_tensor",
        parallel.expert_tensor,
        f"a divisor of {MODEL}.moe.expert_hidden_size = {moe.expert_hidden_size}",
        "every rank that shares an expert holds an equal part of it",
    )


def expert_groups_hold_experts(recipe: Any) -> ConfigError | None:
    """Where a rank's experts are exchanged in groups, no group is empty."""
    parallel, overlap, moe = parallel_config(recipe), overlap_config(recipe), model_config(recipe).moe
    if parallel is None or overlap is None or moe is None or overlap.dispatch == "blocking":
        return None
    local = moe.num_experts // parallel.expert
    if parallel.expert * parallel.expert_tensor == 1 or overlap.expert_groups is None or overlap.expert_groups <= local:
        return None
    return ConfigError(
        f"{STRATEGY}.overlap.expert_groups",
        overlap.expert_groups,
        f"at most {local}, the experts of a rank",
        "leave it out to ask the cost model",
    )


def lengths_agree(field: str) -> Rule:
    """Make the rule that data and model agree on a length."""

    def rule(recipe: Any) -> ConfigError | None:
        if recipe.data is None:
            return None
        given, needed = getattr(recipe.data.init_args, field), getattr(model_config(recipe), field)
        if given == needed:
            return None
        return ConfigError(
            f"data.init_args.{field}",
            given,
            f"{needed}, the model's {MODEL}.{field}",
            "set both to the same length",
        )

    return rule


def precision_fits_device(recipe: Any) -> ConfigError | None:
    """16-mixed needs a GPU; on CPU Lightning would train with bf16-mixed instead."""
    precision = recipe.trainer.precision
    if recipe.trainer.accelerator != "cpu" or full_precision_name(precision) != "16-mixed":
        return None
    return ConfigError(
        "trainer.precision", precision, "32-true, bf16-mixed, bf16-true or 64-true on CPU", "use bf16-mixed"
    )


def precision_is_parallel(recipe: Any) -> ConfigError | None:
    """Our strategy clips gradients and finds overflows over all ranks, for these precisions."""
    precision = recipe.trainer.precision
    supported = ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed")
    if parallel_config(recipe) is None or full_precision_name(precision) in supported:
        return None
    return ConfigError("trainer.precision", precision, ", ".join(supported), "use bf16-mixed")


def callbacks_are_supported(recipe: Any) -> ConfigError | None:
    """Stochastic weight averaging copies the module before its layers exist and would average nothing."""
    callbacks = recipe.trainer.callbacks
    if parallel_config(recipe) is None or not isinstance(callbacks, list):
        return None
    for i, callback in enumerate(callbacks):
        if callback.class_path.rpartition(".")[2] == "StochasticWeightAveraging":
            return ConfigError(
                f"trainer.callbacks[{i}].class_path",
                callback.class_path,
                "EMAWeightAveraging or WeightAveraging",
                "it copies the module before its layers exist and would average nothing",
            )
    return None


def backend_fits_device(recipe: Any) -> ConfigError | None:
    """NCCL moves data between GPUs only."""
    strategy = recipe.trainer.strategy
    if isinstance(strategy, str) or recipe.trainer.accelerator != "cpu":
        return None
    backend = strategy.init_args.process_group_backend
    if backend != "nccl":
        return None
    return ConfigError(f"{STRATEGY}.process_group_backend", backend, "gloo on CPU", "leave it out")


def warmup_ends_before_training(recipe: Any) -> ConfigError | None:
    """The warm-up ends before the last step, or the learning rate never reaches its peak."""
    optimizer = recipe.model.init_args.optimizer or OptimizerConfig()
    warmup, steps = optimizer.warmup_steps, recipe.trainer.max_steps
    if steps < 1 or warmup < steps:
        return None
    return ConfigError(
        "model.init_args.optimizer.warmup_steps",
        warmup,
        f"less than trainer.max_steps = {steps}",
        "the learning rate would never reach its peak",
    )


RECIPE_RULES: tuple[Rule, ...] = (
    *only_for("ChronosMoE", chronos_is_not_split("context"), chronos_is_not_split("tensor")),
    axes_factor_the_world,
    *PIPELINE_RECIPE_RULES,
    expert_axis_divides_experts,
    expert_tensor_axis_divides_experts,
    expert_groups_hold_experts,
    *only_for("ChronosMoE", lengths_agree("context_length"), lengths_agree("prediction_length")),
    *only_for("GPTMoE", *GPT_RECIPE_RULES),
    precision_fits_device,
    precision_is_parallel,
    backend_fits_device,
    callbacks_are_supported,
    warmup_ends_before_training,
)
