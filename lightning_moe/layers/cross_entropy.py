"""Output projection and cross-entropy over a vocabulary that is split over the axis ``tensor``, in chunks of tokens.

T tokens, C tokens of one chunk, D model width, V vocabulary of this rank, P tensor ranks.

[Note: logits of one chunk]
With a vocabulary of 150,000 the logits are by far the largest tensor of a language model. They are never gathered over
ranks: softmax needs, for each token, only the largest logit, the sum of exponentials and the logit of the label. And
they exist for one chunk of tokens at a time: their gradient is known as soon as the logits are (softmax minus one-hot),
so each chunk's contributions to the gradients of hidden states and weight are computed in the forward pass, up to the
factor that the backward pass brings (as in Liger, arXiv:2410.10989). Nothing is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.errors import ConfigError
from lightning_moe.layers.token_layout import TokenLayout
from lightning_moe.layers.vocabulary import VocabularyShard
from lightning_moe.parallel.collectives import all_gather, copies_to_summands
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.weight_grad import MatmulGrad, WeightGrad, compute_dtype, deliver, sink_of

IGNORED_LABEL = -100
"""Label of a token for which nothing is to be predicted."""


@torch.compiler.disable  # type: ignore[untyped-decorator]  # sinks and collectives are side effects
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    mesh: ParallelMesh,
    vocab_size: int,
    layout: TokenLayout,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Sum over tokens of ``cross_entropy(hidden @ weight^T, labels)``, in nats.

    The gradient of the weight goes to its sink, if it has one, and is never deferred. There is no second derivative.

    Args:
        hidden: Hidden states as ``layout`` says: ``[T / P, D]`` with sequence parallelism, else ``[T, D]``.
        weight: ``[V, D]``, this rank's rows of the output projection (see :class:`VocabularyShard`).
        labels: int64 ``[T]`` or ``[B, S]``, the same on all tensor ranks; -100 where there is nothing to predict.
        mesh: The parallel mesh.
        vocab_size: Size of the whole vocabulary.
        layout: How the hidden states are laid out.
        chunk_tokens: Number ``C`` of tokens whose logits exist at a time; all when None.

    Returns:
        The sum over the labels that are not -100: a scalar, the same on all tensor ranks; float64 for float64, else
        float32.

    Raises:
        ConfigError: ``chunk_tokens`` is less than 1, ``weight`` does not hold this rank's rows, or there are more or
            fewer labels than tokens.
    """
    vocabulary = VocabularyShard.of(mesh, vocab_size)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ConfigError("loss_chunk_tokens", chunk_tokens, "at least 1", "null takes all tokens at once")
    if weight.shape[0] != len(vocabulary.tokens):
        raise ConfigError("weight", tuple(weight.shape), f"{len(vocabulary.tokens)} rows, this rank's tokens")
    hidden = hidden.to(compute_dtype(hidden))
    # The gradient of each rank's logits is a summand of that of the hidden states.
    gather = all_gather if layout.sequence_parallel else copies_to_summands
    group = mesh.active_group(Axis.TENSOR)
    hidden = gather(hidden, group)
    labels = labels.reshape(-1)
    if labels.numel() != hidden.shape[0]:  # labels beyond the last chunk would be passed over
        raise ConfigError("labels", f"{labels.numel()} labels", f"one for each of the {hidden.shape[0]} tokens")
    chunk = max(1, hidden.shape[0] if chunk_tokens is None else chunk_tokens)
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
                hidden, weight, labels, vocabulary, group, chunk
            )
            return loss
        return _in_chunks(hidden, weight.to(hidden.dtype), labels, vocabulary, group, chunk, None, None)


def loss_peak_bytes(
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    chunk_tokens: int | None,
    itemsize: int,
    *,
    training: bool = True,
    cast_weight: bool = False,
) -> int:
    """Most bytes that :func:`linear_cross_entropy` allocates at a time, beside its operands.

    ``C V a`` for the logits of a chunk, ``C V i`` for their gradient if it is another tensor, and in training ``T D i``
    and ``V D a`` for the gradients of hidden states and weight, where ``i`` is the itemsize and ``a`` that of float32
    or more. The backward pass, which holds no logits, needs ``T D i`` more than the two gradients; this formula takes
    the larger, for a weight whose gradients go to a sink. Vectors with one entry per token are left out, and
    so are the hidden states gathered under sequence parallelism (``T D i``). On the CPU 16-bit logits exist in both
    dtypes, in evaluation too.

    Args:
        tokens: ``T``.
        hidden_size: ``D``.
        vocab_size: ``V``, of this rank.
        chunk_tokens: ``C``; all tokens when None.
        itemsize: Bytes of one element of the hidden states, after autocast.
        training: Whether gradients are computed.
        cast_weight: Whether autocast makes a copy of the weight.
    """
    accumulated = max(itemsize, 4)
    logits = min(tokens, chunk_tokens or tokens) * vocab_size
    cast = vocab_size * hidden_size * itemsize if cast_weight else 0
    if not training:
        return cast + logits * accumulated
    grads = tokens * hidden_size * itemsize + vocab_size * hidden_size * accumulated
    forward = cast + logits * (accumulated + (itemsize if itemsize < accumulated else 0))
    return grads + max(forward, tokens * hidden_size * itemsize)


@dataclass(frozen=True)
class _ScaledGrad(WeightGrad):
    """A weight gradient that is known up to a factor: ``scale * grad``."""

    grad: Tensor
    scale: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.grad, self.scale

    @property
    def flops(self) -> float:
        return 2.0 * self.grad.numel()

    def compute(self) -> Tensor:
        return self.grad * self.scale

    def add_to(self, main_grad: Tensor, *, accumulate: bool) -> None:
        if accumulate:
            main_grad.addcmul_(self.grad, self.scale)
        else:
            torch.mul(self.grad, self.scale, out=main_grad)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocabulary: VocabularyShard,
        group: dist.ProcessGroup | None,
        chunk_tokens: int,
    ) -> Tensor:
        ctx.sink, ctx.weight_dtype = sink_of(weight), weight.dtype
        accumulated = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=accumulated) if ctx.needs_input_grad[1] else None
        cast = weight.to(hidden.dtype)
        loss = _in_chunks(hidden, cast, labels, vocabulary, group, chunk_tokens, grad_hidden, grad_weight)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy has no second derivative; do not use create_graph=True")
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad
        if grad_weight is not None:
            # It exists already, and is as large as the weight: keeping one for each micro-batch would gain nothing.
            scaled = _ScaledGrad(grad_weight, grad)
            grad_weight = deliver(scaled, ctx.sink, ctx.weight_dtype, deferrable=False)
        return grad_hidden, grad_weight, None, None, None, None


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocabulary: VocabularyShard,
    group: dist.ProcessGroup | None,
    chunk_tokens: int,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> Tensor:
    """The loss; writes its gradient into ``grad_hidden`` and adds it to ``grad_weight`` where they are given."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.zeros((), dtype=dtype, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        logits = _logits(hidden[chunk], weight, dtype)
        located = _Labels.locate(labels[chunk], vocabulary)
        losses, total = _cross_entropy_(logits, located, group)
        loss += losses.sum()
        if grad_hidden is not None or grad_weight is not None:
            logits = _gradient_(logits, located, losses, total, hidden.dtype)
        if grad_hidden is not None:
            torch.mm(logits, weight, out=grad_hidden[chunk])
        if grad_weight is not None:
            MatmulGrad(logits, hidden[chunk]).add_to(grad_weight, accumulate=True)
        del logits  # before the next chunk's are allocated
    return loss


def _logits(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    if hidden.is_cuda and hidden.dtype != dtype:
        return torch.mm(hidden, weight.t(), out_dtype=dtype)  # not rounded to 16 bits in between
    return (hidden @ weight.t()).to(dtype)


@dataclass(frozen=True)
class _Labels:
    """Where the labels of a chunk are."""

    counts: Tensor
    """bool ``[C]``: whether there is something to predict."""
    here: Tensor
    """bool ``[C]``: whether there is, and this rank holds the label."""
    rows: Tensor
    """int64 ``[C, 1]``: position of the label among this rank's tokens; any where it is not here."""

    @classmethod
    def locate(cls, labels: Tensor, vocabulary: VocabularyShard) -> _Labels:
        counts = labels != IGNORED_LABEL
        rows, elsewhere = vocabulary.locate(labels.masked_fill(~counts, vocabulary.tokens.start))
        return cls(counts, counts & ~elsewhere, rows[:, None])


def _cross_entropy_(logits: Tensor, labels: _Labels, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Losses ``[C]`` and the sums of exponentials ``[C]`` over the vocabulary.

    Replaces the logits by their exponentials, each row up to the factor that makes its largest one 1.
    """
    largest = logits.amax(dim=-1)
    if group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    logits.sub_(largest[:, None])
    label_logits = logits.gather(1, labels.rows).squeeze(1).masked_fill(~labels.here, 0.0)
    sums = torch.stack((logits.exp_().sum(dim=-1), label_logits))
    if group is not None:
        dist.all_reduce(sums, group=group)
    total, label_logits = sums
    return (total.log() - label_logits).masked_fill(~labels.counts, 0.0), total


def _gradient_(exponentials: Tensor, labels: _Labels, losses: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    """Softmax minus one-hot, ``[C, V]`` in ``dtype``; uses the memory of the exponentials if it can."""
    grad = exponentials if exponentials.dtype == dtype else torch.empty_like(exponentials, dtype=dtype)
    torch.mul(exponentials, (labels.counts / total)[:, None], out=grad)
    # The label's probability minus one, not rounded to 16 bits before the difference is taken.
    of_label = torch.expm1(-losses).to(dtype)[:, None]
    return grad.scatter_(1, labels.rows, torch.where(labels.here[:, None], of_label, grad.gather(1, labels.rows)))
