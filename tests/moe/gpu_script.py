"""The layer over NCCL against one GPU: ``torchrun --nproc_per_node=N -m tests.moe.gpu_script OUTPUT``."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.parallel.mesh import ParallelMesh
from tests.moe.axes import CONFIGS, compare, random_case, run_rank, run_whole


def main() -> None:
    """Write the largest relative error of each case over all ranks and tensors; rank 0 writes."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=torch.device(device))
    pairs = world_size // 2
    meshes = {
        "expert": ParallelConfig(expert=world_size),
        "expert_tensor": ParallelConfig(expert=pairs, expert_tensor=2),
        "tensor, expert_tensor": ParallelConfig(tensor=2, expert=pairs, expert_tensor=2),
        "context, expert": ParallelConfig(context=2, expert=world_size),
    }
    errors = {}
    for name, unresolved in meshes.items():
        parallel = unresolved.resolve(world_size)
        mesh = ParallelMesh.build(parallel)
        for mode, narrow in CONFIGS.items():
            # Widths that the grouped kernel takes.
            config = replace(narrow, expert_hidden_size=32, grouped_gemm=True)
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                case = random_case(config, parallel, token_slices=parallel.tensor > 1, dtype=dtype)
                found = compare(run_rank(case, mesh, device=device), run_whole(case, mesh.size("data"), device))
                worst = torch.tensor(max(found.values()), device=device)
                dist.all_reduce(worst, op=dist.ReduceOp.MAX)
                errors[f"{name}; {mode}; {str(dtype).removeprefix('torch.')}"] = worst.item()
    if rank == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(errors, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
