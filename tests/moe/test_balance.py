"""Balance losses against Hugging Face, loops, and a single process."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.moe import balance
from lightning_moe.moe.choices import count_choices
from tests.distributed import RankPool

E, K = 6, 2


def decisions(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, scores (a leaf) and experts for tokens of the given shape."""
    logits = 2 * torch.randn(*shape, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scores = logits.softmax(-1).requires_grad_()
    return logits, scores, scores.detach().topk(K).indices


@pytest.mark.parametrize("masked", [False, True])
def test_auxiliary_loss_is_hugging_faces_divided_by_k(masked: bool) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits, scores, experts = decisions(40)
    mask = torch.arange(40) % 3 > 0 if masked else None
    sent = None if mask is None else mask[:, None].expand_as(experts)
    ours = balance.auxiliary_loss(scores, count_choices(experts, E, sent), K, mask)
    theirs = load_balancing_loss_func((logits,), E, K, None if mask is None else mask[None].long())
    assert ours.item() == pytest.approx(theirs.item() / K, rel=1e-6)  # theirs is computed in float32


def test_auxiliary_loss_is_one_when_balanced_and_grows_to_e() -> None:
    uniform = torch.full((12, E), 1 / E, dtype=torch.float64)
    assert balance.auxiliary_loss(uniform, torch.full((E,), 4), K).item() == pytest.approx(1, rel=1e-14)
    collapsed = torch.zeros(12, E, dtype=torch.float64)
    collapsed[:, 0] = 1
    assert balance.auxiliary_loss(collapsed, torch.tensor([12, 0, 0, 0, 0, 0]), 1).item() == pytest.approx(E)


def test_gradient_flows_through_the_mean_scores() -> None:
    _, scores, experts = decisions(10)
    counts = count_choices(experts, E)
    balance.auxiliary_loss(scores, counts, K).backward()
    expected = E * counts.double() / (10 * K) / 10
    assert scores.grad is not None
    assert torch.allclose(scores.grad, expected.expand(10, E), rtol=1e-14)


def sequence_loss_by_loops(scores: Tensor, experts: Tensor, mask: Tensor | None) -> Tensor:
    losses = []
    for b in range(scores.shape[0]):
        real = [s for s in range(scores.shape[1]) if mask is None or mask[b, s]]
        if not real:
            continue
        loss = torch.zeros((), dtype=torch.float64)
        for expert in range(E):
            fraction = sum(int((experts[b, s] == expert).sum()) for s in real) * E / (K * len(real))
            loss = loss + fraction * scores[b, real, expert].mean()
        losses.append(loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("masked", [False, True])
def test_sequence_loss(masked: bool) -> None:
    _, scores, experts = decisions(5, 7)
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    if mask is not None:
        mask[2] = False  # a sequence of padding only counts nowhere
    ours, expected = (
        balance.sequence_auxiliary_loss(scores, experts, mask),
        sequence_loss_by_loops(scores, experts, mask),
    )
    assert ours.item() == pytest.approx(expected.item(), rel=1e-14)
    gradients = [torch.autograd.grad(loss, scores)[0] for loss in (ours, expected)]
    assert torch.allclose(*gradients, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("masked", [False, True])
def test_z_loss(masked: bool) -> None:
    logits, _, _ = decisions(9)
    mask = torch.arange(9) % 2 > 0 if masked else None
    real = logits if mask is None else logits[mask]
    expected = sum(torch.exp(row).sum().log() ** 2 for row in real) / len(real)
    assert balance.z_loss(logits, mask).item() == pytest.approx(expected.item(), rel=1e-14)


def test_masked_tokens_count_nowhere() -> None:
    logits, scores, experts = decisions(9)
    mask = torch.arange(9) % 2 > 0
    counts = count_choices(experts[mask], E)
    assert torch.equal(balance.auxiliary_loss(scores, counts, K, mask), balance.auxiliary_loss(scores[mask], counts, K))
    assert balance.z_loss(logits, mask).item() == pytest.approx(balance.z_loss(logits[mask]).item(), rel=1e-14)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_nothing_real_is_zero_with_a_gradient_of_zeros(num_tokens: int) -> None:
    _, scores, _ = decisions(num_tokens)
    mask, counts = torch.zeros(num_tokens, dtype=torch.bool), torch.zeros(E, dtype=torch.int64)
    losses = [
        balance.auxiliary_loss(scores, counts, K, mask),
        balance.sequence_auxiliary_loss(scores[None], scores.topk(K).indices[None], mask[None]),
        balance.z_loss(scores, mask),
    ]
    for loss in losses:
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, scores)
        assert not gradient.any()


def _global_loss(lengths: list[int], masked: bool) -> tuple[float, Tensor]:
    """This rank's loss and its gradient, for its part of one global batch."""
    _, scores, experts, mask = _part(lengths, dist.get_rank(), masked)
    sent = mask[:, None].expand_as(experts)
    loss = balance.global_auxiliary_loss(scores, count_choices(experts, E, sent), K, mask, dist.group.WORLD)
    return loss.item(), torch.autograd.grad(loss, scores)[0]


def _part(lengths: list[int], rank: int, masked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Each rank prefers other experts, so that a mean of local losses is far from the global one.
    logits, _, _ = decisions(lengths[rank], seed=rank)
    logits = logits + 3 * torch.nn.functional.one_hot(torch.tensor(rank), E)
    scores = logits.softmax(-1).requires_grad_()
    mask = torch.ones(lengths[rank], dtype=torch.bool)
    if masked:
        mask[::3] = False
    return logits, scores, scores.detach().topk(K).indices, mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [[8, 8, 8], [5, 0, 17], [1, 2, 3], [0, 0, 0]])
def test_global_loss_is_that_of_one_process(ranks: RankPool, lengths: list[int], masked: bool) -> None:
    results = ranks.run(3, partial(_global_loss, lengths, masked))
    parts = [_part(lengths, rank, masked) for rank in range(3)]
    scores = torch.cat([part[1].detach() for part in parts]).requires_grad_()
    experts, mask = torch.cat([part[2] for part in parts]), torch.cat([part[3] for part in parts])
    counts = count_choices(experts, E, mask[:, None].expand_as(experts))
    whole = balance.auxiliary_loss(scores, counts, K, mask)
    (gradient,) = torch.autograd.grad(whole, scores)
    assert sum(loss for loss, _ in results) / 3 == pytest.approx(whole.item(), rel=1e-14)
    assert torch.allclose(torch.cat([part for _, part in results]) / 3, gradient, rtol=1e-13, atol=0)
    if sum(lengths):
        local = [
            balance.auxiliary_loss(s, count_choices(e, E, m[:, None].expand_as(e)), K, m).item() for _, s, e, m in parts
        ]
        assert sum(local) / 3 != pytest.approx(whole.item(), rel=1e-3)
