"""Rates are the same on all ranks, sensible, and those of the config where it gives them."""

from __future__ import annotations

from dataclasses import astuple
from math import inf, isfinite
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_moe import OverlapConfig
from lightning_moe.moe.overlap.cost import Rates, typical_gemm
from lightning_moe.moe.overlap.rates import measure_rates
from tests.distributed import RankPool


def measured(config: OverlapConfig, group: dist.ProcessGroup | None, dtype: torch.dtype = torch.float32) -> Rates:
    sizes = {"hidden": 32, "up_width": 48, "inner": 24, "local_slots": 2}
    return measure_rates(group, torch.device("cpu"), **sizes, dtype=dtype, config=config)


def measure_all(configs: list[OverlapConfig]) -> list[tuple[Rates, bool]]:
    """For each config the rates, and whether random numbers go on as if nothing had been measured."""
    results = []
    for config in configs:
        before = torch.get_rng_state()
        rates = measured(config, dist.group.WORLD)
        results.append((rates, torch.equal(before, torch.get_rng_state())))
    return results


def bits(rates: Rates) -> Any:
    """Exact, unlike the shortest decimal that compares equal."""
    return [repr(value) if not isinstance(value, float) else value.hex() for value in astuple(rates)]


def test_ranks_agree(ranks: RankPool) -> None:
    configs = [
        OverlapConfig(),
        OverlapConfig(link_gigabytes_per_second=0.5),
        OverlapConfig(gemm_teraflops=0.25),
        OverlapConfig(link_gigabytes_per_second=2.0, gemm_teraflops=0.25),
    ]
    results = ranks.run(2, measure_all, configs)
    for mine, other in zip(*results, strict=True):
        assert bits(mine[0]) == bits(other[0])
        assert mine[1]
        assert other[1]
    for config, (rates, _) in zip(configs, results[0], strict=True):
        assert 0 < rates.link_bytes_per_second < inf
        assert 0 <= rates.latency < 1
        assert 0 <= rates.contention < 1
        assert all(0 < rate < inf for _, rate in rates.gemm)
        assert 1e6 < rates.copy_bytes_per_second < 1e13
        if config.link_gigabytes_per_second is None:
            # Loopback: between a slow disk's and a fast GPU's.
            assert 1e6 < rates.link_bytes_per_second < 1e12
        else:
            assert rates.link_bytes_per_second == config.link_gigabytes_per_second * 1e9
        if config.gemm_teraflops is None:
            assert rates.gemm[0][0] == 16.0
        else:
            assert rates.gemm == typical_gemm(config.gemm_teraflops * 1e12)
            assert rates.flops_per_second(1e6) == 0.25e12


def slower_rank(rank: int) -> tuple[Rates, float]:
    """Rates as agreed, and this rank's own time for a product."""
    from lightning_moe.moe.overlap.stopwatch import Stopwatch

    own = []
    seconds = Stopwatch.seconds

    def delayed(*arguments: Any, **options: Any) -> float:
        own.append(seconds(*arguments, **options) + (0.25 if dist.get_rank() == rank else 0.0))
        return own[-1]

    Stopwatch.seconds = delayed  # type: ignore[method-assign]
    try:
        return measured(OverlapConfig(), dist.group.WORLD), own[0]
    finally:
        Stopwatch.seconds = seconds  # type: ignore[method-assign]


def test_the_slowest_rank_counts(ranks: RankPool) -> None:
    """One rank's stopwatch adds a quarter of a second: both ranks leave out the products that it leaves out."""
    (first, _), (second, own) = ranks.run(2, slower_rank, 1)
    assert bits(first) == bits(second)
    assert own > 0.25
    assert [rows for rows, _ in first.gemm] == [16.0]
    flops = 2.0 * 4 * 16 * 2 * (48 + 24) * 32
    assert first.gemm[0][1] == pytest.approx(flops / own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_alone(dtype: torch.dtype) -> None:
    rates = measured(OverlapConfig(), None, dtype)
    assert rates.link_bytes_per_second == inf
    assert rates.contention == 0.0
    assert isfinite(rates.gemm[-1][1])
    assert measured(OverlapConfig(link_gigabytes_per_second=3.0), None, dtype).link_bytes_per_second == 3e9
