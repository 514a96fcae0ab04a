"""The router's parts; its decisions as a whole are compared with loops in test_layer.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from lightning_moe.config.moe import MoEConfig
from lightning_moe.errors import ConfigError
from lightning_moe.moe.router import TopKRouter
from tests.distributed import RankPool


def router_for(hidden_size: int = 8, **changes: Any) -> TopKRouter:
    torch.manual_seed(0)
    return TopKRouter(hidden_size, MoEConfig(**({"num_experts": 6, "expert_bias": True} | changes)))


def test_weights_by_hand() -> None:
    """Logits log 1, log 2, log 3, log 4: the softmax is 0.1, 0.2, 0.3, 0.4."""
    logits = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).log()
    expected = {
        (True, False): [0.4, 0.3],
        (True, True): [4 / 7, 3 / 7],
        (False, False): [4 / 7, 3 / 7],
        (False, True): [4 / 7, 3 / 7],
    }
    for (before, renormalize), weights in expected.items():
        router = router_for(1, num_experts=4, router_pre_softmax=before, renormalize=renormalize).double()
        router.weight.data[:] = logits[:, None]
        routing = router(torch.ones(1, 1, dtype=torch.float64))
        assert routing.experts.tolist() == [[3, 2]]
        assert routing.weights.tolist()[0] == pytest.approx(weights, rel=1e-14)
        assert routing.scores.tolist()[0] == pytest.approx([0.1, 0.2, 0.3, 0.4], rel=1e-14)


def test_sigmoid_scores_sum_to_one() -> None:
    routing = router_for(router_score="sigmoid").double()(torch.randn(5, 8, dtype=torch.float64))
    sigmoids = routing.logits.sigmoid()
    assert torch.allclose(routing.scores, sigmoids / sigmoids.sum(-1, keepdim=True), rtol=1e-14)


def test_bias_chooses_and_does_not_weigh() -> None:
    router = router_for(router_score="sigmoid", renormalize=False)
    hidden = torch.randn(50, 8)
    assert router.expert_bias is not None
    router.expert_bias[4] = 10.0
    routing = router(hidden)
    assert (routing.experts == 4).any(1).all()
    assert torch.equal(routing.weights, routing.logits.sigmoid().gather(1, routing.experts))


def test_bias_update_by_hand() -> None:
    router = router_for(num_experts=4, top_k=1, expert_bias_update_rate=0.5)
    assert router.expert_bias is not None
    assert router.tokens_since_update is not None
    router.tokens_since_update[:] = torch.tensor([5, 3, 1, 3])  # mean 3
    router.update_expert_bias()
    assert router.expert_bias.tolist() == [-0.5, 0.0, 0.5, 0.0]
    assert router.tokens_since_update.tolist() == [0, 0, 0, 0]
    router.update_expert_bias()
    assert router.expert_bias.tolist() == [-0.5, 0.0, 0.5, 0.0]


def test_bias_update_balances_the_load() -> None:
    """A few hundred updates even out a router that starts with a strong preference."""
    router = router_for(router_score="sigmoid", expert_bias_update_rate=0.002).train()
    router.weight.data[0] += 0.5
    hidden = torch.randn(600, 8) + 0.3
    before = router(hidden).tokens_per_expert
    for _ in range(300):
        router.update_expert_bias()
        after = router(hidden).tokens_per_expert
    assert before.max() > 400  # 200 is even
    assert after.max() < 220


def _update_on_two_ranks() -> list[Any]:
    router = router_for(num_experts=4, top_k=1, expert_bias_update_rate=0.5)
    assert router.expert_bias is not None
    assert router.tokens_since_update is not None
    # Sums: 5, 5, 1, 1. By itself rank 0 would have raised expert 1 and rank 1 expert 0.
    router.tokens_since_update[:] = torch.tensor([[5, 0, 1, 0], [0, 5, 0, 1]][dist.get_rank()])
    router.update_expert_bias(dist.group.WORLD)
    return [router.expert_bias.tolist(), router.tokens_since_update.tolist()]


def test_bias_update_counts_all_ranks(ranks: RankPool) -> None:
    assert ranks.run(2, _update_on_two_ranks) == [[[-0.5, -0.5, 0.5, 0.5], [0] * 4]] * 2


def test_counts_only_real_tokens_in_training() -> None:
    router = router_for()
    assert router.tokens_since_update is not None
    hidden, mask = torch.randn(9, 8), torch.arange(9) % 3 > 0
    router.eval()(hidden)
    assert not router.tokens_since_update.any()
    router.train()
    first, second = router(hidden, mask), router(hidden)
    assert first.tokens_per_expert.sum() == 12
    assert torch.equal(router.tokens_since_update, first.tokens_per_expert + second.tokens_per_expert)


def test_bias_stays_float32_and_is_saved() -> None:
    router = router_for()
    assert router.expert_bias is not None
    router.expert_bias += 0.3
    exact = router.expert_bias.clone()
    for convert in (router.bfloat16, router.half, router.double, router.float):
        convert()
        assert router.expert_bias.dtype == torch.float32
        assert torch.equal(router.expert_bias, exact)
    assert sorted(router.state_dict()) == ["expert_bias", "weight"]


@pytest.mark.parametrize(
    ("dtype", "router_dtype", "expected"),
    [
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "float64", torch.float64),
        (torch.bfloat16, "float64", torch.float64),
        (torch.float64, "float32", torch.float64),
    ],
)
def test_precision(dtype: torch.dtype, router_dtype: Any, expected: torch.dtype) -> None:
    router = router_for(router_dtype=router_dtype, expert_bias=False).to(dtype)
    hidden = torch.randn(20, 8).to(dtype)
    routing = router(hidden)
    assert routing.logits.dtype == routing.weights.dtype == routing.scores.dtype == expected
    assert torch.equal(routing.logits, F.linear(hidden.to(expected), router.weight.to(expected)))


@pytest.mark.parametrize("masked", [False, True])
def test_forced_balance(masked: bool) -> None:
    router = router_for(force_balance=True, top_k=4, expert_bias=False)
    mask = torch.rand(35) < 0.6 if masked else None
    routing = router(torch.randn(35, 8), mask)
    assert routing.tokens_per_expert.max() - routing.tokens_per_expert.min() <= 1
    assert routing.tokens_per_expert.sum() == 4 * (35 if mask is None else mask.sum())
    assert all(len(set(row)) == 4 for row in routing.experts.tolist())
    weights = routing.logits.softmax(-1).gather(1, routing.experts)
    assert torch.allclose(routing.weights, weights / weights.sum(-1, keepdim=True))


def test_group_of_one_expert() -> None:
    """A group without a second expert is scored by its only one."""
    router = router_for(num_groups=6, top_k_groups=2, expert_bias=False)
    hidden = torch.randn(20, 8)
    plain = router_for(expert_bias=False)
    assert torch.equal(router(hidden).experts, plain(hidden).experts)


def test_series_is_one_decision() -> None:
    router = router_for(routing_granularity="series")
    hidden, mask = torch.randn(4, 5, 8), torch.ones(4, 5, dtype=torch.bool)
    mask[1, 2:] = False
    mask[3] = False
    experts = router(hidden, mask).experts.view(4, 5, 2)
    assert (experts == experts[:, :1]).all()
    pooled = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0), hidden[2].mean(0)])
    assert torch.equal(experts[:3, 0], (pooled @ router.weight.T).topk(2).indices)
    with pytest.raises(ConfigError, match="routing_granularity"):
        router(hidden[0])
