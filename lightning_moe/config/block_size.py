"""Parameters and activations of one transformer block, by arithmetic (torch-free).

D model width, F inner width of a feed-forward layer or of one expert, G that of the shared expert, K experts that a
token visits.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_moe.config.gpt import ActivationCheckpointing
from lightning_moe.config.moe import MoEConfig
from lightning_moe.config.parallel import ParallelConfig


@dataclass(frozen=True, slots=True)
class ParameterSize:
    """Numbers of parameters of a piece of a model, over all ranks that share it.

    Attributes:
        split: Those of which each tensor rank has a part.
        whole: Those of which every rank has a copy, except experts.
        experts: Those of the routed experts.
        visited: Those of the routed experts that one token visits.
    """

    split: int = 0
    whole: int = 0
    experts: int = 0
    visited: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.split + self.whole + self.experts

    @property
    def active(self) -> int:
        """Those that one token uses."""
        return self.split + self.whole + self.visited


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Widths of a block: attention, then experts or a dense feed-forward layer.

    Attributes:
        hidden_size: Width of the residual stream.
        query_width: Width of all query heads together.
        key_width: Width of all key heads together, as wide as all value heads.
        moe: The experts; None for a dense feed-forward layer.
        ffn_hidden_size: Inner width of the dense feed-forward layer.
        ffn_matrices: Matrices of the dense feed-forward layer: 3 with a gate, else 2.
        norm_parameters: Gains of the norms of queries and keys.
    """

    hidden_size: int
    query_width: int
    key_width: int
    moe: MoEConfig | None
    ffn_hidden_size: int
    ffn_matrices: int
    norm_parameters: int = 0

    @property
    def parameters(self) -> ParameterSize:
        """Its parameters; a bias that steers the choice of experts is adapted without gradients and not counted."""
        width = self.hidden_size
        split = 2 * width * (self.query_width + self.key_width)
        whole = 2 * width + self.norm_parameters
        if self.moe is None:
            return ParameterSize(split + self.ffn_matrices * width * self.ffn_hidden_size, whole)
        matrices = expert_matrices(self.moe)
        gate = width if self.moe.shared_expert_gate else 0
        whole += self.moe.num_experts * width + matrices * width * self.moe.shared_expert_hidden_size + gate
        expert = matrices * width * self.moe.expert_hidden_size
        return ParameterSize(split, whole, self.moe.num_experts * expert, self.moe.top_k * expert)


@dataclass(frozen=True, slots=True)
class Elements:
    """Numbers of tensor elements for each token of a rank, fractions where ranks share them.

    Attributes:
        residual: Elements in the precision of the residual stream, which is that of the weights.
        inner: Elements in the precision of matrix products.
    """

    residual: float
    inner: float

    def bytes(self, residual_size: int, inner_size: int) -> float:
        """Bytes, with elements of the given sizes."""
        return self.residual * residual_size + self.inner * inner_size


def kept_activations(
    shape: BlockShape, parallel: ParallelConfig, checkpointing: ActivationCheckpointing, *, fused_norm: bool
) -> Elements:
    """What a block keeps of each token from its forward to its backward pass.

    See the note on activation checkpointing in ``models/gpt_moe/block.py``, whose terms these are. Experts are taken to
    be balanced.

    Args:
        shape: Widths.
        parallel: Sizes of the axes.
        checkpointing: What is computed again instead of being kept.
        fused_norm: Whether norms run as one kernel (on CUDA), which keeps its input and output alone.
    """
    width = shape.hidden_size / _token_parts(parallel)
    if checkpointing == "full" or (checkpointing == "selective" and shape.moe is None):
        return Elements(width, 0.0)
    feed_forward = _feed_forward_elements(shape, parallel)
    if shape.moe is not None and shape.moe.shared_expert_gate:
        feed_forward += shape.hidden_size / parallel.tensor  # the shared expert's output, before its gate
    if checkpointing == "selective":
        return Elements(width, width + feed_forward)
    heads = 3 * (shape.query_width + shape.key_width) / parallel.tensor
    return Elements((2 if fused_norm else 4) * width, 2 * width + heads + feed_forward)


def deferred_operands(shape: BlockShape, parallel: ParallelConfig) -> Elements:
    """What a block keeps of each token from B to W: the two operands of each weight's gradient."""
    width = shape.hidden_size / _token_parts(parallel)
    attention = 2 * width + 2 * (shape.query_width + shape.key_width) / parallel.tensor
    ends = 0.0  # what comes in and the gradient of what goes out; the rows of routed experts are counted below
    if shape.moe is None:
        ends = 2 * width
    elif shape.moe.shared_expert_hidden_size:
        ends = 2 * shape.hidden_size / parallel.tensor
    return Elements(0.0, attention + ends + _feed_forward_elements(shape, parallel))


def expert_matrices(moe: MoEConfig) -> int:
    """Matrices of one expert: up and down, and SwiGLU's gate."""
    return 3 if moe.activation == "swiglu" else 2


def _feed_forward_elements(shape: BlockShape, parallel: ParallelConfig) -> float:
    """Rows sent and returned, and the activation function's input and output: as many as the layer has matrices."""
    if shape.moe is None:
        return shape.ffn_matrices * shape.ffn_hidden_size / parallel.tensor
    # A choice travels to all ranks that share the expert. Tensor ranks divide the tokens in any case.
    moe, matrices = shape.moe, expert_matrices(shape.moe)
    routed = moe.top_k * (2 * shape.hidden_size * parallel.expert_tensor + matrices * moe.expert_hidden_size)
    return (routed + matrices * moe.shared_expert_hidden_size) / parallel.tensor


def _token_parts(parallel: ParallelConfig) -> int:
    """Number of tensor ranks that divide the tokens of the residual stream."""
    return parallel.tensor if parallel.sequence_parallel else 1
