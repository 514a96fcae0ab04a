"""Exchange and experts as one pipeline over chunks, forward and backward.

T tokens, K choices of each, R rows of the send buffer, C rows that this rank computes, E local slots, D model width,
U and F widths of an expert's first projection and of its activation.

[Note: three functions]
:func:`pack` makes the send buffer, :func:`exchange_and_compute` sends, computes and sends back, :func:`collect` adds up
each token's rows. What the second one posts last is waited for by the third, in backward by the first. So what
autograd does in between hides communication, too: the shared expert, which is called after :func:`pack`, runs forward
while the host learns the row counts and backward while gradients return (autograd runs what was called later first).

[Note: order of a call]
All dispatches are posted first, and the own rows' first projection covers them; on CUDA a piece of it is queued before
each, since posting takes the host a while. Then each chunk is waited for, computed and
posted back; the own rows' second projection covers the last returns. Backward does the same with gradients, and what
covers the last returns is the weight gradients: those that no queue takes for later.

[Note: probabilities]
The router's weight multiplies the activation before the second projection, so a token's rows are simply added up, and
the rows that come back are not kept. Weights ride in the rows' pads, their gradients in those of the rows' gradients
(see payload.py); both would otherwise be exchanges of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_moe.moe.overlap import payload as rows_with_pads
from lightning_moe.moe.overlap import scaled_activation
from lightning_moe.moe.overlap.call import OverlappedCall, RowRoutes
from lightning_moe.moe.overlap.matrices import ExpertMatrices
from lightning_moe.moe.overlap.plan import Chunk, Piece
from lightning_moe.moe.overlap.transport import Pending, post_between, wait_for_all
from lightning_moe.moe.rows import sum_choices, take_rows
from lightning_moe.weight_grad.grouped_segments import SegmentedMatmulGrad, bounds_of
from lightning_moe.weight_grad.sink import WeightGradSink, sink_of


class Waiting:
    """What :func:`pack` is told later: the call, whose gradients its backward waits for."""

    call: OverlappedCall | None = None


def pack(tokens: Tensor, weights: Tensor, routes: RowRoutes, waiting: Waiting) -> Tensor:
    """The send buffer.

    Args:
        tokens: ``[T, D]`` in the dtype of the computation.
        weights: ``[T, K]``.
        routes: Choices and rows.
        waiting: To be told of the call.

    Returns:
        ``[R, D + pad]``.
    """
    payload: Tensor = _Pack.apply(tokens, weights, routes, waiting)  # type: ignore[no-untyped-call]
    return payload


def exchange_and_compute(
    payload: Tensor, up: Tensor, down: Tensor, again: tuple[Tensor, Tensor] | None, call: OverlappedCall
) -> Tensor:
    """Send rows to their experts, compute, and begin to send the results back.

    Args:
        payload: The send buffer ``[R, D + pad]``.
        up: ``[E, U, D]``; its gradients go to its sink, if it has one.
        down: ``[E, D, F]``; likewise.
        again: Tokens and weights to make the send buffer of once more, where backward exchanges it again.
        call: The call.

    Returns:
        ``[R, D]``, for :func:`collect` alone: it may not have arrived.
    """
    tokens, weights = again or (None, None)
    # Inside the function gradients are never recorded, and what needs them says so under no_grad, too.
    records = torch.is_grad_enabled() and any(each.requires_grad for each in (payload, up, down))
    rows: Tensor = _Experts.apply(payload, up, down, tokens, weights, call, records)  # type: ignore[no-untyped-call]
    return rows


def collect(rows: Tensor, call: OverlappedCall, dtype: torch.dtype) -> Tensor:
    """Wait for the rows ``[R, D]`` and add up each token's: ``[T, D]`` in ``dtype``."""
    out: Tensor = _Collect.apply(rows, call, dtype)  # type: ignore[no-untyped-call]
    return out


class _Pack(torch.autograd.Function):
    """The send buffer ``[R, D + pad]`` from tokens ``[T, D]`` and weights ``[T, K]``."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weights: Tensor, routes: RowRoutes, waiting: Waiting) -> Tensor:
        ctx.routes, ctx.waiting, ctx.dtypes = routes, waiting, (tokens.dtype, weights.dtype)
        return rows_with_pads.pack(tokens, weights, routes.choice_of_row, routes.row_filled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        routes: RowRoutes = ctx.routes
        if ctx.waiting.call is not None:
            ctx.waiting.call.wait_for_grads()
        tokens, weights = rows_with_pads.sum_back(
            grads, routes.row_of_choice, routes.choice_sent, routes.top_k, *ctx.dtypes
        )
        return tokens, weights, None, None


class _Experts(torch.autograd.Function):
    """The experts' rows ``[R, D]``, on their way back, from the send buffer and the experts' weights."""

    @staticmethod
    def forward(
        ctx: Any,
        payload: Tensor,
        up: Tensor,
        down: Tensor,
        tokens: Tensor | None,
        weights: Tensor | None,
        call: OverlappedCall,
        records: bool,
    ) -> Tensor:
        rows = payload.new_empty((call.plan.num_computed, payload.shape[1]))
        matrices = ExpertMatrices(up, down, payload.dtype, call.offsets, call.grouped_gemm, call.sm_margin)
        projected: list[Tensor] = []

        def first_half(piece: Piece) -> Tensor:
            arrived = rows[piece.rows]
            first = matrices.project(piece, arrived)
            if records and call.save == "fc1":
                projected.append(first)
            return scaled_activation.forward(first, rows_with_pads.probabilities_of(arrived), call.activation)

        def own_half(piece: Piece, sent: Tensor) -> Tensor:
            # Not from where it is sent: backward may compute it again, and products depend on how rows are aligned.
            rows[piece.rows].copy_(sent)
            return first_half(piece)

        # The host has just waited for the row counts, so the device has nothing to do.
        own = [partial(own_half, *each) for each in call.own_pieces(payload)]
        if call.exchange.wait_at_once:
            arrivals, inner = _dispatch(call, payload, rows), [half() for half in own]
        else:
            posts = [partial(call.exchange.dispatch, chunk, payload, rows) for _, chunk in _remote(call)]
            arrivals, inner = post_between(posts, own, payload.device)
        returned = payload.new_empty((call.plan.num_sent, up.shape[2]))
        for i, chunk in _remote(call):
            call.fill(False, i - 1)
            arrivals[i - 1].wait()
            results = [matrices.project_down(piece, first_half(piece)) for piece in chunk.pieces]
            call.returning.append(call.exchange.give_back(chunk, results, returned))
        for (piece, target), activated in zip(call.own_pieces(returned), inner, strict=True):
            target.copy_(matrices.project_down(piece, activated))
        ctx.call, ctx.sinks = call, (sink_of(up), sink_of(down))
        if call.save == "fc1":
            ctx.save_for_backward(up, down, rows, *projected)
        elif call.save == "recompute":
            ctx.save_for_backward(up, down, rows)
        else:
            assert tokens is not None, "the send buffer is packed again"
            assert weights is not None, "the send buffer is packed again"
            ctx.save_for_backward(up, down, tokens, weights)
        return returned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: OverlappedCall = ctx.call
        up, down, *saved = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            grads = _backward(call, grad.contiguous(), (up, down), saved, ctx.sinks, ctx.needs_input_grad)
        # Where gradients of weights alone are asked for, autograd does not get to what waits for those of rows.
        torch.autograd.Variable._execution_engine.queue_callback(partial(wait_for_all, call.returning_grads))
        return *grads, None, None, None, None


class _Collect(torch.autograd.Function):
    """Tokens ``[T, D]`` as sums of their choices' rows ``[R, D]``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, call: OverlappedCall, dtype: torch.dtype) -> Tensor:
        routes = call.routes
        ctx.routes, ctx.dtype = routes, rows.dtype
        call.wait_for_rows()
        # Saved, though it is at hand: a checkpointed function that runs again ends with the last tensor that is saved.
        # It must not end before the rows are here, or they would be written to memory that has been freed.
        ctx.save_for_backward(routes.choice_of_row)
        return sum_choices(rows, routes.row_of_choice, routes.choice_sent, None, routes.top_k, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        routes: RowRoutes = ctx.routes
        (choice_of_row,) = ctx.saved_tensors
        return take_rows(grad.to(ctx.dtype), choice_of_row // routes.top_k, routes.row_filled), None, None


def _backward(
    call: OverlappedCall,
    grad: Tensor,
    weights: tuple[Tensor, Tensor],
    saved: Sequence[Tensor],
    sinks: tuple[WeightGradSink | None, WeightGradSink | None],
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    plan = call.plan
    rows, *projected = saved
    rows_arrivals: list[Pending] = []
    if call.save == "redispatch":
        (rows, rows_arrivals), projected = _exchange_again(call, *saved), []
    grads = grad.new_empty((plan.num_computed, grad.shape[1]))
    arrivals = _dispatch(call, grad, grads)
    _copy_own(call, grad, grads)
    matrices = ExpertMatrices(*weights, grad.dtype, call.offsets, call.grouped_gemm, call.sm_margin)
    kept = iter(projected)
    grad_projected = grad.new_empty((plan.num_computed, weights[0].shape[1]))
    inner = grad.new_empty((plan.num_computed, weights[1].shape[2]))
    back = grad.new_empty((plan.num_sent, rows.shape[1]))
    own_results = iter(call.own_pieces(back))
    for i, chunk in enumerate(plan.chunks):
        if i:
            call.fill(True, i - 1)
        if i and rows_arrivals:
            rows_arrivals[i - 1].wait()
        # Before the gradients are waited for: it needs none of them.
        firsts = [next(kept) if projected else matrices.project(piece, rows[piece.rows]) for piece in chunk.pieces]
        if i:
            arrivals[i - 1].wait()
        results = []
        for piece, first in zip(chunk.pieces, firsts, strict=True):
            grad_first = grad_projected[piece.rows]
            grad_probabilities = scaled_activation.backward(
                first,
                rows_with_pads.probabilities_of(rows[piece.rows]),
                matrices.grad_inner(piece, grads[piece.rows]),
                call.activation,
                grad_first,
                inner[piece.rows],
            )
            if needed[0]:
                out = grad.new_empty((first.shape[0], rows.shape[1])) if i else next(own_results)[1]
                rows_with_pads.put_back(matrices.grad_hidden(piece, grad_first), grad_probabilities, out)
                results.append(out)
        if i and needed[0]:
            call.returning_grads.append(call.exchange.give_back(chunk, results, back))
    hidden = rows_with_pads.hidden_of(rows)
    operands = ((grad_projected, hidden), (grads, inner))
    found = [
        _weight_grad(call, *pair, weight, sink) if wanted else None
        for pair, weight, sink, wanted in zip(operands, weights, sinks, needed[1:3], strict=True)
    ]
    return back if needed[0] else None, *found


def _dispatch(call: OverlappedCall, source: Tensor, buffer: Tensor) -> list[Pending]:
    """Post the rows of all remote chunks."""
    return [call.exchange.dispatch(chunk, source, buffer) for _, chunk in _remote(call)]


def _exchange_again(call: OverlappedCall, tokens: Tensor, weights: Tensor) -> tuple[Tensor, list[Pending]]:
    """The rows that this rank computes, on their way once more; only messages keep the send buffer."""
    routes = call.routes
    payload = rows_with_pads.pack(tokens, weights, routes.choice_of_row, routes.row_filled)
    rows = payload.new_empty((call.plan.num_computed, payload.shape[1]))
    arrivals = _dispatch(call, payload, rows)
    _copy_own(call, payload, rows)
    return rows, arrivals


def _copy_own(call: OverlappedCall, source: Tensor, buffer: Tensor) -> None:
    """Bring this rank's own rows from the send buffer to where they are computed, so that it can be freed."""
    for piece, own in call.own_pieces(source):
        buffer[piece.rows].copy_(own)


def _remote(call: OverlappedCall) -> list[tuple[int, Chunk]]:
    return list(enumerate(call.plan.chunks))[1:]


def _weight_grad(
    call: OverlappedCall, grad_output: Tensor, rows: Tensor, weight: Tensor, sink: WeightGradSink | None
) -> Tensor | None:
    """Hand a weight's gradient to its sink, in parts that fit between other work; or return it, for autograd."""
    num_slots = weight.shape[0]
    segments = tuple(tuple(runs) for runs in call.plan.segments(slice(0, num_slots)))
    num_runs = max([1, *map(len, segments)])

    def part(start: int, stop: int) -> SegmentedMatmulGrad:
        own = segments[start:stop]
        return SegmentedMatmulGrad(grad_output, rows, own, bounds_of(own, rows.device), start, num_slots, num_runs)

    if sink is not None:
        groups = min(call.grad_groups, num_slots) if sink.defers else 1
        edges = [num_slots * g // groups for g in range(groups + 1)]
        # A sink takes all parts or none: what it answers depends on the pass, not on the part.
        if all(sink.take(part(a, b)) for a, b in pairwise(edges)):
            return None
    return part(0, num_slots).compute().to(weight.dtype)
