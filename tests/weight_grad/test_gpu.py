"""Weight gradients of grouped products on CUDA: one kernel for all experts, against float64 and a product for each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_moe.weight_grad import GroupedMatmulGrad, SegmentedMatmulGrad, bounds_of, launching
from lightning_moe.weight_grad.grouped_segments import Segments
from tests.weight_grad.test_grouped import offsets_of
from tests.weight_grad.test_grouped_segments import exact as exact_of_segments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

COUNTS = [[0, 1, 31, 32, 33, 300, 0], [0, 0, 0, 5], [129], [128] * 16]
WIDTHS = [(200, 72), (256, 128), (8, 384)]
RUNS: list[Segments] = [
    (((0, 3), (500, 532), (700, 733)), (), ((3, 300), (300, 301), (532, 700)), ((301, 301), (301, 500))),
    (((10, 300),), ((300, 310),)),
    ((), ()),
]


LIMITS = ("_MOST_BY_LOADS", "_MOST_BY_DESCRIPTORS", "_MOST_OF_RUNS")


@pytest.fixture(params=[False, True], ids=["loads", "descriptors"], autouse=True)
def descriptors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of our kernel to read its operands, however long the runs of rows are."""
    wanted: bool = request.param
    if wanted and not launching.has_descriptors(torch.device("cuda")):
        pytest.skip("the GPU has no tensor descriptors")
    monkeypatch.setattr(launching, "_LONG", 0 if wanted else 2**40)
    return wanted


def random_rows(num_rows: int, widths: tuple[int, int], gap: int, dtype: torch.dtype) -> list[Tensor]:
    """Two matrices with gaps between their rows, which hold no numbers."""
    generator = torch.Generator("cuda").manual_seed(0)
    buffers = [torch.randn(num_rows, width + gap, generator=generator, device="cuda").to(dtype) for width in widths]
    for buffer, width in zip(buffers, widths, strict=True):
        buffer[:, width:] = torch.nan
    return [buffer[:, :width] for buffer, width in zip(buffers, widths, strict=True)]


def operands(
    counts: list[int], widths: tuple[int, int], dtype: torch.dtype, grad_gap: int = 0, gap: int = 0
) -> GroupedMatmulGrad:
    """Of random rows, between rows that belong to no expert and hold no numbers."""
    total = sum(counts) + 40
    left, right = random_rows(total, widths, grad_gap, dtype)[0], random_rows(total, widths, gap, dtype)[1]
    left[sum(counts) :], right[sum(counts) :] = torch.nan, torch.inf
    return GroupedMatmulGrad(left, right, tuple(counts), offsets_of(counts).cuda(), True)


def segmented(runs: Segments, widths: tuple[int, int], dtype: torch.dtype, gap: int) -> SegmentedMatmulGrad:
    """For experts 1, 2, ... of two more than there are runs for; rows of no run hold no numbers."""
    matrices = random_rows(760, widths, gap, dtype)
    outside = torch.ones(760, dtype=torch.bool, device="cuda")
    for start, end in (run for expert in runs for run in expert):
        outside[start:end] = False
    for matrix, value in zip(matrices, (torch.nan, torch.inf), strict=True):
        matrix[outside] = value
    return SegmentedMatmulGrad(*matrices, runs, bounds_of(runs, torch.device("cuda")), 1, len(runs) + 2, 3)


def exact(grad: GroupedMatmulGrad) -> Tensor:
    counts = [*grad.counts, grad.rows.shape[0] - sum(grad.counts)]
    pieces = zip(grad.grad_output.double().split(counts), grad.rows.double().split(counts), strict=True)
    return torch.stack([left.t() @ right for left, right in pieces])[:-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("gaps", [(0, 0), (0, 8), (3, 5)], ids=str)
def test_one_kernel_computes_all_experts(
    gaps: tuple[int, int], counts: list[int], widths: tuple[int, int], dtype: torch.dtype, descriptors: bool
) -> None:
    grad = operands(counts, widths, dtype, *gaps)
    expected = exact(grad)
    written = torch.full_like(expected, float("nan"), dtype=torch.float32)
    aligned = gaps != (3, 5)
    assert grad._launching(written) == ("descriptors" if descriptors and aligned else "loads")
    grad.add_to(written, accumulate=False)
    torch.testing.assert_close(written.double(), expected, rtol=1e-5, atol=1e-4)
    before = torch.randn_like(written)
    added = before.clone()
    grad.add_to(added, accumulate=True)
    torch.testing.assert_close(added.double(), before.double() + expected, rtol=1e-5, atol=1e-4)


def test_sums_are_the_same_in_every_run() -> None:
    grad = operands([700, 0, 513, 90], (512, 384), torch.bfloat16)
    first, *others = [torch.zeros(4, 512, 384, device="cuda") for _ in range(20)]
    for out in (first, *others):
        grad.add_to(out, accumulate=True)
    assert all(torch.equal(first, out) for out in others)


def test_experts_with_much_work_have_a_launch_each(monkeypatch: pytest.MonkeyPatch) -> None:
    grad = operands([64, 64], (256, 256), torch.bfloat16)
    out = torch.zeros(2, 256, 256, device="cuda")
    assert grad._launching(out) != "each"
    assert grad._launching(out.double()) == "each"
    grad = replace(grad, grad_output=grad.grad_output[:128], rows=grad.rows[:128])
    for name in LIMITS:
        monkeypatch.setattr(launching, name, 64 * 256 * 256)
    assert grad._launching(out) == "each"
    grad.add_to(out, accumulate=False)
    torch.testing.assert_close(out.double(), exact(grad), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("widths", [*WIDTHS, (13, 7)], ids=str)
@pytest.mark.parametrize("runs", RUNS, ids=range(len(RUNS)))
@pytest.mark.parametrize("gap", [0, 8, 3])
@pytest.mark.parametrize("once", [True, False], ids=["one launch", "a launch for each run"])
def test_experts_with_several_runs_of_rows(
    once: bool,
    gap: int,
    runs: Segments,
    widths: tuple[int, int],
    dtype: torch.dtype,
    descriptors: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Written, added and returned; by one kernel, or by one product for each run."""
    if not once:
        for name in LIMITS:
            monkeypatch.setattr(launching, name, 0)
    grad = segmented(runs, widths, dtype, gap)
    expected = exact_of_segments(grad)
    written = torch.full_like(expected, torch.nan, dtype=torch.float32)
    found = launching.how_to_launch(grad.grad_output, grad.rows, written, grad.num_runs)
    aligned = gap != 3 and widths != (13, 7)
    assert found == ("each" if not once else "descriptors" if descriptors and aligned else "loads")
    grad.add_to(written, accumulate=False)
    torch.testing.assert_close(written.double(), expected, rtol=1e-5, atol=1e-4)
    before = torch.randn_like(written)
    added = before.clone()
    grad.add_to(added, accumulate=True)
    torch.testing.assert_close(added.double(), before.double() + expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(added[[0, -1]], before[[0, -1]])
    computed = grad.compute()
    assert computed.dtype == dtype
    # cuBLAS may round partial sums.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        computed.double(), expected, rtol=(0.51 if once else 2) * eps, atol=1e-4 if once else 0.2
    )
    assert not computed[[0, -1]].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_runs_of_rows_in_other_dtypes(dtype: torch.dtype) -> None:
    grad = segmented(RUNS[0], (200, 72), dtype, 4)
    main = torch.full((6, 200, 72), torch.nan, dtype=dtype, device="cuda")
    grad.add_to(main, accumulate=False)
    torch.testing.assert_close(main.double(), exact_of_segments(grad), rtol=1e-5, atol=1e-3)


def test_sums_over_runs_are_the_same_in_every_repetition() -> None:
    grad = segmented(RUNS[0], (512, 384), torch.bfloat16, 8)
    first = torch.zeros(6, 512, 384, device="cuda")
    grad.add_to(first, accumulate=True)
    computed = grad.compute()
    for _ in range(100):
        out = torch.zeros_like(first)
        grad.add_to(out, accumulate=True)
        assert torch.equal(first, out)
        assert torch.equal(computed, grad.compute())


@pytest.mark.parametrize("widths", [(13, 7), (200, 72), (520, 136)], ids=str)
def test_widths_that_fill_no_tile(widths: tuple[int, int], descriptors: bool) -> None:
    """Rows begin at multiples of 16 bytes, whatever their width; what lies in the gaps belongs to nobody."""
    matrices = [random_rows(760, (width, width), -width % 8 + 8, torch.bfloat16)[0] for width in widths]
    grad = SegmentedMatmulGrad(*matrices, RUNS[0], bounds_of(RUNS[0], torch.device("cuda")), 1, 6, 3)
    out = torch.full((6, *widths), torch.nan, device="cuda")
    found = launching.how_to_launch(grad.grad_output, grad.rows, out, 3)
    assert found == ("descriptors" if descriptors else "loads")
    grad.add_to(out, accumulate=False)
    torch.testing.assert_close(out.double(), exact_of_segments(grad), rtol=1e-5, atol=1e-4)


def test_parts_have_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the runs of some experts alone would be too short for descriptors, or long enough."""
    monkeypatch.undo()
    lengths = [(1700, 1500), (300, 0), (900, 800), (1200, 0)]
    runs, start = [], 0
    for expert in lengths:
        own = []
        for length in expert:
            if length:
                own.append((start, start + length))
            start += length
        runs.append(tuple(own))
    matrices = random_rows(start, (512, 384), 8, torch.bfloat16)
    whole = torch.zeros(4, 512, 384, device="cuda")
    parts = whole.clone()

    def grad(first: int, stop: int) -> SegmentedMatmulGrad:
        own = tuple(runs[first:stop])
        return SegmentedMatmulGrad(*matrices, own, bounds_of(own, torch.device("cuda")), first, 4, 2)

    grad(0, 4).add_to(whole, accumulate=True)
    for first, stop in ((0, 1), (1, 2), (2, 2), (2, 4)):
        grad(first, stop).add_to(parts, accumulate=True)
    assert torch.equal(whole, parts)
    torch.testing.assert_close(whole.double(), exact_of_segments(grad(0, 4)), rtol=1e-5, atol=1e-3)


def test_gaps_and_runs_do_not_change_the_bits() -> None:
    """Rows in one run, with or without gaps, are added up in the same order by the same kernel."""
    plain = operands([700, 0, 513, 90], (512, 384), torch.bfloat16)
    out = torch.zeros(3, 4, 512, 384, device="cuda")
    plain.add_to(out[0], accumulate=False)
    gapped = replace(plain, rows=torch.nn.functional.pad(plain.rows, (0, 8))[:, :384])
    gapped.add_to(out[1], accumulate=False)
    ends = [700, 700, 1213, 1303]
    runs = tuple(((end - count, end),) for end, count in zip(ends, plain.counts, strict=True))
    bounds = bounds_of(runs, torch.device("cuda"))
    SegmentedMatmulGrad(plain.grad_output, plain.rows, runs, bounds, 0, 4, 1).add_to(out[2], accumulate=False)
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2])


def test_the_host_does_not_wait_for_bounds() -> None:
    """Nor for anything else in a weight gradient."""
    grad = segmented(RUNS[0], (200, 72), torch.bfloat16, 8)
    main = torch.zeros(6, 200, 72, device="cuda")
    grad.add_to(main, accumulate=True)  # kernels are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        bounds = bounds_of(RUNS[0], torch.device("cuda"))
        replace(grad, bounds=bounds).add_to(main, accumulate=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(main.double(), exact_of_segments(grad), rtol=1e-5, atol=1e-4)
