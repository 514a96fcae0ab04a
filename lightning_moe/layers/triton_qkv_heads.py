"""Triton kernels from the output of a fused projection to queries, keys and values, normalised and rotated.

T tokens; N query heads and M key and value heads of width H, in this order in each row of the projection. A row of a
kernel is one head of one token; R = T (N + 2M) rows. All is computed in float32 and rounded once.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 64
"""Rows that a program handles at a time."""
_PROGRAMS = 1024
"""Most programs of the backward kernel, each of which leaves sums for the gains' gradients."""


@triton.jit
def _forward_kernel(
    x,
    q_gain,
    k_gain,
    cos,
    sin,
    query,
    key,
    value,
    num_rows,
    length,
    half,
    table_batch,
    table_token,
    eps,
    NORM: tl.constexpr,  # noqa: N803 (Triton's spelling of compile-time constants)
    N: tl.constexpr,  # noqa: N803
    M: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = rows // (N + 2 * M), rows % (N + 2 * M)
    column = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (column < half)[None, :]
    is_query, is_value = (head < N)[:, None], (head >= N + M)[:, None]
    source = x + rows[:, None] * 2 * half + column[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    first_in, second_in = first, second
    if NORM:
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * half) + eps)[:, None]
        gain = tl.where(is_query, q_gain, k_gain) + column[None, :]
        first = first * scale * tl.load(gain, mask=inside, other=0.0).to(tl.float32)
        second = second * scale * tl.load(gain + half, mask=inside, other=0.0).to(tl.float32)
    table = ((token // length) * table_batch + (token % length) * table_token)[:, None] + column[None, :]
    c = tl.load(cos + table, mask=inside, other=0.0)
    s = tl.load(sin + table, mask=inside, other=0.0)
    turned_first, turned_second = first * c - second * s, second * c + first * s
    out_first = tl.where(is_value, first_in, turned_first).to(query.dtype.element_ty)
    out_second = tl.where(is_value, second_in, turned_second).to(query.dtype.element_ty)
    q_row, k_row, v_row = token * N + head, token * M + head - N, token * M + head - N - M
    target = tl.where(is_query, query + q_row[:, None] * 2 * half, key + k_row[:, None] * 2 * half)
    target = tl.where(is_value, value + v_row[:, None] * 2 * half, target) + column[None, :]
    tl.store(target, out_first, mask=inside)
    tl.store(target + half, out_second, mask=inside)


@triton.jit
def _backward_kernel(
    grad_query,
    grad_key,
    grad_value,
    x,
    q_gain,
    k_gain,
    cos,
    sin,
    grad_x,
    gain_sums,
    num_rows,
    length,
    half,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    table_batch,
    table_token,
    eps,
    tiles,
    NORM: tl.constexpr,  # noqa: N803
    N: tl.constexpr,  # noqa: N803
    M: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    q_first, q_second = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    k_first, k_second = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for tile in range(tiles):
        rows = (program.to(tl.int64) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        # In 64 bits: with heads before tokens, a head's stride times its number may be more than 32 hold.
        token, head = rows // (N + 2 * M), rows % (N + 2 * M)
        batch, position = token // length, token % length
        inside = (rows < num_rows)[:, None] & (column < half)[None, :]
        is_query, is_value = (head < N)[:, None], (head >= N + M)[:, None]
        q_place = batch * q_batch + position * q_token + head * q_head
        k_place = batch * k_batch + position * k_token + (head - N) * k_head
        v_place = batch * v_batch + position * v_token + (head - N - M) * v_head
        source = tl.where(is_query, grad_query + q_place[:, None], grad_key + k_place[:, None])
        source = tl.where(is_value, grad_value + v_place[:, None], source) + column[None, :]
        first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        table = (batch * table_batch + position * table_token)[:, None] + column[None, :]
        c = tl.load(cos + table, mask=inside, other=0.0)
        s = tl.load(sin + table, mask=inside, other=0.0)
        turned_first, turned_second = first * c + second * s, second * c - first * s
        place = rows[:, None] * 2 * half + column[None, :]
        if NORM:
            x_first = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
            x_second = tl.load(x + place + half, mask=inside, other=0.0).to(tl.float32)
            scale = tl.rsqrt((tl.sum(x_first * x_first, 1) + tl.sum(x_second * x_second, 1)) / (2 * half) + eps)
            x_first, x_second = x_first * scale[:, None], x_second * scale[:, None]
            to_first, to_second = turned_first * x_first, turned_second * x_second
            q_first += tl.sum(tl.where(is_query, to_first, 0.0), 0)
            q_second += tl.sum(tl.where(is_query, to_second, 0.0), 0)
            of_key = (head >= N)[:, None] & (head < N + M)[:, None]
            k_first += tl.sum(tl.where(of_key, to_first, 0.0), 0)
            k_second += tl.sum(tl.where(of_key, to_second, 0.0), 0)
            gain = tl.where(is_query, q_gain, k_gain) + column[None, :]
            gain_first = tl.load(gain, mask=inside, other=0.0).to(tl.float32)
            gain_second = tl.load(gain + half, mask=inside, other=0.0).to(tl.float32)
            mean = (tl.sum(to_first * gain_first, 1) + tl.sum(to_second * gain_second, 1)) / (2 * half)
            turned_first = (turned_first * gain_first - x_first * mean[:, None]) * scale[:, None]
            turned_second = (turned_second * gain_second - x_second * mean[:, None]) * scale[:, None]
        first = tl.where(is_value, first, turned_first)
        second = tl.where(is_value, second, turned_second)
        tl.store(grad_x + place, first.to(grad_x.dtype.element_ty), mask=inside)
        tl.store(grad_x + place + half, second.to(grad_x.dtype.element_ty), mask=inside)
    if NORM:
        sums = gain_sums + program * 4 * half + column
        wanted = column < half
        tl.store(sums, q_first, mask=wanted)
        tl.store(sums + half, q_second, mask=wanted)
        tl.store(sums + 2 * half, k_first, mask=wanted)
        tl.store(sums + 3 * half, k_second, mask=wanted)


def forward(
    projected: Tensor,
    gains: tuple[Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    heads: tuple[int, int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B, Q, N, H]``, keys and values ``[B, Q, M, H]``, each contiguous, in the dtype of ``projected``.

    Args:
        projected: ``[B, Q, (N + 2M) * H]``, contiguous, not empty.
        gains: Of the norms of queries and of keys, each ``[H]``, contiguous; None without norms.
        cos: float32 ``[B, Q, H / 2]`` with any strides but the last, which is 1.
        sin: Likewise, with the same strides.
        heads: ``(N, M)``.
        eps: Added to mean squares.
    """
    batch, length, width = projected.shape
    num_heads, num_kv_heads = heads
    head_size = width // (num_heads + 2 * num_kv_heads)
    query, key, value = (
        projected.new_empty((batch, length, count, head_size)) for count in (num_heads, num_kv_heads, num_kv_heads)
    )
    num_rows = projected.numel() // head_size
    q_gain, k_gain = gains or (projected, projected)
    _forward_kernel[(triton.cdiv(num_rows, _ROWS),)](
        projected,
        q_gain,
        k_gain,
        cos,
        sin,
        query,
        key,
        value,
        num_rows,
        length,
        head_size // 2,
        cos.stride(0),
        cos.stride(1),
        eps,
        NORM=gains is not None,
        N=num_heads,
        M=num_kv_heads,
        ROWS=_ROWS,
        BLOCK=triton.next_power_of_2(head_size // 2),
    )
    return query, key, value


def backward(
    grads: tuple[Tensor, Tensor, Tensor],
    projected: Tensor | None,
    gains: tuple[Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of :func:`forward`, bit for bit the same in every run.

    Args:
        grads: Of queries, keys and values, in one dtype, with any strides but the last, which is 1.
        projected: As in :func:`forward`; needed with gains.
        gains: As in :func:`forward`.
        cos: Likewise.
        sin: Likewise.
        eps: Likewise.

    Returns:
        The gradient of ``projected``, and those of the gains, float32 ``[2, H]``; None without norms.
    """
    query, key, value = grads
    batch, length, num_heads, head_size = query.shape
    num_kv_heads = key.shape[2]
    grad = query.new_empty((batch, length, (num_heads + 2 * num_kv_heads) * head_size))
    num_rows = grad.numel() // head_size
    tiles = triton.cdiv(triton.cdiv(num_rows, _ROWS), _PROGRAMS)
    programs = triton.cdiv(num_rows, _ROWS * tiles)
    sums = None
    if gains is not None:
        sums = torch.empty((programs, 2, head_size), dtype=torch.float32, device=grad.device)
    q_gain, k_gain = gains or (grad, grad)
    _backward_kernel[(programs,)](
        query,
        key,
        value,
        grad if projected is None else projected,
        q_gain,
        k_gain,
        cos,
        sin,
        grad,
        grad if sums is None else sums,
        num_rows,
        length,
        head_size // 2,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        cos.stride(0),
        cos.stride(1),
        eps,
        tiles,
        NORM=gains is not None,
        N=num_heads,
        M=num_kv_heads,
        ROWS=_ROWS,
        BLOCK=triton.next_power_of_2(head_size // 2),
    )
    return grad, None if sums is None else sums.sum(0)
