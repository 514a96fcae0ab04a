"""Overlapped layers over NCCL: ``torchrun --nproc_per_node=N -m tests.moe.overlap.gpu_script OUTPUT REPETITIONS``."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from math import inf

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.config.moe import MoEConfig
from lightning_moe.config.overlap import OverlapConfig
from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.moe.layer import MoELayer
from lightning_moe.moe.overlap.cost import Rates
from lightning_moe.moe.overlap.executor import ExpertOverlap
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.state import load_full_state_dict
from lightning_moe.weight_grad import WeightGradQueue, detach_sink
from tests.weight_grad.owners import MainGrad

PLANS = [("source", None), ("expert", 1), ("expert", 2)]
SAVES = ["fc1", "recompute", "redispatch"]
STARVED = Rates(link_bytes_per_second=1e3, gemm=((1.0, 1e15),), launch=0.0)
"""With these rates every wait is long enough for all weight gradients."""
CONFIGS = {
    "plain": {},
    "skewed": {},
    "shared expert": {"shared_expert_hidden_size": 64},
    "gelu": {"activation": "gelu"},
    "capacity": {"capacity_factor": 0.8, "load_balancing": "none"},
    "padded": {"capacity_factor": 1.2, "pad_to_capacity": True, "load_balancing": "none"},
}


def step(layer: MoELayer, hidden: Tensor, cotangent: Tensor, deferred: bool = False) -> list[Tensor]:
    """Output, input gradient and all weight gradients of one pass; deferred ones in float32."""
    overlap, queue = layer.overlap, WeightGradQueue() if deferred else None
    sums = [MainGrad(weight, queue) for weight in layer.experts.parameters()] if deferred else []
    if overlap is not None:
        large = overlap.choice.large_product
        layer.overlap = ExpertOverlap(overlap.config, STARVED if deferred else None, queue, large_product=large)
    hidden = hidden.clone().requires_grad_()
    layer.zero_grad()
    output, info = layer(hidden)
    loss = (output * cotangent).sum() + info.auxiliary_loss
    if queue is None:
        loss.backward()
    else:
        with queue.capture(0):
            loss.backward()
        queue.pop_all()
        assert queue.statistics.run_within or overlap is None or not hidden.numel()
    assert hidden.grad is not None
    grads = [weight.grad for weight in layer.parameters() if weight.grad is not None]
    for weight in layer.experts.parameters():
        detach_sink(weight)
    layer.overlap = overlap
    return [output.detach(), hidden.grad, *grads, *(each.sum for each in sums)]


def error(actual: list[Tensor], expected: list[Tensor]) -> float:
    pairs = [(a.double(), e.double()) for a, e in zip(actual, expected, strict=True)]
    return max(((a - e).abs().max() / e.abs().max().clamp(min=1e-30)).item() if e.numel() else 0.0 for a, e in pairs)


def main() -> None:
    """Write the worst error against the all-to-all, and how many comparisons bit for bit failed; rank 0 writes."""
    rank, world_size, repetitions = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(sys.argv[2])
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}")
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    mesh = ParallelMesh.build(ParallelConfig(expert=world_size))
    errors: dict[str, float] = {}
    unequal: dict[str, int] = {}
    layouts = 0
    for name, changes in CONFIGS.items():
        config = MoEConfig(num_experts=4 * world_size, top_k=3, expert_hidden_size=96, **changes)  # type: ignore[arg-type]
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            whole = MoELayer(128, config).state_dict()
            if name == "skewed":
                whole["router.weight"][: world_size * 3] = 0.0
            layer = MoELayer(128, config, mesh).to(device=device, dtype=dtype)
            load_full_state_dict(layer, {key: value.to(dtype) for key, value in whole.items()})
            torch.manual_seed(rank)
            tokens = 0 if name == "skewed" and rank == 1 else 700 + 13 * rank
            hidden, cotangent = torch.randn(2, tokens, 128, device=device).to(dtype).unbind()
            blocking = step(layer, hidden, cotangent)
            for number, (plan, groups) in enumerate(PLANS):
                large = 0.0 if layouts % 2 else inf  # each plan with both layouts
                layouts += 1
                key = f"{name}; {plan} {groups}; {str(dtype).removeprefix('torch.')}"
                overlap = OverlapConfig(
                    dispatch="p2p",
                    chunk=plan,  # type: ignore[arg-type]
                    expert_groups=groups,
                    save=SAVES[number],  # type: ignore[arg-type]
                    wait_at_once=True,
                )
                layer.overlap = ExpertOverlap(overlap, large_product=large)
                waiting, queued = step(layer, hidden, cotangent), step(layer, hidden, cotangent, deferred=True)
                errors[key] = error(waiting, blocking)
                layer.overlap = ExpertOverlap(replace(overlap, wait_at_once=False), large_product=large)
                wrong = torch.zeros((), device=device, dtype=torch.int64)
                for _ in range(repetitions if dtype == torch.bfloat16 else 2):
                    for expected, deferred in ((waiting, False), (queued, True)):
                        found = step(layer, hidden, cotangent, deferred)
                        wrong += sum((a != b).any() for a, b in zip(found, expected, strict=True))
                dist.all_reduce(wrong)
                unequal[key] = int(wrong.item())
                worst = torch.tensor(errors[key], device=device)
                dist.all_reduce(worst, op=dist.ReduceOp.MAX)
                errors[key] = worst.item()
                layer.overlap = None
    if rank == 0:
        with open(sys.argv[1], "w") as file:
            json.dump({"errors": errors, "unequal": unequal}, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
