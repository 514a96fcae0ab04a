"""Torch-free configuration: frozen dataclasses, their rules, and the reader of recipes."""

from lightning_moe.config.chronos import ChronosMoEConfig
from lightning_moe.config.moe import MoEConfig
from lightning_moe.config.optimizer import OptimizerConfig
from lightning_moe.config.parallel import ParallelConfig

__all__ = ["ChronosMoEConfig", "MoEConfig", "OptimizerConfig", "ParallelConfig"]
