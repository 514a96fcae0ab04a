"""Matrix products of a column-parallel and a row-parallel layer, cut into chunks of heads around an exchange of them.

T tokens of a context rank, D model width, P tensor ranks, n chunks; C context ranks, B batch, Q = T / B, H head width.

[Note: products by chunks]
The column-parallel product gives a chunk of features at a time, each of which is sent while the next is computed. The
row-parallel product takes chunks as they arrive and adds its summands up. Both read runs of the rows or columns of
their weight, joined to one matrix: a chunk has heads of every context rank, which lie apart.

Summands are added in float32 at least and rounded once, in the output of the row-parallel product and in the gradient
of the column-parallel product's input. Where a chunk has come back in the backward pass, its summand and its weight
gradient (a :class:`~lightning_moe.weight_grad.segments.PartOfGrad`) are computed while the next one is on its way.

With tensor parallelism each product communicates as the whole one does (see :mod:`lightning_moe.layers.column_matmul`
and :mod:`lightning_moe.layers.row_matmul`), once for all chunks, except that nothing hides the sum of the input's
gradient over tensor ranks. Weight gradients that are deferred gather their other operand once for each chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.layers.pending_exchange import PendingExchange, refuse_second_derivatives
from lightning_moe.parallel.collectives import (
    PendingTensor,
    all_gather,
    reduce_scatter,
    start_all_gather,
    summands_to_copies,
)
from lightning_moe.parallel.sm_margin import SmMargin
from lightning_moe.weight_grad import (
    GatheredInputGrad,
    GatheredOutputGrad,
    MatmulGrad,
    WeightGrad,
    compute_dtype,
    deliver,
    sink_of,
)
from lightning_moe.weight_grad.segments import PartOfGrad

Runs = tuple[slice, ...]
"""Rows or columns of a weight that a chunk reads."""


class ColumnMatmulByChunks:
    """``input @ weight[rows]^T`` for all tokens, for some rows after others.

    Dtypes and weight gradients are those of :func:`~lightning_moe.layers.column_matmul.column_matmul`.

    Args:
        input: ``[T / P, D]``, this rank's tokens, with ``sequence_parallel``; else ``[T, D]``, the same on all ranks.
        weight: ``[N, D]``, this tensor rank's rows.
        group: The tensor ranks; None for a world of one.
        sequence_parallel: Whether tensor ranks share the tokens.
        sm_margin: Multiprocessors that products leave to messages; not those of weight gradients, which may be computed
            at any time.
    """

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        group: dist.ProcessGroup | None,
        *,
        sequence_parallel: bool,
        sm_margin: int = 0,
    ) -> None:
        input = input.to(compute_dtype(input))
        margin = SmMargin(sm_margin, input.device)
        self._gradients = _ColumnGradients(weight, group, margin, shared=sequence_parallel and group is not None)
        self._own, self._weight = input.detach(), weight.detach()
        self._tokens = all_gather(self._own, group) if self._gradients.shared else self._own
        self._ticket: Tensor = _Enter.apply(input, weight, self._gradients)  # type: ignore[no-untyped-call]

    def rows(self, runs: Runs) -> Tensor:
        """The features ``[T, rows]`` of some rows, which no other call reads."""
        with torch.autocast(self._own.device.type, enabled=False):
            out: Tensor = _Rows.apply(  # type: ignore[no-untyped-call]
                self._ticket, self._tokens, self._own, self._weight, runs, self._gradients
            )
        return out


def row_matmul_of_arrivals(
    tickets: Sequence[Tensor],
    exchanges: Sequence[PendingExchange],
    columns: Sequence[Runs],
    weight: Tensor,
    group: dist.ProcessGroup | None,
    *,
    sequence_parallel: bool,
    sm_margin: int = 0,
) -> Tensor:
    """The sum over chunks and tensor ranks of ``features @ weight[:, columns]^T``.

    Args:
        tickets: Of chunks of heads that are being exchanged; blocks ``[C, B, Q, heads of the chunk, H]`` arrive, in the
            dtype of the product.
        exchanges: What brings them.
        columns: What each chunk is multiplied by; its heads come in the order of the ranks.
        weight: ``[D, K]``, this tensor rank's columns.
        group: The tensor ranks; None for a world of one.
        sequence_parallel: Whether they share the tokens.
        sm_margin: As of :class:`ColumnMatmulByChunks`.

    Returns:
        ``[T / P, D]`` with ``sequence_parallel``, else ``[T, D]``; in the dtype of the chunks.
    """
    shared = sequence_parallel and group is not None
    with torch.autocast(weight.device.type, enabled=False):
        out: Tensor = _Arrivals.apply(  # type: ignore[no-untyped-call]
            weight,
            _RowSettings(tuple(exchanges), tuple(columns), group, shared, SmMargin(sm_margin, weight.device)),
            *tickets,
        )
        return out if shared else summands_to_copies(out, group)


class _ColumnGradients:
    """Sums of one backward pass over the chunks of a column-parallel product.

    Attributes:
        margin: For products.
        shared: Whether tensor ranks share the tokens, which then are gathered again.
        needs_input: Whether the input wants a gradient.
        needs_weight: Whether the weight wants one.
    """

    def __init__(self, weight: Tensor, group: dist.ProcessGroup | None, margin: SmMargin, *, shared: bool) -> None:
        self.group, self.margin, self.shared = group, margin, shared
        self.needs_input = self.needs_weight = False
        self._sink = sink_of(weight)
        self._dtype, self._shape = weight.dtype, tuple(weight.shape)
        self._input_grad: Tensor | None = None
        self._weight_grad: Tensor | None = None
        self._gather: PendingTensor | None = None
        self._gathered: Tensor | None = None

    def add(self, grad: Tensor, own: Tensor | None, weight: Tensor | None, runs: Runs) -> None:
        """Add the gradients of a chunk, from that of its features ``[T, rows]``; operands of what is wanted."""
        defers = self._sink is not None and self._sink.defers
        gathers = self.shared and self.needs_weight and not defers
        if gathers and self._gather is None and self._gathered is None:
            assert self.group is not None
            assert own is not None
            self._gather = start_all_gather(own, self.group)
        if self.needs_input:
            assert weight is not None
            with self.margin:
                self._input_grad = _add_product(self._input_grad, grad, _joined(weight, runs, 0).to(grad.dtype))
        if self.needs_weight:
            assert own is not None
            part: WeightGrad
            if self.shared and defers:
                assert self.group is not None
                part = GatheredInputGrad(grad, own, self.group)
            else:
                part = MatmulGrad(grad, self._tokens() if gathers else own)
            rest = deliver(PartOfGrad(part, runs, self._shape), self._sink, self._dtype)
            self._weight_grad = _add(self._weight_grad, rest)

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """The sums, where there are any, as after the last chunk; forgets them and all else of the backward pass."""
        sums = self._input_grad, self._weight_grad
        self._input_grad = self._weight_grad = self._gather = self._gathered = None
        return sums

    def _tokens(self) -> Tensor:
        if self._gather is not None:
            self._gathered, self._gather = self._gather.wait(), None
        assert self._gathered is not None
        return self._gathered


class _Enter(torch.autograd.Function):
    """Stands between the input and the weight and all chunks, which are given a ticket: all gradients end here."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, gradients: _ColumnGradients) -> Tensor:
        ctx.gradients, ctx.dtype = gradients, input.dtype
        gradients.needs_input, gradients.needs_weight, _ = ctx.needs_input_grad
        return input.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        refuse_second_derivatives()
        grad, grad_weight = ctx.gradients.take()
        if grad is not None:
            grad = grad.to(ctx.dtype)
            reduce = reduce_scatter if ctx.gradients.shared else summands_to_copies
            grad = reduce(grad, ctx.gradients.group)
        return grad, grad_weight, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, _: Tensor, tokens: Tensor, own: Tensor, weight: Tensor, runs: Runs, gradients: _ColumnGradients
    ) -> Tensor:
        ctx.runs, ctx.gradients = runs, gradients
        # What nothing needs is not kept: tokens of a frozen weight.
        ctx.save_for_backward(own if gradients.needs_weight else None, weight if gradients.needs_input else None)
        with gradients.margin:
            return F.linear(tokens, _joined(weight, runs, 0).to(tokens.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        refuse_second_derivatives()
        own, weight = ctx.saved_tensors
        ctx.gradients.add(grad, own, weight, ctx.runs)
        return None, None, None, None, None, None


class _RowSettings:
    """What a row-parallel product over chunks has beside tensors."""

    def __init__(
        self,
        exchanges: tuple[PendingExchange, ...],
        columns: tuple[Runs, ...],
        group: dist.ProcessGroup | None,
        shared: bool,
        margin: SmMargin,
    ) -> None:
        self.exchanges, self.columns, self.group, self.shared = exchanges, columns, group, shared
        self.margin = margin


class _Arrivals(torch.autograd.Function):
    """Waits for chunks, as :meth:`PendingExchange.finish` does, and multiplies them."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, settings: _RowSettings, *tickets: Tensor) -> Tensor:
        ctx.settings, ctx.sink = settings, sink_of(weight)
        chunks: list[Tensor] = []
        total = None
        for exchange, columns in zip(settings.exchanges, settings.columns, strict=True):
            blocks = exchange.collect()
            ctx.shape = blocks.shape
            chunk = blocks.movedim(0, 2).flatten(2).flatten(0, 1)
            with settings.margin:
                total = _add_product(total, chunk, _joined(weight, columns, 1).to(blocks.dtype).t())
            if ctx.needs_input_grad[0]:
                chunks.append(chunk)
        ctx.save_for_backward(weight, *chunks)
        assert total is not None
        total = total.to(tickets[0].dtype)
        return reduce_scatter(total, settings.group) if settings.shared else total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        weight, *chunks = ctx.saved_tensors
        settings: _RowSettings = ctx.settings
        needs_weight, _, *needs_chunk = ctx.needs_input_grad
        defers = needs_weight and ctx.sink is not None and ctx.sink.defers
        whole = grad
        if settings.shared and (any(needs_chunk) or not defers):
            whole = all_gather(grad, settings.group)
        # The last chunk first, as autograd goes on with it. All are sent before any weight gradient is computed.
        order = list(reversed(range(len(settings.exchanges))))
        ranks, batch, length, _, width = ctx.shape
        for i in order:
            if needs_chunk[i]:
                with settings.margin:
                    features = whole @ _joined(weight, settings.columns[i], 1).to(whole.dtype)
                blocks = features.unflatten(0, (batch, length)).unflatten(2, (ranks, -1, width)).movedim(2, 0)
                settings.exchanges[i].post(blocks)
        grad_weight = None
        for i in order if needs_weight else ():
            part: WeightGrad
            if settings.shared and defers:
                assert settings.group is not None
                part = GatheredOutputGrad(grad, chunks[i], settings.group)
            else:
                part = MatmulGrad(whole, chunks[i])
            part = PartOfGrad(part, settings.columns[i], tuple(weight.shape), dim=1)
            grad_weight = _add(grad_weight, deliver(part, ctx.sink, weight.dtype))
        tickets = (grad.new_empty(0) if needed else None for needed in needs_chunk)
        return grad_weight, None, *tickets


def _joined(weight: Tensor, runs: Runs, dim: int) -> Tensor:
    """Some rows (dim 0) or columns (dim 1) of a weight as one matrix: a view where they are one run."""
    pieces = [weight[run] if dim == 0 else weight[:, run] for run in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``total + left @ right``, in float32 at least; in place."""
    accumulate = total is not None
    if total is None:
        dtype = torch.promote_types(left.dtype, torch.float32)
        total = left.new_empty((left.shape[0], right.shape[1]), dtype=dtype)
    # The product of a weight gradient: it takes 16-bit operands and adds in the precision of the sum.
    MatmulGrad(left.t(), right).add_to(total, accumulate=accumulate)
    return total


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Gradients of disjoint parts of a weight, with zeros elsewhere, for autograd; in place."""
    return part if total is None else total if part is None else total.add_(part)
