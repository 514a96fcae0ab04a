"""How much memory each rank of a pipeline needs, by arithmetic (torch-free).

[Note: what the estimate counts]
Weights, main gradients, AdamW's moments and float32 main weights, as the table in docs/concepts/optimizer-sharding.md
has them; activations that microbatches hold from their forward to their backward pass, and operands of weight gradients
that wait for W, at the peak of the schedule; of what comes and goes within one action, the largest: the logits of one
chunk of tokens, or a block that is computed again. It does not count what libraries hold for themselves (contexts,
communicators, workspaces), buffers of communication, gaps that the allocator leaves, and temporary tensors of single
layers. Experts are taken to be balanced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from lightning_moe.config.block_size import BlockShape, ParameterSize, deferred_operands, kept_activations
from lightning_moe.config.gpt import ActivationCheckpointing
from lightning_moe.config.model_size import ModelSize
from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.pipeline.actions import Actions, Kind
from lightning_moe.pipeline.parts import ModelPart
from lightning_moe.pipeline.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What the memory of a rank depends on beside model, axes and schedule.

    Attributes:
        precision: Lightning's full name of the precision.
        optimizer_sharding: Whether ranks share optimizer state.
        checkpointing: What is computed again in the backward pass.
        fused_norm: Whether norms keep their input and output alone, as on CUDA.
        tokens: Most tokens of one microbatch on one rank of the axis context.
        loss_chunk_tokens: Number of tokens whose logits exist at a time; None for all.
        vocab_size: Size of the vocabulary; 0 for a head without logits.
    """

    precision: str
    optimizer_sharding: bool
    checkpointing: ActivationCheckpointing
    fused_norm: bool
    tokens: int
    loss_chunk_tokens: int | None
    vocab_size: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight, and of one element of the residual stream."""
        return {"64-true": 8, "bf16-true": 2, "16-true": 2}.get(self.precision, 4)

    @property
    def product_bytes(self) -> int:
        """Bytes of one element in matrix products."""
        return {"64-true": 8, "32-true": 4}.get(self.precision, 2)

    @property
    def main_bytes(self) -> int:
        """Bytes of one element of gradients and optimizer state."""
        return max(4, self.weight_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes that one rank of a pipeline needs; the same at all positions of the other axes.

    Attributes:
        weights: Weights.
        gradients: Main gradients.
        optimizer: Moments and main weights of AdamW.
        activations: What is kept between actions, at the peak of the schedule.
        temporary: The largest of what comes and goes within one action.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    temporary: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporary


def memory_of_ranks(
    size: ModelSize, parallel: ParallelConfig, schedule: Schedule, parts: Sequence[ModelPart], facts: RunFacts
) -> tuple[RankMemory, ...]:
    """Estimate the memory of each rank of a pipeline (see the note at the head of this file).

    Args:
        size: The model.
        parallel: Sizes of all axes, resolved.
        schedule: The schedule.
        parts: What each stage holds.
        facts: Precision and the like.
    """
    placement = schedule.placement
    ranks = []
    for rank, actions in enumerate(schedule.ranks):
        own = [parts[placement.stage(rank, chunk)] for chunk in range(placement.chunks)]
        weights, state = _parameters(size, parallel, own, facts)
        held = [_held(size, parallel, part, facts) for part in own]
        deferred = [_deferred(size, parallel, part, facts) for part in own]
        ranks.append(
            RankMemory(
                weights=weights * facts.weight_bytes,
                gradients=weights * facts.main_bytes,
                optimizer=state,
                activations=peak_bytes(actions, held, deferred),
                temporary=max(_temporary(size, parallel, part, facts) for part in own),
            )
        )
    return tuple(ranks)


def peak_bytes(actions: Actions, held: Sequence[float], deferred: Sequence[float]) -> float:
    """Most bytes that a rank keeps between its actions.

    Args:
        actions: What the rank does.
        held: For each chunk, bytes of one microbatch from F to B.
        deferred: For each chunk, bytes of one microbatch from B to W.
    """
    now = peak = 0.0
    for action in actions:
        match action.kind:
            case Kind.F:
                now += held[action.chunk]
            case Kind.B:
                now += deferred[action.chunk] - held[action.chunk]
            case Kind.W:
                now -= deferred[action.chunk]
            case Kind.BW:
                now -= held[action.chunk]
        peak = max(peak, now)
    return peak


def _parameters(
    size: ModelSize, parallel: ParallelConfig, parts: Sequence[ModelPart], facts: RunFacts
) -> tuple[float, float]:
    """Number of parameters that a rank holds, and bytes of its share of their optimizer state."""
    pieces = [size.blocks[block].parameters for part in parts for block in part.blocks]
    first, last = any(part.first for part in parts), any(part.last for part in parts)
    if first:
        pieces.append(size.embedding)
    if last:
        shared = size.tied and first
        pieces.append(ParameterSize(0, size.head.whole) if shared else size.head)
    dense = sum(piece.split for piece in pieces) / parallel.tensor + sum(piece.whole for piece in pieces)
    experts = sum(piece.experts for piece in pieces) / (parallel.expert * parallel.expert_tensor)
    assert parallel.data is not None, "resolve(world_size) first"
    sharing = (parallel.data * parallel.context, parallel.expert_data) if facts.optimizer_sharding else (1, 1)
    moments = 2 * facts.main_bytes + (facts.main_bytes if facts.weight_bytes == 2 else 0)
    return dense + experts, moments * (dense / sharing[0] + experts / sharing[1])


def _held(size: ModelSize, parallel: ParallelConfig, part: ModelPart, facts: RunFacts) -> float:
    """Bytes that a microbatch keeps in a stage until its B."""
    blocks = sum(_kept(size.blocks[block], parallel, facts, facts.checkpointing) for block in part.blocks)
    head = 0.0
    if part.last and facts.vocab_size:
        # The loss computes the gradients of hidden states and projection in its forward pass, up to a factor.
        width = size.blocks[0].hidden_size
        projection = width * facts.vocab_size / parallel.tensor * facts.main_bytes
        head = projection + facts.tokens * width * facts.product_bytes
    return facts.tokens * blocks + head


def _deferred(size: ModelSize, parallel: ParallelConfig, part: ModelPart, facts: RunFacts) -> float:
    """Bytes that a microbatch keeps in a stage from B to W."""
    operands = (deferred_operands(size.blocks[block], parallel) for block in part.blocks)
    return facts.tokens * sum(one.bytes(facts.weight_bytes, facts.product_bytes) for one in operands)


def _temporary(size: ModelSize, parallel: ParallelConfig, part: ModelPart, facts: RunFacts) -> float:
    """Bytes of the logits of one chunk of tokens, or of a block that is computed again."""
    logits = 0.0
    if part.last:
        chunk = min(facts.tokens, facts.loss_chunk_tokens or facts.tokens)
        cast = facts.product_bytes if facts.product_bytes < facts.main_bytes else 0
        logits = chunk * ceil(facts.vocab_size / parallel.tensor) * (facts.main_bytes + cast)
    if facts.checkpointing == "none":
        return logits
    again = (_kept(size.blocks[block], parallel, facts, "none") for block in part.blocks)
    return max(logits, facts.tokens * max(again, default=0.0))


def _kept(
    shape: BlockShape, parallel: ParallelConfig, facts: RunFacts, checkpointing: ActivationCheckpointing
) -> float:
    """Bytes that a block keeps of one token."""
    elements = kept_activations(shape, parallel, checkpointing, fused_norm=facts.fused_norm)
    return elements.bytes(facts.weight_bytes, facts.product_bytes)
