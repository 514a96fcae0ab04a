"""The same equality on CUDA with NCCL: every topology of two and of four GPUs against one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models.gpt_moe.gpu_script import CASES
from tests.strategy.tiny import Run, check_equal

ROOT = Path(__file__).parents[3]
TOLERANCES = {"64-true": 1e-11, "32-true": 1e-4, "bf16-mixed": 5e-2}
"""Largest relative error. In bf16 operands have 8 bits, and ranks add up in another order; TF32 is off."""


def _run(world_size: int, output: Path) -> dict[tuple[str, str], Run]:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={world_size}", "--standalone"]
    command = [sys.executable, *launcher, "-m", "tests.models.gpt_moe.gpu_script", str(output)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    runs: dict[tuple[str, str], Run] = torch.load(output, weights_only=False)
    return runs


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The reference, by precision."""
    runs = _run(1, tmp_path_factory.mktemp("one") / "runs.pt")
    return {precision: run for (_, precision), run in runs.items()}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_nccl_equals_one_gpu(one_gpu: dict[str, Run], world_size: int, tmp_path: Path) -> None:
    """Losses and gradients in all precisions, weights after six steps in float64."""
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    runs = _run(world_size, tmp_path / "runs.pt")
    assert {precision for _, precision in runs} == set(CASES)
    failures = []
    for (topology, precision), run in runs.items():
        try:
            check_equal(run, one_gpu[precision], TOLERANCES[precision])
        except AssertionError as error:
            failures.append(f"{topology}, {precision}: {error}")
    assert not failures, "\n".join(failures)
