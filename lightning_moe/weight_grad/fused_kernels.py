"""Where the package's Triton kernels may take the place of plain operations."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def fused_kernels_take(*tensors: Tensor) -> bool:
    """Whether fused kernels, which compute in float32, take these operands: 16 or 32 bits, on CUDA, with Triton."""
    supported = (torch.float32, torch.bfloat16, torch.float16)
    return all(tensor.is_cuda and tensor.dtype in supported for tensor in tensors) and has_triton()


@cache
def has_triton() -> bool:
    """Whether Triton can be imported, as it can be with PyTorch's builds for CUDA."""
    return find_spec("triton") is not None
