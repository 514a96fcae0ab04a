"""Every way of starting ranks gives the numbers of the single process, and the weights come back."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lightning_moe import ConfigError, MoEStrategy, ParallelConfig
from lightning_moe.strategy.launcher import ShardedMultiProcessingLauncher
from tests.distributed import RankPool
from tests.strategy.launch_script import SETTINGS, Data
from tests.strategy.tiny import Recorder, Run, TinyMoE, check_equal, loader, relative_error, trainer

ROOT = Path(__file__).parents[2]


@dataclass
class Result:
    """What the training script left."""

    run: Run
    """Written by the ranks themselves at the end of the training."""
    validate: dict[str, float]
    """Metrics of ``validate`` after ``fit``, in the main process."""
    weights: dict[str, torch.Tensor]
    """The main process' weights after that."""


def train_single() -> Result:
    """The reference: Lightning in one process, the same global batches."""
    recorder = Recorder()
    run = trainer(1, 0, callbacks=[recorder], **SETTINGS)
    module = TinyMoE()
    run.fit(module, Data())
    trained = recorder.run(run, module)
    (metrics,) = run.validate(module, Data(), verbose=False)
    return Result(trained, metrics, module.state_dict())


def _run_script(strategy: str, folder: Path, *command: str) -> Result:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = command or (sys.executable, "-m")
    process = subprocess.run(
        [*command, "tests.strategy.launch_script", strategy, str(folder)],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    run, after = torch.load(folder / "run.pt", weights_only=True), torch.load(folder / "after.pt", weights_only=True)
    return Result(Run(**run), **after)


def _check(result: Result, expected: Result) -> None:
    """The training has the numbers of the single process, and validation saw the weights it ended with."""
    check_equal(result.run, expected.run, 1e-12)
    # Lightning logs in float32.
    assert result.validate["val_loss"] == pytest.approx(expected.validate["val_loss"], rel=1e-6)


@pytest.fixture(scope="module")
def expected(ranks: RankPool) -> Result:
    result: Result = ranks.run(1, train_single, init_process_group=False)[0]
    assert min(result.run.gradient_norms()) > SETTINGS["gradient_clip_val"], "every step has to be clipped"
    assert len(result.run.grads) == 10
    assert len(result.run.losses) == 20, "every second window has to be short"
    return result


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["popen", "spawn", "fork"])
def test_start_methods(start_method: str, expected: Result, tmp_path: Path) -> None:
    """Validation after fit sees the trained weights, though spawn and fork train in processes that are gone."""
    result = _run_script(start_method, tmp_path)
    _check(result, expected)
    assert result.weights.keys() == expected.weights.keys()
    for name, value in result.weights.items():
        whole = expected.weights[name]
        if value.shape == whole.shape:
            assert relative_error(value, whole) <= 1e-12, name
        else:  # with popen the main process is rank 0 and keeps its own experts
            assert start_method == "popen"
            assert relative_error(value, whole[: len(value)]) <= 1e-12, name


@pytest.mark.slow
def test_torchrun(expected: Result, tmp_path: Path) -> None:
    """Ranks started by torchrun are joined, not launched again."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m")
    _check(_run_script("popen", tmp_path, *torchrun), expected)


@pytest.mark.slow
def test_registered_name(expected: Result, tmp_path: Path) -> None:
    """``strategy="moe_spawn"`` is plain data parallelism over all devices."""
    _check(_run_script("moe_spawn", tmp_path), expected)


CONFIG_FILE = """
trainer:
  accelerator: cpu
  devices: 4
  logger: false
  strategy:
    class_path: lightning_moe.MoEStrategy
    init_args:
      parallel:
        expert: 2
      start_method: fork
"""


def test_strategy_from_a_configuration_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own command line builds the strategy from ``class_path`` and ``init_args``, nested sizes included."""
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG_FILE)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(file)])
    strategy = LightningCLI(BoringModel, run=False, seed_everything_default=False).trainer.strategy
    assert type(strategy) is MoEStrategy
    assert strategy.parallel == ParallelConfig(expert=2)
    assert strategy.num_processes == 4
    assert isinstance(strategy.launcher, ShardedMultiProcessingLauncher)
    assert strategy.launcher._start_method == "fork"


def test_registry_names() -> None:
    for name, start_method in (("moe", "popen"), ("moe_spawn", "spawn"), ("moe_fork", "fork")):
        strategy = StrategyRegistry.get(name)
        assert isinstance(strategy, MoEStrategy)
        assert strategy._start_method == start_method


LAYERS_IN_SETUP = """
import warnings
import torch
from lightning_moe import MoEStrategy, ParallelConfig
from tests.strategy.launch_script import Data
from tests.strategy.tiny import TinyMoE, trainer

class InSetup(TinyMoE):
    def configure_model(self): pass
    def setup(self, stage): super().configure_model()

if __name__ == "__main__":
    strategy = MoEStrategy(ParallelConfig(expert=2), start_method="fork")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(2, 2, strategy=strategy, precision="64-true", max_steps=1)
        run.fit(InSetup(), Data())
    assert any("stay behind in the workers" in str(each.message) for each in caught)
    strategy = MoEStrategy(ParallelConfig(expert=2), start_method="fork")
    module = TinyMoE()
    trainer(2, 2, strategy=strategy, precision="64-true", max_epochs=0).fit(module, Data())
    assert module.layers[0].experts.down_proj.shape[0] == 8
    print("done")
"""


@pytest.mark.slow
def test_weights_that_cannot_or_need_not_come_back(tmp_path: Path) -> None:
    """Layers that ``setup`` builds in the workers, and a fit without a single step: neither may end in an error."""
    script = tmp_path / "script.py"
    script.write_text(LAYERS_IN_SETUP)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.stdout.strip().endswith("done"), result.stderr[-2000:]


def test_launcher_of_each_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's detection of SLURM and torchrun works with the strategy; processes are created externally."""

    def strategy(**settings: Any) -> MoEStrategy:
        run = pl.Trainer(accelerator="cpu", devices=2, strategy=MoEStrategy(**settings), logger=False)
        assert isinstance(run.strategy, MoEStrategy)
        return run.strategy

    assert isinstance(strategy().launcher, _SubprocessScriptLauncher)
    assert isinstance(strategy(start_method="spawn").launcher, ShardedMultiProcessingLauncher)
    slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train", "SLURM_LOCALID": "1", "SLURM_PROCID": "1"}
    with monkeypatch.context() as patch:
        for key, value in {**slurm, "SLURM_NODEID": "0", "SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "2"}.items():
            patch.setenv(key, value)
        on_slurm = strategy(parallel=ParallelConfig(expert=2))
        assert isinstance(on_slurm.cluster_environment, SLURMEnvironment)
        assert isinstance(on_slurm.launcher, _SubprocessScriptLauncher)
        assert on_slurm.launcher.cluster_environment.creates_processes_externally
        assert on_slurm.distributed_sampler_kwargs == {"num_replicas": 2, "rank": 1}
    torchrun = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    with monkeypatch.context() as patch:
        for key, value in {**torchrun, "TORCHELASTIC_RUN_ID": "x"}.items():
            patch.setenv(key, value)
        assert isinstance(strategy().cluster_environment, TorchElasticEnvironment)


def test_sampler_arguments_before_any_process_exists() -> None:
    """Lightning's own code and users ask for them right after the Trainer is built."""
    run = pl.Trainer(accelerator="cpu", devices=4, strategy=MoEStrategy(ParallelConfig(expert=2)), logger=False)
    assert run.strategy.distributed_sampler_kwargs == {"num_replicas": 4, "rank": 0}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"parallel": ParallelConfig(expert=3)}, "parallel.expert"),
        ({"parallel": ParallelConfig(data=3)}, "parallel.data"),
        ({"parallel": ParallelConfig(pipeline=3)}, "parallel.pipeline*context*tensor"),
        ({"start_method": "forkserver"}, "start_method"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"bucket_megabytes": -1}, "bucket_megabytes"),
    ],
)
def test_bad_settings_are_refused_before_any_process_starts(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        pl.Trainer(accelerator="cpu", devices=4, strategy=MoEStrategy(**settings), logger=False)
    assert error.value.field == field


def test_mesh_before_launch_says_when_it_exists() -> None:
    with pytest.raises(RuntimeError, match="configure_model"):
        _ = MoEStrategy().mesh


def test_training_twice_in_one_process(ranks: RankPool) -> None:
    """Fit, validate and fit again on the same objects: hooks, buckets and groups must not pile up."""
    results = ranks.run(2, _fit_twice, init_process_group=False)
    single = ranks.run(1, _fit_four_steps, init_process_group=False)[0]
    assert results[0] == pytest.approx(single, rel=1e-12)


def _fit_four_steps() -> list[float]:
    recorder = Recorder()
    run = trainer(1, 0, precision="64-true", callbacks=[recorder], max_steps=4, max_epochs=100)
    run.fit(TinyMoE(optimizer="sgd"), loader(16, 8, 1, 0, torch.float64))
    return recorder.losses


def _fit_twice() -> list[float]:
    recorder = Recorder()
    run = trainer(2, 2, precision="64-true", callbacks=[recorder], max_steps=2, max_epochs=100)
    module = TinyMoE(optimizer="sgd")  # without state, so that two fits continue like one
    data = loader(16, 8, 2, run.global_rank, torch.float64)
    run.fit(module, data)
    run.validate(module, data, verbose=False)
    run.fit_loop.epoch_loop.max_steps = 4
    run.fit(module, data)
    gathered: list[Any] = [None, None]
    torch.distributed.all_gather_object(gathered, recorder.losses)
    return [sum(pair) / 2 for pair in zip(*gathered, strict=True)]
