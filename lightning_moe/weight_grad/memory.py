"""What it costs to keep tensors: a view keeps the whole storage, and several tensors may share one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Storage = tuple[torch.device, int]
"""Device and address: what tells storages apart while they exist."""


def storages(tensors: Iterable[Tensor]) -> dict[Storage, int]:
    """The bytes of each storage that the tensors keep alive."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {(storage.device, storage.data_ptr()): storage.nbytes() for storage in found}


def is_aligned(tensor: Tensor) -> bool:
    """Whether rows follow each other without gaps from a multiple of 16 bytes, as in a tensor of its own."""
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def has_aligned_rows(matrix: Tensor) -> bool:
    """Whether every row is one run of memory that starts at a multiple of 16 bytes; there may be gaps between rows.

    Strides count for a single row, too: libraries check them without looking at the number of rows.
    """
    stride = matrix.stride(0)
    return (
        matrix.stride(1) == 1
        and stride >= matrix.shape[1]
        and stride * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def without_the_rest(tensor: Tensor) -> Tensor:
    """A copy of a part of a larger storage, so that the rest can be freed; any other tensor itself.

    Only where the copy has the layout of the part: libraries choose kernels by strides and alignment, and a product
    computed later must not differ from one computed at once. Other views keep their storage.
    """
    if is_aligned(tensor) and tensor.untyped_storage().nbytes() > tensor.nbytes:
        return tensor.clone()
    return tensor


class KeptBytes:
    """Bytes of the storages that are kept, each counted once however many tensors share it."""

    def __init__(self) -> None:
        self.total = 0
        self._uses: dict[Storage, int] = {}

    def add(self, kept: Mapping[Storage, int]) -> None:
        """Some storages have one more use."""
        for storage, nbytes in kept.items():
            uses = self._uses.get(storage, 0)
            self._uses[storage] = uses + 1
            self.total += 0 if uses else nbytes

    def remove(self, kept: Mapping[Storage, int]) -> None:
        """They have one use less."""
        for storage, nbytes in kept.items():
            self._uses[storage] -= 1
            if not self._uses[storage]:
                del self._uses[storage]
                self.total -= nbytes

    def only_in(self, kept: Mapping[Storage, int]) -> int:
        """How many bytes :meth:`remove` would free."""
        return sum(nbytes for storage, nbytes in kept.items() if self._uses[storage] == 1)

    def clear(self) -> None:
        """Nothing is kept."""
        self.total = 0
        self._uses.clear()
