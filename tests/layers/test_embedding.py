"""Vocabulary-parallel embedding and gathered logits against the whole table."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.errors import ConfigError
from lightning_moe.layers import TokenLayout, VocabParallelEmbedding, whole_logits
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import local_part, shard_specs
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

VOCAB, WIDTH = 11, 6  # no number of ranks divides 11
TOKENS = torch.tensor([[0, 10, 3, 3], [5, 6, 0, 9]])
LAYOUTS = [TokenLayout(2, 4), TokenLayout(2, 4, sequence_parallel=True)]


def embedding(mesh: ParallelMesh) -> VocabParallelEmbedding:
    torch.manual_seed(0)
    return VocabParallelEmbedding(VOCAB, WIDTH, mesh, init_std=0.5)


def run_embedding(mesh: ParallelMesh, layout: TokenLayout, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[int]]:
    layer = embedding(mesh).to(dtype)
    output = layer(here(TOKENS), layout)
    (own_rows(random(8, WIDTH, seed=1, dtype=dtype), mesh, layout) * output.sin()).sum().backward()
    assert layer.weight.grad is not None
    whole = embedding(ParallelMesh.single()).weight.to(dtype)
    assert torch.equal(layer.weight, local_part(whole, shard_specs(layer)["weight"]))
    return output.detach().cpu(), layer.weight.grad.cpu(), list(layer.vocabulary.tokens)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_the_whole_table(ranks: RankPool, world_size: int) -> None:
    cases = list(product(LAYOUTS, TOLERANCES))
    for (layout, dtype), results in run_cases(ranks, {"tensor": world_size}, run_embedding, cases):
        check_embedding(results, layout, dtype, TOLERANCES[dtype])


def check_embedding(
    results: list[tuple[Tensor, Tensor, list[int]]], layout: TokenLayout, dtype: torch.dtype, tolerance: float
) -> None:
    """Compare the results of :func:`run_embedding` with the whole table."""
    table = embedding(ParallelMesh.single()).weight.detach().to(dtype).requires_grad_()
    output = F.embedding(TOKENS.flatten(), table)
    (random(8, WIDTH, seed=1, dtype=dtype) * output.sin()).sum().backward()
    assert table.grad is not None
    # The sum adds zeros only, so the rows are those of the table to the last bit.
    assert torch.equal(gather([result[0] for result in results], layout), output)
    assert [token for result in results for token in result[2]] == list(range(VOCAB))
    assert_close(torch.cat([result[1] for result in results]), table.grad, tolerance)


def embed_unknown(token: int) -> None:
    layer = embedding(build_mesh(tensor=2))
    layer(torch.tensor([[0, token]]), TokenLayout(1, 2))


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_tokens_outside_the_vocabulary_are_an_error(ranks: RankPool, token: int) -> None:
    with pytest.raises(RankFailure, match="index out of range"):
        ranks.run(2, embed_unknown, token)


def autocast_embedding(layout: TokenLayout) -> torch.dtype:
    layer = embedding(build_mesh(tensor=2))
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(TOKENS, layout)
    output.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    dtype: torch.dtype = output.dtype
    return dtype


def test_autocast(ranks: RankPool) -> None:
    assert ranks.run(2, autocast_embedding, LAYOUTS[1]) == [torch.bfloat16] * 2


def test_refuses_more_ranks_than_tokens() -> None:
    mesh = ParallelMesh.single()
    with pytest.raises(ConfigError, match=r"parallel\.tensor"):
        VocabParallelEmbedding(0, WIDTH, mesh, init_std=1.0)


def run_logits(mesh: ParallelMesh, layout: TokenLayout, vocab_size: int) -> Grads:
    torch.manual_seed(0)
    head = VocabParallelEmbedding(vocab_size, WIDTH, mesh, init_std=0.5).double()
    leaf = own_rows(random(8, WIDTH), mesh, layout).clone().requires_grad_()
    output = whole_logits(leaf, head.weight, mesh=mesh, vocab_size=vocab_size, layout=layout)
    (random(8, vocab_size, seed=1) * output.sin()).sum().backward()
    return result_of(head, output, leaf)


def test_whole_logits(ranks: RankPool) -> None:
    cases = list(product(LAYOUTS, (VOCAB, 12)))
    for (layout, vocab_size), results in run_cases(ranks, {"tensor": 2}, run_logits, cases):
        check_logits(results, layout, vocab_size)


def check_logits(results: list[Grads], layout: TokenLayout, vocab_size: int) -> None:
    torch.manual_seed(0)
    head = VocabParallelEmbedding(vocab_size, WIDTH, ParallelMesh.single(), init_std=0.5).double()
    hidden = random(8, WIDTH).requires_grad_()
    output = hidden @ head.weight.T
    (random(8, vocab_size, seed=1) * output.sin()).sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    for result in results:
        assert_close(result.output, output.detach(), 1e-12)
    assert_close(gather([result.input for result in results], layout), hidden.grad, 1e-12)
    assert_shards(results, {"weight": head.weight.grad}, 1e-12)
