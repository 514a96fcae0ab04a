"""A copy of a state in host memory, to be written while training goes on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_moe.checkpoint.shards import LogicalShard

_Path = tuple[Any, ...]


class HostCopy:
    """Copies states into host memory, pinned where they come from a GPU, and keeps that memory for the next copy.

    Allocating pinned memory takes longer than filling it, so every tensor's place in the state keeps its buffer. Hence
    a copy is valid until the next one is taken: the owner takes it when the copy has been written.
    """

    def __init__(self) -> None:
        self._buffers: dict[_Path, Tensor] = {}

    def take(self, state: dict[str, Any]) -> dict[str, Any]:
        """Copy a state; when this returns, its tensors may be changed.

        Args:
            state: Nested dictionaries, lists and tuples of tensors and plain values. Plain values are taken as they
                are.

        Returns:
            The same structure, of new containers and of tensors in host memory. A :class:`LogicalShard` describes the
            same part of the same whole tensor.
        """
        buffers: dict[_Path, Tensor] = {}
        devices: set[torch.device] = set()
        copied: dict[str, Any] = self._copy(state, (), buffers, devices)
        self._buffers = buffers  # what is no longer in the state is freed
        for device in devices:
            torch.cuda.current_stream(device).synchronize()  # once for all copies, which need not wait for the host
        return copied

    def _copy(self, value: Any, path: _Path, buffers: dict[_Path, Tensor], devices: set[torch.device]) -> Any:
        match value:
            case LogicalShard():
                return value.with_local(self._copy(value.local, path, buffers, devices))
            case Tensor():
                buffer = buffers[path] = self._buffer(value, path)
                buffer.copy_(value.detach(), non_blocking=value.is_cuda)
                if value.is_cuda:
                    devices.add(value.device)
                return buffer
            case dict():
                return {key: self._copy(item, (*path, key), buffers, devices) for key, item in value.items()}
            case list() | tuple():
                items = [self._copy(item, (*path, i), buffers, devices) for i, item in enumerate(value)]
                return items if isinstance(value, list) else tuple(items)
            case _:
                return value

    def _buffer(self, value: Tensor, path: _Path) -> Tensor:
        known = self._buffers.get(path)
        if known is not None and (known.shape, known.dtype, known.is_pinned()) == (
            value.shape,
            value.dtype,
            value.is_cuda,
        ):
            return known
        return torch.empty_like(value.detach(), device="cpu", pin_memory=value.is_cuda, requires_grad=False)
