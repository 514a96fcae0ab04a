"""Comparisons bit for bit, also on CUDA."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic as settings

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic() -> Iterator[None]:
    """Let equal passes give equal bits; what cannot raises :class:`RuntimeError`.

    Backward passes of fused attention add up with atomics, in an order that changes from run to run. With ``warn_only``
    torch's flash and memory-efficient kernels warn and do so nevertheless, and cuDNN's may still be taken. Only where
    it would be an error do the former add in order and is the latter passed over.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = settings.fill_uninitialized_memory  # type: ignore[attr-defined]  # a property of the module
    workspace = os.environ.get(_CUBLAS)
    os.environ.setdefault(_CUBLAS, ":4096:8")  # asked for by torch, although it gives cuBLAS its workspaces itself
    settings.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # to post messages no later than without
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        settings.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        if workspace is None:
            del os.environ[_CUBLAS]
