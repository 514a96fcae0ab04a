from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.data.windows import FlatSeries, WindowSampler, uniforms

CONTEXT, HORIZON = 8, 3


def some_series() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    series = [1e9 * rng.normal(size=30), rng.normal(size=5), rng.normal(size=12), np.zeros(20)]
    series[2][[0, 4, 10]] = np.nan
    return series


def window_by_hand(values: np.ndarray, cut: int, stop: int) -> tuple[np.ndarray, np.ndarray, float]:
    context, target = np.full(CONTEXT, np.nan), np.full(HORIZON, np.nan)
    past, future = values[max(0, cut - CONTEXT) : cut], values[cut : min(cut + HORIZON, stop)]
    if len(past):
        context[-len(past) :] = past
    target[: len(future)] = future
    observed = past[~np.isnan(past)]
    scale = float(np.mean(np.abs(observed))) if len(observed) and np.any(observed) else 1.0
    return context / scale, target / scale, scale


@given(rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=8))
def test_windows_equal_slices(rows: list[tuple[int, int, int]]) -> None:
    series = some_series()
    stops = [min(stop, len(series[which])) for which, _, stop in rows]
    cuts = [min(cut, stop) for (_, cut, _), stop in zip(rows, stops, strict=True)]
    which = np.array([row[0] for row in rows])
    windows = FlatSeries.concatenate(series).windows(which, np.array(cuts), np.array(stops), CONTEXT, HORIZON)
    assert windows.context.dtype == windows.target.dtype == np.float32
    for row, (index, cut, stop) in enumerate(zip(which, cuts, stops, strict=True)):
        context, target, scale = window_by_hand(series[index], cut, stop)
        assert windows.scale[row] == pytest.approx(scale, rel=1e-15)
        np.testing.assert_allclose(windows.context[row], context, rtol=6e-8)
        np.testing.assert_allclose(windows.target[row], target, rtol=6e-8)


def test_large_values_survive_float32() -> None:
    # Differences of one part in ten million: gone in float32 units, there in the scaled window.
    values = 1e12 + 1e5 * np.arange(12)
    windows = FlatSeries.concatenate([values]).windows(np.array([0]), np.array([8]), np.array([12]), 8, 4)
    restored = np.r_[windows.context[0], windows.target[0]] * windows.scale[0]
    np.testing.assert_allclose(restored, values, rtol=6e-8)
    assert len(np.unique(windows.context[0])) == 8


def test_uniforms_are_the_philox_stream_of_each_index() -> None:
    indices = np.array([7, 3, 100, 4, 3])
    drawn = uniforms(11, indices, 3)
    for row, index in enumerate(indices):
        raw = np.random.Philox(key=11, counter=int(index)).random_raw(3)
        np.testing.assert_array_equal(drawn[row], (raw >> np.uint64(11)) / 2.0**53)
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0


def test_uniforms_do_not_change_between_versions() -> None:
    # Resumed runs and published results rest on these numbers.
    expected = [[0.01154675, 0.24154920, 0.11142586], [0.42701275, 0.27536465, 0.60891111]]
    np.testing.assert_allclose(uniforms(0, np.array([0, 12345]), 3), expected, rtol=0, atol=1e-8)


@given(seed=st.integers(0, 2**63), indices=st.lists(st.integers(0, 5000), min_size=1, max_size=20))
def test_draws_do_not_depend_on_the_company(seed: int, indices: list[int]) -> None:
    sampler = WindowSampler(np.array([0, 0, 1]), np.array([10, 2, 50]), seed)
    together = np.stack(sampler.draw(np.array(indices)))
    alone = np.concatenate([np.stack(sampler.draw(np.array([index]))) for index in indices], axis=1)
    np.testing.assert_array_equal(together, alone)


def test_every_window_has_context_and_target() -> None:
    length = np.array([2, 3, 4, 5, 6, 100])
    sampler = WindowSampler(np.zeros(6, dtype=np.int64), length, seed=0)
    series, cut = sampler.draw(np.arange(20_000))
    assert cut.min() >= 1
    assert (cut < length[series]).all()
    for which, size in enumerate(length):
        seen = cut[series == which]
        # All cuts from a quarter of the series on (at least 4 observations, where there are) do occur.
        earliest = min(max(4, size // 4), size - 1)
        np.testing.assert_array_equal(np.unique(seen), np.arange(earliest, size))


def test_data_sets_are_drawn_by_the_square_root_of_their_size() -> None:
    sizes = np.array([1, 4, 25, 100])
    dataset = np.repeat(np.arange(4), sizes)
    sampler = WindowSampler(dataset, np.full(130, 10), seed=3)
    series, _ = sampler.draw(np.arange(100_000))
    share = np.bincount(dataset[series], minlength=4) / 100_000
    np.testing.assert_allclose(share, np.sqrt(sizes) / np.sqrt(sizes).sum(), atol=0.006)  # four standard errors
    within = np.bincount(series[dataset[series] == 1], minlength=5)[1:5]
    np.testing.assert_allclose(within / within.sum(), 0.25, atol=0.02)


def test_seeds_differ() -> None:
    draws = [WindowSampler(np.zeros(50, dtype=np.int64), np.full(50, 90), seed).draw(np.arange(99)) for seed in (0, 1)]
    assert not np.array_equal(draws[0][0], draws[1][0])
