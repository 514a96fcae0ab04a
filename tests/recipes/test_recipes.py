"""The recipes that we ship can run, and are what their table says."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from lightning_moe.cli.check import check, summarize
from lightning_moe.config import ChronosMoEConfig, GPTMoEConfig
from lightning_moe.config.gpt_size import parameter_count
from lightning_moe.config.loader import load_yaml
from lightning_moe.config.mapping import from_mapping
from lightning_moe.config.recipe import Recipe
from lightning_moe.models.chronos_moe import ChronosMoE
from lightning_moe.models.chronos_moe.pretrained import config_from_dict

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def row_of(recipe: Path) -> str:
    rows = [line for line in README.splitlines() if line.startswith("|") and f"]({recipe.name})" in line]
    assert len(rows) == 1, f"{recipe.name} has {len(rows)} rows in recipes/README.md"
    return rows[0]


def test_there_are_recipes() -> None:
    assert FOLDER / "chronos_moe_cpu.yaml" in RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_passes_the_check(recipe: Path) -> None:
    verdict = check([str(recipe)])
    assert [str(problem) for problem in verdict.problems] == []


def trains(model: str) -> list[Path]:
    return [recipe for recipe in RECIPES if load_yaml(recipe).values["model"]["class_path"] == f"lightning_moe.{model}"]


def test_every_recipe_trains_one_of_our_models() -> None:
    assert sorted(trains("ChronosMoE") + trains("GPTMoE")) == RECIPES


@pytest.mark.parametrize("recipe", trains("ChronosMoE"), ids=lambda path: path.stem)
def test_table_of_chronos_recipes_is_true(recipe: Path) -> None:
    values, row = load_yaml(recipe).values, row_of(recipe)
    config = config_from_dict(values["model"]["init_args"]["config"])
    model = ChronosMoE(config).network()
    experts = f"{config.moe.num_experts} experts (top-{config.moe.top_k})" if config.moe else "dense"
    sizes = summarize(check([str(recipe)]).recipe)
    windows = values["data"]["init_args"]["batch_size"] * sizes["data"]
    for text in (
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters",
        f"{config.num_layers} layers",
        experts,
        f"context {config.context_length}, horizon {config.prediction_length}, patch {config.patch_length}",
        f"{sizes['world_size']} on CPU",
        f"`expert: {sizes['expert']}`",
        f"{values['trainer']['max_steps']:,} of {windows} windows",
    ):
        assert text in row


@pytest.mark.parametrize("recipe", trains("GPTMoE"), ids=lambda path: path.stem)
def test_table_of_gpt_recipes_is_true(recipe: Path) -> None:
    values, row = load_yaml(recipe).values, row_of(recipe)
    config = from_mapping(GPTMoEConfig, values["model"]["init_args"]["config"], "config")
    trainer, data = values["trainer"], values["data"]["init_args"]
    sizes = summarize(check([str(recipe)]).recipe)
    rows = data["batch_size"] * sizes["data"] * trainer.get("accumulate_grad_batches", 1)
    assert config.moe is not None
    for text in (
        f"{parameter_count(config).total:,} parameters",
        f"{config.num_layers} layers",
        f"{config.moe.num_experts} experts (top-{config.moe.top_k})",
        f"sequences of {data['sequence_length']:,}",
        f"{sizes['world_size']} on {trainer['accelerator'].upper()}",
        f"{trainer['max_steps']:,} of {rows * data['sequence_length']:,} tokens",
    ):
        assert text in row
    for axis, size in trainer["strategy"]["init_args"]["parallel"].items():
        assert axis == "sequence_parallel" or f"`{axis}: {size}`" in row


@pytest.mark.parametrize("name", ["qwen3_30b_a3b", "mixtral_8x7b"])
def test_cluster_recipes_train_the_published_models(name: str) -> None:
    """The fields that are written out are those of the preset; only the balancing loss is the recipe's own."""
    (recipe,) = (path for path in RECIPES if path.name.startswith(name))
    values = load_yaml(recipe).values["model"]["init_args"]["config"]
    config, preset = from_mapping(GPTMoEConfig, values, "config"), getattr(GPTMoEConfig, name)()
    assert config.moe is not None
    balancing = replace(preset.moe, auxiliary_loss_coefficient=config.moe.auxiliary_loss_coefficient)
    assert config == replace(preset, moe=balancing)


def test_the_cpu_recipe_is_as_announced() -> None:
    """The sizes that the published figures of this recipe stand for."""
    values = load_yaml(FOLDER / "chronos_moe_cpu.yaml").values
    config = config_from_dict(values["model"]["init_args"]["config"])
    assert (config.patch_length, config.context_length, config.prediction_length) == (12, 144, 24)
    assert config.moe is not None
    assert (config.moe.num_experts, config.moe.top_k, config.moe.shared_expert_gate) == (8, 2, True)
    assert config.moe.shared_expert_hidden_size > 0
    assert 380_000 < sum(parameter.numel() for parameter in ChronosMoE(config).network().parameters()) < 440_000
    assert values["trainer"]["devices"] == 2
    assert values["trainer"]["strategy"]["init_args"]["process_group_backend"] == "gloo"
    assert values["report"] is True
    assert config == ChronosMoEConfig(moe=config.moe), "everything but the MoE layer is at its default"


def test_every_top_level_key_and_its_default_are_documented() -> None:
    for field in fields(Recipe):
        rows = [
            line for line in README.splitlines() if line.startswith("|") and f"`{field.name}`" in line.split("|")[1]
        ]
        assert len(rows) == 1, field.name
        if isinstance(field.default, bool):
            assert f"`{str(field.default).lower()}`" in rows[0].split("|")[2]
