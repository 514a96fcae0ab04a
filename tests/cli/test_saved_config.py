"""The check against the parser that trains: what one writes, the other accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI

import lightning_moe.strategy  # noqa: F401 (registers the strategies)
from lightning_moe.config.loader import load_yaml
from lightning_moe.config.recipe import check_recipe
from tests.cli.recipes import GOOD


@pytest.mark.slow
def test_what_lightning_saves_passes_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI saves the recipe of a run with every default filled in; it must be usable as a recipe."""
    monkeypatch.setattr("sys.argv", ["lightning-moe"])  # LightningCLI warns when it sees pytest's arguments
    recipe, saved = tmp_path / "recipe.yaml", tmp_path / "config.yaml"
    recipe.write_text(GOOD.replace("save_dir: runs", f"save_dir: {tmp_path}"))
    cli = LightningCLI(run=False, args=["--config", str(recipe)], save_config_callback=None)
    cli.parser.save(cli.config, saved, skip_none=False)

    document = load_yaml(saved)
    assert len(document.locations) > 130, "every argument is written"
    verdict = check_recipe(document)
    assert [str(problem) for problem in verdict.problems] == []

    known = verdict.recipe.model.init_args.config
    trained = cli.model.config
    assert known.moe.shared_expert_hidden_size == trained.moe.shared_expert_hidden_size == 128
    assert known.quantiles == trained.quantiles == (0.1, 0.5, 0.9)
    assert verdict.recipe.model.init_args.optimizer.learning_rate == cli.model.optimizer_config.learning_rate
