"""Ulysses attention whose exchanges hide under its own computation, cut into chunks of heads.

B batch, S sequence, C context ranks, Q = S / C, T = B * Q tokens of this rank; N query heads and M key and value heads
of this tensor rank, H head width.

[Note: chunks of heads]
Heads are independent of each other from the projection to the sum over heads that the output projection is, so a
chunk of them can be on its way while others are computed:

    forward   project 0, send 0, project 1, send 1, ...      queries, keys and values
              wait 0, attend 0, send back 0, wait 1, ...
              wait 0, multiply by its columns of the output projection, wait 1, ...

and autograd takes the same way back (see the note in :mod:`lightning_moe.layers.pending_exchange`). Norms over single
heads and rotary positions act on a head of a token alone, so they come before the exchange, where tokens are fewest. A
norm over all heads together needs all of them: then the whole projection comes first, and the exchanges hide under
attention and the output projection only.

Tokens are never cut: a chunk of tokens of every rank is not a run of the sequence, and must be put back in its place
on each way; FluidMoE, which cuts them, loses that order in its backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.layers.head_chunks import HeadChunk, head_chunks
from lightning_moe.layers.matmul_by_chunks import ColumnMatmulByChunks, Runs, row_matmul_of_arrivals
from lightning_moe.layers.pending_exchange import PendingExchange
from lightning_moe.layers.token_layout import TokenLayout
from lightning_moe.weight_grad import compute_dtype

Heads = list[Tensor]
"""Query, key and value ``[B, tokens, heads, H]`` of a chunk; query alone where the chunk brings no keys."""


class _UnderWay(NamedTuple):
    exchange: PendingExchange
    ticket: Tensor
    widths: list[int]
    """Heads of each of the tensors that are exchanged together."""

    def finish(self) -> Heads:
        """``[B, S, heads, H]`` of each tensor."""
        received = self.exchange.finish(self.ticket)  # [C, B, Q, heads, H]
        return list(received.movedim(0, 1).flatten(1, 2).split(self.widths, dim=2))


class ChunkedHeads:
    """The heads of a layer, cut into chunks; knows where each chunk lies in weights and in activations.

    Args:
        num_heads: Query heads ``N``.
        num_kv_heads: Key and value heads ``M``.
        head_size: Width ``H``.
        group: The context ranks.
        chunks: How many chunks are wanted; as many as fit are made.
        wait_at_once: Whether to wait for every exchange where it is posted: the same computation without overlap.
        sm_margin: Multiprocessors that projections leave to messages.

    Attributes:
        chunks: The chunks, of which there may be a single one.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        group: dist.ProcessGroup,
        chunks: int,
        *,
        wait_at_once: bool = False,
        sm_margin: int = 0,
    ) -> None:
        self._heads, self._kv_heads, self._width = num_heads, num_kv_heads, head_size
        self._group, self._ranks = group, dist.get_world_size(group)
        self._copies = math.lcm(num_kv_heads, self._ranks) // num_kv_heads
        self._wait_at_once, self._sm_margin = wait_at_once, sm_margin
        self.chunks: tuple[HeadChunk, ...] = head_chunks(num_heads, num_kv_heads, self._ranks, chunks)

    def project(
        self, hidden: Tensor, weight: Tensor, layout: TokenLayout, group: dist.ProcessGroup | None
    ) -> Iterator[Heads]:
        """Compute the heads of one chunk after the other, each when it is asked for.

        Args:
            hidden: Hidden states as ``layout`` says.
            weight: ``[(N + 2M) * H, D]``: rows of queries, keys and values.
            layout: How the hidden states are laid out.
            group: The tensor ranks; None for a world of one.

        Yields:
            The chunk's query, key and value ``[B, Q, heads, H]``; heads in the order of the ranks that they are for.
        """
        product = ColumnMatmulByChunks(
            hidden, weight, group, sequence_parallel=layout.sequence_parallel, sm_margin=self._sm_margin
        )
        for chunk in self.chunks:
            queries = self._runs(self._heads, chunk.query, 0)
            keys = [self._kv_runs(chunk, self._heads + skipped) for skipped in (0, self._kv_heads)]
            features = product.rows(_merged(queries, *keys))
            widths = [width for width in map(_width, (queries, *keys)) if width]
            heads = features.split(widths, dim=-1)
            yield [part.reshape(layout.batch, layout.length, -1, self._width) for part in heads]

    def cut(self, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Heads]:
        """The same chunks of ``[B, Q, N, H]``, ``[B, Q, M, H]`` and ``[B, Q, M, H]`` that exist already."""
        sent = [len(chunk.sent) for chunk in self.chunks]
        if self._copies > 1:
            sent = [self._kv_heads if count else 0 for count in sent]  # before they are copied
        else:
            key, value = (heads.unflatten(2, (self._ranks, -1)) for heads in (key, value))
        queries = query.unflatten(2, (self._ranks, -1)).split([len(chunk.query) for chunk in self.chunks], dim=3)
        keys, values = (heads.split(sent, dim=-2) for heads in (key, value))
        for count, parts in zip(sent, zip(queries, keys, values, strict=True), strict=True):
            yield [part.flatten(2, -2) for part in (parts if count else parts[:1])]

    def attend(self, heads: Iterable[Heads], attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[_UnderWay]:
        """Exchange heads for tokens, attend, and begin to exchange tokens for heads.

        Args:
            heads: Of each chunk, as :meth:`project` gives them; what is computed when they are asked for hides the
                exchange of those before.
            attend: Gives ``[B, S, heads, H]`` for query, key and value of a chunk's heads.

        Returns:
            What :meth:`project_back` takes.
        """
        under_way = [self._start(parts) for parts in heads]
        attended = []
        brought, keys = range(0), Heads()
        for chunk, started in zip(self.chunks, under_way, strict=True):
            query, *pair = started.finish()
            if pair:
                brought, keys = chunk.sent, pair
            key, value = keys
            if chunk.key != brought:
                first = chunk.key.start - brought.start
                key, value = (part.narrow(2, first, len(chunk.key)) for part in keys)
            out = attend(query, key, value)
            out = out.to(compute_dtype(out)).unflatten(1, (self._ranks, -1))  # [B, C, Q, heads, H]
            attended.append(self._post(out.movedim(1, 0), [out.shape[3]]))
        return attended

    def project_back(
        self,
        attended: list[_UnderWay],
        weight: Tensor,
        layout: TokenLayout,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """Wait for attended heads and sum up what each chunk adds to the hidden states, in float32 at least.

        Args:
            attended: From :meth:`attend`.
            weight: ``[D, N * H]``.
            layout: How the hidden states are to be laid out.
            group: The tensor ranks; None for a world of one.

        Returns:
            Hidden states as ``layout`` says.
        """
        return row_matmul_of_arrivals(
            [chunk.ticket for chunk in attended],
            [chunk.exchange for chunk in attended],
            [_merged(self._runs(self._heads, chunk.query, 0)) for chunk in self.chunks],
            weight,
            group,
            sequence_parallel=layout.sequence_parallel,
            sm_margin=self._sm_margin,
        )

    def join(self, attended: list[_UnderWay]) -> Tensor:
        """Wait for attended heads: ``[B, Q, N * H]``, what the output projection as a whole takes."""
        received = [chunk.exchange.finish(chunk.ticket) for chunk in attended]  # [C, B, Q, heads of the chunk, H]
        return torch.cat(received, dim=3).movedim(0, 2).flatten(2)

    def _start(self, heads: Heads) -> _UnderWay:
        query, *keys = heads
        if self._copies > 1:
            keys = [part.repeat_interleave(self._copies, dim=2) for part in keys]
        shares = [part.unflatten(2, (self._ranks, -1)).movedim(2, 0) for part in (query, *keys)]
        return self._post(torch.cat(shares, dim=3), [share.shape[3] for share in shares])

    def _post(self, blocks: Tensor, widths: list[int]) -> _UnderWay:
        exchange = PendingExchange(self._group, wait_at_once=self._wait_at_once)
        return _UnderWay(exchange, exchange.start(blocks), widths)

    def _runs(self, heads: int, share: range, skipped: int) -> list[slice]:
        """Features of a range of every rank's share of some heads, which come after ``skipped`` others."""
        starts = (skipped + rank * heads // self._ranks for rank in range(self._ranks))
        return [slice((start + share.start) * self._width, (start + share.stop) * self._width) for start in starts]

    def _kv_runs(self, chunk: HeadChunk, skipped: int) -> list[slice]:
        if not chunk.sent:
            return []
        if self._copies > 1:
            return [slice(skipped * self._width, (skipped + self._kv_heads) * self._width)]
        return self._runs(self._kv_heads, chunk.sent, skipped)


def _merged(*runs: list[slice]) -> Runs:
    """The runs one after the other, those that touch as one."""
    merged: list[slice] = []
    for run in (run for each in runs for run in each):
        if merged and merged[-1].stop == run.start:
            run = slice(merged.pop().start, run.stop)
        merged.append(run)
    return tuple(merged)


def _width(runs: list[slice]) -> int:
    return sum(run.stop - run.start for run in runs)
