"""The linear layer's matrix product, with a weight gradient that can go to a sink.

T rows (tokens), K input width, N output width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.weight_grad.memory import without_the_rest
from lightning_moe.weight_grad.sink import WeightGrad, deliver, sink_of


@dataclass(frozen=True)
class MatmulGrad(WeightGrad):
    """``grad_output^T @ input``: the weight gradient of ``input @ weight^T``.

    Attributes:
        grad_output: ``[T, N]``.
        input: ``[T, K]``, in the same dtype.
    """

    grad_output: Tensor
    input: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Both operands."""
        return self.grad_output, self.input

    @property
    def flops(self) -> float:
        """``2 T N K``."""
        return 2.0 * self.grad_output.numel() * self.input.shape[-1]

    def compact(self) -> Self:
        """With copies of operands that are parts of larger tensors."""
        return replace(self, grad_output=without_the_rest(self.grad_output), input=without_the_rest(self.input))

    def compute(self) -> Tensor:
        """The gradient ``[N, K]`` in the dtype of the operands."""
        return self.grad_output.t() @ self.input

    def add_to(self, main_grad: Tensor, *, accumulate: bool) -> None:
        """Write or add the gradient, with products summed in the dtype of ``main_grad`` ``[N, K]``."""
        beta = 1.0 if accumulate else 0.0  # with 0 addmm ignores what is there, also NaN
        left, right = self.grad_output.t(), self.input
        if left.dtype != main_grad.dtype and left.is_cuda and main_grad.dtype == torch.float32:
            # One cuBLAS kernel that reads 16-bit operands and accumulates into the float32 matrix.
            torch.addmm(main_grad, left, right, out_dtype=main_grad.dtype, beta=beta, out=main_grad)
        else:
            main_grad.addmm_(left.to(main_grad.dtype), right.to(main_grad.dtype), beta=beta)


def linear(input: Tensor, weight: Tensor) -> Tensor:
    """``input @ weight^T``, like :func:`torch.nn.functional.linear` without a bias.

    Under autocast both are cast to the autocast dtype; the weight gradient is computed from the cast operands and
    accumulated in the sink's dtype, without being rounded to 16 bits in between.

    Args:
        input: ``[..., K]``.
        weight: ``[N, K]``; its gradients go to its sink, if it has one.

    Returns:
        ``[..., N]``.
    """
    if torch.compiler.is_compiling():
        return F.linear(input, weight)  # a sink is a side effect, which a compiled backward cannot have
    dtype = compute_dtype(input)
    with torch.autocast(input.device.type, enabled=False):
        out: Tensor = _Linear.apply(input.to(dtype), weight)  # type: ignore[no-untyped-call]
    return out


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which autocast would multiply ``tensor``: its own outside autocast, and for float64."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return tensor.dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.sink = sink_of(weight)
        # The weight itself and not its cast, which would be a second copy, and without a path to second derivatives.
        ctx.save_for_backward(input, weight)
        return F.linear(input, weight.to(input.dtype))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_input = grad_output @ weight.to(input.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = deliver(matmul_grad(grad_output, input), ctx.sink, weight.dtype)
        return grad_input, grad_weight


def matmul_grad(grad_output: Tensor, input: Tensor) -> MatmulGrad:
    """The weight gradient of one use, from operands with any number of leading dims."""
    if not torch.is_grad_enabled():
        input = input.detach()  # what a sink keeps must not keep the graph behind the input
    return MatmulGrad(grad_output.reshape(-1, grad_output.shape[-1]), input.reshape(-1, input.shape[-1]))
