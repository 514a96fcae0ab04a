"""Runs layers on GPUs: ``torchrun --nproc_per_node=2 -m tests.layers.gpu_script OUTPUT``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tests.layers.parallel import build_mesh
from tests.layers.test_causal_attention import KINDS, run_attention
from tests.layers.test_cross_entropy import run_loss
from tests.layers.test_embedding import run_embedding
from tests.layers.test_linear import LAYOUTS, run_pair

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ATTENTION = [(2, False, 2), (2, True, 4), (1, False, 1)]
"""Tensor ranks (else the ranks are context ranks), sequence parallelism, key and value heads."""


def run_all() -> dict[Any, Any]:
    """The result of every case on this rank."""
    results: dict[Any, Any] = {}
    tensor, context = build_mesh(tensor=2), build_mesh(context=2)
    for dtype in DTYPES:
        for i, layout in enumerate(LAYOUTS):
            results["linear", dtype, i] = run_pair(tensor, layout, dtype)
            results["embedding", dtype, i] = run_embedding(tensor, layout, dtype)
            results["loss", dtype, i] = run_loss(tensor, layout, 3, dtype)
        for name, kind in KINDS.items():
            for case in ATTENTION:
                ranks, sequence_parallel, kv_heads = case
                mesh = tensor if ranks == 2 else context
                results["attention", dtype, name, case] = run_attention(mesh, sequence_parallel, kind, dtype, kv_heads)
    return results


def write_results(run: Callable[[], Any]) -> None:
    """Call a function on every rank; rank 0 writes a list of what all return."""
    torch.set_default_device(f"cuda:{os.environ['LOCAL_RANK']}")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, run())
    if dist.get_rank() == 0:
        torch.save(results, sys.argv[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    write_results(run_all)
