"""Overlapped expert layers on CUDA devices over NCCL."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu

TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}
"""Against the all-to-all, which rounds elsewhere."""


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_overlapped_equals_waiting_and_the_all_to_all(world_size: int, tmp_path: Path) -> None:
    """A hundred repetitions, each bit for bit: a race would show."""
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    output = tmp_path / "results.json"
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={world_size}", "--standalone"]
    command = [sys.executable, *launcher, "-m", "tests.moe.overlap.gpu_script", str(output), "100"]
    result = subprocess.run(
        command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(output.read_text())
    assert len(found["errors"]) == 54
    wrong = {case: error for case, error in found["errors"].items() if not error <= TOLERANCES[case.split("; ")[-1]]}
    assert not wrong, wrong
    unequal = {case: count for case, count in found["unequal"].items() if count}
    assert not unequal, unequal
