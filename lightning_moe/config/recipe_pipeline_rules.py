"""The rules that a recipe with a pipeline must obey, as far as they need no schedule (torch-free)."""

from __future__ import annotations

from typing import Any

from lightning_moe.config.ranges import Rule
from lightning_moe.config.recipe_facts import STRATEGY, model_config, parallel_config, pipeline_config
from lightning_moe.errors import ConfigError

PIPELINE = f"{STRATEGY}.pipeline"


def batch_has_all_microbatches(recipe: Any) -> ConfigError | None:
    """No microbatch of a training batch is empty."""
    parallel, config = parallel_config(recipe), pipeline_config(recipe)
    if config is None or parallel is None or recipe.data is None:
        return None
    batch, microbatches = recipe.data.init_args.batch_size, config.microbatches(parallel.pipeline)
    if batch >= microbatches:
        return None
    if config.num_microbatches is None:
        return ConfigError(
            "data.init_args.batch_size",
            batch,
            f"at least {microbatches}: two microbatches for each pipeline rank",
            f"raise it to a multiple of {microbatches}, or set {PIPELINE}.num_microbatches",
        )
    return ConfigError(
        f"{PIPELINE}.num_microbatches",
        microbatches,
        f"at most data.init_args.batch_size = {batch}",
        "every microbatch has at least one sample of the rank's batch; a divisor of it makes all alike",
    )


def depths_are_the_models(recipe: Any) -> ConfigError | None:
    """Stages whose depths are given hold all blocks, and no more."""
    config = pipeline_config(recipe)
    if config is None or config.blocks_per_stage is None:
        return None
    layers, depths = model_config(recipe).num_layers, config.blocks_per_stage
    if sum(depths) == layers:
        return None
    return ConfigError(
        f"{PIPELINE}.blocks_per_stage",
        list(depths),
        f"numbers that add up to the model's num_layers = {layers}",
        f"they add up to {sum(depths)}; leave it out to divide by cost",
    )


def every_block_has_a_cost(recipe: Any) -> ConfigError | None:
    """Costs that are given are one for each block."""
    config = pipeline_config(recipe)
    if config is None or config.block_costs is None:
        return None
    layers, costs = model_config(recipe).num_layers, config.block_costs
    if len(costs) == layers:
        return None
    return ConfigError(
        f"{PIPELINE}.block_costs",
        list(costs),
        f"{layers} costs, one for each of the model's num_layers",
        f"{len(costs)} are given; leave it out to take the model's own",
    )


PIPELINE_RECIPE_RULES: tuple[Rule, ...] = (
    batch_has_all_microbatches,
    depths_are_the_models,
    every_block_has_a_cost,
)
