"""Torch-free configuration: frozen dataclasses, their rules, and the reader of recipes."""

from lightning_moe.config.chronos import ChronosMoEConfig
from lightning_moe.config.gpt import GPTMoEConfig
from lightning_moe.config.moe import MoEConfig
from lightning_moe.config.optimizer import OptimizerConfig
from lightning_moe.config.overlap import OverlapConfig
from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.config.pipeline import PipelineConfig
from lightning_moe.config.rope import RopeScaling
from lightning_moe.config.text import TextConfig

__all__ = [
    "ChronosMoEConfig",
    "GPTMoEConfig",
    "MoEConfig",
    "OptimizerConfig",
    "OverlapConfig",
    "ParallelConfig",
    "PipelineConfig",
    "RopeScaling",
    "TextConfig",
]
