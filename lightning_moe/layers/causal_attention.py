"""Causal self attention with grouped key and value heads, split over the axes ``tensor`` and ``context``.

B batch, S sequence, Q tokens of this context rank or new tokens, T = B * Q, D model width, H head width; N query heads
and M key and value heads of this tensor rank.
"""

from __future__ import annotations

from functools import partial
from itertools import repeat
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.errors import ConfigError
from lightning_moe.layers.kv_cache import KVCache
from lightning_moe.layers.linear import ColumnParallelLinear, RowParallelLinear
from lightning_moe.layers.norm import ParallelRMSNorm, RMSNorm
from lightning_moe.layers.qkv_heads import HeadShape, can_fuse, qkv_heads
from lightning_moe.layers.rope import apply_rope
from lightning_moe.layers.token_layout import TokenLayout
from lightning_moe.layers.ulysses import heads_from_tokens, tokens_from_heads
from lightning_moe.layers.ulysses_overlap import ChunkedHeads
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import even_slice, set_partial_grad

QKNorm = Literal["none", "head", "projection"]


class CausalSelfAttention(nn.Module):
    """``softmax(q k^T / sqrt(H)) v`` over the tokens so far, with rotary positions.

    Heads are split over the axis ``tensor``, key and value heads with their query heads, and once more over the axis
    ``context`` while attending (see the note in :mod:`lightning_moe.layers.ulysses`).

    Args:
        hidden_size: Width ``D`` of the hidden states.
        num_heads: Number of query heads.
        num_kv_heads: Number of key and value heads, a divisor of ``num_heads``; each serves a run of query heads.
        head_size: Width ``H`` of a head.
        mesh: The parallel mesh.
        qk_norm: RMSNorm on queries and keys before the rotation: none, over each head (Qwen3), or over all heads of
            the projection together (OLMoE).
        sliding_window: Number of tokens that a token attends to, itself included; None for all. The mask given to
            ``forward`` must be made with it.
        norm_eps: Added to the mean squares of these norms.
        init_std: Standard deviation of the initial query, key and value projections; ``D^-0.5`` when None.
        output_init_std: That of the output projection; ``(heads * H)^-0.5`` when None.

    Attributes:
        qkv_proj: Weight ``[(N + 2M) * H, D]``: this rank's rows of the query, the key and the value projection.
        o_proj: Weight ``[D, N * H]``.
        q_norm: None without ``qk_norm``.
        k_norm: Likewise.
        num_kv_heads: Key and value heads ``M`` held here, the number that a :class:`KVCache` needs.
        exchange_chunks: Number of chunks that heads are exchanged in over the axis ``context``, under the computation
            of others (see the note in :mod:`lightning_moe.layers.ulysses_overlap`); 1 exchanges all heads at once and
            waits for them. As many as fit where a rank has fewer heads. A ``projection`` norm needs all queries, so
            with it they are projected at once and the chunks begin after it. So are those of a projection that is more
            than its weight (that has hooks, or an adapter in its place): chunks end before such an output projection.
            Chunks cannot be differentiated twice. May be changed between forward passes.
        wait_at_once: Whether every chunk is waited for where it is sent: the same computation without overlap.
        sm_margin: Multiprocessors of a GPU that the projections of chunks leave to messages.

    Raises:
        ConfigError: The heads cannot be split this way.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        mesh: ParallelMesh,
        *,
        qk_norm: QKNorm = "none",
        sliding_window: int | None = None,
        norm_eps: float = 1e-6,
        init_std: float | None = None,
        output_init_std: float | None = None,
    ) -> None:
        super().__init__()
        _check_heads(num_heads, num_kv_heads, mesh)
        self.exchange_chunks = 1
        self.wait_at_once = False
        self.sm_margin = 0
        self.num_heads = num_heads // mesh.size(Axis.TENSOR)
        self.num_kv_heads = num_kv_heads // mesh.size(Axis.TENSOR)
        self.head_size = head_size
        self.sliding_window = sliding_window
        self._mesh = mesh
        query_width, key_width = num_heads * head_size, num_kv_heads * head_size
        # The ranks divide the heads, so these slices end between heads.
        query, key = even_slice(query_width, mesh, Axis.TENSOR), even_slice(key_width, mesh, Axis.TENSOR)
        index = (*query, *(query_width + row for row in key), *(query_width + key_width + row for row in key))
        self.qkv_proj = ColumnParallelLinear(
            hidden_size, query_width + 2 * key_width, mesh, index=index, init_std=init_std
        )
        self.o_proj = RowParallelLinear(query_width, hidden_size, mesh, index=query, init_std=output_init_std)
        self.qk_norm = qk_norm
        self.q_norm: RMSNorm | ParallelRMSNorm | None = None
        self.k_norm: RMSNorm | ParallelRMSNorm | None = None
        if qk_norm == "projection":
            self.q_norm = ParallelRMSNorm(query_width, mesh, query, norm_eps)
            self.k_norm = ParallelRMSNorm(key_width, mesh, key, norm_eps)
        elif qk_norm == "head":
            self.q_norm, self.k_norm = RMSNorm(head_size, norm_eps), RMSNorm(head_size, norm_eps)
            if mesh.size(Axis.TENSOR) > 1:  # every rank holds the whole gain and applies it to its own heads
                set_partial_grad(self.q_norm, "weight")
                set_partial_grad(self.k_norm, "weight")

    def forward(
        self,
        hidden: Tensor,
        layout: TokenLayout,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Let every token attend to those before it.

        Args:
            hidden: Hidden states as ``layout`` says: ``[T / tensor, D]`` or ``[T, D]``.
            layout: How the hidden states are laid out.
            rope: ``(cos, sin)`` of this rank's tokens, each ``[B, Q, H]`` or ``[1, Q, H]``.
            mask: From :func:`~lightning_moe.layers.attention_mask`, for whole sequences.
            cache: Keys and values of the tokens before these, to which theirs are added; without context parallelism.

        Returns:
            The shape of ``hidden``.
        """
        group = self._mesh.active_group(Axis.CONTEXT) if layout.context_parallel else None
        if group is not None and self.exchange_chunks > 1 and self.num_heads > self._mesh.size(Axis.CONTEXT):
            assert cache is None, "a cache holds whole sequences"
            by_chunks: Tensor = self._forward_by_chunks(hidden, layout, rope, mask, group)
            return by_chunks
        query, key, value = self._placed_heads(self.qkv_proj(hidden, layout), layout, rope)
        if cache is not None:
            assert not layout.context_parallel, "a cache holds whole sequences"
            key, value = cache.append(key, value)
        attended = self._attend(*heads_from_tokens(query, key, value, group), mask)
        features = tokens_from_heads(attended, group).reshape(layout.num_tokens, -1)
        out: Tensor = self.o_proj(features, layout)
        return out

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # as all communication: see apply_eagerly
    def _forward_by_chunks(
        self,
        hidden: Tensor,
        layout: TokenLayout,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        group: dist.ProcessGroup,
    ) -> Tensor:
        """The same with heads that are exchanged in chunks."""
        heads = ChunkedHeads(
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            group,
            self.exchange_chunks,
            wait_at_once=self.wait_at_once,
            sm_margin=self.sm_margin,
        )
        tensor_group = self._mesh.active_group(Axis.TENSOR)
        # Where a projection is more than its weight, it is called. What ranks send each other is the same either way.
        if self.qk_norm == "projection" or not _is_plain(self.qkv_proj, ColumnParallelLinear):
            chunks = heads.cut(*self._heads(self.qkv_proj(hidden, layout), layout))
        else:
            chunks = heads.project(hidden, self.qkv_proj.weight, layout, tensor_group)
        norms = (self.q_norm, self.k_norm)
        # A chunk is a query alone where an earlier one has brought its keys and values.
        placed = ([*map(self._placed, parts, norms, repeat(rope)), *parts[2:]] for parts in chunks)
        attended = heads.attend(placed, partial(self._attend, mask=mask))
        if _is_plain(self.o_proj, RowParallelLinear):
            return heads.project_back(attended, self.o_proj.weight, layout, tensor_group)
        out: Tensor = self.o_proj(heads.join(attended).flatten(0, 1), layout)
        return out

    def _placed_heads(
        self, projected: Tensor, layout: TokenLayout, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Heads of ``[T, (N + 2M) * H]`` as :meth:`_heads` splits them, queries and keys normalised and rotated."""
        norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        alike = len({norm.eps for norm in norms}) < 2
        if alike and can_fuse(projected, rope) and all(_is_plain(norm, RMSNorm) for norm in norms):
            gains, eps = ((norms[0].weight, norms[1].weight), norms[0].eps) if norms else (None, 0.0)
            return qkv_heads(projected.view(layout.batch, layout.length, -1), gains, rope, self._head_shape, eps)
        query, key, value = self._heads(projected, layout)
        return self._placed(query, self.q_norm, rope), self._placed(key, self.k_norm, rope), value

    @property
    def _head_shape(self) -> HeadShape:
        return HeadShape(self.num_heads, self.num_kv_heads, self.head_size)

    def _heads(self, projected: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor]:
        """Split ``[T, (N + 2M) * H]`` into heads ``[B, Q, N, H]``, ``[B, Q, M, H]`` and ``[B, Q, M, H]``."""
        query, key, value = projected.split(self._head_shape.widths, dim=-1)
        if self.qk_norm == "projection":
            assert self.q_norm is not None
            assert self.k_norm is not None
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.reshape(layout.batch, layout.length, -1, self.head_size) for x in (query, key, value))
        return query, key, value

    def _placed(self, heads: Tensor, norm: nn.Module | None, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate queries or keys ``[B, Q, heads, H]`` by their positions, normalised if the norm is of single heads."""
        if self.qk_norm == "head":
            assert norm is not None
            heads = norm(heads)
        cos, sin = (table[:, :, None] for table in rope)
        return apply_rope(heads, cos, sin)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of ``[B, Q, heads, H]`` over ``[B, S, fewer heads, H]``; gives ``[B, Q, heads, H]``."""
        queries, keys, groups = query.shape[1], key.shape[1], query.shape[2] // key.shape[2]
        window = self.sliding_window
        assert mask is not None or window is None or window >= keys, "a window shorter than the sequence needs a mask"
        causal = mask is None and queries > 1
        assert not causal or queries == keys, "tokens after a cache need a mask"
        # Of CUDA's fused kernels only flash attention knows grouped heads; it takes 16-bit types and no mask.
        grouped = groups > 1 and mask is None and (not query.is_cuda or query.dtype.itemsize == 2)
        if groups > 1 and not grouped:
            key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            is_causal=causal,
            enable_gqa=grouped,
        )
        return attended.transpose(1, 2)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a projection (or a norm) does no more than what its class does with its weight."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    own = type(module).forward is kind.forward and "forward" not in vars(module)
    return own and not any(getattr(module, name) for name in hooks)


def _check_heads(num_heads: int, num_kv_heads: int, mesh: ParallelMesh) -> None:
    if num_heads % num_kv_heads:
        raise ConfigError("num_kv_heads", num_kv_heads, f"a divisor of num_heads = {num_heads}")
    tensor, context = mesh.size(Axis.TENSOR), mesh.size(Axis.CONTEXT)
    if num_kv_heads % tensor:  # then it does not divide num_heads either, or not with whole groups
        raise ConfigError(
            "parallel.tensor",
            tensor,
            f"a divisor of num_kv_heads = {num_kv_heads}",
            "each tensor rank holds whole key and value heads; use fewer tensor ranks, or context ranks instead",
        )
    if num_heads // tensor % context:
        raise ConfigError(
            "parallel.context",
            context,
            f"a divisor of num_heads / tensor = {num_heads // tensor}",
            "while attending, each context rank holds whole heads",
        )
