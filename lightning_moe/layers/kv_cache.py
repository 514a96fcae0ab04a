"""Keys and values of the tokens so far, for generation token by token.

B batch, S tokens, M key and value heads of this rank, H head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of one attention layer.

    Args:
        batch: Number of sequences ``B``.
        max_length: Most tokens of a sequence.
        num_kv_heads: Key and value heads ``M`` of this rank.
        head_size: Width ``H`` of a head.
        dtype: Dtype of the keys and values.
        device: Their device.
    """

    def __init__(
        self,
        batch: int,
        max_length: int,
        num_kv_heads: int,
        head_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._keys = torch.empty(batch, max_length, num_kv_heads, head_size, dtype=dtype, device=device)
        self._values = torch.empty_like(self._keys)
        self._length = 0

    @property
    def length(self) -> int:
        """Number of tokens held."""
        return self._length

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values ``[B, Q, M, H]`` of the next ``Q`` tokens.

        Returns:
            All keys and all values so far, ``[B, S, M, H]``: views that the next call does not change.
        """
        end = self._length + key.shape[1]
        assert end <= self._keys.shape[1], f"{end} tokens in a cache for {self._keys.shape[1]}"
        self._keys[:, self._length : end] = key
        self._values[:, self._length : end] = value
        self._length = end
        return self._keys[:, :end], self._values[:, :end]
