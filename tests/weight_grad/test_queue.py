"""Deferred weight gradients against those that are added at once, and what the queue keeps and frees."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_moe.weight_grad import (
    GroupedMatmulGrad,
    MatmulGrad,
    WeightGrad,
    WeightGradQueue,
    WeightGradStatistics,
    grouped_linear,
    linear,
)
from tests.weight_grad.owners import MainGrad, flops

WIDTH, TOKENS, MICROBATCHES = 8, 12, 4
COUNTS = (5, 0, 7)
DTYPES = [torch.float32, torch.bfloat16]


class Net(nn.Module):
    """A weight used once, one used twice on the residual stream, and stacked experts."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=dtype))
        self.shared = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=dtype))
        self.experts = nn.Parameter(torch.randn(len(COUNTS), WIDTH, WIDTH, dtype=dtype))
        self.to(device)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = linear(hidden, self.first)
        for _ in range(2):
            hidden = hidden + linear(hidden.tanh(), self.shared)
        offsets = torch.tensor(COUNTS, device=hidden.device).cumsum(0).int()
        return hidden + grouped_linear(hidden, self.experts, COUNTS, offsets)


def backward(net: Net, microbatch: int) -> None:
    generator = torch.Generator().manual_seed(microbatch)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(net.first)
    net(hidden).sin().sum().backward()


def sinks_of(net: Net, queue: WeightGradQueue | None) -> dict[str, MainGrad]:
    return {name: MainGrad(weight, queue) for name, weight in net.named_parameters()}


def immediate(dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    net = Net(dtype, device)
    sinks = sinks_of(net, None)
    for microbatch in range(MICROBATCHES):
        backward(net, microbatch)
    return {name: sink.sum for name, sink in sinks.items()}


# What happens after each backward pass; returns how many microbatches have been popped.


def pop_at_once(queue: WeightGradQueue, microbatch: int) -> int:
    queue.pop(microbatch)
    return microbatch + 1


def pop_with_lag(queue: WeightGradQueue, microbatch: int) -> int:
    if microbatch >= 2:
        queue.pop(microbatch - 2)
    return max(0, microbatch - 1)


def use_waits(queue: WeightGradQueue, microbatch: int) -> int:
    assert queue.run_within(2.5 * 2 * TOKENS * WIDTH**2, flops) <= 2.5 * 2 * TOKENS * WIDTH**2
    return 0


def never(queue: WeightGradQueue, microbatch: int) -> int:
    return 0


@pytest.mark.parametrize("by_weight", [False, True])
@pytest.mark.parametrize("after_each", [pop_at_once, pop_with_lag, use_waits, never])
@pytest.mark.parametrize("max_bytes", [None, 0, 3000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_immediate_gradients_bit_for_bit(
    dtype: torch.dtype,
    max_bytes: int | None,
    after_each: Callable[[WeightGradQueue, int], int],
    by_weight: bool,
) -> None:
    expected = immediate(dtype)
    net, queue = Net(dtype), WeightGradQueue(max_bytes)
    sinks = sinks_of(net, queue)
    popped = 0
    for microbatch in range(MICROBATCHES):
        with queue.capture(microbatch):
            backward(net, microbatch)
            assert max_bytes is None or queue.live_bytes <= max_bytes
        popped = after_each(queue, microbatch)
    if by_weight:
        queue.run_tail([(microbatch, 0) for microbatch in range(popped, MICROBATCHES)])
    else:
        queue.pop_all()
    for name, sink in sinks.items():
        assert torch.equal(sink.sum, expected[name]), name
        assert not sink.sum.requires_grad
    assert all(weight.grad is None for weight in net.parameters())
    assert queue.live_bytes == queue.num_held == 0
    statistics = queue.statistics
    assert statistics.captured == statistics.run == 4 * MICROBATCHES
    assert (statistics.run_early == statistics.run) == (max_bytes == 0)
    assert (statistics.run_early > 0) >= (max_bytes == 3000 and after_each is never)
    assert (statistics.run_within > 0) == (after_each is use_waits and max_bytes != 0)


def test_a_gradient_that_is_not_computed_is_noticed() -> None:
    expected = immediate(torch.float32)
    net, queue = Net(torch.float32), WeightGradQueue()
    sinks = sinks_of(net, queue)
    for microbatch in range(MICROBATCHES):
        with queue.capture(microbatch):
            backward(net, microbatch)
    for microbatch in range(MICROBATCHES - 1):
        queue.pop(microbatch)
    assert queue.num_held == 4
    assert queue.live_bytes > 0
    for name, sink in sinks.items():
        assert sink.drains == 0
        assert not torch.equal(sink.sum, expected[name])


def test_popping_everything_leaves_what_is_not_sealed() -> None:
    net, queue = Net(torch.float32), WeightGradQueue()
    sinks_of(net, queue)
    with queue.capture(0):
        backward(net, 0)
    with queue.capture(1):
        backward(net, 1)
        queue.pop_all()
        assert queue.num_held == 4
    queue.pop_all()
    assert queue.num_held == queue.live_bytes == 0


def test_backward_in_another_thread() -> None:
    """As on CUDA, where autograd runs in a thread of its own."""
    expected = immediate(torch.float32)
    net, queue = Net(torch.float32), WeightGradQueue()
    sinks = sinks_of(net, queue)
    for microbatch in range(MICROBATCHES):
        with queue.capture(microbatch):
            thread = threading.Thread(target=backward, args=(net, microbatch))
            thread.start()
            thread.join()
    assert queue.num_held == 4 * MICROBATCHES
    queue.pop_all()
    assert all(torch.equal(sink.sum, expected[name]) for name, sink in sinks.items())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    expected = immediate(dtype, "cuda")
    net, queue = Net(dtype, "cuda"), WeightGradQueue()
    sinks = sinks_of(net, queue)
    for microbatch in range(MICROBATCHES):
        with queue.capture(microbatch):
            backward(net, microbatch)
    assert queue.num_held == 4 * MICROBATCHES
    queue.run_tail([(microbatch, 0) for microbatch in range(MICROBATCHES)])
    assert all(torch.equal(sink.sum, expected[name]) for name, sink in sinks.items())


class Sentinel:
    """Something that lives as long as the node of the graph that calls it."""

    def hook(self, *_: object) -> None:
        pass


class Watching(MainGrad):
    """Checks that tensors of gradients that have been added do not exist any more."""

    def __init__(self, weight: nn.Parameter, queue: WeightGradQueue) -> None:
        super().__init__(weight, queue)
        self.kept: list[weakref.ref[Tensor]] = []

    def take(self, grad: WeightGrad, *, deferrable: bool = True) -> bool:
        self.kept += [weakref.ref(tensor) for tensor in grad.tensors]
        return super().take(grad)

    def add(self, grad: WeightGrad) -> None:
        assert self.queue is not None
        assert self.alive() == len(grad.tensors) * (self.queue.num_held + 1)
        super().add(grad)

    def drained(self) -> None:
        assert self.alive() == 0
        super().drained()

    def alive(self) -> int:
        return sum(tensor() is not None for tensor in self.kept)


def plain_product(rows: Tensor, net: Net) -> Tensor:
    return linear(rows, net.first)


def product_of_experts(rows: Tensor, net: Net) -> Tensor:
    return grouped_linear(rows, net.experts, COUNTS, torch.tensor(COUNTS).cumsum(0).int())


@pytest.mark.parametrize(
    ("product", "name", "more"), [(plain_product, "first", 0), (product_of_experts, "experts", 4 * len(COUNTS))]
)
def test_only_operands_are_kept_and_freed_as_soon_as_they_are_used(
    product: Callable[[Tensor, Net], Tensor], name: str, more: int
) -> None:
    net, queue = Net(torch.float32), WeightGradQueue()
    sink = Watching(net.get_parameter(name), queue)
    for microbatch in range(3):
        rows = torch.randn(TOKENS, WIDTH, requires_grad=True) * 2
        sentinel = Sentinel()
        assert rows.grad_fn is not None
        rows.grad_fn.register_hook(sentinel.hook)
        graph = weakref.ref(sentinel)
        loss = product(rows, net).sin().sum()
        with queue.capture(microbatch):
            loss.backward()
        del rows, sentinel, loss
        assert graph() is None
    assert queue.live_bytes == 3 * (2 * TOKENS * WIDTH * 4 + more)
    queue.run_tail([(0, 0), (1, 0), (2, 0)])
    assert (sink.added, sink.drains) == (3, 1)
    assert queue.live_bytes == 0


def test_shared_storages_count_once() -> None:
    """Two projections of one input, and views of it."""
    queue = WeightGradQueue()
    weights = [nn.Parameter(torch.randn(4, WIDTH)) for _ in range(2)]
    sinks = [MainGrad(weight, queue) for weight in weights]
    hidden = torch.randn(2, 3, WIDTH)
    with queue.capture(0):
        (linear(hidden, weights[0]) * linear(hidden, weights[1])).sum().backward()
    grads, input = 2 * 6 * 4 * 4, 6 * WIDTH * 4
    assert queue.live_bytes == grads + input
    assert queue.run_within(1.0, lambda grad: 1.0) == 1.0
    assert queue.live_bytes == grads // 2 + input
    queue.pop(0)
    assert queue.live_bytes == 0
    assert queue.statistics == WeightGradStatistics(2, 2, run_within=1, peak_bytes=grads + input)
    assert [sink.drains for sink in sinks] == [1, 1]


def test_parts_of_larger_tensors_are_copied_where_that_changes_nothing() -> None:
    buffer = torch.randn(64, WIDTH)
    rows, columns = buffer[8:20], torch.randn(12, 64)[:, :WIDTH]
    for left, right, nbytes in (
        (rows, rows, 2 * 12 * WIDTH * 4),
        (columns, rows, 12 * 64 * 4 + 12 * WIDTH * 4),  # a copy would have other strides
        (torch.ones(()).expand(12, WIDTH), rows, 4 + 12 * WIDTH * 4),
    ):
        grad = MatmulGrad(left, right).compact()
        assert grad.nbytes == nbytes
        assert torch.equal(grad.compute(), MatmulGrad(left, right).compute())
        assert (grad.grad_output.stride(), grad.input.stride()) == (left.stride(), right.stride())
    grouped = GroupedMatmulGrad(rows, rows, (12,), torch.tensor([12], dtype=torch.int32), False)
    assert grouped.compact().nbytes == 2 * 12 * WIDTH * 4 + 4
    queue, sink = WeightGradQueue(), MainGrad(nn.Parameter(torch.zeros(WIDTH, WIDTH)), None)
    with queue.capture(0):
        queue.put(sink, MatmulGrad(rows, rows))
        assert queue.live_bytes == 2 * 12 * WIDTH * 4
    queue.pop_all()


def test_sizes_of_gradients() -> None:
    plain = MatmulGrad(torch.zeros(12, 5), torch.zeros(12, 3))
    assert plain.flops == 2 * 12 * 5 * 3
    assert plain.nbytes == 12 * (5 + 3) * 4
    offsets = torch.tensor([5, 5, 12], dtype=torch.int32)
    grouped = GroupedMatmulGrad(torch.zeros(12, 4), torch.zeros(12, 8), COUNTS, offsets, False)
    assert grouped.flops == 2 * 12 * 4 * 8
    assert grouped.nbytes == 12 * (4 + 8) * 4 + 3 * 4
    assert not plain.has_collective
    assert not grouped.has_collective


def test_changed_operands_are_refused() -> None:
    weight, queue = nn.Parameter(torch.randn(4, WIDTH)), WeightGradQueue()
    sink = MainGrad(weight, queue)
    buffer = torch.randn(3, WIDTH)
    with queue.capture(0):
        linear(buffer, weight).sum().backward()
    buffer.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        queue.pop(0)
    queue.clear()
    assert sink.added == queue.live_bytes == 0
