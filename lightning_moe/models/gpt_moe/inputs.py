"""What the blocks of GPT-MoE are given beside the hidden states, from a batch that all stages of a pipeline have.

B batch, S sequence, Q tokens of a sequence on this context rank, H head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moe.config.gpt import GPTMoEConfig
from lightning_moe.config.gpt_rules import sequence_parts
from lightning_moe.errors import ConfigError
from lightning_moe.layers import TokenLayout, attention_mask, rope_frequencies, rope_tables_at
from lightning_moe.models.gpt_moe.block import BlockInputs
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh


class InputLayer:
    """Lays tokens out over ranks, and makes rotary tables and masks for them.

    Args:
        config: Sizes of the network.
        mesh: The parallel mesh.
    """

    def __init__(self, config: GPTMoEConfig, mesh: ParallelMesh) -> None:
        self._config, self._mesh = config, mesh
        # No buffer of the model: it would be cast with the module (see the note in lightning_moe.layers.rope).
        self._frequencies, self._attention_factor = rope_frequencies(
            config.head_width, config.rope_theta, config.rope_scaling
        )

    def training_layout(self, tokens: Tensor) -> TokenLayout:
        """How the tokens ``[B, S]`` of a training batch are spread over the axes context and tensor.

        Raises:
            ConfigError: The ranks do not divide the sequence, or it is longer than the model is made for.
        """
        batch, length = tokens.shape
        parts, longest = sequence_parts(self._mesh.config), self._config.max_sequence_length
        if length > longest:
            raise ConfigError("data.sequence_length", length, f"at most config.max_sequence_length = {longest}")
        if length % parts:
            raise ConfigError(
                "data.sequence_length",
                length,
                f"a multiple of {parts}: the context ranks times, with sequence_parallel, the tensor ranks",
                "each of them holds an equal part of every sequence",
            )
        context = self._mesh.size(Axis.CONTEXT)
        return TokenLayout(
            batch,
            length // context,
            sequence_parallel=self._mesh.config.sequence_parallel and self._mesh.size(Axis.TENSOR) > 1,
            context_parallel=context > 1,
        )

    def own_chunk(self, values: Tensor) -> Tensor:
        """This context rank's part ``[B, Q]`` of what is given for whole sequences, ``[B, S]``."""
        length = values.shape[1] // self._mesh.size(Axis.CONTEXT)
        return values.narrow(1, self._mesh.rank(Axis.CONTEXT) * length, length)

    def own_tokens(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """The tokens ``[B, Q]`` whose hidden states are computed by the ranks that this one shares its chunk with."""
        return self.own_chunk(tokens) if layout.context_parallel else tokens

    def block_inputs(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        layout: TokenLayout,
        dtype: torch.dtype,
        past: int = 0,
    ) -> BlockInputs:
        """What every block of one forward pass is given.

        Args:
            tokens: int64 ``[B, S]``; shape and device are what counts.
            positions: int64 ``[B, S]``: position of each token in its document; those that follow ``past`` when None.
            documents: int64 ``[B, S]``: number of each token's document within the sequence; None for one document.
            layout: How hidden states are laid out.
            dtype: Dtype of the model.
            past: Number of tokens in the caches.
        """
        length = tokens.shape[1]
        if positions is None:
            positions = torch.arange(past, past + length, device=tokens.device)[None]
        mask = attention_mask(documents, length, self._config.sliding_window, tokens.device, past=past)
        self._frequencies = self._frequencies.to(tokens.device)
        rope = rope_tables_at(self.own_tokens(positions, layout), self._frequencies, self._attention_factor, dtype)
        return BlockInputs(layout, rope, mask, self._sequence_of_tokens(layout, tokens.device))

    def _sequence_of_tokens(self, layout: TokenLayout, device: torch.device) -> Tensor | None:
        """Number of the sequence of each of this rank's hidden states; None where no loss is taken per sequence."""
        moe = self._config.moe
        if moe is None or moe.load_balancing != "sequence":
            return None
        sequence = torch.arange(layout.num_tokens, device=device) // layout.length
        if not layout.sequence_parallel:
            return sequence
        share = layout.num_tokens // self._mesh.size(Axis.TENSOR)
        return sequence.narrow(0, self._mesh.rank(Axis.TENSOR) * share, share)
