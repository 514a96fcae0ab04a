"""The schema of a whole recipe, and the check of a recipe against it (torch-free).

A recipe has LightningCLI's layout: ``seed_everything``, ``trainer``, ``model``, ``data``, ``ckpt_path``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

from lightning_moe.config.chronos import ChronosMoEConfig
from lightning_moe.config.gpt import ActivationCheckpointing, GPTMoEConfig
from lightning_moe.config.loader import Document
from lightning_moe.config.optimizer import OptimizerConfig
from lightning_moe.config.ranges import Rule, at_least, within
from lightning_moe.config.reader import Component, KnownValues, apply_rules, read_fields
from lightning_moe.config.recipe_rules import RECIPE_RULES
from lightning_moe.config.series import SeriesConfig
from lightning_moe.config.text import TextConfig
from lightning_moe.config.trainer import TrainerRecipe
from lightning_moe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ChronosMoERecipe:
    """What a recipe may give under ``model.init_args`` for :class:`lightning_moe.ChronosMoE`."""

    config: ChronosMoEConfig | None = None
    """Sizes, loss and feed-forward blocks of the model; null takes the defaults."""
    optimizer: OptimizerConfig | None = None
    """Optimizer and learning-rate schedule; null takes the defaults."""


@dataclass(frozen=True, kw_only=True)
class GPTMoERecipe:
    """What a recipe may give under ``model.init_args`` for :class:`lightning_moe.GPTMoE`."""

    rules: ClassVar[tuple[Rule, ...]] = (at_least("loss_chunk_tokens", 1, "null computes the loss in one piece"),)

    config: GPTMoEConfig | None = None
    """Sizes and blocks of the model; null takes the defaults."""
    optimizer: OptimizerConfig | None = None
    """Optimizer and learning-rate schedule; null takes the defaults."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """What is computed again in the backward pass instead of being kept: nothing, all but experts, or whole blocks."""
    loss_chunk_tokens: int | None = 1024
    """Number of tokens whose logits exist at a time; null means all of them."""
    compile_blocks: bool = False
    """Whether ``torch.compile`` compiles the attention and the dense feed-forward layer of each block."""


class ModelComponent(Component):
    """A LightningModule by its class."""

    known: ClassVar = MappingProxyType({"ChronosMoE": ChronosMoERecipe, "GPTMoE": GPTMoERecipe})


class DataComponent(Component):
    """A LightningDataModule by its class."""

    known: ClassVar = MappingProxyType({"SeriesDataModule": SeriesConfig, "TextDataModule": TextConfig})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a recipe may say."""

    rules: ClassVar[tuple[Rule, ...]] = (within("seed_everything", 0, 2**32),)

    seed_everything: bool | int = True
    """Seed of all random numbers; true draws one."""
    trainer: TrainerRecipe = field(default_factory=TrainerRecipe)
    """Arguments of the Trainer."""
    model: ModelComponent
    """The LightningModule to train."""
    data: DataComponent | None = None
    """The LightningDataModule to train on."""
    optimizer: Component | None = None
    """Optimizer for a model that configures none itself."""
    lr_scheduler: Component | None = None
    """Learning-rate schedule for a model that configures none itself."""
    ckpt_path: str | None = None
    """Checkpoint to start from."""
    weights_only: bool | None = None
    """Whether the checkpoint may hold nothing but weights and plain values."""
    report: bool = False
    """Whether to test after training and to print the scores on held-out data beside known ones."""


@dataclass(frozen=True)
class Verdict:
    """What a check found."""

    recipe: KnownValues
    """The values that could be read, as in :class:`Recipe`."""
    problems: tuple[ConfigError, ...]
    """All problems, each with its location, in the order of the text."""


def check_recipe(document: Document, further: Sequence[Rule] = ()) -> Verdict:
    """Check what a recipe says, without importing what it names.

    Args:
        document: The recipe.
        further: Rules for whole recipes beside those of this room, which knows the settings and nothing else.
    """
    recipe, found = read_fields("", document.values, Recipe)
    found += apply_rules((*RECIPE_RULES, *further), recipe)
    located = [problem.at(document.location(problem.field)) for problem in found]
    order = {location: i for i, location in enumerate(document.locations.values())}
    problems = sorted([*document.problems, *located], key=lambda problem: order.get(problem.location, -1))
    return Verdict(recipe, tuple(problems))
