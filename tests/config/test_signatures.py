"""The torch-free descriptions of classes name the same arguments, with the same defaults, as the classes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, get_args, get_type_hints

import lightning.pytorch as pl
import pytest
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from lightning_moe import ChronosMoE, GPTMoE, MoEStrategy, SeriesDataModule, TextDataModule
from lightning_moe.config.recipe import ChronosMoERecipe, GPTMoERecipe
from lightning_moe.config.series import HORIZONS, DatasetName, SeriesConfig
from lightning_moe.config.strategy import StrategyRecipe
from lightning_moe.config.text import TextConfig
from lightning_moe.config.trainer import StrategyName, TrainerRecipe


def defaults(schema: Any) -> dict[str, object]:
    """Return the fields of a dataclass with their defaults."""
    assert all(field.default_factory is MISSING for field in fields(schema))
    return {field.name: field.default for field in fields(schema)}


def arguments(cls: type) -> Mapping[str, inspect.Parameter]:
    parameters = dict(inspect.signature(cls.__init__).parameters)
    parameters.pop("self")
    return parameters


@pytest.mark.parametrize(
    ("cls", "schema"),
    [
        (pl.Trainer, TrainerRecipe),
        (MoEStrategy, StrategyRecipe),
        (SeriesDataModule, SeriesConfig),
        (TextDataModule, TextConfig),
        (ChronosMoE, ChronosMoERecipe),
        (GPTMoE, GPTMoERecipe),
    ],
)
def test_same_names_and_defaults(cls: type, schema: Any) -> None:
    assert defaults(schema) == {name: parameter.default for name, parameter in arguments(cls).items()}


def test_strategy_names_are_the_registered_ones() -> None:
    assert set(get_args(StrategyName)) == {"auto", *StrategyRegistry.available_strategies()}


def test_accelerator_names_are_registered() -> None:
    names = get_args(get_type_hints(TrainerRecipe)["accelerator"])
    assert set(names) == {"auto", "gpu", *AcceleratorRegistry.available_accelerators()}


def test_horizons_are_those_of_the_official_holdouts() -> None:
    from lightning_moe.data import DATASETS, load_competitions

    assert set(get_args(DatasetName)) == set(HORIZONS) == set(DATASETS)
    horizons = {name: {series.horizon for series in group} for name, group in load_competitions().items()}
    assert horizons == {name: {length} for name, length in HORIZONS.items()}
