"""Multiprocessors of a GPU that matrix products leave to communication.

[Note: why products should not fill the GPU]
NCCL's kernels hold multiprocessors while messages are under way, and a block of a large product does not fit beside
them. cuBLAS starts exactly as many blocks as the GPU has multiprocessors and gives each its share of the tiles, so the
blocks that find theirs taken begin when all others have ended: the product takes up to twice as long, and the messages
get less of the memory's bandwidth. A product that uses a few multiprocessors less is slower by their share alone.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch


def sm_margin_for(ranks: int, given: int | None) -> int:
    """Multiprocessors to leave to the messages among some ranks.

    What is given; else 4 between two ranks, 8 among more. NCCL holds the more multiprocessors, the more ranks messages
    go to, but products become slower with each that they leave: between two H200 with NVLink 8 cost more than they
    gain, among four they gain. It depends on nothing that is measured, because it chooses kernels, and with them the
    last bits of results.

    Args:
        ranks: Ranks of the group.
        given: What the user says; None if nothing.
    """
    if given is not None:
        return given
    return 4 if ranks <= 2 else 8


class SmMargin:
    """A context in which matrix products leave some multiprocessors free; outside CUDA it does nothing.

    It asks cuBLASLt, whose kernels take such a limit, and torch's grouped GEMM obeys it as well. PyTorch's switches for
    it hold for the whole process, so they are set back at the end of the context. PyTorch calls them experimental, and
    prints a line when each is used for the first time; where it lacks them, nothing is left free. The limit chooses
    kernels, so results may differ in their last bits from those without it.

    Args:
        count: Multiprocessors to leave free, at most all but one; 0 changes nothing.
        device: Where the products run.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        supported = hasattr(torch._C, "_set_sm_carveout_experimental") and torch.version.hip is None
        self._count = 0
        if count and device.type == "cuda" and supported:
            self._count = min(count, torch.cuda.get_device_properties(device).multi_processor_count - 1)
        self._before: list[tuple[Any, int | None]] = []

    def __enter__(self) -> None:
        if not self._count:
            return
        backend = torch._C._get_blas_preferred_backend()
        if backend != torch._C._BlasBackend.Cublaslt:
            torch._C._set_blas_preferred_backend(torch._C._BlasBackend.Cublaslt)
        self._before.append((backend, torch._C._get_sm_carveout_experimental()))
        torch._C._set_sm_carveout_experimental(self._count)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._count:
            return
        backend, margin = self._before.pop()
        torch._C._set_sm_carveout_experimental(margin)
        if backend != torch._C._BlasBackend.Cublaslt:
            torch._C._set_blas_preferred_backend(backend)
