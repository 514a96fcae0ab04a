"""One block of GPT-MoE: causal self attention, then a mixture of experts or a dense feed-forward layer.

T tokens of this rank (its slice of them under sequence parallelism), D model width, B batch, Q tokens of a sequence on
this context rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_moe.config.gpt import GPTMoEConfig
from lightning_moe.layers import CausalSelfAttention, KVCache, RMSNorm, SwiGLU, TokenLayout
from lightning_moe.moe.layer import MoELayer, RoutingInfo
from lightning_moe.moe.routing_tape import RoutingTape, checkpoint_with_routing
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.main_params import gather_in_forward
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import set_partial_grad

# [Note: activation checkpointing]
# What a block keeps for the backward pass, in elements per token. D is the model width; N query heads and M key-value
# heads of width H are those of this tensor rank; K experts of inner width F (of which this rank has a part) see each
# token, as does a shared expert of width G:
#
#   none       6 D + 3 (N + M) H + E   norms: input, normalised, output; heads before, after rotation, attended
#   selective  2 D + E                 the inputs of the block and of the experts
#   full       D                       the input of the block
#   where E =  K (2 D + 3 F) + 3 G     rows sent, SwiGLU's input and output, rows returned; the shared expert
#
# A fused norm (CUDA) keeps 4 D instead of 6. In 16-bit training the inputs of norms and of the router are kept in
# float32. Under sequence parallelism a rank has T / tensor tokens, but attends to T.
#
# So selective recomputation repeats no communication between experts. Full recomputation repeats the exchange of rows,
# but not the routing: which experts were chosen, and how many rows come from where, is kept (a RoutingTape), and losses
# and load counters are counted once. A dense block has no experts to except; both kinds keep its input alone.


class BlockInputs(NamedTuple):
    """What every block of one forward pass is given beside the hidden states."""

    layout: TokenLayout
    """How the hidden states are laid out."""
    rope: tuple[Tensor, Tensor]
    """Cosines and sines of this context rank's tokens, each ``[B, Q, H]`` or ``[1, Q, H]``."""
    mask: Tensor | None
    """Who attends to whom, for whole sequences; None where causality alone says it."""
    sequence: Tensor | None
    """int64 ``[T]``: number of the sequence within the batch that each hidden state belongs to, where it is needed."""


class GPTMoEBlock(nn.Module):
    """Pre-norm residual block: ``x + attention(norm(x))``, then ``x + ffn(norm(x))``.

    Args:
        config: Sizes.
        layer: Number of the block, which decides whether it has experts.
        mesh: The parallel mesh.
        activation_checkpointing: What is computed again in the backward pass (see the note at the head of this file).
    """

    def __init__(self, config: GPTMoEConfig, layer: int, mesh: ParallelMesh, activation_checkpointing: str) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        # The sum over 2 L residual branches keeps the size of one (GPT-2; Megatron's scaled initialisation).
        output_std = config.init_std / (2 * config.num_layers) ** 0.5
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = CausalSelfAttention(
            config.hidden_size,
            config.num_heads,
            config.kv_heads,
            config.head_width,
            mesh,
            qk_norm=config.qk_norm,
            sliding_window=config.sliding_window,
            norm_eps=config.norm_eps,
            init_std=config.init_std,
            output_init_std=output_std,
        )
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn: MoELayer | SwiGLU
        if config.moe is not None and layer in config.moe_layers:
            self.ffn = MoELayer(config.hidden_size, config.moe, mesh)
        else:
            self.ffn = SwiGLU(
                config.hidden_size,
                config.ffn_hidden_size,
                mesh,
                init_std=config.init_std,
                output_init_std=output_std,
            )
        gather_in_forward(self)
        mark_norm(self.attention_norm, mesh)
        mark_norm(self.ffn_norm, mesh)

    def compile_dense_parts(self, backend: str = "inductor") -> None:
        """Let ``torch.compile`` compile norms, attention and a dense feed-forward layer; experts stay eager.

        ``nn.Module.compile`` changes no parameter's name, and a copy of the module is not compiled.
        """
        for module in (self.attention_norm, self.attention, self.ffn_norm, self.ffn):
            if not isinstance(module, MoELayer):
                module.compile(backend=backend)

    def forward(
        self, hidden: Tensor, inputs: BlockInputs, cache: KVCache | None = None
    ) -> tuple[Tensor, RoutingInfo | None]:
        """Transform the hidden states.

        Args:
            hidden: ``[T, D]`` as ``inputs.layout`` says.
            inputs: What all blocks share.
            cache: Keys and values so far, in generation.

        Returns:
            ``[T, D]``, and what the router did (None for a dense block).
        """
        mode = self.activation_checkpointing
        if mode == "none" or cache is not None or not torch.is_grad_enabled():
            return self._run(hidden, inputs, cache)
        if mode == "full" or isinstance(self.ffn, SwiGLU):
            out: tuple[Tensor, RoutingInfo | None] = checkpoint_with_routing(self._run, hidden, inputs, None)
            return out
        # Nothing is drawn at random in a block, so no generator has to be put back.
        hidden, normed = checkpoint(self._attend, hidden, inputs, None, use_reentrant=False, preserve_rng_state=False)
        return self._feed_forward(hidden, normed, inputs, None)

    def _run(
        self, hidden: Tensor, inputs: BlockInputs, cache: KVCache | None, saved: RoutingTape | None = None
    ) -> tuple[Tensor, RoutingInfo | None]:
        hidden, normed = self._attend(hidden, inputs, cache)
        return self._feed_forward(hidden, normed, inputs, saved)

    def _attend(self, hidden: Tensor, inputs: BlockInputs, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        """The hidden states after attention, and their norm."""
        attended = self.attention(self.attention_norm(hidden), inputs.layout, inputs.rope, inputs.mask, cache)
        hidden = hidden + attended
        return hidden, self.ffn_norm(hidden)

    def _feed_forward(
        self, hidden: Tensor, normed: Tensor, inputs: BlockInputs, saved: RoutingTape | None
    ) -> tuple[Tensor, RoutingInfo | None]:
        if isinstance(self.ffn, SwiGLU):
            return hidden + self.ffn(normed, inputs.layout), None
        update, routing = self.ffn(
            normed,
            sequence=inputs.sequence,
            num_sequences=inputs.layout.batch,
            token_slices=inputs.layout.sequence_parallel,
            saved=saved,
        )
        return hidden + update, routing


def mark_norm(norm: RMSNorm, mesh: ParallelMesh) -> None:
    """Say that the tensor ranks apply a norm's gain to tokens of their own, so that its gradient is a sum over them."""
    if mesh.size(Axis.TENSOR) > 1 and mesh.config.sequence_parallel:
        set_partial_grad(norm, "weight")
