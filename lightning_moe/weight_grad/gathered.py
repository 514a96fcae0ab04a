"""Weight gradients of products one operand of which is spread over the ranks of a group until it is needed.

T tokens of the group, P ranks, K input width, N output width.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Self

import torch.distributed as dist
from torch import Tensor

from lightning_moe.parallel.collectives import PendingTensor, start_all_gather
from lightning_moe.weight_grad.linear import MatmulGrad
from lightning_moe.weight_grad.memory import without_the_rest
from lightning_moe.weight_grad.sink import WeightGrad


@dataclass(eq=False)
class _GatheredGrad(WeightGrad):
    grad_output: Tensor
    input: Tensor
    group: dist.ProcessGroup
    _gather: PendingTensor | None = field(default=None, init=False, repr=False)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Both operands, as they are kept."""
        return self.grad_output, self.input

    @property
    def has_collective(self) -> bool:
        """True."""
        return True

    def prefetch(self) -> None:
        """Begin to gather the operand that is spread over the ranks."""
        if self._gather is None:
            self._gather = start_all_gather(self._own_part, self.group)

    def compact(self) -> Self:
        """With copies of operands that are parts of larger tensors."""
        return replace(self, grad_output=without_the_rest(self.grad_output), input=without_the_rest(self.input))

    def compute(self) -> Tensor:
        """The gradient ``[N, K]`` in the dtype of the operands; on all ranks of the group."""
        return self._product(self._gathered()).compute()

    def add_to(self, main_grad: Tensor, *, accumulate: bool) -> None:
        """Write or add the gradient, as :class:`MatmulGrad` does; on all ranks of the group."""
        self._product(self._gathered()).add_to(main_grad, accumulate=accumulate)

    @property
    @abstractmethod
    def _own_part(self) -> Tensor: ...

    @abstractmethod
    def _product(self, gathered: Tensor) -> MatmulGrad: ...

    def _gathered(self) -> Tensor:
        self.prefetch()
        assert self._gather is not None
        gather, self._gather = self._gather, None
        return gather.wait()


@dataclass(eq=False)
class GatheredInputGrad(_GatheredGrad):
    """``grad_output^T @ all_gather(input)``: the weight gradient where each rank keeps its own tokens only.

    Attributes:
        grad_output: ``[T, N]``.
        input: ``[T / P, K]``, in the same dtype.
        group: The ranks that hold the other tokens.
    """

    @property
    def flops(self) -> float:
        """``2 T N K``."""
        return 2.0 * self.grad_output.numel() * self.input.shape[-1]

    @property
    def _own_part(self) -> Tensor:
        return self.input

    def _product(self, gathered: Tensor) -> MatmulGrad:
        return MatmulGrad(self.grad_output, gathered)


@dataclass(eq=False)
class GatheredOutputGrad(_GatheredGrad):
    """``all_gather(grad_output)^T @ input``: the same where the outputs are spread over the ranks.

    Attributes:
        grad_output: ``[T / P, N]``.
        input: ``[T, K]``, in the same dtype.
        group: The ranks that hold the other outputs.
    """

    @property
    def flops(self) -> float:
        """``2 T N K``."""
        return 2.0 * self.input.numel() * self.grad_output.shape[-1]

    @property
    def _own_part(self) -> Tensor:
        return self.grad_output

    def _product(self, gathered: Tensor) -> MatmulGrad:
        return MatmulGrad(gathered, self.input)
