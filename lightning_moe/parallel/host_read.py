"""Reading a tensor's values on the host while the device goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor


class HostRead:
    """Values of a tensor on their way to the host.

    On CUDA the copy is queued behind the work that makes the tensor; what is queued after that runs while the host
    waits. Elsewhere the values are there already.

    Args:
        tensor: Any tensor; it must not be written before :meth:`wait` has returned.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._values = tensor
        if tensor.is_cuda:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> Any:
        """The values as :meth:`torch.Tensor.tolist` gives them."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


class NumbersOnDevice(Sequence[int]):
    """Integers of a tensor as they are now, on their way to the host, which waits for them when it first looks.

    Args:
        tensor: int64, one dimension.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._count = tensor.shape[0]
        self._read: HostRead | None = HostRead(tensor)
        if not tensor.is_cuda:  # somebody may write the tensor, and nothing is gained by reading it later
            _ = self._numbers

    @cached_property
    def _numbers(self) -> list[int]:
        read, self._read = self._read, None
        assert read is not None
        numbers: list[int] = read.wait()
        return numbers

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._numbers[index]
