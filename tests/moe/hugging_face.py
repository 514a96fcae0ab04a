"""Hugging Face's MoE blocks as references, and the same blocks as our configurations and weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_moe.config.moe import MoEConfig
from tests.moe.routed import RoutedBatch, RoutedResult

D, E = 64, 12


def _mixtral() -> tuple[nn.Module, MoEConfig]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=D, intermediate_size=96, num_local_experts=E, num_experts_per_tok=2, router_jitter_noise=0.0
    )
    return _eager(config, MixtralSparseMoeBlock), _ours(top_k=2, expert_hidden_size=96)


def _qwen2_moe() -> tuple[nn.Module, MoEConfig]:
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = Qwen2MoeConfig(
        hidden_size=D,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=80,
        num_experts=E,
        num_experts_per_tok=4,
        norm_topk_prob=False,
    )
    ours = _ours(
        top_k=4, expert_hidden_size=48, renormalize=False, shared_expert_hidden_size=80, shared_expert_gate=True
    )
    return _eager(config, Qwen2MoeSparseMoeBlock), ours


def _qwen3_moe() -> tuple[nn.Module, MoEConfig]:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=48, num_experts=E, num_experts_per_tok=4, norm_topk_prob=True
    )
    return _eager(config, Qwen3MoeSparseMoeBlock), _ours(top_k=4, expert_hidden_size=48)


def _deepseek_v3() -> tuple[nn.Module, MoEConfig]:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=48,
        n_routed_experts=E,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        n_shared_experts=2,
        routed_scaling_factor=2.5,
    )
    ours = _ours(
        top_k=4,
        expert_hidden_size=48,
        router_score="sigmoid",
        expert_bias=True,
        num_groups=4,
        top_k_groups=2,
        routed_scaling_factor=2.5,
        shared_expert_hidden_size=96,
    )
    return _eager(config, DeepseekV3MoE), ours


BLOCKS: dict[str, Callable[[], tuple[nn.Module, MoEConfig]]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek_v3,
}


@dataclass(frozen=True)
class Reference:
    """One of Hugging Face's blocks on one batch, with everything under our names."""

    config: MoEConfig
    state: dict[str, Tensor]
    hidden: Tensor
    cotangent: Tensor
    output: Tensor
    hidden_grad: Tensor
    grads: dict[str, Tensor]
    tokens_per_expert: Tensor


def reference(name: str, dtype: torch.dtype, batch: int, sequence: int, *, keep_float64: bool = False) -> Reference:
    """Run a randomly initialised block forward and backward.

    Args:
        name: Key of :data:`BLOCKS`.
        dtype: Dtype of weights and tokens.
        batch: Number of sequences.
        sequence: Length of each.
        keep_float64: Undo the casts to float32 that all four blocks have in their routers.
    """
    block, config = _random_block(name, dtype)
    hidden, cotangent = torch.randn(2, batch, sequence, D, dtype=torch.float64).to(dtype).unbind()
    hidden = hidden.clone().requires_grad_()
    with _KeepFloat64() if keep_float64 else nullcontext():
        output = block(hidden)
        experts = block.gate(hidden)[2]
    output.backward(cotangent)
    assert hidden.grad is not None
    values = {_our_name(theirs): value for theirs, value in block.state_dict().items()}
    grads = {_our_name(n): p.grad for n, p in block.named_parameters() if p.grad is not None}
    return Reference(
        config,
        _stack_shared(values),
        hidden.detach(),
        cotangent,
        output.detach(),
        hidden.grad,
        _stack_shared(grads),
        torch.bincount(experts.flatten(), minlength=E),
    )


def routed_reference(name: str, dtype: torch.dtype, num_tokens: int) -> tuple[RoutedBatch, RoutedResult]:
    """Run only the routed experts of a block, on the choices and weights of its own router."""
    block, config = _random_block(name, dtype)
    hidden, cotangent = torch.randn(2, num_tokens, D, dtype=torch.float64).to(dtype).unbind()
    with torch.no_grad():
        _, weights, choices = block.gate(hidden)
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    output = block.experts(hidden, choices, weights)
    output.backward(cotangent)
    up, down = block.experts.gate_up_proj, block.experts.down_proj
    batch = RoutedBatch(config, up.detach(), down.detach(), hidden.detach(), choices, weights.detach(), cotangent)
    return batch, RoutedResult(output.detach(), hidden.grad, weights.grad, up.grad, down.grad)


def _random_block(name: str, dtype: torch.dtype) -> tuple[Any, MoEConfig]:
    torch.manual_seed(3)
    block, config = BLOCKS[name]()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.08)
    if config.expert_bias:
        block.gate.e_score_correction_bias.normal_(std=0.3)
    return block.to(dtype), config


def _our_name(name: str) -> str:
    renamed = {
        "gate.weight": "router.weight",
        "gate.e_score_correction_bias": "router.expert_bias",
        "shared_expert_gate.weight": "shared_expert.gate",
    }
    if name in renamed:
        return renamed[name]
    return name.replace("shared_experts.", "shared_expert.").removesuffix(".weight")


def _stack_shared(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face keeps the shared expert's gate and up projections apart."""
    values = dict(values)
    if "shared_expert.gate_proj" in values:
        gate, up = values.pop("shared_expert.gate_proj"), values.pop("shared_expert.up_proj")
        values["shared_expert.gate_up_proj"] = torch.cat([gate, up])
    return values


def _ours(**changes: Any) -> MoEConfig:
    return MoEConfig(num_experts=E, load_balancing="none", **changes)


def _eager(config: Any, block: Callable[[Any], nn.Module]) -> nn.Module:
    config._experts_implementation = "eager"
    return block(config).train()


class _KeepFloat64(TorchFunctionMode):
    """Makes ``x.float()``, ``x.type(torch.float32)`` and ``softmax(dtype=torch.float32)`` leave float64 as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float or (func is Tensor.type and torch.float32 in args[1:]):
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
