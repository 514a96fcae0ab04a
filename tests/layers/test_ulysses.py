"""The exchange of heads for tokens against slicing whole tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_moe.layers.ulysses import heads_from_tokens, tokens_from_heads
from tests.distributed import RankPool
from tests.layers.parallel import assert_close, random

BATCH, LENGTH, WIDTH = 2, 8, 3


def heads(query_heads: int, kv_heads: int) -> list[Tensor]:
    """Whole query, key and value."""
    return [random(BATCH, LENGTH, n, WIDTH, seed=i) for i, n in enumerate((query_heads, kv_heads, kv_heads))]


def there_and_back(query_heads: int, kv_heads: int) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Heads received, the query after the way back, and gradients of ``sum(sin(received) * (1 + rank))``."""
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    ranks = torch.distributed.get_world_size()
    leaves = [whole.chunk(ranks, 1)[rank].clone().requires_grad_() for whole in heads(query_heads, kv_heads)]
    received = heads_from_tokens(leaves[0], leaves[1], leaves[2], group)
    loss = sum((part.sin().sum() for part in received), torch.zeros(())) * (1 + rank)
    grads = torch.autograd.grad(loss, leaves, retain_graph=True)
    return [part.detach() for part in received], tokens_from_heads(received[0], group).detach(), list(grads)


@pytest.mark.parametrize(
    ("ranks_", "query_heads", "kv_heads"),
    [(2, 4, 4), (2, 4, 2), (2, 4, 1), (2, 6, 3), (4, 8, 2), (4, 4, 4), (4, 12, 6)],
)
def test_heads_for_tokens(ranks: RankPool, ranks_: int, query_heads: int, kv_heads: int) -> None:
    results = ranks.run(ranks_, there_and_back, query_heads, kv_heads)
    whole = [tensor.requires_grad_() for tensor in heads(query_heads, kv_heads)]
    share, kv_share = query_heads // ranks_, math.lcm(kv_heads, ranks_) // ranks_
    losses = []
    for rank, (received, back, _) in enumerate(results):
        own = range(rank * share, (rank + 1) * share)
        # The key head that each own query head attends with, as often as the rank holds it.
        kv = [head * kv_heads // query_heads for head in own][:: share // kv_share]
        expected = [whole[0][:, :, list(own)], whole[1][:, :, kv], whole[2][:, :, kv]]
        for part, reference in zip(received, expected, strict=True):
            assert torch.equal(part, reference)
        assert torch.equal(back, whole[0].chunk(ranks_, 1)[rank])
        losses += [part.sin().sum() * (1 + rank) for part in expected]
    grads = torch.autograd.grad(torch.stack(losses).sum(), whole)
    for i, expected_grad in enumerate(grads):
        assert_close(torch.cat([result[2][i] for result in results], dim=1), expected_grad, 1e-14)


def test_no_group_is_the_identity() -> None:
    whole = heads(4, 2)
    received = heads_from_tokens(whole[0], whole[1], whole[2], None)
    assert all(part is tensor for part, tensor in zip(received, whole, strict=True))
    assert tokens_from_heads(whole[0], None) is whole[0]
