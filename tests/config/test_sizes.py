"""Parameters and activations by arithmetic are those of the built models."""

from __future__ import annotations

import pytest
import torch

from lightning_moe.config import ChronosMoEConfig, GPTMoEConfig, MoEConfig, ParallelConfig
from lightning_moe.config.block_size import deferred_operands, kept_activations
from lightning_moe.config.chronos_size import chronos_size, tokens_per_series
from lightning_moe.config.gpt_size import gpt_size
from lightning_moe.models.chronos_moe.model import ChronosMoEModel
from lightning_moe.models.gpt_moe.model import GPTMoEModel

MOE = MoEConfig(num_experts=4, expert_hidden_size=96)
SHARED = MoEConfig(num_experts=4, expert_hidden_size=96, shared_expert_hidden_size=64, shared_expert_gate=True)


def count(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("moe", [MOE, SHARED, None], ids=["moe", "shared", "dense"])
def test_pieces_of_a_gpt(moe: MoEConfig | None) -> None:
    config = GPTMoEConfig(num_kv_heads=2, qk_norm="head", moe=moe, dense_layers=(0,) if moe else ())
    model, size = GPTMoEModel(config), gpt_size(config)
    assert size.embedding.total == count(model.embedding)
    assert [shape.parameters.total for shape in size.blocks] == [count(block) for block in model.blocks.children()]
    assert size.head.total == count(model.lm_head) + count(model.final_norm)


@pytest.mark.parametrize("moe", [MOE, SHARED, None], ids=["moe", "shared", "dense"])
def test_pieces_of_a_chronos(moe: MoEConfig | None) -> None:
    config = ChronosMoEConfig(moe=moe)
    model, size = ChronosMoEModel(config), chronos_size(config)
    assert size.embedding.total == count(model.patch_embedding) + model.reg_token.numel()
    assert [shape.parameters.total for shape in size.blocks] == [count(block) for block in model.blocks.children()]
    assert size.head.total == count(model.quantile_head) + count(model.final_norm)
    assert tokens_per_series(config) == 144 // 12 + 1 + 24 // 12


def test_relative_costs() -> None:
    """A block of experts counts what a token visits; the head of Qwen3-30B is as dear as five blocks."""
    costs = gpt_size(GPTMoEConfig.qwen3_30b_a3b()).relative_costs
    assert costs.blocks == (1.0,) * 48
    assert costs.embed == 0
    attention, visited, router = 2 * 2048 * (32 + 4) * 128, 8 * 3 * 2048 * 768, 128 * 2048
    block = attention + visited + router + 2 * 2048 + 2 * 128
    assert costs.head == pytest.approx(151936 * 2048 / block, rel=1e-12)
    uneven = gpt_size(GPTMoEConfig.deepseek_moe_16b()).relative_costs.blocks
    assert sum(uneven) == pytest.approx(28, rel=1e-12)
    assert uneven[0] != uneven[1]


def kept_bytes(model: GPTMoEModel, tokens: torch.Tensor) -> int:
    """Bytes of what autograd keeps of a forward pass, weights left out and shared memory counted once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(tokens, tokens)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert output.loss_sum.requires_grad
    return total


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("moe", [MOE, SHARED, None], ids=["moe", "shared", "dense"])
def test_activations_are_those_that_autograd_keeps(moe: MoEConfig | None, checkpointing: str) -> None:
    """Two blocks more keep twice the estimate; 2 %: routing weights and statistics of norms are left out of it."""
    tokens, kept = torch.randint(257, (4, 64)), []
    for layers in (1, 3):
        config = GPTMoEConfig(num_kv_heads=2, num_layers=layers, ffn_hidden_size=160, moe=moe)
        kept.append(kept_bytes(GPTMoEModel(config, activation_checkpointing=checkpointing), tokens))
    (shape, *_), parallel = gpt_size(config).blocks, ParallelConfig()
    estimate = kept_activations(shape, parallel, checkpointing, fused_norm=False).bytes(4, 4)
    assert (kept[1] - kept[0]) / 2 / tokens.numel() == pytest.approx(estimate, rel=0.02)


def test_axes_divide_activations() -> None:
    (shape, *_) = gpt_size(GPTMoEConfig(moe=MOE)).blocks
    alone, split = ParallelConfig(), ParallelConfig(tensor=2)
    for size in (lambda p: kept_activations(shape, p, "none", fused_norm=True), lambda p: deferred_operands(shape, p)):
        assert size(split).bytes(4, 2) == pytest.approx(size(alone).bytes(4, 2) / 2, rel=1e-12)
    copies = ParallelConfig(tensor=2, sequence_parallel=False)
    assert kept_activations(shape, copies, "full", fused_norm=True).residual == 64


def test_operands_of_a_dense_block() -> None:
    """Attention: x 64, dy of q, k, v 192, heads 64, dy 64. SwiGLU: x 64, dy 320, inner 160, dy 64."""
    (shape, *_) = gpt_size(GPTMoEConfig(moe=None, ffn_hidden_size=160)).blocks
    assert deferred_operands(shape, ParallelConfig()).inner == 64 + 192 + 64 + 64 + 64 + 320 + 160 + 64
