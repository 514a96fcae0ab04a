"""The same equality on CUDA with NCCL: one GPU against two or four."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpus import run_on_gpus
from tests.strategy.test_pipeline import check_bitwise
from tests.strategy.tiny import check_equal, check_losses, relative_error


def _run(world_size: int, expert: int, precision: str, output: Path) -> dict[str, Any]:
    return _launch(world_size, "tests.strategy.gpu_script", str(expert), precision, str(output))


def _launch(world_size: int, module: str, *arguments: str) -> dict[Any, Any]:
    """Run a module on GPUs; its last argument is the file that it writes."""
    run_on_gpus(world_size, module, *arguments)
    loaded: dict[Any, Any] = torch.load(arguments[-1], weights_only=False)
    return loaded


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The reference on one GPU, trained once per precision."""
    folder = tmp_path_factory.mktemp("single")
    return cache(lambda precision: _run(1, 0, precision, folder / f"{precision}.pt"))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "expert"), [(2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("64-true", 1e-11), ("32-true", 1e-4), ("bf16-mixed", 5e-2), ("bf16-true", 5e-2), ("16-mixed", 1e-2)],
)
def test_nccl_equals_one_gpu(
    single: Callable[[str], dict[str, Any]],
    precision: str,
    tolerance: float,
    world_size: int,
    expert: int,
    tmp_path: Path,
) -> None:
    """Losses, gradients, weights with accumulation and clipping; predictions in inference mode; resuming."""
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    result, expected = _run(world_size, expert, precision, tmp_path / "ranks.pt"), single(precision)
    check_equal(result["run"], expected["run"], tolerance)
    assert result["predictions"].keys() == expected["predictions"].keys()
    for index, out in result["predictions"].items():
        assert relative_error(out, expected["predictions"][index]) <= 1e-4
    if precision == "64-true":
        whole, rest = result["resumed"]
        check_losses(whole, expected["resumed"][0], tolerance)
        check_losses(rest, whole[2:], tolerance)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "expert"), [(2, 1), (4, 2)])
def test_sharded_optimizers_change_no_bit(world_size: int, expert: int, tmp_path: Path) -> None:
    """With clipping and accumulation, fused AdamW, overflows on one rank."""
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    same = _launch(world_size, "tests.strategy.sharding_script", str(expert), str(tmp_path / "same.pt"))
    assert all(same.values()), same


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_pipelines_equal_one_gpu(world_size: int, tmp_path: Path) -> None:
    """All schedules, over send and receive and over copy engines, in all precisions."""
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    expected = _launch(1, "tests.strategy.pipeline_script", str(tmp_path / "one.pt"))
    results = _launch(world_size, "tests.strategy.pipeline_script", str(tmp_path / "ranks.pt"))
    allocations = results.pop("allocations")
    assert allocations[-1] == allocations[3], "steps ask CUDA for memory again and again"
    for key, runs in results.items():
        check_bitwise(runs, expected[key[0]][0], key)
