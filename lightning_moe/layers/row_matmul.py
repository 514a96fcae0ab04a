"""The matrix product of a row-parallel layer, whose ranks each have a summand of the result.

T tokens, K input width of this rank, N output width, P ranks of the group.

Both products of the backward pass need the gradient of all tokens. With sequence parallelism a rank gets that of its
own tokens; it is gathered once for the two. Where the weight gradient is deferred, only the own slice is kept in
between, and gathered a second time where the weight gradient is computed, under the GEMM of the one before it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.parallel.collectives import all_gather, apply_eagerly, reduce_scatter, summands_to_copies
from lightning_moe.weight_grad import GatheredOutputGrad, compute_dtype, deliver, linear, matmul_grad, sink_of


def row_matmul(input: Tensor, weight: Tensor, group: dist.ProcessGroup | None, *, sequence_parallel: bool) -> Tensor:
    """The sum over ranks of ``input @ weight^T``, shared out among the ranks or as copies for all of them.

    Dtypes and weight gradients are those of :func:`lightning_moe.weight_grad.linear`.

    Args:
        input: ``[T, K]``, this rank's features of all tokens.
        weight: ``[N, K]``, this rank's columns.
        group: The ranks that hold the other columns; None for a world of one.
        sequence_parallel: Whether ranks share the tokens.

    Returns:
        ``[T / P, N]``, the tokens of this rank, with ``sequence_parallel``; else ``[T, N]``, the same on all ranks.
    """
    if group is None or not sequence_parallel:
        return summands_to_copies(linear(input, weight), group)
    input = input.to(compute_dtype(input))
    with torch.autocast(input.device.type, enabled=False):
        return apply_eagerly(_ScatteredMatmul, input, weight, group)


class _ScatteredMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.sink = group, sink_of(weight)
        ctx.save_for_backward(input, weight)
        return reduce_scatter(F.linear(input, weight.to(input.dtype)), group)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, _ = ctx.needs_input_grad
        # With create_graph=True all of this is differentiated again, so nothing is deferred.
        defers = needs_weight and not torch.is_grad_enabled() and ctx.sink is not None and ctx.sink.defers
        grad_input = grad_weight = None
        if needs_input or not defers:
            gathered = all_gather(grad_output, ctx.group)
            if needs_input:
                grad_input = gathered @ weight.to(input.dtype)
            if needs_weight and not defers:
                grad_weight = deliver(matmul_grad(gathered, input), ctx.sink, weight.dtype)
        if defers:
            own = GatheredOutputGrad(grad_output, input.detach(), ctx.group)
            grad_weight = deliver(own, ctx.sink, weight.dtype)
        return grad_input, grad_weight, None
