"""The same layers on CUDA: NCCL ranks against the CPU's references, memory of the loss, choice of kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_moe.layers import (
    CausalSelfAttention,
    RMSNorm,
    TokenLayout,
    apply_rope,
    attention_mask,
    linear_cross_entropy,
    loss_peak_bytes,
    rope_frequencies,
    rope_tables_at,
)
from lightning_moe.parallel.mesh import ParallelMesh
from tests.gpus import run_on_gpus
from tests.layers.gpu_script import ATTENTION, DTYPES
from tests.layers.test_causal_attention import KINDS, check_attention
from tests.layers.test_cross_entropy import check_loss
from tests.layers.test_embedding import check_embedding
from tests.layers.test_linear import LAYOUTS, Collector, check_pair

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""bfloat16 is compared with float32 on unrounded operands: a few roundings of 2^-9 each."""

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """The results of both ranks, launched once for all tests."""
    output = tmp_path_factory.mktemp("layers") / "results.pt"
    run_on_gpus(2, "tests.layers.gpu_script", output)
    loaded: list[dict[Any, Any]] = torch.load(output, weights_only=False)
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_nccl_equals_the_cpu(results: list[dict[Any, Any]], dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[dtype]
    reference = torch.float32 if dtype == torch.bfloat16 else dtype

    def of(*key: Any) -> list[Any]:
        return [result[key] for result in results]

    for i, layout in enumerate(LAYOUTS):
        check_pair(of("linear", dtype, i), layout, reference, tolerance)
        check_embedding(of("embedding", dtype, i), layout, dtype, tolerance)
        check_loss(of("loss", dtype, i), layout, reference, tolerance)
    for name, kind in KINDS.items():
        for case in ATTENTION:
            tensor, sequence_parallel, kv_heads = case
            parts = of("attention", dtype, name, case)
            check_attention(parts, tensor, sequence_parallel, kind, reference, kv_heads, tolerance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("chunk", [1024, 5000, None])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_peak_memory_of_the_loss(dtype: torch.dtype, autocast: bool, chunk: int | None, training: bool) -> None:
    tokens, width, vocab = 8192, 1024, 32768
    if autocast and dtype == torch.bfloat16:
        pytest.skip("nothing to cast")
    compute = torch.bfloat16 if autocast else dtype
    hidden = torch.randn(tokens, width, device="cuda", dtype=compute, requires_grad=training)
    weight = nn.Parameter(torch.randn(vocab, width, device="cuda", dtype=dtype), requires_grad=training)
    labels = torch.randint(vocab, (tokens,), device="cuda")
    sink = Collector(weight, takes=True)
    settings: dict[str, Any] = {"mesh": ParallelMesh.single(), "vocab_size": vocab, "layout": TokenLayout(1, tokens)}

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk, **settings)
        if training:
            loss.backward()

    step()  # workspaces of cuBLAS stay allocated
    hidden.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    measured = torch.cuda.max_memory_allocated() - before
    formula = loss_peak_bytes(tokens, width, vocab, chunk, compute.itemsize, training=training, cast_weight=autocast)
    assert sink.calls == (2 if training else 0)
    assert measured == pytest.approx(formula, rel=0.05)


@pytest.mark.parametrize(
    ("dtype", "masked", "backend"),
    [
        (torch.bfloat16, False, SDPBackend.FLASH_ATTENTION),
        (torch.bfloat16, True, SDPBackend.EFFICIENT_ATTENTION),
        (torch.float32, False, SDPBackend.EFFICIENT_ATTENTION),
        (torch.float32, True, SDPBackend.EFFICIENT_ATTENTION),
    ],
)
def test_attention_uses_fused_kernels(dtype: torch.dtype, masked: bool, backend: SDPBackend) -> None:
    """Grouped heads too: the fallback would hold the scores of all pairs of tokens."""
    with torch.device("cuda"):
        module = CausalSelfAttention(256, 8, 2, 64, ParallelMesh.single()).to(dtype)
        hidden = torch.randn(2 * 512, 256, dtype=dtype, requires_grad=True)
        rope = rope_tables_at(torch.arange(512)[None], *rope_frequencies(64, 1e4), dtype)
        mask = (
            attention_mask(torch.arange(512).div(100).int().expand(2, -1), 512, None, hidden.device) if masked else None
        )
    with sdpa_kernel(backend):  # an error if the kernel does not take these operands
        module(hidden, TokenLayout(2, 512), rope, mask).float().sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tables", ["shared", "per sequence"])
@pytest.mark.parametrize("heads", [(5,), (2, 3), (40,)], ids=str)
def test_one_kernel_rotates_heads_where_they_lie(
    heads: tuple[int, ...], tables: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_moe.layers import triton_rope  # there is no Triton without a GPU

    calls: list[bool] = []
    rotate = triton_rope.rotate
    monkeypatch.setattr(triton_rope, "rotate", lambda *args, back: calls.append(back) or rotate(*args, back=back))
    batch, length, width = 2, 7, 24
    fused = torch.randn(batch, length, 48, width, dtype=dtype, device="cuda", requires_grad=True)
    count = torch.Size(heads).numel()
    positions = torch.arange(length, device="cuda").expand(batch if tables == "per sequence" else 1, -1)
    positions = positions + 100 * torch.arange(positions.shape[0], device="cuda")[:, None]
    rope = rope_tables_at(positions, *rope_frequencies(width, 1e4), dtype)
    shape = (*positions.shape, *[1] * len(heads), width)

    def rotated(source: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = apply_rope(source[:, :, 3 : 3 + count].unflatten(2, heads), cos.view(shape), sin.view(shape))
        # Attention gives gradients with heads before tokens.
        out.transpose(1, 2).backward(torch.ones_like(out.transpose(1, 2)).cumsum(-1) / width)
        assert source.grad is not None
        return torch.cat([out.detach().flatten(), source.grad.flatten()])

    out = rotated(fused, *rope)
    assert calls == [False, True]
    exact = rotated(fused.detach().double().requires_grad_(), *(table.double() for table in rope))
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    assert len(calls) == 2  # float64 takes the plain operations


@pytest.mark.parametrize("width", [64, 2048])
def test_norm_of_16_bit_vectors_rounds_once(width: int) -> None:
    norm = RMSNorm(width).cuda().bfloat16()
    hidden = torch.randn(300, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = norm(hidden)
    grads = torch.autograd.grad(out, (hidden, norm.weight), torch.full_like(out, 0.5))
    exact = RMSNorm(width).cuda().double()
    wide = hidden.detach().double().requires_grad_()
    expected = exact(wide)
    wanted = torch.autograd.grad(expected, (wide, exact.weight), torch.full_like(expected, 0.5))
    for value, reference in zip((out, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=2**-8, atol=1e-3)
