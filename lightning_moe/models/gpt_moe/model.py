"""The GPT-MoE network: a causal decoder whose experts, heads, vocabulary and sequences are spread over ranks.

B batch, S sequence, Q tokens of a sequence on this context rank, T = B * Q, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_moe.config.gpt import ActivationCheckpointing, GPTMoEConfig
from lightning_moe.config.gpt_rules import sequence_parts
from lightning_moe.errors import ConfigError
from lightning_moe.layers import (
    KVCache,
    RMSNorm,
    TokenLayout,
    VocabParallelEmbedding,
    attention_mask,
    linear_cross_entropy,
    rope_frequencies,
    rope_tables_at,
    whole_logits,
)
from lightning_moe.layers.cross_entropy import IGNORED_LABEL
from lightning_moe.models.gpt_moe.block import BlockInputs, GPTMoEBlock, mark_norm
from lightning_moe.models.gpt_moe.head import OutputProjection
from lightning_moe.moe.layer import MoELayer, RoutingInfo
from lightning_moe.moe.participation import number_layers
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.main_params import gather_in_forward
from lightning_moe.parallel.mesh import ParallelMesh


class GPTMoEOutput(NamedTuple):
    """What one forward pass with labels gives."""

    loss_sum: Tensor
    """Sum of the losses of this context rank's labels in nats: a scalar, float32 or float64."""
    num_labels: Tensor
    """How many labels that are, int64 scalar."""
    routing: tuple[RoutingInfo, ...]
    """What each MoE layer's router did; empty for a dense model."""


class GPTMoEModel(nn.Module):
    """Embedding, blocks, final norm and output projection; this rank's part of each.

    Training gives every rank of the axes context and tensor the same batch. Each context rank takes its contiguous
    chunk of every sequence, and under sequence parallelism (``mesh.config.sequence_parallel``) each tensor rank its
    slice of the chunk's tokens.

    Args:
        config: Sizes of the network.
        mesh: This rank's place; None for a model that is whole in this process.
        activation_checkpointing: What is computed again in the backward pass instead of being kept.
        loss_chunk_tokens: Number of tokens whose logits exist at a time; None for all.
        compile_blocks: Whether ``torch.compile`` compiles the attention and the dense feed-forward layers.

    Attributes:
        embedding: The :class:`VocabParallelEmbedding`.
        blocks: The :class:`GPTMoEBlock` of every layer.
        final_norm: The norm before the output projection.
        lm_head: The :class:`OutputProjection`; None where the embedding serves as one.

    Raises:
        ConfigError: The ranks do not divide what they are to share, or an argument is unknown.
    """

    def __init__(
        self,
        config: GPTMoEConfig,
        mesh: ParallelMesh | None = None,
        *,
        activation_checkpointing: ActivationCheckpointing = "none",
        loss_chunk_tokens: int | None = 1024,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__()
        kinds = get_args(ActivationCheckpointing)
        if activation_checkpointing not in kinds:
            raise ConfigError("activation_checkpointing", activation_checkpointing, "one of " + ", ".join(kinds))
        self.config = config
        self.mesh = mesh if mesh is not None else ParallelMesh.single()
        self.loss_chunk_tokens = loss_chunk_tokens
        std = config.init_std
        self.embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, self.mesh, init_std=std)
        self.blocks = nn.ModuleList(
            GPTMoEBlock(config, layer, self.mesh, activation_checkpointing) for layer in range(config.num_layers)
        )
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        mark_norm(self.final_norm, self.mesh)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = OutputProjection(config.vocab_size, config.hidden_size, self.mesh, init_std=std)
            gather_in_forward(self.final_norm, self.lm_head)
        gather_in_forward(self.embedding)  # the first to be called, also where the output projection is the same
        number_layers([module for module in self.modules() if isinstance(module, MoELayer)])
        # No buffer: it would be cast with the module (see the note in lightning_moe.layers.rope).
        self._frequencies, self._attention_factor = rope_frequencies(
            config.head_width, config.rope_theta, config.rope_scaling
        )
        if compile_blocks:
            for block in self._blocks():
                block.compile_dense_parts()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embedding.weight.device

    @property
    def output_weight(self) -> nn.Parameter:
        """This rank's rows ``[V, D]`` of the output projection."""
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight

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
            ConfigError: The ranks do not divide the sequence, or it is longer than the model is made for.
        """
        layout = self._training_layout(tokens)
        hidden, routing = self._hidden_states(tokens, positions, documents, layout)
        labels = self.own_chunk(labels)
        loss_sum = linear_cross_entropy(
            hidden,
            self.output_weight,
            labels,
            mesh=self.mesh,
            vocab_size=self.config.vocab_size,
            layout=layout,
            chunk_tokens=self.loss_chunk_tokens,
        )
        return GPTMoEOutput(loss_sum, (labels != IGNORED_LABEL).sum(), routing)

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
        """
        batch, length = tokens.shape
        layout = TokenLayout(batch, length)
        hidden, _ = self._hidden_states(tokens, positions, documents, layout, caches)
        logits = whole_logits(
            hidden, self.output_weight, mesh=self.mesh, vocab_size=self.config.vocab_size, layout=layout
        )
        return logits.view(batch, length, -1)

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
        length = values.shape[1] // self.mesh.size(Axis.CONTEXT)
        return values.narrow(1, self.mesh.rank(Axis.CONTEXT) * length, length)

    def _blocks(self) -> list[GPTMoEBlock]:
        return [block for block in self.blocks if isinstance(block, GPTMoEBlock)]

    def _training_layout(self, tokens: Tensor) -> TokenLayout:
        batch, length = tokens.shape
        parts, longest = sequence_parts(self.mesh.config), self.config.max_sequence_length
        if length > longest:
            raise ConfigError("data.sequence_length", length, f"at most config.max_sequence_length = {longest}")
        if length % parts:
            raise ConfigError(
                "data.sequence_length",
                length,
                f"a multiple of {parts}: the context ranks times, with sequence_parallel, the tensor ranks",
                "each of them holds an equal part of every sequence",
            )
        context = self.mesh.size(Axis.CONTEXT)
        return TokenLayout(
            batch,
            length // context,
            sequence_parallel=self.mesh.config.sequence_parallel and self.mesh.size(Axis.TENSOR) > 1,
            context_parallel=context > 1,
        )

    def _hidden_states(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        layout: TokenLayout,
        caches: Sequence[KVCache] | None = None,
    ) -> tuple[Tensor, tuple[RoutingInfo, ...]]:
        """Normed hidden states before the output projection, as ``layout`` says, and what the routers did."""
        past = caches[0].length if caches else 0
        length = tokens.shape[1]
        if positions is None:
            positions = torch.arange(past, past + length, device=tokens.device)[None]
        mask = attention_mask(documents, length, self.config.sliding_window, tokens.device, past=past)
        if layout.context_parallel:
            tokens, positions = self.own_chunk(tokens), self.own_chunk(positions)
        self._frequencies = self._frequencies.to(tokens.device)
        rope = rope_tables_at(positions, self._frequencies, self._attention_factor, self.dtype)
        inputs = BlockInputs(layout, rope, mask, self._sequence_of_tokens(layout, tokens.device))
        hidden = self.embedding(tokens, layout)
        routing: list[RoutingInfo] = []
        for layer, block in enumerate(self._blocks()):
            hidden, routed = block(hidden, inputs, caches[layer] if caches else None)
            if routed is not None:
                routing.append(routed)
        return self.final_norm(hidden), tuple(routing)

    def _sequence_of_tokens(self, layout: TokenLayout, device: torch.device) -> Tensor | None:
        """Number of the sequence of each of this rank's hidden states; None where no loss is taken per sequence."""
        moe = self.config.moe
        if moe is None or moe.load_balancing != "sequence":
            return None
        sequence = torch.arange(layout.num_tokens, device=device) // layout.length
        if not layout.sequence_parallel:
            return sequence
        share = layout.num_tokens // self.mesh.size(Axis.TENSOR)
        return sequence.narrow(0, self.mesh.rank(Axis.TENSOR) * share, share)
