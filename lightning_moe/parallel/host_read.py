"""Reading a tensor's values on the host while the device goes on."""

from __future__ import annotations

from typing import Any

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
