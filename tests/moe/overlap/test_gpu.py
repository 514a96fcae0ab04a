"""Overlapped expert layers on CUDA devices over NCCL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gpus import run_on_gpus

pytestmark = pytest.mark.gpu

TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}
"""Against the all-to-all, which rounds elsewhere."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world_size", [2, 4])
def test_overlapped_equals_waiting_and_the_all_to_all(world_size: int, tmp_path: Path) -> None:
    """A hundred repetitions, each bit for bit: a race would show."""
    output = tmp_path / "results.json"
    run_on_gpus(world_size, "tests.moe.overlap.gpu_script", output, 100, timeout=540.0)
    found = json.loads(output.read_text())
    assert len(found["errors"]) == 54
    wrong = {case: error for case, error in found["errors"].items() if not error <= TOLERANCES[case.split("; ")[-1]]}
    assert not wrong, wrong
    unequal = {case: count for case, count in found["unequal"].items() if count}
    assert not unequal, unequal
