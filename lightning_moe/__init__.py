"""Pipeline, expert, tensor and data parallelism for PyTorch Lightning: ``Trainer(strategy=MoEStrategy(...))``.

Public names are loaded on first use (PEP 562), so that ``import lightning_moe`` and the commands that only
look at configuration do not pay for importing torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_moe.config import (
        ChronosMoEConfig,
        GPTMoEConfig,
        MoEConfig,
        OptimizerConfig,
        OverlapConfig,
        ParallelConfig,
        PipelineConfig,
        RopeScaling,
        TextConfig,
    )
    from lightning_moe.data import SeriesDataModule, TextDataModule
    from lightning_moe.errors import CheckpointError, ConfigError
    from lightning_moe.models.chronos_moe import ChronosMoE
    from lightning_moe.models.gpt_moe import GPTMoE
    from lightning_moe.moe import MoELayer
    from lightning_moe.parallel.mesh import ParallelMesh
    from lightning_moe.parallel.sharding import ShardSpec, set_shard_spec, shard_specs
    from lightning_moe.pipeline.chain import chain_spec
    from lightning_moe.pipeline.parts import ModelPart
    from lightning_moe.pipeline.spec import Microbatch, PartOutput, PipelineSpec, ScheduleResult
    from lightning_moe.strategy import MoEStrategy

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ChronosMoE",
    "ChronosMoEConfig",
    "ConfigError",
    "GPTMoE",
    "GPTMoEConfig",
    "Microbatch",
    "MoEConfig",
    "MoELayer",
    "MoEStrategy",
    "ModelPart",
    "OptimizerConfig",
    "OverlapConfig",
    "ParallelConfig",
    "ParallelMesh",
    "PartOutput",
    "PipelineConfig",
    "PipelineSpec",
    "RopeScaling",
    "ScheduleResult",
    "SeriesDataModule",
    "ShardSpec",
    "TextConfig",
    "TextDataModule",
    "__version__",
    "chain_spec",
    "set_shard_spec",
    "shard_specs",
]


def _home_of(name: str) -> str | None:
    """Return the module that defines a public name."""
    match name:
        case (
            "ChronosMoEConfig"
            | "GPTMoEConfig"
            | "MoEConfig"
            | "OptimizerConfig"
            | "OverlapConfig"
            | "ParallelConfig"
            | "PipelineConfig"
            | "RopeScaling"
            | "TextConfig"
        ):
            return "lightning_moe.config"
        case "CheckpointError" | "ConfigError":
            return "lightning_moe.errors"
        case "ParallelMesh":
            return "lightning_moe.parallel.mesh"
        case "ShardSpec" | "set_shard_spec" | "shard_specs":
            return "lightning_moe.parallel.sharding"
        case "Microbatch" | "PartOutput" | "PipelineSpec" | "ScheduleResult":
            return "lightning_moe.pipeline.spec"
        case "ModelPart":
            return "lightning_moe.pipeline.parts"
        case "chain_spec":
            return "lightning_moe.pipeline.chain"
        case "MoELayer":
            return "lightning_moe.moe"
        case "ChronosMoE":
            return "lightning_moe.models.chronos_moe"
        case "GPTMoE":
            return "lightning_moe.models.gpt_moe"
        case "SeriesDataModule" | "TextDataModule":
            return "lightning_moe.data"
        case "MoEStrategy":
            return "lightning_moe.strategy"
        case _:
            return None


def __getattr__(name: str) -> object:
    home = _home_of(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if "lightning.pytorch" in sys.modules:
    # ``Trainer(strategy="moe")`` looks the name up in Lightning's registry, which has no entry points. Where Lightning
    # is loaded already (the usual order of imports) torch is too, and registering costs next to nothing.
    import_module("lightning_moe.strategy")
