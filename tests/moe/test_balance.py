"""Balance losses against Hugging Face and loops; over ranks they are compared in test_parallel_axes.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_moe.moe import balance
from lightning_moe.moe.choices import count_choices

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


def sequence_loss(scores: Tensor, experts: Tensor, mask: Tensor | None) -> Tensor:
    """Ours, for ``[B, S]`` tokens."""
    batch, length = scores.shape[:2]
    sequence = torch.arange(batch).repeat_interleave(length)
    flat_mask = None if mask is None else mask.flatten()
    counts = balance.count_by_sequence(experts.flatten(0, 1), sequence, (batch, E), flat_mask)
    return balance.sequence_auxiliary_loss(scores.flatten(0, 1), sequence, counts, K, flat_mask)


@pytest.mark.parametrize("masked", [False, True])
def test_sequence_loss(masked: bool) -> None:
    _, scores, experts = decisions(5, 7)
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    if mask is not None:
        mask[2] = False  # a sequence of padding only counts nowhere
    ours, expected = sequence_loss(scores, experts, mask), sequence_loss_by_loops(scores, experts, mask)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-14)
    gradients = [torch.autograd.grad(loss, scores)[0] for loss in (ours, expected)]
    assert torch.allclose(*gradients, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("masked", [False, True])
def test_z_loss(masked: bool) -> None:
    logits, _, _ = decisions(9)
    mask = torch.arange(9) % 2 > 0 if masked else None
    real = logits if mask is None else logits[mask]
    expected = sum(torch.exp(row).sum().log() ** 2 for row in real) / len(real)
    assert balance.z_loss(logits, torch.tensor(len(real)), mask).item() == pytest.approx(expected.item(), rel=1e-14)


def test_masked_tokens_count_nowhere() -> None:
    logits, scores, experts = decisions(9)
    mask = torch.arange(9) % 2 > 0
    counts, num_real = count_choices(experts[mask], E), mask.sum()
    assert torch.equal(balance.auxiliary_loss(scores, counts, K, mask), balance.auxiliary_loss(scores[mask], counts, K))
    expected = balance.z_loss(logits[mask], num_real)
    assert balance.z_loss(logits, num_real, mask).item() == pytest.approx(expected.item(), rel=1e-14)


def test_terms_of_parts_add_up() -> None:
    """Tokens cut anywhere, also inside a sequence: with the counts of all, the parts' terms sum to the whole."""
    logits, scores, experts = decisions(12)
    sequence = torch.arange(3).repeat_interleave(4)
    counts, by_sequence = count_choices(experts, E), balance.count_by_sequence(experts, sequence, (3, E))
    parts = [slice(0, 5), slice(5, 5), slice(5, 12)]
    losses = {
        "auxiliary": lambda own: balance.auxiliary_loss(scores[own], counts, K),
        "sequence": lambda own: balance.sequence_auxiliary_loss(scores[own], sequence[own], by_sequence, K),
        "z": lambda own: balance.z_loss(logits[own], torch.tensor(12)),
    }
    for name, loss in losses.items():
        whole = loss(slice(None)).item()
        assert sum(loss(own).item() for own in parts) == pytest.approx(whole, rel=1e-14), name


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_nothing_real_is_zero_with_a_gradient_of_zeros(num_tokens: int) -> None:
    _, scores, experts = decisions(num_tokens)
    mask, counts = torch.zeros(num_tokens, dtype=torch.bool), torch.zeros(E, dtype=torch.int64)
    losses = [
        balance.auxiliary_loss(scores, counts, K, mask),
        sequence_loss(scores[None], experts[None], mask[None]),
        balance.z_loss(scores, mask.sum(), mask),
    ]
    for loss in losses:
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, scores)
        assert not gradient.any()
