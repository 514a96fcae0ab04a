"""The experts of one rank, as stacked matrices and one grouped matrix multiplication.

R rows (sorted by local expert), E local experts, D model width, F expert width, X ranks that share an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_moe.errors import ConfigError
from lightning_moe.moe.activation import Activation, activate, up_projection
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.sharding import ShardSpec, ShardSpecs, set_shard_spec, sharded_init_
from lightning_moe.weight_grad import compute_dtype, grouped_linear


class GroupedExperts(nn.Module):
    """Bias-free feed-forward experts, each applied to its own run of rows.

    The weights are drawn from normal distributions with standard deviation ``D^-0.5`` (up) and ``0.5 *
    F^-0.5`` (down): a unit-variance token then leaves a ReLU or SwiGLU expert with a variance well below 1,
    so adding a fresh MoE layer to the residual stream hardly disturbs it. Each expert has a random stream of
    its own, so its initial weights do not depend on which rank holds it.

    The module may hold a part of each expert's inner width. Its output is then this part's summand of the
    experts' output.

    Args:
        hidden_size: Width ``D`` of the tokens.
        expert_hidden_size: Inner width ``F`` of each expert.
        activation: Nonlinearity.
        num_experts: Number of experts in the whole layer.
        index: Logical ids of the experts held here, in local order.
        grouped_gemm: Whether to use one grouped GEMM where it is available (see
            :func:`~lightning_moe.weight_grad.can_group`); False always loops over the experts.
        inner: Positions of the inner width held here, ``F / X`` of them; all when None.

    Attributes:
        gate_up_proj: ``[E, 2F/X, D]`` (SwiGLU, the gate first), or ``up_proj`` ``[E, F/X, D]``.
        down_proj: ``[E, D, F/X]``.
        index: Logical ids of the experts held here.
        inner: Positions of the inner width held here.
    """

    def __init__(
        self,
        hidden_size: int,
        expert_hidden_size: int,
        activation: Activation,
        num_experts: int,
        index: tuple[int, ...],
        grouped_gemm: bool = True,
        inner: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.expert_hidden_size = expert_hidden_size
        self.activation = activation
        self.num_experts = num_experts
        self.index = index
        self.grouped_gemm = grouped_gemm
        self.inner = tuple(range(expert_hidden_size) if inner is None else inner)
        self._up_name, up_width = up_projection(activation, len(self.inner))
        self.register_parameter(self._up_name, nn.Parameter(torch.empty(len(index), up_width, hidden_size)))
        self.down_proj = nn.Parameter(torch.empty(len(index), hidden_size, len(self.inner)))
        for name in self._parameters:
            set_shard_spec(self, name, *self._specs(name))
        self.reset_parameters()

    @property
    def projections(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The first projection's weight and the second's."""
        up: nn.Parameter = getattr(self, self._up_name)
        return up, self.down_proj

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        up: Tensor = getattr(self, self._up_name)
        up_std = up.shape[-1] ** -0.5
        down_std = 0.5 * self.expert_hidden_size**-0.5
        sharded_init_(
            up,
            self._specs(self._up_name),
            lambda weight, generator: weight.normal_(0, up_std, generator=generator),
        )
        sharded_init_(
            self.down_proj,
            self._specs("down_proj"),
            lambda weight, generator: weight.normal_(0, down_std, generator=generator),
        )

    @torch.no_grad()
    def keep_(self, index: tuple[int, ...], inner: Sequence[int]) -> None:
        """Keep only the experts ``index`` and, of each, the positions ``inner`` of its inner width, in that order.

        The parameters stay the same objects and lose their gradients.

        Raises:
            ConfigError: An expert or a position is not held here.
        """
        inner = tuple(inner)
        if (index, inner) == (self.index, self.inner):
            return
        for name, wanted, held in (("index", index, self.index), ("inner", inner, self.inner)):
            if not set(wanted) <= set(held):
                raise ConfigError(name, wanted, f"some of those that this module holds: {held}")
        before = {name: self._specs(name) for name in self._parameters}
        self.index, self.inner = index, inner
        for name, parameter in self.named_parameters():
            specs = self._specs(name)
            for old, new in zip(before[name], specs, strict=True):
                if new.index != old.index:
                    position = {logical: local for local, logical in enumerate(old.index)}
                    kept = torch.tensor([position[logical] for logical in new.index], device=parameter.device)
                    parameter.data = parameter.data.index_select(old.dim, kept)
            parameter.grad = None
            set_shard_spec(self, name, *specs)

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
        return self.forward_with(*self.projections, rows, counts, offsets)

    def forward_with(self, up: Tensor, down: Tensor, rows: Tensor, counts: Sequence[int], offsets: Tensor) -> Tensor:
        """:meth:`forward` with other values of the two projections' weights."""
        projected = grouped_linear(rows.to(compute_dtype(rows)), up, counts, offsets, self.grouped_gemm)
        inner = activate(projected, self.activation)
        return grouped_linear(inner, down, counts, offsets, self.grouped_gemm)

    def _specs(self, name: str) -> ShardSpecs:
        """Specs of a parameter: experts over one axis, their inner width over another."""
        experts = ShardSpec(Axis.EXPERT, 0, self.num_experts, self.index)
        width, inner = self.expert_hidden_size, self.inner
        if name == "down_proj":
            return experts, ShardSpec(Axis.EXPERT_TENSOR, 2, width, inner)
        if self.activation == "swiglu":
            width, inner = 2 * width, (*inner, *(width + position for position in inner))
        return experts, ShardSpec(Axis.EXPERT_TENSOR, 1, width, inner)
