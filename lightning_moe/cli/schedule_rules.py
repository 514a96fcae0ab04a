"""The rules of a recipe that need its schedule (torch-free); ``lightning_moe.config`` knows no schedules."""

from __future__ import annotations

from contextlib import suppress
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
    config, size = pipeline_config(recipe), None
    if config is None:
        return None
    with suppress(UnknownValueError):
        size = model_size(recipe)
    try:
        schedule = _schedule(recipe, None if size is None else len(size.blocks))
    except ConfigError as problem:
        return problem.under(STRATEGY)
    if schedule is None or size is None:
        return None
    layers, stages = len(size.blocks), schedule.placement.num_stages
    if sum(config.blocks_per_stage or (layers,)) != layers or len(config.block_costs or size.blocks) != layers:
        return None  # told by the rules of lightning_moe.config
    costs = size.relative_costs
    most = max(1, layers + (costs.embed > 0) + (costs.head > 0))
    if config.blocks_per_stage is None and stages > most:
        return _too_many_stages(schedule, layers, most)
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
    except (ConfigError, TypeError) as problem:  # TypeError: a field without default is missing
        raise UnknownValueError("config") from problem


def _too_many_stages(schedule: Schedule, layers: int, most: int) -> ConfigError:
    """Names the chunks where fewer of them would do, else the ranks."""
    placement = schedule.placement
    hint = "every stage holds something: a block, or an embedding or head that takes time"
    if placement.ranks > most:
        allowed = f"at most {most}, for {layers} blocks"
        return ConfigError(f"{STRATEGY}.parallel.pipeline", placement.ranks, allowed, hint)
    allowed = f"at most {most // placement.ranks}, for {layers} blocks on {placement.ranks} ranks"
    return ConfigError(
        f"{STRATEGY}.pipeline.chunks",
        placement.chunks,
        allowed,
        f"{hint}; {schedule.name} with {placement.chunks} chunks a rank makes {placement.num_stages} stages",
    )


def _schedule(recipe: Any, num_blocks: int | None) -> Schedule | None:
    """The schedule; None without a pipeline, and for a function of the user's, which takes an import."""
    parallel, config = parallel_config(recipe), pipeline_config(recipe)
    if config is None or parallel is None or ":" in config.schedule:
        return None
    return schedule_of(config, parallel.pipeline, num_blocks)


def _plain(known: KnownValues) -> dict[str, Any]:
    return {name: _plain(value) if isinstance(value, KnownValues) else value for name, value in known.as_dict().items()}


SCHEDULE_RULES: tuple[Rule, ...] = (pipeline_is_possible,)
