"""How a model describes itself to the pipeline: how many blocks it has, and how to build and run a part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from lightning_moe.pipeline.parts import ModelPart

Carry = tuple[Tensor, ...]
"""What a part hands to the next one."""


@dataclass(frozen=True)
class Microbatch:
    """A part of the samples of one batch.

    Attributes:
        data: The batch's own structure, with the samples of this microbatch.
        index: Its number, from 0.
        count: Number of microbatches of the batch.
        weight: Its share of the batch's samples; all shares add up to 1.
        context: What the step hands to all microbatches (see ``MoEStrategy.run_schedule``).
        predicting: Whether only predictions are wanted: the batch may have no targets.
    """

    data: Any
    index: int = 0
    count: int = 1
    weight: float = 1.0
    context: Any = None
    predicting: bool = False


class PartOutput(NamedTuple):
    """What one part gives for one microbatch."""

    carry: Carry = ()
    """For the next part, at most 16 tensors; from the last one nobody takes it. Must not be changed in place any more,
    as it may still be on its way."""
    loss: Tensor | None = None
    """A scalar that the part adds to the microbatch's loss: the loss itself from the last part, auxiliary losses from
    any. The step's loss is the sum over parts of the mean over microbatches, weighted by their samples."""
    metrics: Mapping[str, Tensor] = {}
    """Tensors to be summed over parts and microbatches, and given to all ranks of the pipeline. Parts that leave a name
    out add zero; the names and shapes must not change from step to step."""
    output: Any = None
    """What the last part predicts, tensors in any structure with samples along dim 0; wanted in evaluation only."""


class PipelinedModel(Protocol):
    """A module that holds one or more parts of a model."""

    def run_part(self, part: int, carry: Carry, microbatch: Microbatch) -> PartOutput:
        """Run one of the parts that the module was built with.

        Args:
            part: Its position among them.
            carry: What the part before it has given; empty for the first part.
            microbatch: The microbatch, also given to parts in the middle.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PipelineSpec:
    """A model that can be cut between its blocks.

    Attributes:
        num_blocks: Number of blocks.
        build: Builds a module with the given parts, a :class:`PipelinedModel`. Names of parameters, and initial
            weights, must be those that the same blocks have in the whole model.
        block_costs: Relative cost of each block; None if all are alike.
        embed_cost: Cost of what comes before the blocks, relative to an average block.
        head_cost: Cost of what comes after them, relative to an average block.
        split: Cuts a batch into the given number of microbatches of (nearly) equal size, in the order of samples; None
            cuts what has the length of the batch, and gives the rest to all (see
            :func:`~lightning_moe.pipeline.splitting.split_batch`).
    """

    num_blocks: int
    build: Callable[[Sequence[ModelPart]], nn.Module]
    block_costs: tuple[float, ...] | None = None
    embed_cost: float = 0.0
    head_cost: float = 0.0
    split: Callable[[Any, int], list[Any]] | None = None


@dataclass(frozen=True)
class ScheduleResult:
    """What a step through the pipeline gives, the same on all ranks of the pipeline.

    Attributes:
        loss: Scalar; in training its backward delivers the gradients.
        metrics: Sums over parts and microbatches.
        outputs: What the last part predicted for each microbatch, where it was asked for.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)


class PipelineRunner(Protocol):
    """What a model needs of the strategy; :class:`lightning_moe.MoEStrategy` is one."""

    @property
    def is_pipelined(self) -> bool:
        """Whether models are to be built and run by parts."""
        ...

    def build_pipeline(self, spec: PipelineSpec) -> nn.Module:
        """Build the parts of the model that this rank holds; call it in ``configure_model``."""
        ...

    def run_schedule(self, batch: Any, context: Any = None, *, outputs: bool = False) -> ScheduleResult:
        """Run all microbatches of a batch through the pipeline; forward only except in ``training_step``.

        Args:
            batch: This rank's batch, the same on all ranks of the pipeline.
            context: Handed to all microbatches.
            outputs: Whether predictions are wanted on all ranks; forward only.
        """
        ...
