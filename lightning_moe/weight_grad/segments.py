"""The gradient of some rows or columns of a weight, where a layer multiplies by parts of it one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from lightning_moe.weight_grad.sink import WeightGrad


@dataclass(frozen=True)
class PartOfGrad(WeightGrad):
    """The gradient of a weight of which one use has read some slices only.

    Several uses make up the gradient of the whole weight. A gradient that replaces what was there before is written
    first, whichever part it is; so it makes the rest of the weight zero.

    Attributes:
        grad: The gradient of the slices, joined in their order.
        index: Slices with ``start`` and ``stop``, without ``step``; they have no element in common.
        shape: Shape of the whole weight.
        dim: The dim of the weight that is sliced.
    """

    grad: WeightGrad
    index: tuple[slice, ...]
    shape: tuple[int, ...]
    dim: int = 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The operands of the part."""
        return self.grad.tensors

    @property
    def flops(self) -> float:
        """Those of the part."""
        return self.grad.flops

    @property
    def has_collective(self) -> bool:
        """As the gradient of the part says."""
        return self.grad.has_collective

    def prefetch(self) -> None:
        """Begin to communicate what the part needs."""
        self.grad.prefetch()

    def compact(self) -> Self:
        """With copies of operands that are parts of larger tensors."""
        return replace(self, grad=self.grad.compact())

    def compute(self) -> Tensor:
        """The gradient in the shape of the whole weight, with zeros outside the part."""
        part = self.grad.compute()
        whole = part.new_zeros(self.shape)
        for target, piece in self._pairs(whole, part):
            target.copy_(piece)
        return whole

    def add_to(self, main_grad: Tensor, *, accumulate: bool) -> None:
        """Write the part, and zeros elsewhere, or add it; products are summed in the dtype of ``main_grad``."""
        if not accumulate:
            main_grad.zero_()
        if len(self.index) == 1:
            self.grad.add_to(_narrow(main_grad, self.dim, self.index[0]), accumulate=True)
            return
        # One product for all slices, in the precision of the sum: a product for each would be many small ones.
        length = sum(_length(run) for run in self.index)
        part = main_grad.new_empty((*self.shape[: self.dim], length, *self.shape[self.dim + 1 :]))
        self.grad.add_to(part, accumulate=False)
        for target, piece in self._pairs(main_grad, part):
            target.add_(piece)

    def _pairs(self, whole: Tensor, part: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each slice of the whole weight with its piece of the part."""
        pieces = part.split([_length(run) for run in self.index], self.dim)
        return zip((_narrow(whole, self.dim, run) for run in self.index), pieces, strict=True)


def _length(run: slice) -> int:
    length: int = run.stop - run.start
    return length


def _narrow(tensor: Tensor, dim: int, run: slice) -> Tensor:
    return tensor.narrow(dim, run.start, _length(run))
