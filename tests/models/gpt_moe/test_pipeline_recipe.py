"""The recipe of a pipeline trains by the console command, as the plan of it says."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_moe.cli.main import main
from tests.data.text.folder import write_texts
from tests.distributed import RankPool

RECIPE = str(Path(__file__).parents[3] / "recipes" / "gpt_moe_cpu_pipeline.yaml")
CHANGES = {
    "--data.path": "texts",
    "--data.holdout_modulus": "5",
    "--model.optimizer.warmup_steps": "2",
    "--model.config.max_sequence_length": "128",
    "--trainer.max_steps": "6",
    "--trainer.val_check_interval": "3",
    "--trainer.log_every_n_steps": "1",
    "--trainer.callbacks+": "lightning_moe.callbacks.TextSamples",
    "--trainer.callbacks.every_n_steps": "4",
    "--trainer.callbacks.max_new_tokens": "4",
}


class Parts(pl.Callback):
    """Writes what each rank has built."""

    def on_fit_end(self, trainer: pl.Trainer, module: Any) -> None:
        network = module.network()
        (part,) = network.parts
        built = {
            "blocks": [int(name) for name, _ in network.blocks.named_children()],
            "embedding": part.first,
            "head": part.last,
            "weights": sum(each.numel() * each.element_size() for each in module.parameters()),
        }
        Path(f"rank{trainer.global_rank}.json").write_text(json.dumps(built))


def fit(folder: Path) -> tuple[int, str]:
    """Run the command on this rank; exit code and what it printed."""
    os.chdir(folder)
    arguments = [f"{name}={value}" for name, value in CHANGES.items()]
    watch = f"--trainer.callbacks+={Parts.__module__}.{Parts.__qualname__}"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(["fit", "--config", RECIPE, *arguments, watch, "--json"])
    return code, out.getvalue()


@pytest.mark.slow
def test_recipe_trains_as_planned(ranks: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(tmp_path / "texts")
    (code, out), (other_code, _) = ranks.run(2, fit, tmp_path, init_process_group=False, timeout=240)
    assert (code, other_code) == (0, 0)
    assert out.count("[step 4] def ") == 1
    summary = json.loads(out.splitlines()[-1])
    assert main(["plan", RECIPE, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    for rank, (stage, memory) in enumerate(zip(plan["stages"], plan["memory"], strict=True)):
        built = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert built.pop("weights") == memory["weights"]
        assert built == {key: stage[key] for key in built}
    assert 4 * summary["parameters"] == sum(memory["weights"] for memory in plan["memory"])
    assert summary["world_size"] == 2
    assert summary["tokens_seen"] == 6 * 8 * 128
    assert len(summary["expert_load"]) == 4
    with (tmp_path / "runs/gpt_moe_cpu_pipeline/version_0/metrics.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.3
    assert summary["test_loss"] < losses[0]
