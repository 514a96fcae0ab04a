"""Decides, call by call, how an expert layer exchanges its rows, and runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_moe.config.overlap import OverlapConfig
from lightning_moe.moe.dispatch import RowCounts, combine, dispatch
from lightning_moe.moe.overlap.call import OverlappedCall, RowRoutes, piece_offsets
from lightning_moe.moe.overlap.choice import LARGE_PRODUCT, OverlapChoice
from lightning_moe.moe.overlap.cost import LayerShape, Prediction, Rates, predict
from lightning_moe.moe.overlap.function import Waiting, collect, exchange_and_compute, pack
from lightning_moe.moe.overlap.plan import Chunking, plan_exchange
from lightning_moe.moe.overlap.transport import ChunkExchange, SimulatedLink
from lightning_moe.moe.overlap.trial import seconds_of
from lightning_moe.moe.rows_to_send import RowsToSend
from lightning_moe.parallel.layout import Axis
from lightning_moe.weight_grad.queue import WeightGradQueue
from lightning_moe.weight_grad.sink import WeightGrad

if TYPE_CHECKING:
    from lightning_moe.moe.layer import MoELayer

_GRAD_GROUPS = 4
"""Parts that each weight's gradient is computed in, so that they fit into waits."""


class ExpertOverlap:
    """How expert layers overlap; made by the strategy and shared by its layers.

    Args:
        config: What the user wants.
        rates: Measured rates, equal on all ranks; None where the config leaves nothing to be chosen, else ``auto``
            means messages between pairs of ranks, in chunks by source if these are tall.
        queue: Deferred weight gradients, which are computed in the waits that the rates predict.
        link: Simulated speed, on CPUs.
        large_product: Multiply-adds of a chunk's rows of one expert from which they have a product of their own, and
            all rows of an expert follow each other.
        trials: For shapes of calls, the seconds that an all-to-all and overlap took. With ``auto`` calls of other
            shapes are tried in training, and added; None lets the cost model alone decide.
        report: Is told what each trial has found.
    """

    def __init__(
        self,
        config: OverlapConfig,
        rates: Rates | None = None,
        queue: WeightGradQueue | None = None,
        link: SimulatedLink | None = None,
        large_product: float = LARGE_PRODUCT,
        trials: dict[LayerShape, tuple[float, float]] | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.config, self.rates, self.queue, self.link = config, rates, queue, link
        self.choice = OverlapChoice(config, rates, large_product, trials, report)
        self._predicted: dict[tuple[LayerShape, Chunking, bool, bool], Prediction] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> ExpertOverlap:
        return self  # copies of a layer, as averaging callbacks make them, exchange rows in the same way

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"queue": None}  # it belongs to a strategy's gradients, which stay here

    def begin(self, layer: MoELayer, tokens: Tensor, weights: Tensor, sending: RowsToSend) -> OverlappedRows:
        """Begin a call, before the other ranks have said what they send.

        Args:
            layer: The layer.
            tokens: ``[T, D]`` in the dtype of the computation.
            weights: ``[T, K]``.
            sending: What this rank sends.
        """
        return OverlappedRows(self, layer, tokens, weights, sending)

    @torch.no_grad()
    def serve(self, layer: MoELayer, tokens: Tensor, slots: Tensor, counts: RowCounts) -> None:
        """Take part in a call with no rows of this rank's.

        Args:
            layer: The layer.
            tokens: ``[0, D]`` in the dtype of the rows.
            slots: int64 ``[0, K]``.
            counts: Rows that each rank sends to each slot.
        """
        sizes = slots.new_zeros(len(counts.numbers[0]))
        weights = torch.empty(slots.shape, dtype=torch.float32, device=slots.device)
        rows = self.begin(layer, tokens, weights, RowsToSend.of(slots, None, sizes, padded=False))
        rows.finish(counts, tokens.dtype)

    def filler(self, shape: LayerShape, chunking: Chunking) -> Callable[[bool, int], None]:
        """What offers the idle time of a call's waits to the queue."""

        def fill(backward: bool, position: int) -> None:
            queue, rates = self.queue, self.rates
            if queue is None or rates is None or not queue.num_held:
                return
            key = shape, chunking, backward, queue.capturing
            if key not in self._predicted:
                self._predicted[key] = predict(
                    shape, rates, chunking, backward=backward, save=self.config.save, deferred=queue.capturing
                )
            idle = self._predicted[key].idle
            if position < len(idle) and idle[position] > 0:
                queue.run_within(idle[position], self._seconds)

        return fill

    def _seconds(self, grad: WeightGrad) -> float:
        assert self.rates is not None
        # The tallest products of the table: rows per expert are not known of any weight gradient.
        return grad.flops / self.rates.flops_per_second(float("inf")) + self.rates.launch


class OverlappedRows:
    """The routed experts of one call: rows are packed at once, and the rest follows when the counts are known."""

    def __init__(
        self, overlap: ExpertOverlap, layer: MoELayer, tokens: Tensor, weights: Tensor, sending: RowsToSend
    ) -> None:
        self._overlap, self._layer = overlap, layer
        self._tokens, self._weights, self._sending = tokens, weights, sending
        self._routes: RowRoutes | None = None
        self._payload: Tensor | None = None
        self._waiting = Waiting()
        # By a guess from this rank's rows where the model decides. What is packed before the shared expert is called
        # keeps the device busy while counts are exchanged, and lets gradients return under it (see function.py).
        if sending.count is not None and overlap.choice.chunking(_shape_of(layer, tokens, sending.count)) is not None:
            self._pack(sending.count)

    def finish(self, counts: RowCounts, dtype: torch.dtype) -> Tensor:
        """Exchange the rows, and compute.

        Args:
            counts: Rows that each rank sends to each slot.
            dtype: Dtype of the result.

        Returns:
            ``[T, D]``.
        """
        layer, overlap, rank = self._layer, self._overlap, self._layer.mesh.rank(Axis.EXPERT_MODEL)
        shape = _shape_of(layer, self._tokens, sum(map(sum, counts.numbers)) / len(counts.numbers))
        untried = overlap.choice.untried(shape)
        # Every call that records gradients, so that what is run again in backward goes the same way. All ranks record
        # them, or none does: the headers say so.
        if untried is not None and torch.is_grad_enabled() and self._is_trained:
            overlap.choice.add_trial(shape, self._try(counts, untried, dtype))
        chunking = overlap.choice.chunking(shape)
        if chunking is None:
            self._payload = None
            return layer.run_experts(self._tokens, self._weights, self._sending.plan(counts, rank), dtype)
        if self._payload is None:
            self._pack(sum(counts.numbers[rank]))
        assert self._routes is not None
        assert self._payload is not None
        call = self._waiting.call = self._call(counts, chunking, self._routes, overlap.filler(shape, chunking))
        with torch.autocast(self._tokens.device.type, enabled=False):
            again = self._again(self._tokens, self._weights)
            rows = exchange_and_compute(self._payload, *layer.experts.projections, again, call)
            self._payload = None  # nothing needs it once its rows have left
            return collect(rows, call, dtype)

    @property
    def _is_trained(self) -> bool:
        return any(each.requires_grad for each in (self._tokens, self._weights, *self._layer.experts.projections))

    def _try(self, counts: RowCounts, chunking: Chunking, dtype: torch.dtype) -> tuple[float, float]:
        """Seconds of an all-to-all and of overlap on the rows of this call; a collective call."""
        layer, rank = self._layer, self._layer.mesh.rank(Axis.EXPERT_MODEL)
        group, experts = layer.expert_group, layer.experts
        routes = self._routes or self._sending.routes(sum(counts.numbers[rank]))

        def blocking(tokens: Tensor, weights: Tensor, up: nn.Parameter, down: nn.Parameter) -> Tensor:
            plan = self._sending.plan(counts, rank)
            rows = dispatch(tokens, plan, group)
            rows = experts.forward_with(up, down, rows, plan.expert_counts, plan.expert_offsets)
            return combine(rows, weights, plan, group, dtype)

        def overlapped(tokens: Tensor, weights: Tensor, up: nn.Parameter, down: nn.Parameter) -> Tensor:
            waiting = Waiting()
            payload = pack(tokens, weights, routes, waiting)
            call = waiting.call = self._call(counts, chunking, routes, _nothing_to_fill)
            rows = exchange_and_compute(payload, up, down, self._again(tokens, weights), call)
            return collect(rows, call, dtype)

        first, second = seconds_of(
            (blocking, overlapped),
            self._tokens,
            self._weights,
            experts.projections,
            group,
            deferred=self._overlap.queue is not None,
        )
        return first, second

    def _call(
        self, counts: RowCounts, chunking: Chunking, routes: RowRoutes, fill: Callable[[bool, int], None]
    ) -> OverlappedCall:
        layer, config = self._layer, self._overlap.config
        assert layer.expert_group is not None
        plan = plan_exchange(counts.numbers, layer.mesh.rank(Axis.EXPERT_MODEL), chunking)
        return OverlappedCall(
            plan,
            routes,
            ChunkExchange(layer.expert_group, self._overlap.link, config.wait_at_once),
            piece_offsets(plan, self._tokens.device),
            layer.experts.activation,
            layer.experts.grouped_gemm,
            config.save,
            _GRAD_GROUPS,
            self._overlap.choice.sm_margin(len(counts.numbers)),
            fill,
        )

    def _again(self, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor] | None:
        """What the send buffer is made of once more, where backward exchanges it again."""
        return (tokens.detach(), weights.detach()) if self._overlap.config.save == "redispatch" else None

    def _pack(self, num_rows: int) -> None:
        self._routes = self._sending.routes(num_rows)
        self._payload = pack(self._tokens, self._weights, self._routes, self._waiting)


def _nothing_to_fill(backward: bool, position: int) -> None:
    return


def _shape_of(layer: MoELayer, tokens: Tensor, rows: float) -> LayerShape:
    """Shape of a call in which each rank sends so many rows; they are rounded, so that few different shapes are met."""
    up, down = layer.experts.projections
    step = 2 ** max(0, int(rows).bit_length() - 4)  # to an eighth or less
    return LayerShape(
        ranks=layer.mesh.size(Axis.EXPERT_MODEL),
        local_slots=up.shape[0],
        hidden=tokens.shape[1],
        up_width=up.shape[1],
        inner=down.shape[2],
        rows=max(1, round(rows / step) * step),
        itemsize=tokens.element_size(),
    )
