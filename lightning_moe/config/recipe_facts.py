"""What a recipe says about the run as a whole, read from several of its parts (torch-free).

A model's or strategy's arguments are known only where the class is one of ours. Everywhere else the functions here
return None, or raise :class:`~lightning_moe.config.reader.UnknownValueError`, which leaves a rule with nothing to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, TypeVar

from lightning_moe.config.chronos import ChronosMoEConfig
from lightning_moe.config.gpt import GPTMoEConfig
from lightning_moe.config.overlap import OverlapConfig
from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.config.pipeline import PipelineConfig
from lightning_moe.config.trainer import count_devices

STRATEGY = "trainer.strategy.init_args"
MODEL = "model.init_args.config"

_Settings = TypeVar("_Settings", OverlapConfig, PipelineConfig)

_CONFIGS: Mapping[str, type[ChronosMoEConfig] | type[GPTMoEConfig]] = MappingProxyType(
    {"ChronosMoE": ChronosMoEConfig, "GPTMoE": GPTMoEConfig}
)


def model_name(recipe: Any) -> str:
    """Return the name of the model's class, without its package."""
    return str(recipe.model.class_path).rpartition(".")[2]


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


def pipeline_config(recipe: Any) -> PipelineConfig | None:
    """Return how the pipeline is run, or None when each batch goes through the model in one piece."""
    parallel, strategy = parallel_config(recipe), recipe.trainer.strategy
    if parallel is None:
        return None
    given = None if isinstance(strategy, str) else strategy.init_args.pipeline
    if given is None:
        return None if parallel.pipeline == 1 else PipelineConfig()
    return _built(PipelineConfig, given)


def overlap_config(recipe: Any) -> OverlapConfig | None:
    """Return how exchanges are overlapped, or None when they are waited for."""
    strategy = recipe.trainer.strategy
    if parallel_config(recipe) is None or isinstance(strategy, str):
        return None
    given = strategy.init_args.overlap
    return None if given is None else _built(OverlapConfig, given)


def model_config(recipe: Any) -> Any:
    """Return the settings of our model, defaults where the recipe gives none."""
    config = recipe.model.init_args.config
    return _CONFIGS[model_name(recipe)]() if config is None else config


def _built(settings: type[_Settings], known: Any) -> _Settings:
    """The settings that a recipe gives, if all of them could be read."""
    return settings(**{field.name: getattr(known, field.name) for field in fields(settings)})
