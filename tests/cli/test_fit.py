"""The console command end to end, as a user runs it: two processes, real series, a report."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lightning_moe.checkpoint.consolidate import consolidate
from lightning_moe.config.loader import load_yaml
from lightning_moe.data.fcomp import load_competitions
from lightning_moe.models.chronos_moe import ChronosMoE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

COMMAND = [str(Path(sys.executable).with_name("lightning-moe"))]
DATASETS = ("m1_yearly", "m3_other", "tourism_quarterly")

RECIPE = f"""\
seed_everything: 0
report: true
trainer:
  accelerator: cpu
  devices: 2
  strategy:
    class_path: lightning_moe.MoEStrategy
    init_args:
      parallel:
        expert: 2
  max_steps: 30
  val_check_interval: 15
  num_sanity_val_steps: 0
  log_every_n_steps: 10
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args:
      save_dir: runs
      name: tiny
      version: 0
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        monitor: val_wql
        filename: "{{step}}"
    - class_path: lightning_moe.callbacks.ExpertLoad
model:
  class_path: lightning_moe.ChronosMoE
  init_args:
    config:
      hidden_size: 16
      ffn_hidden_size: 32
      moe:
        num_experts: 4
        expert_hidden_size: 16
    optimizer:
      warmup_steps: 5
data:
  class_path: lightning_moe.SeriesDataModule
  init_args:
    datasets: [{", ".join(DATASETS)}]
    batch_size: 48
"""


@dataclass(frozen=True)
class Run:
    """A finished command."""

    folder: Path
    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.out.splitlines()[-1]


def run(folder: Path, *arguments: str, command: list[str] = COMMAND) -> Run:
    process = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, timeout=200)
    return Run(folder, process.returncode, process.stdout, process.stderr)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("fit")
    (folder / "recipe.yaml").write_text(RECIPE)
    done = run(folder, "fit", "--config", "recipe.yaml")
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def summary(fitted: Run) -> dict[str, Any]:
    name, _, path = fitted.last_line.partition(": ")
    assert name == "summary"
    assert Path(path) == fitted.folder / "runs/tiny/version_0/summary.json"
    values: dict[str, Any] = json.loads(Path(path).read_text())
    return values


def test_summary_is_complete(summary: dict[str, Any]) -> None:
    assert summary["command"] == "fit"
    assert summary["world_size"] == 2
    assert summary["seconds"] > 0
    assert tuple(summary["datasets"]) == DATASETS
    assert summary["relative_datasets"] == ["m1_yearly", "tourism_quarterly"]
    for part in ("mase", "wql"):
        ratios = [summary["datasets"][name][f"relative_{part}"] for name in summary["relative_datasets"]]
        assert summary[f"relative_{part}"] == pytest.approx(np.prod(ratios) ** 0.5, rel=1e-9)
    assert {"TiRex", "AutoETS", "AutoTheta", "Chronos-Bolt base", "Chronos-T5 large"} <= set(summary["published"])
    load = np.array(summary["expert_load"])
    assert load.shape == (2, 4)
    assert load.sum(axis=1) == pytest.approx(1.0, rel=1e-12)
    assert (load > 0).sum(axis=1).min() > 1


def test_only_rank_zero_prints(fitted: Run) -> None:
    assert fitted.out.count("Relative to seasonal naive") == 1
    assert fitted.out.count("summary: ") == 1
    assert "Traceback" not in fitted.err
    assert "sync_dist" not in fitted.err


def test_picture_shows_forecasts(summary: dict[str, Any]) -> None:
    image = matplotlib.image.imread(summary["forecast_png"])[..., :3]
    assert image.std() > 0.05, "not blank"
    for colour in ("2f6fde", "d9822b", "3b4252"):  # forecast, actual values, history
        rgb = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        assert (np.abs(image - rgb).max(axis=-1) < 0.02).sum() > 100, colour


def test_scores_are_those_of_the_checkpoint(summary: dict[str, Any], tmp_path: Path) -> None:
    """Forecast every holdout in this process with the saved weights, and score by the definitions in numpy."""
    recipe = load_yaml(Path(summary["checkpoint"]).parents[1] / "config.yaml").values
    model = ChronosMoE(recipe["model"]["init_args"]["config"])
    model.configure_model()
    consolidate(Path(summary["checkpoint"]), tmp_path / "weights.safetensors")
    model.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert summary["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    levels = np.arange(1, 10) / 10
    for name, members in load_competitions(list(DATASETS)).items():
        forecast = model.predict([torch.from_numpy(one.values) for one in members]).numpy()
        scaled, loss, size = [], np.zeros(9), 0.0
        for one, quantiles in zip(members, forecast, strict=True):
            error = one.test - quantiles[:, : one.horizon]
            season = one.season_length
            scale = np.abs(one.values[season:] - one.values[:-season]).mean()
            if scale > 0:
                scaled.append(np.abs(error[4]).mean() / scale)
            loss += 2 * np.maximum(levels[:, None] * error, (levels[:, None] - 1) * error).sum(axis=1)
            size += np.abs(one.test).sum()
        scores = summary["datasets"][name]
        assert scores["series"] == len(members)
        # The data module hands the model float32 values; here they are float64.
        assert scores["mase"] == pytest.approx(np.mean(scaled), rel=1e-5)
        assert scores["wql"] == pytest.approx((loss / size).mean(), rel=1e-5)


def test_checkpoint_validates_on_one_device(fitted: Run, summary: dict[str, Any]) -> None:
    """The sharded checkpoint of two expert ranks, in one process, gives the score that training logged."""
    done = run(
        fitted.folder,
        *("validate", "--config", "runs/tiny/version_0/config.yaml", "--ckpt_path", summary["checkpoint"]),
        *("--trainer.devices", "1", "--trainer.strategy.parallel.expert", "1", "--trainer.logger", "false", "--json"),
    )
    assert done.code == 0, done.err
    result = json.loads(done.last_line)
    assert (result["command"], result["world_size"]) == ("validate", 1)
    with (fitted.folder / "runs/tiny/version_0/metrics.csv").open() as file:
        logged = {int(row["step"]): float(row["val_wql"]) for row in csv.DictReader(file) if row["val_wql"]}
    assert sorted(logged) == [14, 29]
    assert summary["checkpoint"].endswith(f"step={min(logged, key=lambda step: logged[step]) + 1}.ckpt")
    assert result["metrics"]["val_wql"] == pytest.approx(min(logged.values()), rel=1e-5)


def test_again_as_a_module_with_json(fitted: Run, summary: dict[str, Any]) -> None:
    """`python -m` starts its ranks by another command; the same folder is no obstacle; the figures are the same."""
    again = run(
        *(fitted.folder, "fit", "--config", "recipe.yaml", "--json"),
        command=[sys.executable, "-m", "lightning_moe.cli.main"],
    )
    assert again.code == 0, again.err
    result = json.loads(again.last_line)
    assert result.keys() == summary.keys()
    assert result["relative_wql"] == pytest.approx(summary["relative_wql"], rel=1e-6)
    assert "summary: " not in again.out


def test_test_command_reports_as_well(fitted: Run, summary: dict[str, Any]) -> None:
    done = run(
        fitted.folder,
        *("test", "--config", "runs/tiny/version_0/config.yaml", "--ckpt_path", summary["checkpoint"]),
        *("--trainer.logger.version", "1", "--json"),
    )
    assert done.code == 0, done.err
    result = json.loads(done.last_line)
    assert result["command"] == "test"
    assert result["datasets"] == summary["datasets"]
    assert (fitted.folder / "runs/tiny/version_1/summary.json").is_file()


def test_bad_data_are_one_message(fitted: Run) -> None:
    """A mistake that only shows when the ranks are running and read the data."""
    (fitted.folder / "series.csv").write_text("item_id,timestamp,sales\na,2020-01-01,1\n")
    recipe = fitted.folder / "own.yaml"
    recipe.write_text(RECIPE.replace(f"datasets: [{', '.join(DATASETS)}]", "path: series.csv"))
    done = run(fitted.folder, "fit", "--config", "own.yaml")
    assert done.code == 2
    assert "Traceback" not in done.err
    assert done.err.count("is not allowed") == 1
    assert done.err.rstrip().splitlines()[-1].startswith("target: 'target' is not allowed; allowed: a column")
