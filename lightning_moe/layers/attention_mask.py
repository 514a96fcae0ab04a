"""Who attends to whom in a causal model, as one mask for all blocks, or none where causality alone says it.

B batch, Q queries, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask(
    documents: Tensor | None, length: int, window: int | None, device: torch.device, *, past: int = 0
) -> Tensor | None:
    """Build the mask of :class:`~lightning_moe.layers.CausalSelfAttention`; once per forward pass.

    Args:
        documents: int64 ``[B, S]`` of whole sequences, not of a context rank's chunk: number of each token's document
            within its sequence. A token attends to its own document only. None for one document.
        length: Number of queries ``Q``.
        window: Number of tokens that a token attends to, itself included; None for all.
        device: Device of the mask.
        past: Keys that a cache holds already; ``S = past + Q``. Without documents only.

    Returns:
        bool ``[B, 1, Q, S]`` or ``[1, 1, Q, S]``, True where a query attends to a key. None where every token attends
        to all tokens before it: kernels that need no mask are faster and take no ``Q * S`` memory.
    """
    keys = past + length
    windowed = window is not None and window < keys
    if documents is None and not windowed and (past == 0 or length == 1):
        return None
    key = torch.arange(keys, device=device)
    query = key[past:, None]
    mask = key <= query
    if window is not None and windowed:
        mask &= key > query - window
    mask = mask[None, None]
    if documents is not None:
        assert past == 0, "a cache holds one document"
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    return mask
