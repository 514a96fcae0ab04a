"""From the output of a fused projection to queries, keys and values, normalised by heads and rotated.

B batch, Q tokens of a sequence, H head width; N query heads, M key and value heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_moe.layers.norm import rms_norm
from lightning_moe.layers.rope import apply_rope
from lightning_moe.weight_grad.fused_kernels import fused_kernels_take

_Heads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class HeadShape:
    """How a row of the projection splits: N heads of queries, M of keys, M of values, each of width H."""

    num_heads: int
    num_kv_heads: int
    head_size: int

    @property
    def widths(self) -> list[int]:
        """Widths of the three parts of a row."""
        return [count * self.head_size for count in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]


def can_fuse(projected: Tensor, rope: tuple[Tensor, Tensor]) -> bool:
    """Whether one kernel makes queries, keys and values of ``projected``: 16 or 32 bits on CUDA, with Triton."""
    if torch.compiler.is_compiling():  # the compiler fuses the plain operations itself
        return False
    return projected.numel() > 0 and fused_kernels_take(projected, *rope)


def qkv_heads(
    projected: Tensor, gains: tuple[Tensor, Tensor] | None, rope: tuple[Tensor, Tensor], shape: HeadShape, eps: float
) -> _Heads:
    """Split heads, normalise queries and keys over each head, and rotate them by their positions.

    One kernel, which reads and writes everything once, where :func:`can_fuse` says so; the projection is all that is
    kept for the backward pass, and without norms nothing is.

    Args:
        projected: ``[B, Q, (N + 2M) * H]``.
        gains: Of the norms of queries and of keys, each ``[H]``; None without norms.
        rope: ``(cos, sin)``, each ``[B, Q, H]`` or ``[1, Q, H]``, the second half of the columns as the first.
        shape: ``N``, ``M`` and ``H``.
        eps: Added to mean squares.

    Returns:
        ``[B, Q, N, H]``, ``[B, Q, M, H]`` and ``[B, Q, M, H]`` in the dtype of ``projected``.
    """
    cos, sin = rope
    if not can_fuse(projected, rope):
        return _plain(projected, gains, cos, sin, shape, eps)
    q_gain, k_gain = gains or (None, None)
    heads: _Heads = _FusedHeads.apply(projected, q_gain, k_gain, cos, sin, shape, eps)  # type: ignore[no-untyped-call]
    return heads


def _plain(
    projected: Tensor, gains: tuple[Tensor, Tensor] | None, cos: Tensor, sin: Tensor, shape: HeadShape, eps: float
) -> _Heads:
    query, key, value = (part.unflatten(-1, (-1, shape.head_size)) for part in projected.split(shape.widths, dim=-1))
    if gains is not None:
        query, key = (rms_norm(heads, gain, eps) for heads, gain in zip((query, key), gains, strict=True))
    cos, sin = cos[:, :, None], sin[:, :, None]
    return apply_rope(query, cos, sin), apply_rope(key, cos, sin), value


class _FusedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        q_gain: Tensor | None,
        k_gain: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        shape: HeadShape,
        eps: float,
    ) -> _Heads:
        from lightning_moe.layers import triton_qkv_heads

        ctx.save_for_backward(None if q_gain is None else projected, q_gain, k_gain, cos, sin)
        ctx.shape, ctx.eps = shape, eps
        return triton_qkv_heads.forward(
            projected.contiguous(),
            _contiguous_gains(q_gain, k_gain),
            *_half_tables(cos, sin, projected),
            (shape.num_heads, shape.num_kv_heads),
            eps,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        projected, q_gain, k_gain, cos, sin = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph=True the gradient is differentiated again
            return *_again(ctx, grads), None, None, None, None
        from lightning_moe.layers import triton_qkv_heads

        query, key, value = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads)
        grad, gain_grads = triton_qkv_heads.backward(
            (query, key, value),
            None if projected is None else projected.contiguous(),
            _contiguous_gains(q_gain, k_gain),
            *_half_tables(cos, sin, grads[0]),
            ctx.eps,
        )
        if gain_grads is None:
            return grad, None, None, None, None, None, None
        return grad, gain_grads[0].to(q_gain.dtype), gain_grads[1].to(k_gain.dtype), None, None, None, None


def _again(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients by plain operations, which have derivatives of their own."""
    projected, q_gain, k_gain, cos, sin = ctx.saved_tensors
    if projected is None:  # a rotation is linear: any input will do
        batch, length = grads[0].shape[:2]
        projected = grads[0].new_zeros((batch, length, sum(ctx.shape.widths)), requires_grad=True)
    gains = None if q_gain is None else (q_gain, k_gain)
    inputs = [x for x in (projected, q_gain, k_gain) if x is not None and x.requires_grad]
    outputs = _plain(projected, gains, cos, sin, ctx.shape, ctx.eps)
    # With a frozen projection values depend on nothing that is trained.
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    trained, incoming = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(trained, inputs, incoming, create_graph=True))
    first, second, third = (
        next(found) if x is not None and x.requires_grad else None for x in (projected, q_gain, k_gain)
    )
    return first, second, third


def _contiguous_gains(q_gain: Tensor | None, k_gain: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if q_gain is None or k_gain is None:
        return None
    return q_gain.contiguous(), k_gain.contiguous()


def _half_tables(cos: Tensor, sin: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Tables ``[B, Q, H / 2]`` with the same strides."""
    half = cos.shape[-1] // 2
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    cos, sin = (table[..., :half].expand(like.shape[0], like.shape[1], half) for table in (cos, sin))
    return cos, sin
