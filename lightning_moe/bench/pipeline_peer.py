"""The pipeline schedules of torch.distributed.pipelining on the same blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

# With one stage for each rank ScheduleInterleavedZeroBubble is ZB-H1.
PEERS = ("1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "InterleavedZeroBubble-2", "ZBV")


class _MakeBlocks(Protocol):
    def __call__(self, count: int, *, ours: bool) -> nn.ModuleList: ...


def torch_step(
    name: str,
    num_blocks: int,
    blocks: _MakeBlocks,
    input: Tensor,
    target: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[], Any]:
    """A function that runs one step of a schedule of torch.

    Args:
        name: One of :data:`PEERS`.
        num_blocks: Number of blocks of the whole model.
        blocks: Makes some of them.
        input: All microbatches ``[M, S, D]``.
        target: Likewise.
        loss: Loss of a microbatch.
    """
    rank, ranks, microbatches = dist.get_rank(), dist.get_world_size(), input.shape[0]
    kind, chunks = {
        "1F1B": (Schedule1F1B, 1),
        "Interleaved1F1B": (ScheduleInterleaved1F1B, 2),
        "InterleavedZeroBubble": (ScheduleInterleavedZeroBubble, 1),
        "InterleavedZeroBubble-2": (ScheduleInterleavedZeroBubble, 2),
        "ZBV": (ScheduleZBVZeroBubble, 2),
    }[name]
    num_stages = ranks * chunks
    numbers = [rank, num_stages - 1 - rank] if name == "ZBV" else [rank + chunk * ranks for chunk in range(chunks)]
    modules = [nn.Sequential(*blocks(num_blocks // num_stages, ours=False)) for _ in numbers]
    stages = [
        PipelineStage(module, number, num_stages, input.device) for module, number in zip(modules, numbers, strict=True)
    ]
    schedule = kind(stages[0] if name == "1F1B" else stages, microbatches, loss_fn=loss)
    inputs = (input,) if 0 in numbers else ()
    targets = {"target": target} if num_stages - 1 in numbers else {}

    def step() -> None:
        for module in modules:
            module.zero_grad()
        schedule.step(*inputs, **targets)

    return step
