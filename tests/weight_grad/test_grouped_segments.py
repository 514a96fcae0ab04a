"""Weight gradients of experts whose rows come in runs, against one product per run in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from lightning_moe.weight_grad import (
    GroupedMatmulGrad,
    SegmentedMatmulGrad,
    WeightGradQueue,
    bounds_of,
    grouped_segments,
)
from lightning_moe.weight_grad.grouped_segments import Segments
from tests.weight_grad.owners import MainGrad
from tests.weight_grad.test_grouped import offsets_of

R, N, K = 40, 16, 24
SEGMENTS: dict[str, Segments] = {
    "several": (((0, 3), (20, 21), (30, 37)), (), ((3, 9),), ((9, 9), (21, 30))),
    "one each": (((0, 10),), ((10, 20),), ((20, 30),), ((30, 40),)),
    "none": ((), (), (), ()),
    "one expert": (((5, 6), (7, 8)),),
    "no expert": (),
}
"""Of the experts of a range; rows 38 and 39 belong to none of the first."""
EXPERTS, FIRST = 6, 1


def segmented(segments: Segments, dtype: torch.dtype, device: str = "cpu", gap: int = 8) -> SegmentedMatmulGrad:
    """Of random rows, with NaN in rows of no run and in the gaps between rows."""
    generator = torch.Generator().manual_seed(0)
    operands = []
    for width in (N, K):
        buffer = torch.full((R, width + gap), torch.nan)
        for start, end in (run for runs in segments for run in runs):
            buffer[start:end, :width] = torch.randn(end - start, width, generator=generator)
        operands.append(buffer.to(device, dtype)[:, :width])
    return SegmentedMatmulGrad(*operands, segments, bounds_of(segments, torch.device(device)), FIRST, EXPERTS, 3)


def exact(grad: SegmentedMatmulGrad) -> Tensor:
    """By a product for each run, in float64."""
    total = grad.rows.new_zeros(grad.num_experts, grad.grad_output.shape[1], grad.rows.shape[1], dtype=torch.float64)
    for expert, runs in enumerate(grad.segments, grad.first_expert):
        for start, end in runs:
            total[expert] += grad.grad_output[start:end].double().t() @ grad.rows[start:end].double()
    return total


@pytest.mark.parametrize("gap", [0, 8, 3])
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_a_product_for_each_run(dtype: torch.dtype, segments: Segments, gap: int) -> None:
    """Written, added, and returned. Experts without rows get exact zeros, or keep what they have."""
    grad = segmented(segments, dtype, gap=gap)
    expected = exact(grad)
    empty = torch.ones(EXPERTS, dtype=torch.bool)
    empty[[FIRST + expert for expert, runs in enumerate(segments) if any(b > a for a, b in runs)]] = False
    wide = torch.promote_types(dtype, torch.float32)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    main = torch.full(expected.shape, torch.nan, dtype=wide)
    grad.add_to(main, accumulate=False)
    torch.testing.assert_close(main.double(), expected, rtol=tolerance, atol=10 * tolerance)
    assert not main[empty].any()
    main = torch.full(expected.shape, 3.0, dtype=wide)
    grad.add_to(main, accumulate=True)
    torch.testing.assert_close(main.double(), 3.0 + expected, rtol=tolerance, atol=10 * tolerance)
    assert bool((main[empty] == 3.0).all())
    computed = grad.compute()
    assert computed.dtype == dtype
    rounding = tolerance if dtype.itemsize > 2 else 0.5 * torch.finfo(dtype).eps
    torch.testing.assert_close(computed.double(), expected, rtol=1.001 * rounding, atol=10 * tolerance)
    assert not computed[empty].any()


def test_sixteen_bits_are_rounded_after_all_runs() -> None:
    """1 + 2^-9 and -1: the first run's sum by itself would be rounded to 1."""
    operand, ones = torch.tensor([[1.0], [2.0**-9], [-1.0]]).bfloat16(), torch.ones(3, 1).bfloat16()
    segments: Segments = (((0, 2), (2, 3)),)
    grad = SegmentedMatmulGrad(operand, ones, segments, bounds_of(segments, torch.device("cpu")), 0, 1, 2)
    assert grad.compute().item() == 2.0**-9
    main = torch.full((1, 1, 1), 2.0**-9).bfloat16()
    grad.add_to(main, accumulate=True)
    assert main.item() == 2.0**-8


def test_equals_the_grouped_product_where_runs_follow_each_other() -> None:
    counts = [10, 0, 25, 5]
    bounds = [0, 10, 10, 35, 40]
    segments = tuple(((a, b),) for a, b in pairwise(bounds))
    grad = replace(segmented((((0, R),),), torch.float32), segments=segments, first_expert=0, num_experts=4)
    grouped = GroupedMatmulGrad(grad.grad_output, grad.rows, tuple(counts), offsets_of(counts), False)
    assert torch.equal(grad.compute(), grouped.compute())
    assert grad.flops == grouped.flops


def test_parts_of_a_weight_add_up_to_the_whole() -> None:
    """As when experts are exchanged in groups: the first part is written, the others are added."""
    whole = replace(segmented(SEGMENTS["several"], torch.float32), num_experts=4, first_expert=0)
    parts = []
    for start, stop in ((0, 1), (1, 3), (3, 4)):
        segments = whole.segments[start:stop]
        bounds = bounds_of(segments, torch.device("cpu"))
        parts.append(replace(whole, segments=segments, bounds=bounds, first_expert=start))
    main = torch.full((4, N, K), torch.nan)
    for number, part in enumerate(parts):
        part.add_to(main, accumulate=number > 0)
    assert torch.equal(main, whole.compute())
    assert torch.equal(main, sum(part.compute() for part in parts))  # type: ignore[arg-type]
    assert sum(part.flops for part in parts) == whole.flops
    assert whole.flops == 2 * 26 * N * K


def test_a_queue_keeps_shared_operands_once() -> None:
    grad = segmented(SEGMENTS["several"], torch.float32)
    queue = WeightGradQueue()
    owner = MainGrad(nn.Parameter(torch.zeros(EXPERTS, N, K)), queue)
    with queue.capture(0):
        assert owner.take(grad)
        assert owner.take(replace(grad, first_expert=2))
    assert grad.nbytes == R * (N + 8 + K + 8) * 4 + grad.bounds.nbytes
    assert queue.live_bytes == grad.nbytes
    queue.pop(0)
    expected = exact(grad) + exact(replace(grad, first_expert=2))
    torch.testing.assert_close(owner.sum.double(), expected, rtol=1e-6, atol=1e-5)


def test_compact_frees_what_surrounds_contiguous_operands() -> None:
    large = torch.randn(4 * R, N)
    grad = segmented(SEGMENTS["several"], torch.float32, gap=0)
    grad = replace(grad, grad_output=large[R : 2 * R])
    compact = grad.compact()
    assert compact.nbytes == grad.nbytes - 3 * R * N * 4
    assert torch.equal(compact.compute(), grad.compute())


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_bounds_are_filled_up_with_empty_runs(segments: Segments) -> None:
    bounds = bounds_of(segments, torch.device("cpu"))
    assert bounds.dtype == torch.int32
    assert bounds.is_contiguous()
    longest = max([1, *map(len, segments)])
    assert bounds.shape == (len(segments), longest, 2)
    for runs, row in zip(segments, bounds.tolist(), strict=True):
        assert row == [*map(list, runs), *[[0, 0]] * (longest - len(runs))]


def test_parts_and_the_whole_are_computed_by_the_same_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether one of ours is faster is asked of the whole weight, or a deferred gradient would differ."""
    asked = []

    def answer(grad_output: Tensor, rows: Tensor, out: Tensor, num_runs: int) -> str:
        asked.append((grad_output.shape, rows.shape, rows.dtype, out.shape, num_runs))
        return "each"

    monkeypatch.setattr(grouped_segments, "how_to_launch", answer)
    whole = segmented(SEGMENTS["several"], torch.bfloat16)
    main = torch.zeros(EXPERTS, N, K)
    whole.add_to(main, accumulate=True)
    for start, end in pairwise((0, 1, 4)):
        runs = whole.segments[start:end]
        part = replace(whole, segments=runs, bounds=whole.bounds[start:end], first_expert=FIRST + start)
        part.add_to(main, accumulate=True)
    assert len(asked) == 3
    assert len(set(asked)) == 1
