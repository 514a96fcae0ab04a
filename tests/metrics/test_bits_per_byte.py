"""Bits per byte against the definition, on one process and on several."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_moe.metrics import BitsPerByte
from tests.distributed import RankPool

BATCHES = [([0.5, 2.0, 1.25], [1, 0, 3]), ([3.0], [4]), ([0.125, 0.375], [1, 1])]
EXPECTED = (0.5 + 2.0 + 1.25 + 3.0 + 0.125 + 0.375) / math.log(2) / 10


def metric_over(batches: list[tuple[list[float], list[int]]]) -> BitsPerByte:
    metric = BitsPerByte()
    for nats, num_bytes in batches:
        metric.update(torch.tensor(nats), torch.tensor(num_bytes))
    return metric


def test_definition() -> None:
    value = metric_over(BATCHES).compute()
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(EXPECTED, rel=1e-12)


def test_a_uniform_model_of_bytes_has_eight_bits() -> None:
    logits = torch.zeros(2, 7, 256)
    labels = torch.randint(256, (2, 7))
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    metric = BitsPerByte()
    metric.update(nats.view(2, 7), torch.ones(2, 7, dtype=torch.int64))
    assert metric.compute().item() == pytest.approx(8.0, rel=1e-6)


def test_small_batches_are_not_lost_beside_large_sums() -> None:
    """In float32 the sum would stand still at 2**24."""
    metric = metric_over([([2.0**24], [2**24])])
    for _ in range(100):
        metric.update(torch.tensor(1.0), torch.tensor(1))
    assert metric.nats.item() == metric.num_bytes.item() == 2**24 + 100
    metric.to(torch.bfloat16)
    assert metric.compute().item() == pytest.approx(1 / math.log(2), rel=1e-15)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_was_added() -> None:
    assert math.isnan(BitsPerByte().compute())


def value_on_rank(parts: list[list[int]]) -> float:
    return float(metric_over([BATCHES[index] for index in parts[torch.distributed.get_rank()]]).compute())


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("parts", [[[0, 1], [2]], [[0, 1, 2], []], [[0, 1, 2], [0, 1, 2]]])
def test_any_split_over_ranks_gives_the_same(ranks: RankPool, parts: list[list[int]]) -> None:
    for value in ranks.run(2, value_on_rank, parts):
        assert value == pytest.approx(EXPECTED, rel=1e-12)
