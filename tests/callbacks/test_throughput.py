"""True rates where several ranks work on the same samples."""

from __future__ import annotations

import pytest
from lightning.fabric.utilities.throughput import Throughput

from lightning_moe.callbacks.throughput import ShardedThroughput


def run(throughput: Throughput, steps: int = 4) -> dict[str, int | float]:
    """Batches of 8 samples of 16 tokens and 1e3 FLOPs, one every half second."""
    for step in range(1, steps + 1):
        throughput.update(time=step * 0.5, batches=step, samples=8 * step, lengths=128 * step, flops=1000)
    return throughput.compute()


@pytest.mark.parametrize(("data_ranks", "ranks"), [(1, 2), (2, 4), (3, 12)])
def test_samples_count_once(data_ranks: int, ranks: int) -> None:
    metrics = run(ShardedThroughput(data_ranks, ranks, window_size=4, available_flops=1e5))
    totals = {"batches_per_sec": 2.0, "samples_per_sec": 16.0, "items_per_sec": 256.0, "flops_per_sec": 2000.0}
    for name, of_one in totals.items():
        assert metrics[name] == pytest.approx(of_one * data_ranks, rel=1e-12)
        assert metrics[f"device/{name}"] == pytest.approx(of_one * data_ranks / ranks, rel=1e-12)
    assert metrics["device/mfu"] == pytest.approx(2000.0 * data_ranks / ranks / 1e5, rel=1e-12)
    assert "mfu" not in metrics
    assert (metrics["time"], metrics["batches"], metrics["samples"], metrics["lengths"]) == (2.0, 4, 32, 512)


def test_without_shared_samples_it_is_lightnings() -> None:
    settings = {"window_size": 4, "available_flops": 1e5, "separator": "-"}
    assert run(ShardedThroughput(4, 4, **settings)) == run(Throughput(world_size=4, **settings))  # type: ignore[arg-type]


def test_rates_wait_for_a_full_window() -> None:
    assert run(ShardedThroughput(2, 4, window_size=10)).keys() == {"time", "batches", "samples", "lengths"}
