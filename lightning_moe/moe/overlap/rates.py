"""Measures how fast the machine is, for the cost model.

Each rank measures, and all take the slowest rank's times: rates that differed in the last bit could make ranks choose
different chunks, and then wait for messages that nobody sends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.config.overlap import OverlapConfig
from lightning_moe.moe.overlap.cost import Rates, typical_gemm
from lightning_moe.moe.overlap.stopwatch import Stopwatch, Work
from lightning_moe.parallel.sm_margin import SmMargin, sm_margin_for
from lightning_moe.weight_grad import grouped_linear

_ROWS = (16, 64, 256, 512, 2048)
"""Rows of each expert in the products that are timed."""
_TURNS = 4
"""Products in a row that are timed together, so that the host can run ahead of a GPU as it does in training."""
_MESSAGES = 32
"""Messages to each peer that are timed against one, for the latency."""
_MESSAGE_BYTES = 256
_BYTES = (2**20, 2**23, 2**26)
"""What a rank sends in all, for the bandwidth: as much as does not take too long."""
_LONGEST = 0.02
"""Seconds; what should take longer is not timed."""
_MOST_CONTENTION = 0.9
"""Where it is more, the times were disturbed."""


@torch.no_grad()
def measure_rates(
    group: dist.ProcessGroup | None,
    device: torch.device,
    *,
    hidden: int,
    up_width: int,
    inner: int,
    local_slots: int,
    dtype: torch.dtype,
    config: OverlapConfig,
) -> Rates:
    """Measure the rates of an expert layer; a collective call on the group.

    It takes about half a second, after the group's first messages, which connect its ranks. Random generators are left
    as they are.

    Args:
        group: The expert group; None for a rank that holds all experts, whose link then has no limit.
        device: Where the layer lives.
        hidden: Width of the rows.
        up_width: Width of the experts' first projection.
        inner: Width of their activation.
        local_slots: Experts of this rank.
        dtype: Dtype of the products.
        config: What it says of rates is taken, and not measured. How much communication slows products down is
            measured only where it says nothing.

    Returns:
        The rates, bit for bit the same on all ranks of the group.
    """
    clock = Stopwatch(device, group)
    experts = _Experts(device, dtype, hidden, up_width, inner, local_slots)
    times: dict[int, float] = {}
    if config.gemm_teraflops is None:
        times = _product_times(clock, experts)
        gemm = tuple((float(rows), experts.flops(rows) / seconds) for rows, seconds in times.items())
    else:
        gemm = typical_gemm(config.gemm_teraflops * 1e12)
    rates = Rates(link_bytes_per_second=inf, gemm=gemm, copy_bytes_per_second=_copy_rate(clock))
    if config.link_gigabytes_per_second is not None:
        return replace(rates, link_bytes_per_second=config.link_gigabytes_per_second * 1e9)
    if group is None:
        return rates
    link, latency, transfer, seconds = _link_rates(clock, group)
    margin = SmMargin(sm_margin_for(group.size(), config.sm_margin), device)
    contention = _contention(clock, experts, times, transfer, seconds, margin) if times else 0.0
    return replace(rates, link_bytes_per_second=link, latency=latency, contention=contention)


@dataclass(frozen=True)
class _Experts:
    """Makes products such as the layer's."""

    device: torch.device
    dtype: torch.dtype
    hidden: int
    up_width: int
    inner: int
    local_slots: int

    def flops(self, rows: int) -> float:
        """Of :meth:`products`."""
        return 2.0 * _TURNS * rows * self._number(rows) * self._weights

    def products(self, rows: int) -> Work:
        """What computes both projections of ``rows`` rows of each expert, some times."""
        experts = self._number(rows)
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            # Not zeros: a GPU draws less power for them, and is faster than in training.
            return torch.empty(sizes, device=self.device, dtype=self.dtype).normal_(generator=generator)

        hidden, inner = normal(experts * rows, self.hidden), normal(experts * rows, self.inner)
        up, down = normal(experts, self.up_width, self.hidden), normal(experts, self.hidden, self.inner)
        counts = [rows] * experts
        ends = torch.arange(1, experts + 1, dtype=torch.int32, device=self.device) * rows

        def compute() -> None:
            for _ in range(_TURNS):
                grouped_linear(hidden, up, counts, ends)
                grouped_linear(inner, down, counts, ends)

        return compute

    def _number(self, rows: int) -> int:
        """As many experts as a moderate amount of memory holds."""
        widths = 2 * self.hidden + self.up_width + self.inner
        most = 2**28 if self.device.type == "cuda" else 2**24
        return max(1, min(self.local_slots, most // ((self._weights + rows * widths) * self.dtype.itemsize)))

    @property
    def _weights(self) -> int:
        return (self.up_width + self.inner) * self.hidden


def _product_times(clock: Stopwatch, experts: _Experts) -> dict[int, float]:
    """Seconds of :meth:`_Experts.products`, by rows, as far as they take no rank too long."""
    times: list[float] = []
    for rows, fewer in zip(_ROWS, (None, *_ROWS), strict=False):
        expected = 0.0 if fewer is None else times[-1] * rows / fewer
        times.append(clock.seconds(experts.products(rows)) if expected <= _LONGEST else inf)
    return {rows: seconds for rows, seconds in zip(_ROWS, clock.agree(times), strict=True) if seconds < inf}


def _copy_rate(clock: Stopwatch) -> float:
    """Bytes per second that copying reads and writes."""
    nbytes = 2**26 if clock.device.type == "cuda" else 2**24
    source, target = torch.ones((2, nbytes), dtype=torch.uint8, device=clock.device).unbind()
    return 2 * nbytes / clock.agree([clock.seconds(lambda: target.copy_(source))])[0]


def _link_rates(clock: Stopwatch, group: dist.ProcessGroup) -> tuple[float, float, Callable[[], Work], float]:
    """Bytes per second, seconds per message, and a transfer that takes long, with its seconds."""
    peers = group.size() - 1

    def timed(nbytes: int, messages: int = 1) -> tuple[Callable[[], Work], float]:
        transfer = _transfer(group, clock.device, nbytes, messages)
        return transfer, clock.agree([clock.seconds(lambda: transfer()())])[0]

    _, one = timed(_MESSAGE_BYTES)
    _, many = timed(_MESSAGE_BYTES, _MESSAGES)
    nbytes = _BYTES[0] // peers
    transfer, seconds = timed(nbytes)
    for less, more in pairwise(_BYTES):
        if one + max(0.0, seconds - one) * more / less <= _LONGEST:
            nbytes = more // peers
            transfer, seconds = timed(nbytes)
        else:
            break
    # Messages take time besides; where they seem to have taken most of it, the clock was disturbed.
    bandwidth = nbytes * peers / max(seconds - one, seconds / 2)
    return bandwidth, max(0.0, many - one) / ((_MESSAGES - 1) * peers), transfer, seconds


def _transfer(group: dist.ProcessGroup, device: torch.device, nbytes: int, messages: int) -> Callable[[], Work]:
    """What posts messages of ``nbytes`` to every other rank, and returns what waits for them."""
    rank, ranks = group.rank(), group.size()
    source, target = torch.zeros((2, messages, ranks, nbytes), dtype=torch.uint8, device=device).unbind()
    operations: list[dist.P2POp] = []
    for i in range(1, ranks):
        for inward, outward in zip(target[:, i], source[:, i], strict=True):
            operations.append(dist.P2POp(dist.irecv, inward, group=group, group_peer=(rank - i) % ranks))
            operations.append(dist.P2POp(dist.isend, outward, group=group, group_peer=(rank + i) % ranks))

    def post() -> Work:
        works = dist.batch_isend_irecv(operations)
        return lambda: [work.wait() for work in works]

    return post


def _contention(
    clock: Stopwatch,
    experts: _Experts,
    times: Mapping[int, float],
    transfer: Callable[[], Work],
    seconds: float,
    margin: SmMargin,
) -> float:
    """Share of its speed that a product loses beside a transfer that takes about twice as long."""
    rows = max((rows for rows in times if times[rows] <= seconds / 2), default=_ROWS[0])
    compute = experts.products(rows)

    def compute_beside() -> None:
        with margin:
            compute()

    alone, beside = clock.agree([clock.seconds(compute), clock.seconds(compute_beside, transfer)])
    return min(_MOST_CONTENTION, max(0.0, (beside - alone) / min(beside, seconds)))
