"""Arguments of :class:`lightning_moe.MoEStrategy`, for checking recipes without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lightning_moe.config.overlap import OverlapConfig
from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.config.pipeline import PipelineConfig
from lightning_moe.config.ranges import Rule, above
from lightning_moe.config.reader import Component


@dataclass(frozen=True, kw_only=True)
class StrategyRecipe:
    """What a recipe may give under ``trainer.strategy.init_args``: the arguments of ``MoEStrategy``."""

    rules: ClassVar[tuple[Rule, ...]] = (above("timeout_seconds", 0.0), above("bucket_megabytes", 0.0))

    parallel: ParallelConfig | None = None
    """Sizes of the parallel axes; null makes all ranks data-parallel."""
    pipeline: PipelineConfig | None = None
    """Schedule and microbatches; null takes the defaults where ``parallel.pipeline`` is above 1, and runs each batch in
    one piece where it is not."""
    overlap: OverlapConfig | None = None
    """How expert and attention layers exchange tokens while they compute; null exchanges them by all-to-alls that are
    waited for."""
    start_method: Literal["popen", "spawn", "fork"] = "popen"
    """How to start the ranks when no external launcher has."""
    process_group_backend: str | None = None
    """Backend of the process groups; null takes the one for the device."""
    timeout_seconds: float = 1800.0
    """Seconds after which a collective gives up."""
    bucket_megabytes: float = 25.0
    """Size of a gradient bucket in MiB."""
    optimizer_sharding: bool = True
    """Whether ranks that hold the same parameters divide the optimizer's state and work; false for optimizers that do
    not treat every element by itself, such as Muon."""
    async_checkpoint: bool = False
    """Whether training goes on while checkpoints are written from a copy in host memory."""
    accelerator: None = None
    """Set by the Trainer."""
    parallel_devices: None = None
    """Set by the Trainer."""
    cluster_environment: Component | None = None
    """How the ranks find each other; null finds it out."""
    checkpoint_io: Component | None = None
    """How whole-file checkpoints are written."""
    precision_plugin: None = None
    """Set by the Trainer from its precision."""
