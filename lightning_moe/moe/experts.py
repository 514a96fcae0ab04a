"""The experts of one rank, as stacked matrices and one grouped matrix multiplication.

R rows (sorted by local expert), E local experts, D model width, F expert width, N and K output and input
width of one projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.errors import ConfigError
from lightning_moe.moe.activation import Activation, activate, up_projection
from lightning_moe.parallel.sharding import ShardSpec, set_shard_spec, sharded_init_


class GroupedExperts(nn.Module):
    """Bias-free feed-forward experts, each applied to its own run of rows.

    The weights are drawn from normal distributions with standard deviation ``D^-0.5`` (up) and ``0.5 *
    F^-0.5`` (down): a unit-variance token then leaves a ReLU or SwiGLU expert with a variance well below 1,
    so adding a fresh MoE layer to the residual stream hardly disturbs it. Each expert has a random stream of
    its own, so its initial weights do not depend on which rank holds it.

    Args:
        hidden_size: Width ``D`` of the tokens.
        expert_hidden_size: Inner width ``F`` of each expert.
        activation: Nonlinearity.
        num_experts: Number of experts in the whole layer.
        index: Logical ids of the experts held here, in local order.
        grouped_gemm: Whether to use one grouped GEMM where it is available (see :func:`can_group`); False
            always loops over the experts.

    Attributes:
        gate_up_proj: ``[E, 2F, D]`` (SwiGLU, the gate first), or ``up_proj`` ``[E, F, D]``.
        down_proj: ``[E, D, F]``.
        index: Logical ids of the experts held here.
    """

    def __init__(
        self,
        hidden_size: int,
        expert_hidden_size: int,
        activation: Activation,
        num_experts: int,
        index: tuple[int, ...],
        grouped_gemm: bool = True,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.num_experts = num_experts
        self.index = index
        self.grouped_gemm = grouped_gemm
        self._up_name, up_width = up_projection(activation, expert_hidden_size)
        self.register_parameter(self._up_name, nn.Parameter(torch.empty(len(index), up_width, hidden_size)))
        self.down_proj = nn.Parameter(torch.empty(len(index), hidden_size, expert_hidden_size))
        self._mark()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        up: Tensor = getattr(self, self._up_name)
        up_std = up.shape[-1] ** -0.5
        down_std = 0.5 * self.down_proj.shape[-1] ** -0.5
        sharded_init_(up, self.index, lambda weight, generator: weight.normal_(0, up_std, generator=generator))
        sharded_init_(
            self.down_proj,
            self.index,
            lambda weight, generator: weight.normal_(0, down_std, generator=generator),
        )

    @torch.no_grad()
    def keep_(self, index: tuple[int, ...]) -> None:
        """Keep only the experts ``index``, in that order.

        The parameters stay the same objects and lose their gradients.

        Raises:
            ConfigError: An expert is not held here.
        """
        if index == self.index:
            return
        if not set(index) <= set(self.index):
            raise ConfigError("index", index, f"experts that this module holds: {self.index}")
        positions = [self.index.index(expert) for expert in index]
        for parameter in self.parameters():
            parameter.data = parameter.data[positions].clone()
            parameter.grad = None
        self.index = index
        self._mark()

    def forward(self, rows: Tensor, counts: Sequence[int], offsets: Tensor) -> Tensor:
        """Apply local expert ``e`` to its ``counts[e]`` rows.

        Under autocast the computation runs in the autocast dtype, otherwise in the dtype of the rows; the
        weights are cast to it.

        Args:
            rows: ``[R, D]``, all rows of expert 0, then those of expert 1, ...
            counts: Rows of each expert; zeros are fine.
            offsets: The end of each expert's rows, int32 ``[E]`` on the device of the rows.

        Returns:
            ``[R, D]`` in the dtype of the computation.
        """
        dtype = compute_dtype(rows)
        up, down = getattr(self, self._up_name).to(dtype), self.down_proj.to(dtype)
        rows = rows.to(dtype)
        # grouped_mm is on none of autocast's lists: the loop would be cast and the grouped GEMM would not.
        with torch.autocast(rows.device.type, enabled=False):
            inner = activate(self._project(rows, up, counts, offsets), self.activation)
            return self._project(inner, down, counts, offsets)

    def _project(self, rows: Tensor, weight: Tensor, counts: Sequence[int], offsets: Tensor) -> Tensor:
        if self.grouped_gemm and can_group(rows, weight):
            return _with_contiguous_grad(F.grouped_mm(rows, weight.transpose(-2, -1), offs=offsets))
        return project_in_loop(rows, weight, counts)

    def _mark(self) -> None:
        spec = ShardSpec(axis="expert", dim=0, size=self.num_experts, index=self.index)
        for name in self._parameters:
            set_shard_spec(self, name, spec)


def can_group(rows: Tensor, weight: Tensor) -> bool:
    """Whether ``torch.nn.functional.grouped_mm`` takes these operands, forward and backward, and is worth it.

    Its rules, as of torch 2.11 to 2.13:

    * On the CPU float32, bfloat16 and float16, not float64.
    * On CUDA only bfloat16 on compute capability 9.0 or newer is a grouped kernel; anything else is a loop
      inside torch that first reads the offsets back from the device, which ours does not have to.
    * Row strides are multiples of 16 bytes, in the operands, the output and, for the backward pass, the
      gradients; so both widths of the projection are.
    * Operands start at multiples of 16 bytes (a parameter that is a view into a flat buffer may not).

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
    if not supported or not rows.is_contiguous() or not weight.is_contiguous():
        return False
    widths = (weight.shape[-1], weight.shape[-2])
    addresses = (rows.data_ptr(), weight.data_ptr())
    return all(width * rows.element_size() % 16 == 0 for width in widths) and all(a % 16 == 0 for a in addresses)


def project_in_loop(rows: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """The same product as the grouped GEMM, one ``F.linear`` per expert.

    Args:
        rows: ``[R, K]``, sorted by expert.
        weight: ``[E, N, K]``.
        counts: Rows of each expert.

    Returns:
        ``[R, N]``.
    """
    # Experts without rows take part as well: their weights get zeros as gradient, and a rank that received no
    # row at all stays connected to the graph, so that its backward pass joins the others' all-to-all instead
    # of leaving them to wait. unbind, and not indexing, because the gradient of an index is a tensor as large
    # as the whole stack.
    pieces = zip(torch.split(rows, list(counts)), weight.unbind(0), strict=True)
    return torch.cat([F.linear(piece, matrix) for piece, matrix in pieces])


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which autocast would multiply ``tensor``: its own outside autocast, and for float64."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return tensor.dtype


class _ContiguousGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _with_contiguous_grad(tensor: Tensor) -> Tensor:
    """Return ``tensor``; an expanded gradient (of ``sum()``) is copied, for grouped_mm refuses stride 0."""
    out: Tensor = _ContiguousGrad.apply(tensor)  # type: ignore[no-untyped-call]
    return out
