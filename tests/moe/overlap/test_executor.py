"""What expert layers share: budgets of waits, and what copies keep."""

from __future__ import annotations

import copy
import pickle

import torch

from lightning_moe.config import MoEConfig, OverlapConfig
from lightning_moe.moe import MoELayer
from lightning_moe.moe.overlap.cost import LayerShape, Rates
from lightning_moe.moe.overlap.executor import ExpertOverlap, _shape_of
from lightning_moe.moe.overlap.plan import Chunking
from lightning_moe.weight_grad import WeightGradQueue
from tests.weight_grad.owners import NamedGrad, Recorder

SOURCE = OverlapConfig(dispatch="p2p", chunk="source")
# As in test_cost.py: gradients return in 8 s, under the weight gradients if these are not left for later.
SHAPE = LayerShape(ranks=2, local_slots=2, hidden=1000, up_width=2000, inner=1000, rows=2000, itemsize=2)
RATES = Rates(link_bytes_per_second=2.5e5, latency=0.0, gemm=((1.0, 1e9),), copy_bytes_per_second=1e18, launch=0.0)


def filled_queue(*seconds: float) -> WeightGradQueue:
    queue = WeightGradQueue()
    with queue.capture(0):
        for number, each in enumerate(seconds):
            queue.put(Recorder(str(number), []), NamedGrad(str(number), (torch.ones(3),), cost=each * 1e9))
    return queue


def test_waits_are_longer_where_weight_gradients_are_left_for_later() -> None:
    queue = filled_queue(1.0, 5.0)
    fill = ExpertOverlap(SOURCE, RATES, queue).filler(SHAPE, Chunking("source"))
    fill(True, 1)
    assert queue.num_held == 2, "gradients return under the weight gradients"
    with queue.capture(1):
        fill(True, 0)
        assert queue.num_held == 1, "two seconds for the other rank's gradients"
        fill(True, 2)
        assert queue.num_held == 1, "there is no such wait"
        fill(True, 1)
        assert queue.num_held == 0
    ExpertOverlap(SOURCE, None, filled_queue(0.0)).filler(SHAPE, Chunking("source"))(False, 0)


def test_one_rate_is_a_rate_for_all() -> None:
    overlap = ExpertOverlap(SOURCE, RATES, filled_queue())
    assert overlap._seconds(NamedGrad("", cost=3e9)) == 3.0


def test_few_shapes_are_met() -> None:
    layer, tokens = MoELayer(8, MoEConfig(num_experts=2)), torch.zeros(1, 8)
    shapes = {_shape_of(layer, tokens, rows) for rows in range(10_000)}
    assert len(shapes) < 100
    for rows in (0, 1, 7, 15, 16, 17, 1000, 4095, 65537):
        rounded = _shape_of(layer, tokens, rows).rows
        assert abs(rounded - max(1, rows)) <= rows / 16, (rows, rounded)


def test_copies_share_it_and_pickles_leave_the_queue() -> None:
    overlap = ExpertOverlap(SOURCE, RATES, filled_queue(1.0))
    overlap.filler(SHAPE, Chunking("source"))(True, 0)
    assert copy.deepcopy(overlap) is overlap
    loaded = pickle.loads(pickle.dumps(overlap))
    assert (loaded.config, loaded.rates, loaded.queue) == (SOURCE, RATES, None)
    assert loaded.choice.chunking(SHAPE) == overlap.choice.chunking(SHAPE)
    assert overlap.queue is not None
