"""The same equality on CUDA with NCCL: one GPU against two or four, in float64, float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from lightning_moe import ParallelConfig
from tests.gpus import run_on_gpus
from tests.models.gpt_moe.gpu_script import PRECISIONS, TOPOLOGIES, cases_on
from tests.models.gpt_moe.training import assemble, topology_name
from tests.strategy.tiny import Run, check_equal

TOLERANCES = {"64-true": 1e-11, "32-true": 1e-5, "bf16-mixed": 5e-2}
"""bfloat16 rounds to 3 digits, in other places for each topology."""

RunOf = Callable[[int, str, ParallelConfig | None], Run]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> RunOf:
    """The run of a case; all cases of one world size are trained by one launch."""

    @cache
    def launch(world_size: int) -> list[Run]:
        folder = tmp_path_factory.mktemp(f"ranks{world_size}")
        run_on_gpus(world_size, "tests.models.gpt_moe.gpu_script", folder)
        by_rank = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
        return [assemble(local) for local in zip(*by_rank, strict=True)]

    def find(world_size: int, precision: str, parallel: ParallelConfig | None) -> Run:
        keys = [(known, topology) for known, topology, _ in cases_on(world_size)]
        return launch(world_size)[keys.index((precision, parallel))]

    return find


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(world_size, parallel) for world_size in (2, 4) for parallel in TOPOLOGIES[world_size]],
    ids=topology_name,
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_nccl_equals_one_gpu(run_of: RunOf, precision: str, world_size: int, parallel: ParallelConfig) -> None:
    """Losses, gradients and weights of steps that checkpoint activations in turn."""
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    check_equal(run_of(world_size, precision, parallel), run_of(1, precision, None), TOLERANCES[precision])
