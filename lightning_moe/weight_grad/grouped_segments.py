"""The weight gradient of stacked experts, each with several runs of rows; perhaps of some of the experts only.

R rows, E experts of the range, S runs of an expert at most, K input width, N output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lightning_moe.weight_grad.launching import how_to_launch
from lightning_moe.weight_grad.linear import MatmulGrad
from lightning_moe.weight_grad.memory import without_the_rest
from lightning_moe.weight_grad.sink import WeightGrad

Segments = tuple[tuple[tuple[int, int], ...], ...]
"""For each expert its runs of rows, ``(start, end)``."""


@dataclass(frozen=True)
class SegmentedMatmulGrad(WeightGrad):
    """For each expert of a range ``grad_output^T @ rows`` over its own runs of rows; zeros for the other experts.

    Rows that were computed chunk by chunk lie chunk by chunk, so each chunk has a run of an expert's rows. Copying them
    together would cost as much memory again as the operands take, until the gradient is computed.

    Attributes:
        grad_output: ``[R, N]``. Last stride 1; there may be gaps between rows.
        rows: ``[R, K]``, in the same dtype; likewise.
        segments: The runs of each expert of the range, which are added up in their order.
        bounds: The same on the device of the rows, int32 ``[E, S, 2]`` (see :func:`bounds_of`).
        first_expert: First expert of the range.
        num_experts: Number of experts of the weight, in the range or not.
        num_runs: Runs that an expert of the weight has at most, in the range or not.
    """

    grad_output: Tensor
    rows: Tensor
    segments: Segments
    bounds: Tensor
    first_expert: int
    num_experts: int
    num_runs: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Both operands and the bounds."""
        return self.grad_output, self.rows, self.bounds

    @property
    def num_rows(self) -> int:
        """Rows of all runs."""
        return sum(end - start for runs in self.segments for start, end in runs)

    @property
    def flops(self) -> float:
        """``2 N K`` for each row of a run."""
        return 2.0 * self.num_rows * self.grad_output.shape[1] * self.rows.shape[1]

    def compact(self) -> Self:
        """With copies of operands that are parts of larger tensors."""
        return replace(self, grad_output=without_the_rest(self.grad_output), rows=without_the_rest(self.rows))

    def compute(self) -> Tensor:
        """The gradient ``[num_experts, N, K]`` in the dtype of the operands, rounded once."""
        out = self.rows.new_empty((self.num_experts, self.grad_output.shape[1], self.rows.shape[1]))
        self.add_to(out, accumulate=False)
        return out

    def add_to(self, main_grad: Tensor, *, accumulate: bool) -> None:
        """Write or add the gradient, summed in the dtype of ``main_grad`` ``[num_experts, N, K]``, at least float32."""
        stop = self.first_expert + len(self.segments)
        if not accumulate:
            main_grad[: self.first_expert].zero_()
            main_grad[stop:].zero_()
        own = main_grad[self.first_expert : stop]
        # Asked of the whole weight: a part must not be computed by another kernel than all parts at once.
        launching = how_to_launch(self.grad_output, self.rows, main_grad, self.num_runs)
        if launching != "each":
            from lightning_moe.weight_grad import triton_grouped

            descriptors = launching == "descriptors"
            triton_grouped.add_segments(
                self.grad_output, self.rows, self.bounds, own, descriptors=descriptors, accumulate=accumulate
            )
            return
        for target, runs in zip(own, self.segments, strict=True):
            pieces = [MatmulGrad(self.grad_output[a:b], self.rows[a:b]) for a, b in runs if b > a]
            _add(pieces, target, accumulate)


def bounds_of(segments: Sequence[Sequence[tuple[int, int]]], device: torch.device) -> Tensor:
    """The runs of each expert on a device, int32 ``[E, S, 2]``; the host does not wait for the copy.

    Args:
        segments: For each expert its runs ``(start, end)``; filled up with empty ones to the same number, at least one.
        device: The device.
    """
    most = max([1, *map(len, segments)])
    padded = [[*runs, *[(0, 0)] * (most - len(runs))] for runs in segments]
    # From pageable memory the host would wait.
    host = torch.tensor(padded, dtype=torch.int32, pin_memory=device.type == "cuda").view(len(padded), most, 2)
    return host.to(device, non_blocking=True)


def _add(pieces: Sequence[MatmulGrad], target: Tensor, accumulate: bool) -> None:
    """Write or add the sum of products to ``[N, K]``."""
    if target.dtype.itemsize == 2 and len(pieces) > 1:
        total = torch.empty_like(target, dtype=torch.float32)
        _add(pieces, total, accumulate=False)
        target.copy_(target + total if accumulate else total)
        return
    if not pieces and not accumulate:
        target.zero_()
    for piece in pieces:
        piece.add_to(target, accumulate=accumulate)
        accumulate = True
