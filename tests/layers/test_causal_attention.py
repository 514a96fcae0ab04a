"""Causal attention on tensor and context ranks against loops over heads in one process.

B batch, S sequence, D model width, H head width.
"""

from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.errors import ConfigError
from lightning_moe.layers import (
    CausalSelfAttention,
    KVCache,
    RMSNorm,
    TokenLayout,
    attention_mask,
    rope_frequencies,
    rope_tables_at,
)
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import partial_grads
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
    own_sequence,
    random,
    result_of,
    run_cases,
)

BATCH, LENGTH, WIDTH, HEADS, KV_HEADS, HEAD = 2, 8, 12, 8, 2, 4
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 2, 2]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 1, 2, 3, 4, 0, 1]])
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "head norm, documents": {"qk_norm": "head", "documents": DOCUMENTS},
    "projection norm, window": {"qk_norm": "projection", "sliding_window": 3},
    "documents, window": {"documents": DOCUMENTS, "sliding_window": 3},
}


def attention(mesh: ParallelMesh, kind: dict[str, Any], **changes: int) -> CausalSelfAttention:
    torch.manual_seed(0)
    settings = {name: value for name, value in kind.items() if name != "documents"}
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS} | changes
    module = CausalSelfAttention(WIDTH, head_size=HEAD, mesh=mesh, norm_eps=1e-3, **sizes, **settings)
    for norm in (module.q_norm, module.k_norm):  # gains of one hide errors
        if norm is not None:
            whole = random(HEADS * HEAD, seed=9).exp()
            # Every rank's part of the same gains, by the logical features that it holds.
            specs = norm.__dict__.get("_shard_specs", {}).get("weight", ())
            index = list(specs[0].index) if specs else list(range(norm.weight.shape[0]))
            norm.weight.data = whole[index].to(norm.weight.dtype)
    return module


def rope(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return rope_tables_at(positions, *rope_frequencies(HEAD, 100.0), dtype)


def reference(module: CausalSelfAttention, hidden: Tensor, kind: dict[str, Any], positions: Tensor) -> Tensor:
    """Every head, query by query, on whole weights; ``hidden`` ``[B, S, D]``."""
    batch, length, _ = hidden.shape
    heads, kv_heads = module.num_heads, module.num_kv_heads
    q, k, v = F.linear(hidden, module.qkv_proj.weight).split([heads * HEAD, kv_heads * HEAD, kv_heads * HEAD], dim=-1)

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * gain

    assert (module.q_norm is None) == (module.qk_norm == "none")
    if module.qk_norm == "projection":
        q, k = norm(q, module.q_norm.weight), norm(k, module.k_norm.weight)
    q, k, v = (x.unflatten(-1, (-1, HEAD)) for x in (q, k, v))
    if module.qk_norm == "head":
        q, k = norm(q, module.q_norm.weight), norm(k, module.k_norm.weight)
    angles = positions.to(hidden.dtype)[:, :, None, None] * 100.0 ** (
        -torch.arange(0, HEAD, 2, dtype=hidden.dtype) / HEAD
    )

    def rotate(x: Tensor) -> Tensor:
        a, b = x[..., : HEAD // 2], x[..., HEAD // 2 :]
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)

    q, k = rotate(q), rotate(k)
    rows = []
    for b in range(batch):
        for i in range(length):
            keys = [
                j
                for j in range(i + 1)
                if i - j < kind.get("sliding_window", length)
                and ("documents" not in kind or kind["documents"][b, i] == kind["documents"][b, j])
            ]
            out = [
                (k[b, keys, n * kv_heads // heads] @ q[b, i, n] / HEAD**0.5).softmax(0)
                @ v[b, keys, n * kv_heads // heads]
                for n in range(heads)
            ]
            rows.append(torch.cat(out))
    return F.linear(torch.stack(rows), module.o_proj.weight)


def run_attention(
    mesh: ParallelMesh, sequence_parallel: bool, kind: dict[str, Any], dtype: torch.dtype, kv_heads: int
) -> Grads:
    module = attention(mesh, kind, num_kv_heads=kv_heads).to(dtype)
    tensor, context = mesh.size("tensor"), mesh.size("context")
    assert len(partial_grads(module)) == (2 if kind.get("qk_norm") == "head" and tensor > 1 else 0)
    layout = TokenLayout(BATCH, LENGTH // context, sequence_parallel, context_parallel=context > 1)

    def own(seed: int) -> Tensor:
        whole = random(BATCH, LENGTH, WIDTH, seed=seed, dtype=dtype)
        return own_rows(own_sequence(whole, mesh, layout).flatten(0, 1), mesh, layout)

    leaf = own(0).clone().requires_grad_()
    documents = here(kind["documents"]) if "documents" in kind else None
    mask = attention_mask(documents, LENGTH, kind.get("sliding_window"), leaf.device)
    output = module(leaf, layout, rope(own_sequence(here(POSITIONS), mesh, layout), dtype), mask)
    (own(1) * output.sin()).sum().backward()
    return result_of(module, output, leaf)


def sum_over(results: list[Grads], tensor: int) -> list[Grads]:
    """Reduce parameter gradients as the strategy does: over context, and per-head gains over tensor ranks too."""
    reduced = []
    for rank in range(tensor):
        parameters = {}
        for name in results[rank].parameters:
            whole = name.endswith("norm.weight") and not results[rank].specs.get(name)
            members = results if whole else results[rank::tensor]
            parameters[name] = torch.stack([member.parameters[name] for member in members]).sum(0)
        reduced.append(Grads(results[rank].output, results[rank].input, parameters, results[rank].specs))
    return reduced


def whole_hidden(results: list[Tensor], tensor: int, sequence_parallel: bool) -> Tensor:
    """``[B * S, D]`` from every rank's part: tensor ranks are neighbours, context ranks the rows of ranks."""
    layout = TokenLayout(1, 1, sequence_parallel)
    chunks = [gather(results[i : i + tensor], layout) for i in range(0, len(results), tensor)]
    return torch.cat([chunk.unflatten(0, (BATCH, -1)) for chunk in chunks], dim=1).flatten(0, 1)


@pytest.mark.parametrize(
    ("tensor", "context", "sequence_parallel", "kv_heads"),
    [(1, 1, False, 2), (2, 1, False, 2), (2, 1, True, 4), (1, 2, False, 1), (1, 4, False, 2), (2, 2, True, 2)],
)
def test_equals_loops_over_heads(
    ranks: RankPool, tensor: int, context: int, sequence_parallel: bool, kv_heads: int
) -> None:
    cases = [(sequence_parallel, kind, dtype, kv_heads) for kind, dtype in product(KINDS.values(), TOLERANCES)]
    for case, results in run_cases(ranks, {"tensor": tensor, "context": context}, run_attention, cases):
        check_attention(results, tensor, *case, tolerance=TOLERANCES[case[2]])


def check_attention(
    results: list[Grads],
    tensor: int,
    sequence_parallel: bool,
    kind: dict[str, Any],
    dtype: torch.dtype,
    kv_heads: int,
    tolerance: float,
) -> None:
    """Compare the results of :func:`run_attention` with loops over heads, computed in ``dtype``."""
    module = attention(ParallelMesh.single(), kind, num_kv_heads=kv_heads).to(dtype)
    hidden = random(BATCH, LENGTH, WIDTH, dtype=dtype).requires_grad_()
    output = reference(module, hidden, kind, POSITIONS)
    (random(BATCH, LENGTH, WIDTH, seed=1, dtype=dtype).flatten(0, 1) * output.sin()).sum().backward()
    assert hidden.grad is not None
    outputs = whole_hidden([result.output for result in results], tensor, sequence_parallel)
    assert_close(outputs, output.detach(), tolerance, "output")
    grads = whole_hidden([result.input for result in results], tensor, sequence_parallel)
    assert_close(grads, hidden.grad.flatten(0, 1), tolerance, "input gradient")
    expected = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert len(expected) == (2 if kind.get("qk_norm", "none") == "none" else 4)
    assert_shards(sum_over(results, tensor), expected, tolerance)


def generate(mesh: ParallelMesh, kind: dict[str, Any], pieces: list[int]) -> Tensor:
    """Attention over pieces of the sequence, one after the other, with a cache; without splitting the sequence."""
    module = attention(mesh, kind).double()
    cache = KVCache(BATCH, LENGTH, module.num_kv_heads, HEAD, dtype=torch.float64, device=torch.device("cpu"))
    hidden, outputs = random(BATCH, LENGTH, WIDTH), []
    for piece in pieces:
        past = cache.length
        positions = torch.arange(past, past + piece)[None]
        mask = attention_mask(None, piece, kind.get("sliding_window"), hidden.device, past=past)
        layout = TokenLayout(BATCH, piece)
        own = hidden[:, past : past + piece].flatten(0, 1)
        outputs.append(module(own, layout, rope(positions, torch.float64), mask, cache).unflatten(0, (BATCH, piece)))
    assert cache.length == LENGTH
    return torch.cat(outputs, dim=1).flatten(0, 1).detach()


@pytest.mark.parametrize("sizes", [{"tensor": 1}, {"tensor": 2}, {"context": 2}])
def test_cache_equals_the_whole_sequence(ranks: RankPool, sizes: dict[str, int]) -> None:
    kinds: list[dict[str, Any]] = [{"qk_norm": "head"}, {"qk_norm": "projection", "sliding_window": 3}]
    cases = list(product(kinds, ([LENGTH], [1] * LENGTH, [3, 1, 4])))
    for (kind, _), results in run_cases(ranks, sizes, generate, cases):
        module = attention(ParallelMesh.single(), kind).double()
        positions = torch.arange(LENGTH).expand(BATCH, -1)
        expected = reference(module, random(BATCH, LENGTH, WIDTH), kind, positions)
        for output in results:
            assert_close(output, expected, 1e-12)


def test_a_forgotten_mask_is_noticed() -> None:
    module = attention(ParallelMesh.single(), {"sliding_window": 3}).double()
    with pytest.raises(AssertionError, match="needs a mask"):
        module(random(BATCH * LENGTH, WIDTH), TokenLayout(BATCH, LENGTH), rope(POSITIONS, torch.float64))


def test_refuses_more_tokens_than_the_cache_holds() -> None:
    cache = KVCache(1, 2, 1, 4, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(AssertionError, match="3 tokens in a cache for 2"):
        cache.append(torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4))


def build(tensor: int, context: int, num_heads: int, num_kv_heads: int) -> None:
    attention(build_mesh(tensor=tensor, context=context), {}, num_heads=num_heads, num_kv_heads=num_kv_heads)


def test_refuses_heads_that_cannot_be_split(ranks: RankPool) -> None:
    with pytest.raises(ConfigError, match="num_kv_heads"):
        attention(ParallelMesh.single(), {}, num_kv_heads=3)
    with pytest.raises(
        RankFailure, match=r"parallel\.tensor: 2 is not allowed; allowed: a divisor of num_kv_heads = 1"
    ):
        ranks.run(2, build, 2, 1, 8, 1)
    with pytest.raises(RankFailure, match=r"parallel\.context: 2 is not allowed; allowed: a divisor of num_heads"):
        ranks.run(2, build, 1, 2, 3, 1)


def copies_of_a_module() -> bool:
    module = attention(build_mesh(tensor=2), {"qk_norm": "projection"})
    copied, pickled = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    hidden, layout = random(BATCH * LENGTH, WIDTH, dtype=torch.float32), TokenLayout(BATCH, LENGTH)
    tables = rope(POSITIONS, torch.float32)
    assert torch.equal(pickled.q_norm.weight, module.q_norm.weight)
    return torch.equal(copied(hidden, layout, tables), module(hidden, layout, tables))


def test_modules_can_be_copied_and_pickled(ranks: RankPool) -> None:
    """Weight averaging deep-copies modules; a process group kept by a module could not be."""
    assert ranks.run(2, copies_of_a_module) == [True, True]


def compiled(tensor: int, context: int) -> list[list[Tensor]]:
    mesh = build_mesh(tensor=tensor, context=context)
    layout = TokenLayout(BATCH, LENGTH // context, tensor > 1, context > 1)
    results = []
    for compile_it in (False, True):
        module = attention(mesh, {"qk_norm": "head"}).double()
        function = torch.compile(module, backend="aot_eager") if compile_it else module
        whole = own_sequence(random(BATCH, LENGTH, WIDTH), mesh, layout).flatten(0, 1)
        leaf = own_rows(whole, mesh, layout).clone().requires_grad_()
        output = function(leaf, layout, rope(own_sequence(POSITIONS, mesh, layout), torch.float64))
        output.sin().sum().backward()
        assert leaf.grad is not None
        results.append([output.detach(), leaf.grad, *(p.grad for p in module.parameters() if p.grad is not None)])
    return results


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (2, 1), (1, 2)])
def test_compiled_equals_eager(ranks: RankPool, tensor: int, context: int) -> None:
    for eager, other in ranks.run(tensor * context, compiled, tensor, context):
        for value, expected in zip(other, eager, strict=True):
            assert_close(value, expected, 1e-12)


def test_autocast() -> None:
    """Everything but norms and rotation in bfloat16: errors of a few times 2^-8."""
    module = attention(ParallelMesh.single(), {"qk_norm": "head"})
    hidden = random(BATCH * LENGTH, WIDTH, dtype=torch.float32)
    layout, tables = TokenLayout(BATCH, LENGTH), rope(POSITIONS, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(hidden, layout, tables)
    assert output.dtype == torch.bfloat16
    assert_close(output.float().detach(), module(hidden, layout, tables).detach(), 3e-2)


def test_flash_attention_is_chosen_on_the_cpu_too() -> None:
    """Grouped heads without a mask go to the fused kernel as they are: no copies of keys and values."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    module = attention(ParallelMesh.single(), {}).float()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        module(
            random(BATCH * LENGTH, WIDTH, dtype=torch.float32),
            TokenLayout(BATCH, LENGTH),
            rope(POSITIONS, torch.float32),
        )


def test_norm_module_is_per_head_or_over_the_projection() -> None:
    head = attention(ParallelMesh.single(), {"qk_norm": "head"})
    assert isinstance(head.q_norm, RMSNorm)
    assert head.q_norm.weight.shape == (HEAD,)
    projection = attention(ParallelMesh.single(), {"qk_norm": "projection"})
    assert projection.q_norm is not None
    assert projection.q_norm.weight.shape == (HEADS * HEAD,)
