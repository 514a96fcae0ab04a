"""The peer: Megatron-core's MoELayer (0.16), its all-to-all dispatcher and its GroupedMLP, without TransformerEngine.

[Note: what the peer lacks]
Without TransformerEngine the grouped experts of Megatron-core need the package ``grouped_gemm``, and the alternative is
a loop over experts that nobody trains with. So the one function that they take from it is replaced by torch's grouped
product, which is also what our experts use. The router asks for a name that only exists with TransformerEngine.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.bench.moe_contest import LayerSize
from lightning_moe.moe.layer import MoELayer

_ACTIVATIONS = {"swiglu": F.silu, "gelu": F.gelu, "relu": F.relu}


class MegatronPeer:
    """Megatron-core's layer with the weights of one of ours; on CUDA, in bfloat16, with all ranks along ``expert``.

    Args:
        ours: Where the weights come from.
        size: Sizes of the layer.
        main_grads: Whether to add the experts' gradients to float32 buffers, as the hooks of its data parallelism do.

    Attributes:
        layer: The ``MoELayer``.
    """

    def __init__(self, ours: MoELayer, size: LayerSize, *, main_grads: bool = False) -> None:
        torch.compiler.reset()  # it compiles its activation; limits count the shapes of earlier peers
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what else is not installed
            self.layer = _build(size)
        device = ours.router.weight.device
        self.layer.to(device)
        self.layer.set_layer_number(1)
        local, hidden = ours.experts.down_proj.shape[:2]
        self._local, self._hidden = local, hidden
        up, down = ours.experts.projections
        with torch.no_grad():
            self.layer.router.weight.copy_(ours.router.weight)
            # As its forward sees them: [experts, inputs, outputs].
            self.layer.experts.weight1.view(local, hidden, -1).copy_(up.transpose(1, 2))
            self.layer.experts.weight2.view(local, -1, hidden).copy_(down.transpose(1, 2))
        self._main: list[Tensor] = []
        if main_grads:
            for weight in self._experts():
                self._main.append(torch.zeros_like(weight, dtype=torch.float32, requires_grad=False))
                weight.register_post_accumulate_grad_hook(partial(_move_grad, self._main[-1]))
        names = (name for name, _ in ours.experts.named_parameters())
        self._up_name, self._down_name = (f"experts.{name}" for name in names)

    def forward(self, hidden: Tensor) -> Tensor:
        """Tokens ``[T, D]`` to the same; it wants a sequence and a batch."""
        out: Tensor = self.layer(hidden[:, None])[0]
        return out[:, 0]

    def backward(self, out: Tensor, grad: Tensor) -> None:
        """Compute all gradients."""
        out.backward(grad)

    def gradients(self) -> Mapping[str, Tensor]:
        """Those of the weights, by the names and in the layout of our layer; the caller may keep them."""
        local, hidden = self._local, self._hidden
        up, down = [main.clone() for main in self._main] or [weight.grad for weight in self._experts()]
        return {
            "router.weight": self.layer.router.weight.grad,
            self._up_name: up.view(local, hidden, -1).transpose(1, 2),
            self._down_name: down.view(local, -1, hidden).transpose(1, 2),
        }

    def forget(self) -> None:
        """Drop the gradients."""
        self.layer.zero_grad(set_to_none=True)
        for main in self._main:
            main.zero_()

    def _experts(self) -> tuple[Any, Any]:
        return self.layer.experts.weight1, self.layer.experts.weight2


def _move_grad(main: Tensor, weight: Tensor) -> None:
    """Add a gradient to its buffer and free it, as soon as it is there."""
    assert weight.grad is not None
    main.add_(weight.grad)
    weight.grad = None


def _build(size: LayerSize) -> Any:
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import grouped_gemm_util, moe_utils
    from megatron.core.transformer.moe.experts import GroupedMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoELayer
    from megatron.core.transformer.moe.moe_layer import MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if grouped_gemm_util.grouped_gemm is None:
        grouped_gemm_util.ops = SimpleNamespace(gmm=_grouped_product)
        grouped_gemm_util.grouped_gemm = SimpleNamespace(ops=grouped_gemm_util.ops)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            expert_model_parallel_size=dist.get_world_size(),
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
    config = TransformerConfig(
        num_layers=1,
        hidden_size=size.hidden,
        num_attention_heads=1,
        ffn_hidden_size=size.expert_hidden,
        moe_ffn_hidden_size=size.expert_hidden,
        num_moe_experts=size.experts,
        moe_router_topk=size.top_k,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_grouped_gemm=True,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=dist.get_world_size(),
        gated_linear_unit=size.activation == "swiglu",
        activation_func=_ACTIVATIONS[size.activation],
        add_bias_linear=False,
        bias_activation_fusion=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,  # all weights are copied; its generators need not be set up
    )
    return MegatronMoELayer(config, MoESubmodules(experts=ModuleSpec(module=GroupedMLP)))


def _grouped_product(rows: Tensor, weight: Tensor, counts: Tensor, trans_b: bool = False) -> Tensor:
    """``grouped_gemm.ops.gmm``: rows ``[R, K]``, weight ``[E, K, N]``, and the numbers of rows, on the host."""
    ends = counts.cumsum(0).to(torch.int32).to(rows.device, non_blocking=True)
    return F.grouped_mm(rows, weight.transpose(-2, -1) if trans_b else weight, offs=ends)
