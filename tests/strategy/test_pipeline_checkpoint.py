"""Runs of pipelines are saved, and go on with other numbers of stages and chunks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_moe import MoEStrategy, ParallelConfig, PipelineConfig
from tests.distributed import RankPool
from tests.strategy.chains import Chain
from tests.strategy.tiny import Sequences

BLOCKS = 4
STEPS = 4
ROOT = Path(__file__).parents[2]


class Groups(Chain):
    """AdamW of three groups; the last one is empty on all stages but the one with the head."""

    def configure_optimizers(self) -> Any:
        named = dict(self.named_parameters())
        matrices = [name for name, parameter in named.items() if parameter.dim() > 1]
        head = [name for name in named if name not in matrices and "head" in name]
        vectors = [name for name in named if name not in matrices and name not in head]
        groups = zip((matrices, vectors, head), (0.1, 0.0, 0.0), (0.01, 0.02, 0.03), strict=True)
        optimizer = torch.optim.AdamW(
            [
                {"params": [named[name] for name in names], "weight_decay": decay, "lr": lr}
                for names, decay, lr in groups
            ]
        )
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def fit(
    pipeline: int,
    schedule: str,
    steps: int,
    *,
    start: Path | None = None,
    save: Path | None = None,
    parallel: dict[str, int] | None = None,
    strategy: dict[str, Any] | None = None,
    saves: ModelCheckpoint | None = None,
    averages: bool = False,
    experts: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """Train, from a checkpoint or from the beginning; return this rank's weights."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        strategy=MoEStrategy(
            ParallelConfig(pipeline=pipeline, **(parallel or {})),
            PipelineConfig(schedule=schedule, num_microbatches=4),
            **(strategy or {}),
        ),
        callbacks=[EMAWeightAveraging(decay=0.5)] * averages + [saves] * (saves is not None),
        logger=False,
        enable_checkpointing=saves is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=steps,
        **settings,
    )
    module = Groups(BLOCKS, experts=experts)
    data = Sequences(8 * STEPS)
    sampler: DistributedSampler[Any] = DistributedSampler(data, **trainer.distributed_sampler_kwargs, shuffle=False)
    batch = 8 // trainer.distributed_sampler_kwargs["num_replicas"]
    trainer.fit(module, DataLoader(data, batch_size=batch, sampler=sampler), ckpt_path=start)
    if save is not None:
        trainer.save_checkpoint(save)
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def check_union(results: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    """Ranks of the stages hold the model between them; float32 sums are in one order in all schedules."""
    assert {name for weights in results for name in weights} == expected.keys()
    for weights in results:
        for name, value in weights.items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_a_run_goes_on_with_other_stages(ranks: RankPool, tmp_path: Path) -> None:
    """Sharded and whole optimizer state, a scheduler, and a parameter group that is empty on most stages."""
    whole = ranks.run(1, fit, 1, "1f1b", STEPS, init_process_group=False)[0]
    runs: list[tuple[int, str, dict[str, Any]]] = [
        (1, "1f1b", {}),
        (2, "zb-v", {}),
        (4, "zb-h1", {"strategy": {"optimizer_sharding": False}}),
    ]
    for i, (saving, loading) in enumerate(pairwise([*runs, runs[0]])):
        path = tmp_path / str(i)
        world_size, schedule, options = saving
        ranks.run(world_size, fit, world_size, schedule, 2, save=path, init_process_group=False, **options)
        world_size, schedule, options = loading
        resumed = ranks.run(
            world_size, fit, world_size, schedule, STEPS, start=path, init_process_group=False, **options
        )
        check_union(resumed, whole)


@pytest.mark.slow
def test_an_interrupted_run_with_experts_goes_on_exactly(ranks: RankPool, tmp_path: Path) -> None:
    """Main weights of bfloat16, a weight average, and states of ranks along data and expert axes."""
    options: dict[str, Any] = {
        "parallel": {"expert": 2},
        "experts": {},
        "precision": "bf16-true",
        "averages": True,
        "init_process_group": False,
    }
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    through = ranks.run(4, fit, 2, "zb-h1", STEPS, saves=saves, **options)
    start = tmp_path / "step=2.ckpt"
    resumed = ranks.run(4, fit, 2, "zb-h1", STEPS, start=start, **options)
    for weights, expected in zip(resumed, through, strict=True):
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            assert torch.equal(value, expected[name]), name


FORKED = """
import csv, sys, warnings
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelSummary, ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from lightning_moe import MoEStrategy, ParallelConfig, PipelineConfig
from tests.strategy.chains import Chain
from tests.strategy.tiny import Sequences

def fit(pipeline):
    strategy = MoEStrategy(ParallelConfig(pipeline=pipeline), PipelineConfig(num_microbatches=4), start_method="fork")
    logger = CSVLogger(sys.argv[1], name=str(pipeline), version=0)
    monitor = ThroughputMonitor(lambda batch: len(batch["input"]), window_size=4)
    trainer = pl.Trainer(
        accelerator="cpu", devices=pipeline, strategy=strategy, max_steps=5, logger=logger, log_every_n_steps=1,
        callbacks=[ModelSummary(1), monitor], enable_checkpointing=False, enable_progress_bar=False,
    )
    module = Chain(4)
    trainer.fit(module, DataLoader(Sequences(40), batch_size=8))
    return module.state_dict()

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    one, two = fit(1), fit(2)
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    with open(sys.argv[1] + "/2/version_0/metrics.csv") as file:
        rates = next(row for row in csv.DictReader(file) if row["train/samples_per_sec"])
    print(rates["train/batches_per_sec"], rates["train/samples_per_sec"], rates["train/device/samples_per_sec"])
"""


@pytest.mark.slow
def test_the_main_process_gets_and_is_told_of_the_whole_model(tmp_path: Path) -> None:
    """Weights of all stages come back from the workers; the summary and the samples per second are those of all."""
    script = tmp_path / "script.py"
    script.write_text(FORKED)
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    batches, samples, per_device = map(float, result.stdout.split()[-3:])
    assert samples == pytest.approx(8 * batches, rel=1e-9)
    assert per_device == pytest.approx(samples / 2, rel=1e-9)
    alone, staged = re.findall(r"\n +\| Name .*?Total Flops", result.stderr, re.DOTALL)
    assert alone == staged
    assert "2.8 K     Total params" in staged
