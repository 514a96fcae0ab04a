"""What exchange and experts of one layer call take, chunk by chunk or one after the other (torch-free).

R rows that a rank sends, P ranks, L local slots. Routing is taken to be uniform: R / P rows from each rank to each, the
same number for each slot.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log2
from typing import Literal, NamedTuple

from lightning_moe.config.overlap import OverlapConfig
from lightning_moe.moe.overlap.plan import Chunking
from lightning_moe.moe.overlap.timeline import Step, one_after_the_other, pipelined

Save = Literal["fc1", "recompute", "redispatch"]

_PAD = 16
"""Bytes beside a row that carry its weight, or that weight's gradient."""
WORTHWHILE = 0.02
"""Share of the time that overlap must save to be chosen."""
_CLOSE = 0.02
"""Share of the time within which candidates count as equally fast: the model knows no better."""
_FALL = ((16, 0.1), (64, 0.35), (128, 0.6), (256, 0.85), (512, 0.93), (1024, 0.97), (2048, 1.0))
"""Rows of each expert, and what is left of a GPU's rate for them: weights are read for too few rows."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast the machine is, for one width of experts.

    Attributes:
        link_bytes_per_second: What a rank can send to others, while it receives as much.
        latency: Seconds that each message takes beside its bytes.
        gemm: Rows of each expert, ascending, and FLOP/s of a grouped product of so many.
        copy_bytes_per_second: What elementwise operations read and write.
        launch: Seconds that each grouped product takes beside its arithmetic.
        contention: Share of its speed that computation loses while the link is in use; less than 1.
    """

    link_bytes_per_second: float
    latency: float = 20e-6
    gemm: tuple[tuple[float, float], ...]
    copy_bytes_per_second: float = 2e12
    launch: float = 10e-6
    contention: float = 0.0

    def __post_init__(self) -> None:
        assert self.gemm
        assert all(fewer[0] < more[0] for fewer, more in pairwise(self.gemm)), self.gemm
        assert 0 <= self.contention < 1, self.contention

    def flops_per_second(self, rows_per_expert: float) -> float:
        """Rate of a grouped product: linear in the logarithm of the rows, and constant beyond the table."""
        i = bisect_left(self.gemm, rows_per_expert, key=lambda entry: entry[0])
        if i in (0, len(self.gemm)):
            return self.gemm[max(0, i - 1)][1]
        (low, slow), (high, fast) = self.gemm[i - 1 : i + 1]
        return slow + (fast - slow) * log2(rows_per_expert / low) / log2(high / low)

    def product(self, rows: float, experts: int, inner: int, outer: int) -> float:
        """Seconds of the grouped product ``[rows, inner] @ [experts, inner, outer]``, or of its weight gradient."""
        if not rows:
            return 0.0
        return 2.0 * rows * inner * outer / self.flops_per_second(rows / experts) + self.launch

    def transfer(self, nbytes: float, messages: int) -> float:
        """Seconds that the link is in use for so many messages of ``nbytes`` together."""
        return nbytes / self.link_bytes_per_second + messages * self.latency if nbytes else 0.0


def typical_gemm(flops_per_second: float) -> tuple[tuple[float, float], ...]:
    """A table for :class:`Rates` from the rate for many rows alone: it falls for few as on an H100 or H200."""
    return tuple((float(rows), flops_per_second * share) for rows, share in _FALL)


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Sizes of a layer call on one rank.

    Attributes:
        ranks: ``P``.
        local_slots: ``L``.
        hidden: Width of the rows.
        up_width: Width of the experts' first projection; twice ``inner`` for SwiGLU.
        inner: Width of the activation.
        rows: ``R``.
        itemsize: Bytes of an element.
    """

    ranks: int
    local_slots: int
    hidden: int
    up_width: int
    inner: int
    rows: float
    itemsize: int


@dataclass(frozen=True)
class Prediction:
    """What a forward or a backward pass takes.

    Attributes:
        seconds: From the tokens to the output, or from its gradient to those of tokens and weights.
        communication: Seconds that the link is in use.
        idle: Seconds that the computation waits before each remote chunk, and before the end.
    """

    seconds: float
    communication: float
    idle: tuple[float, ...]


def predict(
    shape: LayerShape,
    rates: Rates,
    chunking: Chunking | None,
    *,
    backward: bool,
    save: Save = "fc1",
    wait_at_once: bool = False,
    deferred: bool = False,
) -> Prediction:
    """Predict a pass through exchange and experts, without router and shared expert.

    Args:
        shape: Sizes of the call.
        rates: The machine's.
        chunking: How remote rows are cut; None for all-to-alls that are waited for. These sort the received rows by
            slot, and back, but compute all rows of a slot at once.
        backward: Which pass.
        save: What backward finds kept; the all-to-alls keep everything.
        wait_at_once: Whether every message is waited for where it is posted.
        deferred: Whether weight gradients are computed later, and not at the end of backward.
    """
    work = _Work(shape, rates)
    if chunking is None:
        return work.blocking(backward)
    own = shape.rows / shape.ranks
    slots = shape.local_slots
    chunks = _remote_chunks(shape, chunking)
    if backward:
        again = save != "fc1"
        head = work.up(own, slots) * again + work.copy(own) * (2 + (save == "redispatch")) + work.grads(own, slots)
        steps = [work.backward_step(chunk, save) for chunk in chunks]
        tail = 0.0 if deferred else work.weight_grads()
    else:
        head = work.copy(own) + work.up(own, slots)
        steps = [work.forward_step(chunk) for chunk in chunks]
        tail = work.down(own, slots) + work.copy(own)
    if wait_at_once:
        seconds, idle = one_after_the_other(head, steps, tail)
    else:
        seconds, idle = pipelined(head, steps, tail, rates.contention)
    communication = sum(step.rows + step.dispatch + step.give_back for step in steps)
    return Prediction(2 * work.copy(shape.rows) + seconds, communication, idle)


def hideable(shape: LayerShape, rates: Rates, chunking: Chunking, *, backward: bool, save: Save = "fc1") -> float:
    """Seconds of communication that a chunking can hide at best: if communication does not slow computation down.

    It is the difference between waiting at once and overlap; at most the communication, and at most the computation.
    """
    ideal = replace(rates, contention=0.0)
    waiting = predict(shape, ideal, chunking, backward=backward, save=save, wait_at_once=True)
    return waiting.seconds - predict(shape, ideal, chunking, backward=backward, save=save).seconds


def choose(shape: LayerShape, rates: Rates, config: OverlapConfig) -> Chunking | None:
    """The fastest chunking for a forward and a backward pass; None for all-to-alls that are waited for.

    Args:
        shape: Sizes of the call.
        rates: The machine's; the same on all ranks of the group, or they would not choose alike.
        config: What may be chosen. With ``dispatch="auto"`` overlap must save at least 2 % of the time.
    """
    if config.dispatch == "blocking" or shape.ranks == 1:
        return None

    def seconds(chunking: Chunking | None) -> float:
        return sum(predict(shape, rates, chunking, backward=b, save=config.save).seconds for b in (False, True))

    times = {chunking: seconds(chunking) for chunking in _candidates(shape.local_slots, config)}
    fastest = min(times.values())
    best = next(chunking for chunking, time in times.items() if time <= fastest * (1 + _CLOSE))
    if config.dispatch == "auto" and times[best] > seconds(None) * (1 - WORTHWHILE):
        return None
    return best


def _candidates(local_slots: int, config: OverlapConfig) -> list[Chunking]:
    """What may be chosen, that with the fewest messages and chunks first."""
    found = [] if config.chunk == "expert" else [Chunking("source")]
    if config.chunk == "source":
        return found
    if config.expert_groups is not None:
        return [*found, Chunking("expert", min(config.expert_groups, local_slots))]
    return found + [Chunking("expert", 2**i) for i in range(local_slots.bit_length())]


class _RemoteChunk(NamedTuple):
    rows: float
    slots: int
    messages: int


def _remote_chunks(shape: LayerShape, chunking: Chunking) -> list[_RemoteChunk]:
    """The chunks that :func:`~lightning_moe.moe.overlap.plan.plan_exchange` makes, beside the own rows."""
    others, slots = shape.ranks - 1, shape.local_slots
    per_source = shape.rows / shape.ranks
    if chunking.by == "source":
        return [_RemoteChunk(per_source, slots, slots if chunking.slot_major else 1)] * others
    if not others:
        return []
    bounds = [slots * g // chunking.groups for g in range(chunking.groups + 1)]
    sizes = [b - a for a, b in pairwise(bounds) if b > a]
    # What comes from one rank is one message, whatever its slots, where they follow each other on both sides.
    apart = others > 1 or chunking.slot_major
    return [_RemoteChunk(others * per_source * size / slots, size, others * size if apart else 1) for size in sizes]


@dataclass(frozen=True)
class _Work:
    """Seconds that the parts of a call take."""

    shape: LayerShape
    rates: Rates

    def up(self, rows: float, slots: int) -> float:
        """First projection and activation."""
        shape = self.shape
        product = self.rates.product(rows, slots, shape.hidden, shape.up_width)
        return product + self._elementwise(rows * (shape.up_width + shape.inner))

    def down(self, rows: float, slots: int) -> float:
        """Second projection."""
        return self.rates.product(rows, slots, self.shape.inner, self.shape.hidden)

    def grads(self, rows: float, slots: int) -> float:
        """Gradients of both projections' inputs and of the activation."""
        shape = self.shape
        products = self.down(rows, slots) + self.rates.product(rows, slots, shape.up_width, shape.hidden)
        return products + self._elementwise(rows * 2 * (shape.up_width + shape.inner))

    def weight_grads(self) -> float:
        """Gradients of both weights, from all rows."""
        shape = self.shape
        up = self.rates.product(shape.rows, shape.local_slots, shape.hidden, shape.up_width)
        return up + self.down(shape.rows, shape.local_slots)

    def copy(self, rows: float) -> float:
        """Reading and writing rows."""
        return self._elementwise(2 * rows * self.shape.hidden)

    def forward_step(self, chunk: _RemoteChunk) -> Step:
        """Rows come with pads and go without."""
        compute = self.up(chunk.rows, chunk.slots) + self.down(chunk.rows, chunk.slots)
        return Step(0.0, 0.0, self._transfer(chunk, _PAD), compute, self._transfer(chunk, 0))

    def backward_step(self, chunk: _RemoteChunk, save: Save) -> Step:
        """Gradients come without pads and go with them."""
        rows = self._transfer(chunk, _PAD) if save == "redispatch" else 0.0
        project = 0.0 if save == "fc1" else self.up(chunk.rows, chunk.slots)
        compute = self.grads(chunk.rows, chunk.slots) + self.copy(chunk.rows)
        return Step(rows, project, self._transfer(chunk, 0), compute, self._transfer(chunk, _PAD))

    def blocking(self, backward: bool) -> Prediction:
        """A pass with all-to-alls."""
        shape = self.shape
        rows, slots, others = shape.rows, shape.local_slots, shape.ranks - 1
        sent = rows * others / shape.ranks
        exchange = self.rates.transfer(sent * shape.hidden * shape.itemsize, others)
        sorts = 2 if others and slots > 1 else 0
        # Packing and adding up; and the weights' gradients, which need the returned rows once more.
        compute = (2 + sorts + 0.5 * backward) * self.copy(rows)
        if backward:
            compute += self.grads(rows, slots) + self.weight_grads()
        else:
            compute += self.up(rows, slots) + self.down(rows, slots)
        return Prediction(compute + 2 * exchange, 2 * exchange, (exchange, exchange))

    def _transfer(self, chunk: _RemoteChunk, pad: int) -> float:
        return self.rates.transfer(chunk.rows * (self.shape.hidden * self.shape.itemsize + pad), chunk.messages)

    def _elementwise(self, elements: float) -> float:
        return elements * self.shape.itemsize / self.rates.copy_bytes_per_second
