"""The benchmark of checkpoints, at a size for a CPU: what it reports fits together, and it cleans up."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from lightning_moe.bench.checkpoint import main, sized_config
from lightning_moe.bench.gpt import bench_config
from lightning_moe.config.gpt_size import parameter_count
from tests.distributed import RankPool

SIZES = ("--layers", "1", "--hidden", "64", "--batch", "1", "--sequence", "16", "--loss-chunk", "16")
STEPS = ("--warmup", "1", "--saves", "2", "--between", "3", "--loads", "2")


def measured(folder: str, expert: int) -> dict[str, Any]:
    printed = io.StringIO()
    with redirect_stdout(printed):
        main(
            [
                *("--folder", folder, "--expert", str(expert), "--async", "--json"),
                *("--accelerator", "cpu", "--precision", "32-true", *SIZES, *STEPS),
            ]
        )
    lines = printed.getvalue().splitlines()
    return json.loads(lines[-1]) if lines else {}


@pytest.mark.slow
def test_both_kinds_of_saving_are_measured(ranks: RankPool, tmp_path: Path) -> None:
    result, other = ranks.run(2, measured, str(tmp_path), 2, init_process_group=False)
    assert other == {}, "rank 0 prints"
    parameters, _ = parameter_count(sized_config(16, 1, 64))
    assert (result["ranks"], result["parameters"]) == (2, parameters)
    # Weights and two moments of AdamW in float32, and little else.
    assert 12 * parameters < result["checkpoint_bytes"] < 12.5 * parameters
    assert result["step_milliseconds"]["median"] > 0
    for kind in ("synchronous", "asynchronous"):
        figures = result[kind]
        for name in ("stall_seconds", "committed_seconds", "load_seconds"):
            spread = figures[name]
            assert 0 < spread["min"] <= spread["median"] <= spread["max"], (kind, name)
        rate = figures["written_gigabytes_per_second"] * figures["committed_seconds"]["median"]
        assert rate == pytest.approx(result["checkpoint_bytes"] / 1e9, rel=1e-9)
    assert result["synchronous"]["step_milliseconds_while_writing"] is None
    assert list(tmp_path.iterdir()) == []


def test_the_full_size_is_the_benchmarks() -> None:
    assert sized_config(4096, 8, 2048) == bench_config(4096)
