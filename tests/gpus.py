"""Starts a script of the tests on several GPUs by torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch


def run_on_gpus(world_size: int, module: str, *arguments: object, timeout: float = 280.0) -> None:
    """Run a module on as many GPUs, and fail with what it has said if it fails; skips where there are fewer."""
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={world_size}", "--standalone"]
    command = [sys.executable, *launcher, "-m", module, *map(str, arguments)]
    root = Path(__file__).parents[1]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=timeout, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
