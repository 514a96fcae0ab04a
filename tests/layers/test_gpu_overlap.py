"""Attention that overlaps its exchanges on NCCL ranks, against dense attention on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpus import run_on_gpus
from tests.layers.gpu_overlap_script import all_cases
from tests.layers.overlapped import TOLERANCES, Case, assert_bitwise, check_dense, dense, variants
from tests.layers.parallel import assert_close

pytestmark = pytest.mark.gpu


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_nccl_equals_dense_attention(world: int, tmp_path: Path) -> None:
    output = tmp_path / "results.pt"
    run_on_gpus(world, "tests.layers.gpu_overlap_script", output)
    check(torch.load(output, weights_only=False), world)


def check(results: list[dict[Any, Any]], world: int) -> None:
    """Check every rank's :func:`~tests.layers.gpu_overlap_script.run_all`."""
    expected: dict[Case, Any] = {}
    for tensor in (1, 2) if world == 4 else (1,):
        for case in all_cases(tensor, world):
            if case.sink != "none":
                continue
            kind = replace(case, chunks=2, sequence_parallel=False)
            expected[kind] = expected.get(kind) or dense(kind)
            parts = [result[tensor, case] for result in results]
            check_dense(parts, expected[kind], case, tensor, TOLERANCES[case.dtype])
            overlapped, waiting = ([result[tensor, each] for result in results] for each in variants(case))
            assert_bitwise(overlapped, waiting, case)
    for result in results:
        repeated = [key for key in result if key[0] == "differences"]
        assert len(repeated) == 2 * len(TOLERANCES)
        assert {key: result[key] for key in repeated if result[key]} == {}
        if world == 2:
            report, (blocking, chunked), _, differences = result["ways"]
            assert [name for name, equal in report.items() if not equal] == []
            assert differences == 0
            for value, other in zip(chunked, blocking, strict=True):
                assert_close(value, other, TOLERANCES[torch.bfloat16])
