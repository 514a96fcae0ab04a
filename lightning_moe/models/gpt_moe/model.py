"""The GPT-MoE network: a causal decoder whose blocks, experts, heads, vocabulary and sequences are spread over ranks.

B batch, S sequence, Q tokens of a sequence on this context rank, T = B * Q, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_moe.config.gpt import ActivationCheckpointing, GPTMoEConfig
from lightning_moe.errors import ConfigError
from lightning_moe.layers import (
    KVCache,
    RMSNorm,
    TokenLayout,
    VocabParallelEmbedding,
    linear_cross_entropy,
    whole_logits,
)
from lightning_moe.layers.cross_entropy import IGNORED_LABEL
from lightning_moe.models.gpt_moe.block import GPTMoEBlock, mark_norm
from lightning_moe.models.gpt_moe.head import OutputProjection
from lightning_moe.models.gpt_moe.inputs import InputLayer
from lightning_moe.models.pipelined import NetworkInParts, held
from lightning_moe.models.routing import as_metric, auxiliary_loss, routing_metrics
from lightning_moe.models.tasks import Predicting, Training
from lightning_moe.moe.layer import MoELayer, RoutingInfo
from lightning_moe.moe.participation import number_layers
from lightning_moe.parallel.main_params import gather_in_forward
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import set_tied
from lightning_moe.pipeline.parts import ModelPart
from lightning_moe.pipeline.spec import Carry, Microbatch, PartOutput


class GPTMoEOutput(NamedTuple):
    """What one forward pass with labels gives."""

    loss_sum: Tensor
    """Sum of the losses of this context rank's labels in nats: a scalar, float32 or float64."""
    num_labels: Tensor
    """How many labels that are, int64 scalar."""
    routing: tuple[RoutingInfo, ...]
    """What each MoE layer's router did; empty for a dense model."""


class GPTMoEModel(NetworkInParts):
    """Embedding, blocks, final norm and output projection; this rank's part of each.

    Training gives every rank of the axes pipeline, context and tensor the same batch. Each context rank takes its
    contiguous chunk of every sequence, and under sequence parallelism (``mesh.config.sequence_parallel``) each tensor
    rank its slice of the chunk's tokens. Stages of a pipeline hand on hidden states.

    Args:
        config: Sizes of the network.
        mesh: This rank's place; None for a model that is whole in this process.
        parts: What of the model to build, for a pipeline; None builds all of it. The names and the initial weights are
            those of a whole model that is built with the same seed.
        activation_checkpointing: What is computed again in the backward pass instead of being kept.
        loss_chunk_tokens: Number of tokens whose logits exist at a time; None for all.
        compile_blocks: Whether ``torch.compile`` compiles the attention and the dense feed-forward layers.

    Attributes:
        parts: What has been built; None for a model that was not cut for a pipeline.
        embedding: The :class:`VocabParallelEmbedding`; None where neither it nor its use as output projection is held.
        blocks: The :class:`GPTMoEBlock` of every layer held, named by its number in the whole model.
        final_norm: The norm before the output projection; None where that is not held.
        lm_head: The :class:`OutputProjection`; None where it is not held or the embedding serves as one.

    Raises:
        ConfigError: The ranks do not divide what they are to share, or an argument is unknown.
    """

    def __init__(
        self,
        config: GPTMoEConfig,
        mesh: ParallelMesh | None = None,
        *,
        parts: Sequence[ModelPart] | None = None,
        activation_checkpointing: ActivationCheckpointing = "none",
        loss_chunk_tokens: int | None = 1024,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__(config.num_layers, parts)
        kinds = get_args(ActivationCheckpointing)
        if activation_checkpointing not in kinds:
            raise ConfigError("activation_checkpointing", activation_checkpointing, "one of " + ", ".join(kinds))
        self.config = config
        self.mesh = mesh if mesh is not None else ParallelMesh.single()
        self.loss_chunk_tokens = loss_chunk_tokens
        own = self.own_parts
        first, last = any(part.first for part in own), any(part.last for part in own)
        layers = {layer for part in own for layer in part.blocks}
        matrix = (config.vocab_size, config.hidden_size, self.mesh)
        embedding = partial(VocabParallelEmbedding, *matrix, init_std=config.init_std)
        self.embedding = held(embedding, first or (last and config.tie_embeddings))
        self.blocks = nn.ModuleList()
        for layer in range(config.num_layers):
            block = held(partial(GPTMoEBlock, config, layer, self.mesh, activation_checkpointing), layer in layers)
            if block is not None:
                self.blocks.add_module(str(layer), block)
        self.final_norm = held(partial(RMSNorm, config.hidden_size, config.norm_eps), last)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = held(partial(OutputProjection, *matrix, init_std=config.init_std), last)
        self._mark_ends(first=first)
        number_layers([module for module in self.modules() if isinstance(module, MoELayer)])
        self._inputs = InputLayer(config, self.mesh)
        if compile_blocks:
            for each in self._blocks():
                each.compile_dense_parts()

    def _mark_ends(self, *, first: bool) -> None:
        """Say what must be known of the weights before and after the blocks."""
        if self.embedding is not None:
            if first != (self.final_norm is not None) and self.config.tie_embeddings:
                set_tied(self.embedding, "weight")
            if first:
                gather_in_forward(self.embedding)  # called before its use as output projection
        if self.final_norm is None:
            return
        mark_norm(self.final_norm, self.mesh)
        if self.lm_head is not None:
            gather_in_forward(self.final_norm, self.lm_head)
        elif not first:
            assert self.embedding is not None, "it is the output projection"
            gather_in_forward(self.final_norm, self.embedding)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def output_weight(self) -> nn.Parameter:
        """This rank's rows ``[V, D]`` of the output projection, where the end of the model is held."""
        holder = self.embedding if self.lm_head is None else self.lm_head
        assert holder is not None, "the end of the model is held by another stage"
        return holder.weight

    def forward(
        self, tokens: Tensor, labels: Tensor, positions: Tensor | None = None, documents: Tensor | None = None
    ) -> GPTMoEOutput:
        """Compute the loss of this context rank's labels; a collective call where ranks share the model.

        Args:
            tokens: int64 ``[B, S]``, the same on all ranks of the axes context and tensor, like all arguments.
            labels: int64 ``[B, S]``: the token that follows each token; -100 where nothing is to be predicted.
            positions: int64 ``[B, S]``: position of each token in its document; 0 to S - 1 when None.
            documents: int64 ``[B, S]``: number of each token's document within the sequence, which is all that the
                token attends to; None for one document.

        Raises:
            ConfigError: The ranks do not divide the sequence, or it is longer than the model is made for; or only a
                part of the model is held.
        """
        layout = self._inputs.training_layout(tokens)
        hidden, routing = self._through(self.whole(), None, tokens, positions, documents, layout)
        loss_sum = self._loss_sum(hidden, labels, layout)
        return GPTMoEOutput(loss_sum, self.num_labels(labels), tuple(routing.values()))

    def logits(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """Compute the logits of every token; for generation and comparison, not for training.

        All ranks of the axes context and tensor compute on copies of all tokens, so that sequences may have any length.

        Args:
            tokens: int64 ``[B, S]``; with caches, the tokens that follow those in the caches.
            positions: int64 ``[B, S]``; when None, 0 to S - 1, or those that follow the caches'.
            documents: As in :meth:`forward`; without caches only.
            caches: Keys and values so far (see :meth:`new_caches`), which these tokens' are added to.

        Returns:
            ``[B, S, V]``, the same on all ranks of the axes context and tensor.

        Raises:
            ConfigError: Only a part of the model is held.
        """
        layout = TokenLayout(*tokens.shape)
        hidden, _ = self._through(self.whole(), None, tokens, positions, documents, layout, caches)
        return self._logits(hidden, layout)

    def new_caches(self, batch: int, max_length: int, dtype: torch.dtype) -> list[KVCache]:
        """Empty caches, one for each block, for ``batch`` sequences of at most ``max_length`` tokens."""
        return [
            KVCache(
                batch,
                max_length,
                block.attention.num_kv_heads,
                block.attention.head_size,
                dtype=dtype,
                device=self.device,
            )
            for block in self._blocks()
        ]

    def own_chunk(self, values: Tensor) -> Tensor:
        """This context rank's part ``[B, Q]`` of what is given for whole sequences, ``[B, S]``."""
        return self._inputs.own_chunk(values)

    def num_labels(self, labels: Tensor) -> Tensor:
        """How many of the labels ``[B, S]`` are to be predicted by this context rank, int64 scalar."""
        return (self.own_chunk(labels) != IGNORED_LABEL).sum()

    # ---- parts

    @override
    def _run(self, part: ModelPart, carry: Carry, microbatch: Microbatch) -> PartOutput:
        """Parts hand on the hidden states.

        The last one predicts the token that follows the last one of each sequence: logits ``[B, V]``, when predicting.
        """
        task, batch = microbatch.context, microbatch.data
        tokens, predicting = batch["tokens"], isinstance(task, Predicting)
        layout = TokenLayout(*tokens.shape) if predicting else self._inputs.training_layout(tokens)
        packing = batch.get("positions"), batch.get("documents")
        hidden, routing = self._through(part, carry[0] if carry else None, tokens, *packing, layout)
        order = {layer: position for position, layer in enumerate(self.config.moe_layers)}
        by_position = {order[layer]: routed for layer, routed in routing.items()}
        metrics = routing_metrics(by_position, len(order), microbatch.weight)
        loss = output = None
        if part.last:
            loss_sum = hidden.new_zeros(()) if predicting else self._loss_sum(hidden, batch["labels"], layout)
            metrics["loss_sum"] = as_metric(loss_sum)
            if isinstance(task, Training):
                loss = task.loss(loss_sum, microbatch.weight)
            elif predicting:
                newest = hidden.view(layout.batch, layout.length, -1)[:, -1]
                output = self._logits(newest, TokenLayout(layout.batch, 1))[:, -1]
        if isinstance(task, Training) and routing:
            auxiliary = auxiliary_loss(routing.values())
            loss = auxiliary if loss is None else loss + auxiliary
        return PartOutput(() if part.last else (hidden,), loss, metrics, output)

    def _through(
        self,
        part: ModelPart,
        hidden: Tensor | None,
        tokens: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        layout: TokenLayout,
        caches: Sequence[KVCache] | None = None,
    ) -> tuple[Tensor, dict[int, RoutingInfo]]:
        """Hidden states after a part, normed by the last one, as ``layout`` says; what the routers did, by layer."""
        past = caches[0].length if caches else 0
        inputs = self._inputs.block_inputs(tokens, positions, documents, layout, self.dtype, past)
        if part.first:
            assert self.embedding is not None
            hidden = self.embedding(self._inputs.own_tokens(tokens, layout), layout)
        routing: dict[int, RoutingInfo] = {}
        for layer in part.blocks:
            hidden, routed = self.blocks.get_submodule(str(layer))(hidden, inputs, caches[layer] if caches else None)
            if routed is not None:
                routing[layer] = routed
        assert hidden is not None, "the part before it gives them"
        if part.last:
            assert self.final_norm is not None
            normed: Tensor = self.final_norm(hidden)
            return normed, routing
        return hidden, routing

    def _loss_sum(self, hidden: Tensor, labels: Tensor, layout: TokenLayout) -> Tensor:
        """Sum of the losses of this context rank's part of ``labels`` ``[B, S]``."""
        loss_sum: Tensor = linear_cross_entropy(
            hidden,
            self.output_weight,
            self.own_chunk(labels),
            mesh=self.mesh,
            vocab_size=self.config.vocab_size,
            layout=layout,
            chunk_tokens=self.loss_chunk_tokens,
        )
        return loss_sum

    def _logits(self, hidden: Tensor, layout: TokenLayout) -> Tensor:
        """Logits ``[B, S, V]`` of hidden states, of which every rank has a copy."""
        logits = whole_logits(
            hidden, self.output_weight, mesh=self.mesh, vocab_size=self.config.vocab_size, layout=layout
        )
        return logits.view(layout.batch, layout.length, -1)

    def _blocks(self) -> list[GPTMoEBlock]:
        return [block for block in self.blocks if isinstance(block, GPTMoEBlock)]
