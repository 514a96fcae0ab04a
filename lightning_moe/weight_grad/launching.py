"""How the weight gradients of stacked experts are launched: by one kernel of ours, or by cuBLAS one after the other.

R rows, E experts, N output width, K input width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_moe.weight_grad.fused_kernels import fused_kernels_take
from lightning_moe.weight_grad.memory import has_aligned_rows

Launching = Literal["each", "loads", "descriptors"]
"""A product of cuBLAS for each expert and run of its rows; or one kernel, which reads by plain loads, or by tensor
descriptors (see triton_grouped.py)."""

_LONG = 768
"""Rows of a run from which descriptors pay. On H200 they lose with 512 and win with 1,024."""
_MOST_BY_LOADS = 4e9
"""Multiply-adds of a product from which cuBLAS is faster than our kernel with plain loads."""
_MOST_BY_DESCRIPTORS = 1.2e10
"""The same with descriptors, on H200: at 8.6e9 both take as long, at 1.3e10 ours takes 3 % longer."""
_MOST_OF_RUNS = 2e10
"""The same where experts have several runs, for each of which cuBLAS reads and writes the sum once more: at 1.7e10 ours
takes 8 to 11 % less, at 3.4e10 3 % more."""


def how_to_launch(grad_output: Tensor, rows: Tensor, out: Tensor, num_runs: int = 1) -> Launching:
    """The fastest way that computes these weight gradients.

    It follows from shapes, dtypes, alignment and the device, all of the whole weight. So a gradient that is computed
    later, in parts, or from operands that have been copied (which keep their alignment), has the same bits.

    Args:
        grad_output: ``[R, N]``, rows of all experts.
        rows: ``[R, K]``.
        out: ``[E, N, K]``, of all experts: where the gradients are written or added.
        num_runs: Runs that an expert's rows come in at most.
    """
    if not (
        out.numel() > 0
        and rows.dtype.itemsize == 2
        and out.dtype in (rows.dtype, torch.float32)
        and out.is_contiguous()
        and fused_kernels_take(rows, out)
        and torch.cuda.get_device_capability(out.device) >= (8, 0)
    ):
        return "each"
    rows_of_a_run = rows.shape[0] / (out.shape[0] * num_runs)
    product = rows_of_a_run * out[0].numel()
    aligned = has_aligned_rows(grad_output) and has_aligned_rows(rows)
    if aligned and rows_of_a_run >= _LONG and has_descriptors(out.device):
        return "descriptors" if product < (_MOST_BY_DESCRIPTORS if num_runs == 1 else _MOST_OF_RUNS) else "each"
    return "loads" if product < _MOST_BY_LOADS else "each"


def has_descriptors(device: torch.device) -> bool:
    """Whether the GPU has tensor descriptors, and shared memory for the tiles that our kernel reads by them.

    Hopper and the Blackwell of data centres; that of workstations has half as much shared memory.
    """
    return torch.cuda.get_device_capability(device)[0] in (9, 10)
