"""A pipelined model made of an embedding, equal-minded blocks and a head: for networks that are such a chain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_moe.parallel.main_params import gather_in_forward
from lightning_moe.pipeline.parts import ModelPart
from lightning_moe.pipeline.spec import Carry, Microbatch, PartOutput, PipelineSpec

Loss = Callable[[Any, Any], Tensor | tuple[Tensor, Mapping[str, Tensor]]]


def chain_spec(
    embed: Callable[[], nn.Module],
    blocks: Sequence[Callable[[], nn.Module]],
    head: Callable[[], nn.Module],
    loss: Loss,
    *,
    block_costs: tuple[float, ...] | None = None,
    embed_cost: float = 0.0,
    head_cost: float = 0.0,
    split: Callable[[Any, int], list[Any]] | None = None,
) -> PipelineSpec:
    """Describe a model as a chain of modules, each made by a function, of which a stage keeps its own.

    Parameters are named ``embed.*``, ``blocks.<number>.*`` and ``head.*``, however the chain is cut.

    Args:
        embed: Makes the module that turns a microbatch into what the first block takes: a tensor, or a tuple.
        blocks: Make the blocks. A block is called with the tensor or tensors that the one before it returned. What all
            blocks need (a mask, an auxiliary loss so far) is handed on beside the hidden states.
        head: Makes the module that turns what the last block returns into the prediction.
        loss: ``loss(prediction, batch)`` with the microbatch's part of the batch, a mean over samples; optionally with
            metrics (see
            :class:`~lightning_moe.pipeline.spec.PartOutput`).
        block_costs: Relative cost of each block; None if all are alike.
        embed_cost: Cost of the embedding relative to an average block.
        head_cost: Cost of head and loss relative to an average block.
        split: As in :class:`~lightning_moe.pipeline.spec.PipelineSpec`.
    """
    return PipelineSpec(
        num_blocks=len(blocks),
        build=lambda parts: ChainModel(parts, embed, blocks, head, loss),
        block_costs=block_costs,
        embed_cost=embed_cost,
        head_cost=head_cost,
        split=split,
    )


class ChainModel(nn.Module):
    """The parts of a chain that one rank holds; see :func:`chain_spec`.

    Attributes:
        embed: What comes before the blocks, where a part has it.
        blocks: The blocks, by number.
        head: What comes after them, where a part has it.
    """

    def __init__(
        self,
        parts: Sequence[ModelPart],
        embed: Callable[[], nn.Module],
        blocks: Sequence[Callable[[], nn.Module]],
        head: Callable[[], nn.Module],
        loss: Loss,
    ) -> None:
        super().__init__()
        self._parts = tuple(parts)
        self._loss = loss
        own = {block for part in parts for block in part.blocks}
        # What other ranks hold is made as well, and dropped: a stage's initial weights are those of the whole model.
        self.embed = _kept(embed(), any(part.first for part in parts))
        self.blocks = nn.ModuleDict()
        for number, make in enumerate(blocks):
            if (block := _kept(make(), number in own)) is not None:
                gather_in_forward(block)
                self.blocks[str(number)] = block
        self.head = _kept(head(), any(part.last for part in parts))

    def run_part(self, part: int, carry: Carry, microbatch: Microbatch) -> PartOutput:
        """Run one part; see :class:`~lightning_moe.pipeline.spec.PipelinedModel`."""
        held = self._parts[part]
        if held.first:
            assert self.embed is not None
            carry = _as_tuple(self.embed(microbatch.data))
        for number in held.blocks:
            carry = _as_tuple(self.blocks[str(number)](*carry))
        if not held.last:
            return PartOutput(carry)
        assert self.head is not None
        prediction = self.head(*carry)
        if microbatch.predicting:
            return PartOutput(output=prediction)
        loss = self._loss(prediction, microbatch.data)
        value, metrics = loss if isinstance(loss, tuple) else (loss, {})
        return PartOutput(loss=value, metrics=metrics, output=prediction)


def _kept(module: nn.Module, keep: bool) -> nn.Module | None:
    return module if keep else None


def _as_tuple(value: Tensor | Carry) -> Carry:
    return (value,) if isinstance(value, Tensor) else tuple(value)
