"""The rules of a recipe that need its schedule (torch-free); ``lightning_moe.config`` knows no schedules."""

from __future__ import annotations

from typing import Any

from lightning_moe.config.chronos import ChronosMoEConfig
from lightning_moe.config.chronos_size import chronos_size
from lightning_moe.config.gpt import GPTMoEConfig
from lightning_moe.config.gpt_size import gpt_size
from lightning_moe.config.mapping import from_mapping
from lightning_moe.config.model_size import ModelSize
from lightning_moe.config.ranges import Rule
from lightning_moe.config.reader import KnownValues, UnknownValueError
from lightning_moe.config.recipe_facts import STRATEGY, model_config, model_name, parallel_config, pipeline_config
from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.planning import parts_of, schedule_of
from lightning_moe.pipeline.schedule import Schedule


def pipeline_is_possible(recipe: Any) -> ConfigError | None:
    """The schedule exists and is made for these numbers, and every stage of it holds something."""
    config = pipeline_config(recipe)
    try:
        schedule = _schedule(recipe)
    except ConfigError as problem:
        return problem.under(STRATEGY)
    if config is None or schedule is None:
        return None
    size = model_size(recipe)
    layers, stages = len(size.blocks), schedule.placement.num_stages
    if sum(config.blocks_per_stage or (layers,)) != layers or len(config.block_costs or size.blocks) != layers:
        return None  # told by the rules of lightning_moe.config
    costs = size.relative_costs
    most = max(1, layers + (costs.embed > 0) + (costs.head > 0))
    if config.blocks_per_stage is None and stages > most:
        chunks = schedule.placement.chunks
        return ConfigError(
            f"{STRATEGY}.parallel.pipeline",
            schedule.placement.ranks,
            f"at most {most // chunks}, for {layers} blocks" + (f" on {chunks} chunks a rank" if chunks > 1 else ""),
            "every stage holds something: a block, or the head",
        )
    try:
        parts_of(config, stages, layers, block_costs=costs.blocks, embed_cost=costs.embed, head_cost=costs.head)
    except ConfigError as problem:
        return problem.under(STRATEGY)
    return None


def model_size(recipe: Any) -> ModelSize:
    """The pieces of the recipe's model.

    Raises:
        UnknownValueError: It is not one of ours, or its configuration has mistakes.
    """
    name, given = model_name(recipe), model_config(recipe)
    values = _plain(given) if isinstance(given, KnownValues) else None
    try:
        if name == "GPTMoE":
            return gpt_size(given if values is None else from_mapping(GPTMoEConfig, values, "config"))
        return chronos_size(given if values is None else from_mapping(ChronosMoEConfig, values, "config"))
    except ConfigError as problem:
        raise UnknownValueError("config") from problem


def _schedule(recipe: Any) -> Schedule | None:
    """The schedule; None without a pipeline, and for a function of the user's, which takes an import."""
    parallel, config = parallel_config(recipe), pipeline_config(recipe)
    if config is None or parallel is None or ":" in config.schedule:
        return None
    return schedule_of(config, parallel.pipeline)


def _plain(known: KnownValues) -> dict[str, Any]:
    return {name: _plain(value) if isinstance(value, KnownValues) else value for name, value in known.as_dict().items()}


SCHEDULE_RULES: tuple[Rule, ...] = (pipeline_is_possible,)
