"""The matrix product of a column-parallel layer, whose backward pass communicates under its GEMMs.

T tokens, K input width, N output width of this rank, P ranks of the group.

[Note: overlap in a column-parallel layer]
The output needs all tokens on every rank, and the gradient of the input is a sum over ranks. Neither communication has
to wait for the weight gradient. With sequence parallelism only the rank's own slice is kept for the backward pass,
which gathers the tokens again under the GEMM for the input's gradient, and reduce-scatters that gradient under the GEMM
for the weight's (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2). Without it the input's gradient is
all-reduced under the weight's GEMM. A row-parallel layer has nothing to hide this way: see
:mod:`lightning_moe.layers.row_matmul`.

Where the weight gradient is deferred, the backward pass does not gather the tokens at all. The rank's own slice is kept
on, and gathered where the weight gradient is computed, under the GEMM of the one before it.

What it is worth depends on the links. Between two H200s with NVLink (bf16, T = 16,384, K = 2,048, N = 5,120, forward
and backward) waiting for each communication takes 2.0 ms and hiding it 1.9 to 2.1, since the communication's kernels
take processors from the GEMMs; keeping all tokens instead of gathering them again takes 1.8, and P times the memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.parallel.collectives import (
    all_gather,
    apply_eagerly,
    reduce_scatter,
    start_all_gather,
    start_all_reduce_,
    start_reduce_scatter,
    summands_to_copies,
)
from lightning_moe.weight_grad import GatheredInputGrad, compute_dtype, deliver, linear, matmul_grad, sink_of


def column_matmul(input: Tensor, weight: Tensor, group: dist.ProcessGroup | None, *, sequence_parallel: bool) -> Tensor:
    """``input @ weight^T`` for all tokens, where ranks share the tokens or hold copies of them.

    Dtypes and weight gradients are those of :func:`lightning_moe.weight_grad.linear`.

    Args:
        input: ``[T / P, K]``, this rank's tokens, with ``sequence_parallel``; else ``[T, K]``, the same on all ranks.
        weight: ``[N, K]``, this rank's rows.
        group: The ranks that hold the other rows; None for a world of one.
        sequence_parallel: Whether ranks share the tokens.

    Returns:
        ``[T, N]``.
    """
    if group is None:
        return linear(input, weight)
    # Cast first: half the bytes to send.
    input = input.to(compute_dtype(input))
    function = _GatheredMatmul if sequence_parallel else _CopiedMatmul
    with torch.autocast(input.device.type, enabled=False):
        return apply_eagerly(function, input, weight, group)


class _GatheredMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.sink = group, sink_of(weight)
        ctx.save_for_backward(input, weight)
        return F.linear(all_gather(input, group), weight.to(input.dtype))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: asynchronous work has no derivative
            gathered = all_gather(input, ctx.group)
            grad_input = reduce_scatter(grad_output @ weight.to(input.dtype), ctx.group)
            return grad_input, (grad_output.t() @ gathered).to(weight.dtype), None
        defers = ctx.sink is not None and ctx.sink.defers
        tokens = start_all_gather(input, ctx.group) if needs_weight and not defers else None
        grad = start_reduce_scatter(grad_output @ weight.to(input.dtype), ctx.group) if needs_input else None
        grad_weight = None
        if tokens is not None:
            grad_weight = deliver(matmul_grad(grad_output, tokens.wait()), ctx.sink, weight.dtype)
        elif needs_weight:
            own = GatheredInputGrad(grad_output, input.detach(), ctx.group)
            grad_weight = deliver(own, ctx.sink, weight.dtype)
        return None if grad is None else grad.wait(), grad_weight, None


class _CopiedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.sink = group, sink_of(weight)
        ctx.save_for_backward(input, weight)
        return F.linear(input, weight.to(input.dtype))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # as above
            grad_input = summands_to_copies(grad_output @ weight.to(input.dtype), ctx.group)
            return grad_input, (grad_output.t() @ input).to(weight.dtype), None
        grad = start_all_reduce_(grad_output @ weight.to(input.dtype), ctx.group) if needs_input else None
        grad_weight = None
        if needs_weight:
            grad_weight = deliver(matmul_grad(grad_output, input), ctx.sink, weight.dtype)
        return None if grad is None else grad.wait(), grad_weight, None
