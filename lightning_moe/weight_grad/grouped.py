"""The matrix product of stacked experts, each with its own run of rows, and its weight gradient.

R rows (sorted by expert), E experts, K input width, N output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.weight_grad.launching import Launching, how_to_launch
from lightning_moe.weight_grad.linear import MatmulGrad, compute_dtype
from lightning_moe.weight_grad.memory import has_aligned_rows, is_aligned, without_the_rest
from lightning_moe.weight_grad.sink import WeightGrad, deliver, sink_of


@dataclass(frozen=True)
class GroupedMatmulGrad(WeightGrad):
    """For each expert ``grad_output^T @ rows`` over its own rows: the weight gradient of a grouped product.

    Attributes:
        grad_output: ``[R, N]``.
        rows: ``[R, K]``, in the same dtype. There may be gaps between rows.
        counts: Rows of each expert; looked at only where experts are multiplied one by one.
        offsets: The end of each expert's rows, int32 ``[E]`` on the device of the rows.
        grouped: Whether the operands follow the rules of the grouped GEMM (see :func:`can_group`).
    """

    grad_output: Tensor
    rows: Tensor
    counts: Sequence[int]
    offsets: Tensor
    grouped: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Both operands and the offsets."""
        return self.grad_output, self.rows, self.offsets

    @property
    def flops(self) -> float:
        """``2 R N K``."""
        return 2.0 * self.grad_output.numel() * self.rows.shape[-1]

    def compact(self) -> Self:
        """With copies of operands that are parts of larger tensors."""
        return replace(self, grad_output=without_the_rest(self.grad_output), rows=without_the_rest(self.rows))

    def compute(self) -> Tensor:
        """The gradient ``[E, N, K]`` in the dtype of the operands; zeros for experts without rows."""
        if self.grouped:
            return F.grouped_mm(self.grad_output.t(), self.rows, offs=self.offsets)
        return torch.stack([piece.compute() for piece in self._per_expert()])

    def add_to(self, main_grad: Tensor, *, accumulate: bool) -> None:
        """Write or add the gradient, with products summed in the dtype of ``main_grad`` ``[E, N, K]``."""
        # Not the grouped GEMM, which can neither add to its output nor widen it: each micro-batch's gradient would be
        # rounded to 16 bits on its way into the float32 sum.
        launching = self._launching(main_grad)
        if launching != "each":
            from lightning_moe.weight_grad import triton_grouped

            descriptors = launching == "descriptors"
            triton_grouped.add_grouped(
                self.grad_output, self.rows, self.offsets, main_grad, descriptors=descriptors, accumulate=accumulate
            )
            return
        for expert, (piece, count) in enumerate(zip(self._per_expert(), self.counts, strict=True)):
            if count:
                piece.add_to(main_grad[expert], accumulate=accumulate)
            elif not accumulate:
                main_grad[expert].zero_()

    def _launching(self, main_grad: Tensor) -> Launching:
        if not self.grouped or main_grad.dtype != torch.float32:
            return "each"
        return how_to_launch(self.grad_output, self.rows, main_grad)

    def _per_expert(self) -> list[MatmulGrad]:
        counts = list(self.counts)
        pieces = zip(torch.split(self.grad_output, counts), torch.split(self.rows, counts), strict=True)
        return [MatmulGrad(grad_output, rows) for grad_output, rows in pieces]


def grouped_linear(
    rows: Tensor, weight: Tensor, counts: Sequence[int], offsets: Tensor, grouped_gemm: bool = True
) -> Tensor:
    """``row @ weight[e]^T`` for each of the ``counts[e]`` rows of expert ``e``.

    Under autocast both operands are cast to the autocast dtype; the weight gradient is computed from the cast operands
    and accumulated in the sink's dtype, as in :func:`~lightning_moe.weight_grad.linear`. The cast weight is not kept
    for the backward pass but cast again: experts hold most of a model's weights, and a second copy of all of them
    would cost more than the rows do.

    Code that is being compiled gets the loop, in plain operations: a sink is a side effect, and the addresses that the
    grouped GEMM has rules about are not known yet. The numbers of rows are then constants of the compiled code, so
    leave expert layers out of compiled regions.

    Args:
        rows: ``[R, K]``, all rows of expert 0, then those of expert 1, ...
        weight: ``[E, N, K]``; its gradients go to its sink, if it has one. Experts without rows get zeros.
        counts: Rows of each expert; zeros are fine. Kept for the backward pass, so it must not change; looked at only
            where experts are multiplied one by one.
        offsets: The end of each expert's rows, int32 ``[E]`` on the device of the rows.
        grouped_gemm: Whether to use one grouped GEMM where it is available (see :func:`can_group`); False always loops
            over the experts.

    Returns:
        ``[R, N]`` in the dtype of the computation. It depends on ``rows`` and ``weight`` even when ``R`` is 0: a rank
        that received no rows must still take part in its group's backward exchanges.
    """
    dtype = compute_dtype(rows)
    # grouped_mm is on none of autocast's lists: the loop would be cast and the grouped GEMM would not.
    with torch.autocast(rows.device.type, enabled=False):
        if torch.compiler.is_compiling():
            return _loop(rows.to(dtype), weight.to(dtype).transpose(-2, -1), counts)
        out: Tensor = _GroupedLinear.apply(  # type: ignore[no-untyped-call]
            rows.to(dtype), weight, counts, offsets, grouped_gemm
        )
    return out


def can_group(rows: Tensor, weight: Tensor) -> bool:
    """Whether ``torch.nn.functional.grouped_mm`` takes these operands, forward and backward, and is worth it.

    Its rules, as of torch 2.11 to 2.13:

    * On the CPU float32, bfloat16 and float16, not float64.
    * On CUDA only bfloat16 on compute capability 9.0 or newer is a grouped kernel; anything else is a loop
      inside torch that first reads the offsets back from the device, which ours does not have to.
    * Row strides are multiples of 16 bytes, in the operands, the output and, for the backward pass, the
      gradients; so both widths of the projection are. There may be gaps between rows.
    * Operands start at multiples of 16 bytes (a parameter that is a view into a flat buffer may not).
    * There are rows: a tensor without elements counts as contiguous whatever its strides, which torch still checks.

    Args:
        rows: ``[R, K]``.
        weight: ``[E, N, K]``, in ``nn.Linear`` orientation.
    """
    if rows.dtype != weight.dtype or rows.device != weight.device:
        return False
    if rows.device.type == "cpu":
        supported = rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
    elif rows.device.type == "cuda":
        supported = rows.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device) >= (9, 0)
    else:
        supported = False
    widths = (weight.shape[-1], weight.shape[-2])
    return (
        supported
        and rows.shape[0] > 0
        and all(width * rows.element_size() % 16 == 0 for width in widths)
        and has_aligned_rows(rows)
        and is_aligned(weight)
    )


def grouped_product(rows: Tensor, matrices: Tensor, counts: Sequence[int], offsets: Tensor, grouped: bool) -> Tensor:
    """``row @ matrices[e]`` for each row of expert ``e``, in the dtype of the operands.

    What :func:`grouped_linear` does without its weight's gradient.

    Args:
        rows: ``[R, K]``, all rows of expert 0, then those of expert 1, ...
        matrices: ``[E, K, N]``.
        counts: Rows of each expert; zeros are fine.
        offsets: The end of each expert's rows, int32 ``[E]`` on the device of the rows.
        grouped: Whether to use the grouped GEMM, whose rules the operands must follow (see :func:`can_group`).

    Returns:
        ``[R, N]``.
    """
    return F.grouped_mm(rows, matrices, offs=offsets) if grouped else _loop(rows, matrices, counts)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, counts: Sequence[int], offsets: Tensor, grouped_gemm: bool
    ) -> Tensor:
        cast = weight.to(rows.dtype)
        ctx.sink, ctx.counts, ctx.offsets = sink_of(weight), counts, offsets
        ctx.grouped = grouped_gemm and can_group(rows, cast)
        ctx.save_for_backward(rows, weight)
        return grouped_product(rows, cast.transpose(-2, -1), counts, offsets, ctx.grouped)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        # grouped_mm refuses stride 0, which the gradient of a sum has.
        grad_output = grad_output.contiguous()
        # With create_graph=True the gradient is differentiated again, through the loop.
        grouped = ctx.grouped and has_aligned_rows(grad_output) and not torch.is_grad_enabled()
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_rows = grouped_product(grad_output, weight.to(rows.dtype), ctx.counts, ctx.offsets, grouped)
        if ctx.needs_input_grad[1]:
            # What a sink keeps must not keep the graph behind the rows.
            kept = rows if torch.is_grad_enabled() else rows.detach()
            grad = GroupedMatmulGrad(grad_output, kept, ctx.counts, ctx.offsets, grouped)
            grad_weight = deliver(grad, ctx.sink, weight.dtype)
        return grad_rows, grad_weight, None, None, None


def _loop(rows: Tensor, matrices: Tensor, counts: Sequence[int]) -> Tensor:
    """The same product, one multiplication per expert, with or without rows, so that all stay in the graph."""
    # unbind, and not indexing, because the gradient of an index is a tensor as large as the whole stack.
    pieces = zip(torch.split(rows, list(counts)), matrices.unbind(0), strict=True)
    return torch.cat([piece @ matrix for piece, matrix in pieces])
