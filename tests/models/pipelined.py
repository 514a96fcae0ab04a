"""A pipeline in one process: parts of models run one after the other, without an engine and without a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn

from lightning_moe import ParallelMesh
from lightning_moe.pipeline.parts import ModelPart
from lightning_moe.pipeline.spec import Carry, Microbatch, PipelineSpec, ScheduleResult


def cut(num_blocks: int, depths: Sequence[int]) -> tuple[ModelPart, ...]:
    """Parts with the given numbers of blocks, together the whole model."""
    parts, start = [], 0
    for stage, depth in enumerate(depths):
        blocks = range(start, start + depth)
        parts.append(ModelPart(blocks, first=stage == 0, last=stage == len(depths) - 1))
        start += depth
    assert start == num_blocks
    return tuple(parts)


def microbatches(batch: dict[str, Tensor], count: int, context: Any) -> list[Microbatch]:
    """Cut a batch into pieces of sizes that differ, of at least one sample."""
    length = len(next(iter(batch.values())))
    count = min(count, length)
    rows = [piece.tolist() for piece in torch.arange(length).tensor_split(count)]
    return [
        Microbatch({key: value[own] for key, value in batch.items()}, k, count, len(own) / length, context)
        for k, own in enumerate(rows)
    ]


class SequentialRunner:
    """Takes the place of the strategy: stages on ``ranks`` modules, stage ``s`` on module ``s % ranks``.

    The module that is handed out is the one of ``rank``, as on that rank of a pipeline; the others stay here.
    """

    def __init__(self, depths: Sequence[int], ranks: int, microbatches: int, rank: int = 0) -> None:
        self.depths, self.ranks, self.count, self.rank = depths, ranks, microbatches, rank
        self.mesh = ParallelMesh.single()
        self.is_pipelined = True
        self.modules: list[nn.Module] = []

    def build_pipeline(self, spec: PipelineSpec) -> nn.Module:
        parts = cut(spec.num_blocks, self.depths)
        state = torch.get_rng_state()
        for rank in range(self.ranks):
            torch.set_rng_state(state)  # ranks of a pipeline are seeded alike
            self.modules.append(spec.build(parts[rank :: self.ranks]))
        return self.modules[self.rank]

    def run_schedule(self, batch: Any, context: Any = None, *, outputs: bool = False) -> ScheduleResult:
        for module in self.modules:
            module.train(self.modules[self.rank].training)
        loss, metrics, found = torch.zeros((), dtype=torch.float64), {}, []
        for microbatch in microbatches(batch, self.count, context):
            carry: Carry = ()
            for stage in range(len(self.depths)):
                part, rank = divmod(stage, self.ranks)
                output = self.modules[rank].run_part(part, carry, microbatch)  # type: ignore[operator]
                carry = output.carry
                if output.loss is not None:
                    loss = loss + microbatch.weight * output.loss
                for name, value in output.metrics.items():
                    metrics[name] = metrics[name] + value if name in metrics else value
            found.append(output.output)
        return ScheduleResult(loss, metrics, found if outputs else [])


class StepTrainer:
    """As much of a Trainer as the steps of our modules look at."""

    world_size = 1
    datamodule = None
    precision_plugin = Precision()

    class _Plain:
        """A strategy without a mesh."""

    def __init__(self, strategy: Any = None) -> None:
        self.strategy = strategy or self._Plain()


def placements(num_blocks: int) -> dict[str, list[list[ModelPart]]]:
    """Ways of spreading four blocks or more over ranks: the parts of each rank."""
    ends, four = cut(num_blocks, (0, 2, num_blocks - 2, 0)), cut(num_blocks, (1, 1, 1, num_blocks - 3))
    return {
        "one": [[ModelPart.whole(num_blocks)]],
        "two": [[part] for part in cut(num_blocks, (1, num_blocks - 1))],
        "four": [[part] for part in four],
        "ends alone": [[part] for part in ends],
        "loop": [list(four[rank::2]) for rank in (0, 1)],
        "v": [[four[0], four[3]], [four[1], four[2]]],
    }


def run_by_hand(ranks: Sequence[nn.Module], microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward of one microbatch through all parts, cut apart as processes are; loss and metrics."""
    stages = [(module, i) for module in ranks for i in range(len(module.parts))]  # type: ignore[arg-type]
    stages.sort(key=lambda stage: _position(stage[0].parts[stage[1]]))  # type: ignore[index]
    loss, metrics, passes, carry = torch.zeros(()), {}, [], ()
    for module, i in stages:
        entering = tuple(tensor.detach().requires_grad_() for tensor in carry)
        output = module.run_part(i, entering, microbatch)  # type: ignore[operator]
        carry = output.carry
        passes.append((entering, output))
        loss = loss if output.loss is None else loss + output.loss.detach()
        for name, value in output.metrics.items():
            metrics[name] = metrics[name] + value if name in metrics else value
    grads: list[Tensor | None] = []
    for entering, output in reversed(passes):
        roots = [*output.carry, *([] if output.loss is None else [output.loss])]
        torch.autograd.backward(roots, [*grads, *([] if output.loss is None else [None])])
        grads = [tensor.grad for tensor in entering]
    return loss, metrics


def gradients(ranks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Gradients of all ranks by name, those of a parameter on several ranks added up."""
    found: dict[str, Tensor] = {}
    for module in ranks:
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            found[name] = found[name] + parameter.grad if name in found else parameter.grad
    return found


def _position(part: ModelPart) -> tuple[bool, bool, int]:
    return (not part.first, part.last, part.blocks.start)
