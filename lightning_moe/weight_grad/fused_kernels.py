"""Where the package's Triton kernels may take the place of plain operations."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def fused_kernels_take(*tensors: Tensor) -> bool:
    """Whether fused kernels, which compute in float32, take these operands: 16 or 32 bits, on CUDA, with Triton."""
    supported = (torch.float32, torch.bfloat16, torch.float16)
    return all(tensor.is_cuda and tensor.dtype in supported for tensor in tensors) and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
