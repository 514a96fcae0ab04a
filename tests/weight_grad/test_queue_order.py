"""What a queue runs, in which order, and whom it tells; with gradients that have no value."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_moe.weight_grad import WeightGrad, WeightGradQueue, WeightGradStatistics
from tests.weight_grad.owners import NamedGrad, Recorder, flops


@dataclass
class Bench:
    """A queue, and owners that write into one list of events."""

    queue: WeightGradQueue = field(default_factory=WeightGradQueue)
    events: list[str] = field(default_factory=list)
    owners: dict[str, Recorder] = field(default_factory=dict)

    def capture(self, microbatch: int, names: str, chunk: int = 0) -> None:
        """Put a gradient of each named owner, 16 bytes each; capital letters stand for gradients with collectives."""
        with self.queue.capture(microbatch, chunk):
            for letter in names:
                self.put(letter, f"{letter}{microbatch}", torch.zeros(4))

    def put(self, letter: str, name: str, *kept: Tensor, cost: float = 1.0) -> None:
        name_of_owner = letter.lower()
        owner = self.owners.setdefault(name_of_owner, Recorder(name_of_owner, self.events))
        self.queue.put(owner, NamedGrad(name, kept, letter.isupper(), cost))

    def news(self) -> str:
        """What has happened since the last call."""
        text = " ".join(event.replace(" drained", "!") for event in self.events)
        self.events.clear()
        return text


def test_one_group_is_one_action() -> None:
    bench = Bench()
    for microbatch in range(2):
        bench.capture(microbatch, "ab")
    assert not bench.queue.capturing
    assert bench.news() == ""
    bench.queue.pop(0)
    assert bench.news() == "a0 b0"
    bench.queue.pop(1)
    assert bench.news() == "a1 a! b1 b!"


def test_a_weight_used_twice_is_drained_once() -> None:
    bench = Bench()
    bench.capture(0, "aba")
    bench.queue.pop(0)
    assert bench.news() == "a0 a0 a! b0 b!"


def test_tail_goes_weight_by_weight() -> None:
    bench = Bench()
    for microbatch, names in enumerate(("ab", "bac", "ba")):
        bench.capture(microbatch, names)
    bench.queue.run_tail([(0, 0), (1, 0), (2, 0)])
    assert bench.news() == "a0 a1 a2 a! b0 b1 b2 b! c1 c!"


def test_tail_of_several_chunks() -> None:
    bench = Bench()
    bench.capture(0, "ab", chunk=1)
    bench.capture(0, "cd", chunk=0)
    bench.capture(1, "ab", chunk=1)
    bench.capture(1, "cd", chunk=0)
    bench.queue.run_tail([(0, 1), (1, 1), (0, 0), (1, 0)])
    assert bench.news() == "a0 a1 a! b0 b1 b! c0 c1 c! d0 d1 d!"


def test_chunks_that_share_a_weight_keep_its_order() -> None:
    bench = Bench()
    bench.capture(0, "ab", chunk=1)
    bench.capture(0, "ca", chunk=0)
    bench.queue.pop(0, 0)
    assert bench.news() == "c0 c! a0 a0 a!"
    bench.queue.pop(0, 1)
    assert bench.news() == "b0 b!"


def test_groups_of_a_chunk_are_popped_in_order() -> None:
    bench = Bench()
    for microbatch in range(2):
        bench.capture(microbatch, "a")
    with pytest.raises(AssertionError, match="microbatch 0 of chunk 0 comes before 1"):
        bench.queue.pop(1)
    with pytest.raises(AssertionError, match="nothing was captured of microbatch 0 and chunk 1"):
        bench.queue.pop(0, 1)
    with pytest.raises(AssertionError, match="captured twice"), bench.queue.capture(1):
        pass
    with bench.queue.capture(2), pytest.raises(AssertionError, match="not sealed"):
        bench.queue.pop(2)


def test_flush_seals_and_a_group_may_be_empty() -> None:
    bench = Bench()
    with bench.queue.capture(0):
        assert bench.queue.capturing
        bench.queue.flush()
        assert not bench.queue.capturing
        bench.queue.pop(0)
    with pytest.raises(AssertionError, match="no backward pass"):
        bench.queue.flush()
    with pytest.raises(AssertionError, match="no backward pass"):
        bench.put("a", "a0")


def test_limit_computes_the_oldest_early() -> None:
    bench = Bench(WeightGradQueue(max_bytes=64))
    bench.capture(0, "abc")
    bench.capture(1, "abc")
    assert bench.news() == "a0 b0"
    assert bench.queue.live_bytes == 64
    bench.queue.pop(0)
    assert bench.news() == "c0"
    bench.capture(2, "abc")
    assert bench.news() == "a1 b1"
    assert bench.queue.statistics == WeightGradStatistics(9, 5, run_early=4, peak_bytes=80)
    bench.queue.pop_all()
    assert bench.news() == "c1 a2 a! b2 b! c2 c!"


def test_limit_does_not_touch_collectives_or_what_comes_after_them() -> None:
    bench = Bench(WeightGradQueue(max_bytes=40))
    bench.capture(0, "ABc")
    assert bench.news() == "c0 c!"
    bench.capture(1, "ab")  # the same weights, now without collectives
    assert bench.news() == ""
    assert bench.queue.live_bytes == 64
    bench.queue.pop_all()
    assert bench.news() == "A0 B0 a1 a! b1 b!"


def test_order_of_collectives_does_not_depend_on_what_ran_early() -> None:
    """A rank that computed ``a0`` early must not come to ``A1`` later than the others do."""
    for early in (0.0, 1.0):
        bench = Bench()
        bench.capture(0, "aB")
        bench.capture(1, "BA")
        assert bench.queue.run_within(early, flops) == early
        bench.queue.run_tail([(0, 0), (1, 0)])
        assert [event for event in bench.events if event.isalnum() and event[0].isupper()] == ["A1", "B0", "B1"]


def test_a_budget_is_spent_on_the_oldest_that_fit() -> None:
    bench = Bench()
    with bench.queue.capture(0):
        bench.put("a", "a0", cost=5.0)
        bench.put("b", "b0", cost=1.0)
        bench.put("A", "A0", cost=0.5)
    with bench.queue.capture(1):
        bench.put("a", "a1", cost=0.5)  # waits for a0, which does not fit
        bench.put("b", "b1", cost=1.5)
        bench.put("c", "c1", cost=0.25)
        assert bench.queue.run_within(2.0, flops) == 1.25
        assert bench.news() == "b0 c1 c!"
        assert bench.queue.run_within(0.0, flops) == 0.0
        assert bench.queue.run_within(7.0, flops) == 6.5
        assert bench.news() == "a0 b1 b!"
        assert bench.queue.run_within(1e9, flops) == 0.0
    bench.queue.pop_all()
    assert bench.news() == "A0 a1 a!"
    assert bench.queue.statistics.run_within == 4


def test_a_budget_leaves_the_reserve() -> None:
    bench = Bench()
    common = torch.zeros(4)
    with bench.queue.capture(0):
        bench.put("a", "a0", torch.zeros(4), common)
        bench.put("b", "b0", torch.zeros(4), common)
        bench.put("c", "c0", torch.zeros(4))
    assert bench.queue.live_bytes == 64
    bench.queue.run_within(9.0, flops, reserve_bytes=40)
    assert bench.news() == "a0 a!"
    bench.queue.run_within(9.0, flops, reserve_bytes=17)  # b0 would free 32
    assert bench.news() == ""
    bench.queue.run_within(9.0, flops, reserve_bytes=16)
    assert bench.news() == "b0 b!"


class Failing(Recorder):
    def add(self, grad: WeightGrad) -> None:
        raise ValueError("no")


def capture_and_fail(bench: Bench) -> None:
    with bench.queue.capture(2):
        bench.put("a", "a2", torch.zeros(4))
        raise KeyError


def test_the_queue_is_usable_after_an_exception() -> None:
    bench = Bench()
    bench.owners["b"] = Failing("b", bench.events)
    bench.capture(0, "abc")
    bench.capture(1, "ab")
    with pytest.raises(ValueError, match="no"):
        bench.queue.pop(0)
    with pytest.raises(KeyError):
        capture_and_fail(bench)
    assert not bench.queue.capturing
    bench.queue.clear()
    assert bench.queue.live_bytes == bench.queue.num_held == 0
    assert bench.news() == "a0"
    bench.capture(0, "ac")
    bench.queue.pop_all()
    assert bench.news() == "a0 a! c0 c!"


@dataclass(frozen=True)
class Step:
    """One thing to do with a queue."""

    kind: str
    chunk: int
    puts: list[tuple[str, int, float]]
    """Letter of the weight, number of the buffer that is kept, cost."""
    groups: int
    budget: float
    reserve: int


_STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(["capture", "capture", "pop", "within"]),
        st.integers(0, 1),
        st.lists(st.tuples(st.sampled_from("aAbBdD"), st.integers(0, 3), st.sampled_from([0.5, 1.0, 3.0])), max_size=5),
        st.integers(1, 3),
        st.sampled_from([0.0, 1.0, 4.0]),
        st.integers(0, 40),
    ),
    max_size=12,
)


def play(steps: list[Step], max_bytes: int | None, *, waits: bool) -> list[str]:
    """What was put ("+a3"), ran ("a3") and was drained; budgets are spent only if ``waits``."""
    bench = Bench(WeightGradQueue(max_bytes))
    queue, events = bench.queue, bench.events
    buffers = [torch.zeros(4) for _ in range(4)]
    sealed: tuple[list[int], list[int]] = [], []
    for number, step in enumerate(steps):
        groups = sealed[step.chunk]
        if step.kind == "capture":
            groups.append(number)
            with queue.capture(number, step.chunk):
                for i, (letter, buffer, cost) in enumerate(step.puts):
                    # The chunks have weights of their own, a and b or x and y, and share d.
                    letter = letter.translate(str.maketrans("aAbB", "xXyY")) if step.chunk else letter
                    name = f"{letter}{10 * number + i}"
                    events.append(f"+{name}")
                    bench.put(letter, name, buffers[buffer], cost=cost)
                    check_bytes(queue)
                    check_limit(queue)
        elif step.kind == "pop":
            queue.run_tail([(microbatch, step.chunk) for microbatch in groups[: step.groups]])
            del groups[: step.groups]
        elif waits:
            before, news = queue.live_bytes, len(events)
            assert queue.run_within(step.budget, flops, reserve_bytes=step.reserve) <= step.budget
            assert queue.live_bytes >= min(before, step.reserve)
            assert not any(event[0].isupper() for event in events[news:])
        check_bytes(queue)
    queue.pop_all()
    assert queue.live_bytes == queue.num_held == 0
    return events


def check_bytes(queue: WeightGradQueue) -> None:
    held = [[task.grad for task in tasks] for tasks in queue._held.values()]
    assert queue.num_held == sum(map(len, held))
    storages = {tensor.data_ptr() for grads in held for grad in grads if grad is not None for tensor in grad.tensors}
    assert queue.live_bytes == 16 * len(storages)


def check_limit(queue: WeightGradQueue) -> None:
    """Too much is held only where collectives are in the way."""
    if queue.max_bytes is not None and queue.live_bytes > queue.max_bytes:
        oldest = [tasks[0].grad for tasks in queue._held.values()]
        assert all(grad is not None and grad.has_collective for grad in oldest)


def check_order(events: list[str]) -> None:
    """Each weight's gradients run once, in the order in which they were put; each time none is left it is drained."""
    held: dict[str, list[str]] = {}
    for event, following in pairwise([*events, ""]):
        if event.endswith(" drained"):
            assert held[event[0]] == []
        elif event.startswith("+"):
            held.setdefault(event[1].lower(), []).append(event[1:])
        else:
            owner = event[0].lower()
            assert held[owner].pop(0) == event
            assert (following == f"{owner} drained") == (not held[owner])
    assert not any(held.values())
    assert sum(event.endswith(" drained") for event in events) <= sum(event.startswith("+") for event in events)


@settings(max_examples=150)
@given(_STEPS, st.sampled_from([None, 0, 16, 40]))
def test_any_sequence_runs_everything_once_and_in_order(steps: list[Step], max_bytes: int | None) -> None:
    events = play(steps, max_bytes, waits=True)
    check_order(events)
    # Ranks may hold different bytes and have different budgets; their collectives must come in the same order.
    others = play(steps, None, waits=False)
    check_order(others)
    assert [event for event in events if event[0].isupper()] == [event for event in others if event[0].isupper()]
