"""What a recipe leads to: mesh, stages, schedule, memory (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lightning_moe.cli.plan.memory import RankMemory, RunFacts, memory_of_ranks
from lightning_moe.cli.schedule_rules import model_size
from lightning_moe.config.chronos_size import tokens_per_series
from lightning_moe.config.model_size import ModelSize
from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.config.pipeline import PipelineConfig
from lightning_moe.config.reader import UnknownValueError
from lightning_moe.config.recipe_facts import (
    STRATEGY,
    model_config,
    model_name,
    parallel_config,
    pipeline_config,
    world_size,
)
from lightning_moe.config.trainer import full_precision_name
from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.costs import Costs
from lightning_moe.pipeline.parts import ModelPart
from lightning_moe.pipeline.planning import costs_of, parts_of, relative, schedule_of, stage_factors
from lightning_moe.pipeline.registry import schedule_names
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.simulate import Simulation, simulate


@dataclass(frozen=True)
class PlannedSchedule:
    """A schedule of the recipe's pipeline, the chosen one or another.

    Attributes:
        schedule: The schedule.
        costs: The times it was simulated with.
        simulation: What came out; memory in microbatches of an average rank.
        parts: What each stage holds; None where the model is not known.
        factors: Cost of each stage, relative to the average one; None where the model is not known.
        memory: Estimate for each rank of a pipeline; None where model or data are not known.
    """

    schedule: Schedule
    costs: Costs
    simulation: Simulation
    parts: tuple[ModelPart, ...] | None
    factors: tuple[float, ...] | None
    memory: tuple[RankMemory, ...] | None


@dataclass(frozen=True)
class Plan:
    """What a recipe leads to.

    Attributes:
        parallel: Sizes of all axes.
        config: How the pipeline is run.
        batch_size: Samples of one rank's batch; None where the data are not known.
        chosen: The recipe's schedule.
        others: The other schedules by name, or why there is none for these sizes; empty where there is one rank.
    """

    parallel: ParallelConfig
    config: PipelineConfig
    batch_size: int | None
    chosen: PlannedSchedule
    others: dict[str, PlannedSchedule | ConfigError]


def make_plan(recipe: Any) -> Plan:
    """Plan a recipe that has passed the check.

    Raises:
        ConfigError: The strategy is not ours, the number of ranks is not known, or the schedule is a function of the
            user's that cannot be imported or makes no valid schedule.
    """
    parallel, world = parallel_config(recipe), world_size(recipe)
    if parallel is None:
        strategy = recipe.trainer.strategy
        name = strategy if isinstance(strategy, str) else strategy.class_path
        raise ConfigError("trainer.strategy", name, "lightning_moe.MoEStrategy, or moe", "others have no pipeline")
    if world is None:
        raise ConfigError("trainer.devices", recipe.trainer.devices, "a number", "add --trainer.devices N")
    parallel = parallel.resolve(world)
    # Without a pipeline a batch is one microbatch of one stage.
    config = pipeline_config(recipe) or PipelineConfig(schedule="1f1b", num_microbatches=1)
    size, facts, batch_size = _model(recipe), None, _batch_size(recipe)
    if size is not None:
        facts = _run_facts(recipe, parallel, config, batch_size)
    try:
        schedule = schedule_of(config, parallel.pipeline, None if size is None else len(size.blocks))
        chosen = _planned(schedule, parallel, config, size, facts)
    except ConfigError as problem:
        raise problem.under(STRATEGY) from None
    others: dict[str, PlannedSchedule | ConfigError] = {}
    for name in schedule_names() if parallel.pipeline > 1 else ():
        if name in (chosen.schedule.name, "auto"):
            continue
        other = replace(config, schedule=name, chunks=None, max_lag=None, memory_limit=None)
        try:
            schedule = schedule_of(other, parallel.pipeline)
            if len(config.blocks_per_stage or ()) != schedule.placement.num_stages:
                other = replace(other, blocks_per_stage=None)  # these depths are of another number of stages
            others[name] = _planned(schedule, parallel, other, size, facts)
        except ConfigError as problem:
            others[name] = problem
    return Plan(parallel, config, batch_size, chosen, others)


def _planned(
    schedule: Schedule,
    parallel: ParallelConfig,
    config: PipelineConfig,
    size: ModelSize | None,
    facts: RunFacts | None,
) -> PlannedSchedule:
    if size is None:
        costs = costs_of(config)
        return PlannedSchedule(schedule, costs, simulate(schedule, costs), None, None, None)
    blocks, embed, head = size.relative_costs
    blocks = relative(config.block_costs) or blocks
    stages = schedule.placement.num_stages
    parts = parts_of(config, stages, len(blocks), block_costs=blocks, embed_cost=embed, head_cost=head)
    factors = stage_factors(parts, block_costs=blocks, embed_cost=embed, head_cost=head)
    costs = costs_of(config, factors)
    memory = None if facts is None else memory_of_ranks(size, parallel, schedule, parts, facts)
    return PlannedSchedule(schedule, costs, simulate(schedule, costs), parts, factors, memory)


def _model(recipe: Any) -> ModelSize | None:
    try:
        return model_size(recipe)
    except UnknownValueError:
        return None


def _batch_size(recipe: Any) -> int | None:
    try:
        return None if recipe.data is None else int(recipe.data.init_args.batch_size)
    except UnknownValueError:
        return None


def _run_facts(
    recipe: Any, parallel: ParallelConfig, config: PipelineConfig, batch_size: int | None
) -> RunFacts | None:
    """What memory depends on; None where the data are not known."""
    if batch_size is None:
        return None
    arguments, model = recipe.model.init_args, model_config(recipe)
    is_text = model_name(recipe) == "GPTMoE"
    length = recipe.data.init_args.sequence_length if is_text else tokens_per_series(model)
    samples = -(-batch_size // config.microbatches(parallel.pipeline))
    strategy = recipe.trainer.strategy
    return RunFacts(
        precision=full_precision_name(recipe.trainer.precision),
        optimizer_sharding=isinstance(strategy, str) or bool(strategy.init_args.optimizer_sharding),
        checkpointing=arguments.activation_checkpointing if is_text else "none",
        fused_norm=recipe.trainer.accelerator in ("gpu", "cuda"),
        tokens=samples * length // parallel.context,
        loss_chunk_tokens=arguments.loss_chunk_tokens if is_text else None,
        vocab_size=model.vocab_size if is_text else 0,
    )
