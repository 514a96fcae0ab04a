"""Chunked, vocabulary-parallel cross-entropy against torch's own on whole logits; what it allocates."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_moe.errors import ConfigError
from lightning_moe.layers import TokenLayout, VocabParallelEmbedding, linear_cross_entropy, loss_peak_bytes
from lightning_moe.parallel.mesh import ParallelMesh
from tests.distributed import RankFailure, RankPool
from tests.layers.parallel import (
    TOLERANCES,
    Grads,
    assert_close,
    assert_shards,
    build_mesh,
    gather,
    here,
    own_rows,
    random,
    result_of,
    run_cases,
)
from tests.layers.test_linear import Collector

VOCAB, WIDTH, TOKENS = 11, 7, 8  # no number of ranks divides 11, and no share of it is 7 or 8
LABELS = torch.tensor([[0, 10, -100, 3], [5, -100, 6, 9]])
LAYOUTS = [TokenLayout(2, 4), TokenLayout(2, 4, sequence_parallel=True)]


def projection(mesh: ParallelMesh, dtype: torch.dtype) -> VocabParallelEmbedding:
    torch.manual_seed(0)
    return VocabParallelEmbedding(VOCAB, WIDTH, mesh, init_std=1.0).to(dtype)


def run_loss(mesh: ParallelMesh, layout: TokenLayout, chunk: int | None, dtype: torch.dtype) -> tuple[Grads, Tensor]:
    head = projection(mesh, dtype)
    leaf = own_rows(random(TOKENS, WIDTH, dtype=dtype), mesh, layout).clone().requires_grad_()
    settings: dict[str, Any] = {"mesh": mesh, "vocab_size": VOCAB, "layout": layout, "chunk_tokens": chunk}
    loss = linear_cross_entropy(leaf, head.weight, here(LABELS), **settings)
    (loss / 3).backward()
    with torch.no_grad():
        evaluated = linear_cross_entropy(leaf, head.weight, here(LABELS), **settings)
    return result_of(head, loss, leaf), evaluated.cpu()


def reference_loss(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    weight = projection(ParallelMesh.single(), dtype).weight
    hidden = random(TOKENS, WIDTH, dtype=dtype).requires_grad_()
    loss = F.cross_entropy(hidden @ weight.T, LABELS.flatten(), reduction="sum")
    (loss / 3).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_whole_logits(ranks: RankPool, world_size: int) -> None:
    cases = list(product(LAYOUTS, (None, 3, 100), TOLERANCES))
    for (layout, _, dtype), results in run_cases(ranks, {"tensor": world_size}, run_loss, cases):
        check_loss(results, layout, dtype, TOLERANCES[dtype])


def check_loss(results: list[tuple[Grads, Tensor]], layout: TokenLayout, dtype: torch.dtype, tolerance: float) -> None:
    """Compare the results of :func:`run_loss` with whole logits, computed in ``dtype``."""
    grads, evaluated = zip(*results, strict=True)
    loss, grad_hidden, grad_weight = reference_loss(dtype)
    for result, value in zip(grads, evaluated, strict=True):
        assert_close(result.output, loss, tolerance, "loss")
        assert torch.equal(value, result.output)
    assert_close(gather([result.input for result in grads], layout), grad_hidden, tolerance, "hidden")
    assert_shards(list(grads), {"weight": grad_weight}, tolerance)


def single(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    layout = TokenLayout(1, hidden.shape[0])
    return linear_cross_entropy(
        hidden,
        weight,
        labels,
        mesh=ParallelMesh.single(),
        vocab_size=weight.shape[0],
        layout=layout,
        chunk_tokens=chunk,
    )


def test_large_logits_do_not_overflow() -> None:
    hidden, weight = torch.tensor([[1e4]]), torch.tensor([[1.0], [-1.0]])
    torch.testing.assert_close(single(hidden, weight, torch.tensor([1])), torch.tensor(2e4))
    torch.testing.assert_close(single(hidden, weight, torch.tensor([0])), torch.tensor(0.0))


def test_nothing_to_predict_and_no_tokens() -> None:
    for tokens in (4, 0):
        hidden, weight = torch.randn(tokens, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
        loss = single(hidden, weight, torch.full((tokens,), -100))
        loss.backward()
        assert loss.item() == 0.0
        assert hidden.grad is not None
        assert weight.grad is not None
        assert not hidden.grad.any()
        assert not weight.grad.any()


@pytest.mark.parametrize(("trains_hidden", "trains_weight"), [(True, False), (False, True)])
def test_frozen_operands(trains_hidden: bool, trains_weight: bool) -> None:
    hidden = random(TOKENS, WIDTH).requires_grad_(trains_hidden)
    weight = projection(ParallelMesh.single(), torch.float64).weight.requires_grad_(trains_weight)
    (single(hidden, weight, LABELS.flatten(), chunk=3) / 3).backward()
    _, grad_hidden, grad_weight = reference_loss(torch.float64)
    for tensor, expected, trains in ((hidden, grad_hidden, trains_hidden), (weight, grad_weight, trains_weight)):
        if trains:
            assert tensor.grad is not None
            assert_close(tensor.grad, expected, 1e-12)
        else:
            assert tensor.grad is None


def test_backward_twice_and_no_second_derivative() -> None:
    hidden, weight = random(TOKENS, WIDTH).requires_grad_(), random(VOCAB, WIDTH, seed=1).requires_grad_()
    loss = single(hidden, weight, LABELS.flatten())
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(2 * loss, [hidden, weight], retain_graph=True)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(2 * one, two)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("uses", [1, 2])
def test_sink_takes_the_weight_gradient(uses: int) -> None:
    weight = nn.Parameter(projection(ParallelMesh.single(), torch.float64).weight.detach())
    sink = Collector(weight, takes=True)
    for _ in range(uses):
        (single(random(TOKENS, WIDTH), weight, LABELS.flatten(), chunk=3) / 3).backward()
    assert weight.grad is None
    assert sink.calls == uses
    assert_close(sink.main_grad, uses * reference_loss(torch.float64)[2], 1e-12)


def test_autocast() -> None:
    """Operands are rounded to bfloat16, everything else is float32: the same on rounded operands is exact to 1e-6."""
    hidden = random(TOKENS, WIDTH, dtype=torch.float32).requires_grad_()
    weight = projection(ParallelMesh.single(), torch.float32).weight
    with torch.autocast("cpu", torch.bfloat16):
        loss = single(hidden, weight, LABELS.flatten(), chunk=3)
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    logits = (hidden.detach().bfloat16() @ weight.detach().bfloat16().T).float()
    assert_close(loss.detach(), F.cross_entropy(logits, LABELS.flatten(), reduction="sum"), 1e-6)
    _, grad_hidden, grad_weight = reference_loss(torch.float32)
    assert_close(hidden.grad * (1 / 3), grad_hidden, 2e-2)
    assert_close(weight.grad * (1 / 3), grad_weight, 2e-2)


def test_refuses_wrong_arguments(ranks: RankPool) -> None:
    hidden, weight = torch.randn(2, 3), torch.randn(5, 3)
    with pytest.raises(ConfigError, match="loss_chunk_tokens"):
        single(hidden, weight, torch.tensor([0, 1]), chunk=0)
    with pytest.raises(ConfigError, match="one for each of the 2 tokens"):
        single(hidden, weight, torch.tensor([0, 1, 2]), chunk=2)
    with pytest.raises(RankFailure, match=rf"weight: \(6, {WIDTH}\) is not allowed; allowed: 5 rows"):
        ranks.run(2, other_share)


def other_share() -> None:
    """A weight whose rows are another rank's."""
    mesh = build_mesh(tensor=2)
    weight = torch.zeros(6 if mesh.rank("tensor") else 5, WIDTH)
    linear_cross_entropy(random(TOKENS, WIDTH), weight, LABELS, mesh=mesh, vocab_size=VOCAB, layout=LAYOUTS[0])


def unknown_label(label: int) -> None:
    mesh = build_mesh(tensor=2)
    head, labels = projection(mesh, torch.float64), torch.tensor([0, label])
    settings: dict[str, Any] = {"mesh": mesh, "vocab_size": VOCAB, "layout": TokenLayout(1, 2)}
    linear_cross_entropy(random(2, WIDTH), head.weight, labels, **settings)


@pytest.mark.parametrize("label", [-1, VOCAB])
def test_labels_outside_the_vocabulary_are_an_error(ranks: RankPool, label: int) -> None:
    with pytest.raises(RankFailure, match="out of bounds"):
        ranks.run(2, unknown_label, label)


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        return result


def shapes_of_a_step(layout: TokenLayout, chunk: int | None) -> tuple[set[tuple[int, ...]], int]:
    mesh = build_mesh(tensor=2)
    head = projection(mesh, torch.float64)
    leaf = own_rows(random(TOKENS, WIDTH), mesh, layout).clone().requires_grad_()
    with Shapes() as recorded:
        loss = linear_cross_entropy(
            leaf, head.weight, LABELS, mesh=mesh, vocab_size=VOCAB, layout=layout, chunk_tokens=chunk
        )
        loss.backward()
    return recorded.shapes, head.weight.shape[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["copies", "slices"])
def test_logits_are_never_whole(ranks: RankPool, layout: TokenLayout) -> None:
    for shapes, local in ranks.run(2, shapes_of_a_step, layout, None):
        assert (TOKENS, local) in shapes
        assert not any(VOCAB in shape for shape in shapes)
    chunk = 3
    for shapes, local in ranks.run(2, shapes_of_a_step, layout, chunk):
        with_vocabulary = {shape for shape in shapes if local in shape} - {(local, WIDTH), (WIDTH, local)}
        assert (chunk, local) in with_vocabulary
        # Chunks of 3, 3 and 2 tokens, some transposed; nothing with more tokens.
        assert with_vocabulary <= {(chunk, local), (local, chunk), (2, local), (local, 2)}


def peak_bytes(chunk: int | None, dtype: torch.dtype, training: bool) -> tuple[int, int]:
    """What the profiler of torch's allocator saw, and the formula."""
    tokens, width, vocab = 256, 32, 1000
    hidden = random(tokens, width, dtype=dtype).requires_grad_(training)
    weight = nn.Parameter(random(vocab, width, seed=1, dtype=dtype), requires_grad=training)
    Collector(weight, takes=True)
    labels = torch.arange(tokens)
    with profile(profile_memory=True) as profiler:
        loss = single(hidden, weight, labels, chunk)
        if training:
            loss.backward()
    assert profiler.kineto_results is not None
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, loss_peak_bytes(tokens, width, vocab, chunk, dtype.itemsize, training=training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_peak_memory_follows_the_formula(dtype: torch.dtype, training: bool) -> None:
    for chunk in (None, 100, 64):
        measured, formula = peak_bytes(chunk, dtype, training)
        assert measured == pytest.approx(formula, rel=0.02)  # vectors with one entry per token are left out


def test_formula_of_mixed_precision() -> None:
    """Counted by hand: 2-byte hidden gradients, 4-byte weight gradients, logits in 4 and their gradient in 2 bytes."""
    assert loss_peak_bytes(1000, 10, 300, 100, 2) == 1000 * 10 * 2 + 300 * 10 * 4 + 100 * 300 * (4 + 2)
    assert loss_peak_bytes(1000, 10, 300, 100, 2, cast_weight=True) == 20_000 + 12_000 + 180_000 + 6_000
    assert loss_peak_bytes(1000, 10, 300, None, 2, training=False) == 1000 * 300 * 4
    assert loss_peak_bytes(1000, 10, 30, 1, 2) == 20_000 + 1_200 + 20_000  # the backward pass is the larger


class Halves(nn.Module):
    """Uses the loss in the middle of compiled code."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return single(hidden * 2, self.weight, labels, 3) / 2


def test_inside_compiled_code() -> None:
    module = Halves(random(VOCAB, WIDTH, seed=1))
    hidden = random(TOKENS, WIDTH).requires_grad_()
    eager = torch.autograd.grad(module(hidden, LABELS.flatten()), [hidden, module.weight])
    compiled = torch.compile(module, backend="aot_eager")(hidden, LABELS.flatten())
    for value, expected in zip(torch.autograd.grad(compiled, [hidden, module.weight]), eager, strict=True):
        assert_close(value, expected, 1e-12)
