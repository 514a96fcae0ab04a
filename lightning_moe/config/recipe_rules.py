"""The rules that the parts of a recipe must obey together, one small function each (torch-free).

A rule here takes a whole recipe and names fields by their full dotted path. It sees a model's or strategy's
arguments only where the class is one of ours.
"""

from __future__ import annotations

from typing import Any

from lightning_moe.config.chronos import ChronosMoEConfig
from lightning_moe.config.optimizer import OptimizerConfig
from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.config.ranges import Rule
from lightning_moe.config.trainer import count_devices, full_precision_name
from lightning_moe.errors import ConfigError

_STRATEGY = "trainer.strategy.init_args"
_MODEL = "model.init_args.config"


def world_size(recipe: Any) -> int | None:
    """Return the number of ranks, or None when only the machine that runs the recipe knows it."""
    devices = count_devices(recipe.trainer)
    return None if devices is None else devices * int(recipe.trainer.num_nodes)


def parallel_config(recipe: Any) -> ParallelConfig | None:
    """Return the sizes of the parallel axes, or None when the strategy is not ours."""
    strategy = recipe.trainer.strategy
    if isinstance(strategy, str):
        return ParallelConfig() if strategy in ("moe", "moe_spawn", "moe_fork") else None
    if strategy.class_path.rpartition(".")[2] != "MoEStrategy":
        return None
    sizes = strategy.init_args.parallel
    return ParallelConfig() if sizes is None else ParallelConfig(**sizes.as_dict())


def model_config(recipe: Any) -> Any:
    """Return the settings of our model, defaults where the recipe gives none."""
    config = recipe.model.init_args.config
    return ChronosMoEConfig() if config is None else config


def axes_are_trained(axis: str) -> Rule:
    """Make the rule that an axis which this release does not train with has size one."""

    def rule(recipe: Any) -> ConfigError | None:
        parallel = parallel_config(recipe)
        size = 1 if parallel is None else getattr(parallel, axis)
        if size == 1:
            return None
        return ConfigError(
            f"{_STRATEGY}.parallel.{axis}",
            size,
            "1",
            "this release trains with expert and data parallelism",
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
        return problem.under(_STRATEGY)
    return None


def expert_axis_divides_experts(recipe: Any) -> ConfigError | None:
    """Every expert rank holds the same number of experts."""
    parallel, moe = parallel_config(recipe), model_config(recipe).moe
    if parallel is None or moe is None or moe.num_experts % parallel.expert == 0:
        return None
    return ConfigError(
        f"{_STRATEGY}.parallel.expert",
        parallel.expert,
        f"a divisor of {_MODEL}.moe.num_experts = {moe.num_experts}",
        "every expert rank holds the same number of experts",
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
            f"{needed}, the model's {_MODEL}.{field}",
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
    return ConfigError(f"{_STRATEGY}.process_group_backend", backend, "gloo on CPU", "leave it out")


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
    axes_are_trained("pipeline"),
    axes_are_trained("context"),
    axes_are_trained("tensor"),
    axes_are_trained("expert_tensor"),
    axes_factor_the_world,
    expert_axis_divides_experts,
    lengths_agree("context_length"),
    lengths_agree("prediction_length"),
    precision_fits_device,
    precision_is_parallel,
    backend_fits_device,
    callbacks_are_supported,
    warmup_ends_before_training,
)
