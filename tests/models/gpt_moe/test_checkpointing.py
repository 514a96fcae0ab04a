"""Activation checkpointing: the same gradients from fewer kept activations, and what is not done twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_moe import GPTMoEConfig, MoEConfig
from lightning_moe.config.gpt import ActivationCheckpointing
from lightning_moe.errors import ConfigError
from lightning_moe.models.gpt_moe import GPTMoEModel
from lightning_moe.models.routing import auxiliary_loss
from lightning_moe.moe import layer as moe_layer
from lightning_moe.moe import rows_to_send
from lightning_moe.moe.router import TopKRouter
from tests.models.gpt_moe.training import CONFIGS, PackedText

KINDS: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")


def build(kind: ActivationCheckpointing, config: GPTMoEConfig) -> GPTMoEModel:
    torch.manual_seed(3)
    return GPTMoEModel(config, activation_checkpointing=kind).double()


def gradients(model: GPTMoEModel) -> tuple[Tensor, dict[str, Tensor | None]]:
    rows = PackedText(4, documents=True).values
    output = model(rows["tokens"], rows["labels"], rows["positions"], rows["documents"])
    loss = output.loss_sum + auxiliary_loss(output.routing)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equal_to_the_last_bit(name: str, kind: ActivationCheckpointing) -> None:
    expected_loss, expected = gradients(build("none", CONFIGS[name]))
    loss, grads = gradients(build(kind, CONFIGS[name]))
    assert torch.equal(loss, expected_loss)
    for parameter, grad in grads.items():
        assert torch.equal(grad, expected[parameter]), parameter  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "exchanges"), [("none", 1), ("selective", 1), ("full", 2)])
def test_what_happens_twice(kind: ActivationCheckpointing, exchanges: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are exchanged again by full checkpointing only; tokens are routed and counted once by all kinds."""
    calls: dict[str, int] = {"dispatch": 0, "plan_dispatch": 0}
    modules = {"dispatch": moe_layer, "plan_dispatch": rows_to_send}

    def counting(name: str) -> Any:
        original = getattr(modules[name], name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    for name, module in modules.items():
        monkeypatch.setattr(module, name, counting(name))
    config = CONFIGS["untied"]
    assert config.moe is not None
    model = build(kind, replace(config, moe=replace(config.moe, expert_bias=True)))
    gradients(model)
    assert calls == {"dispatch": exchanges, "plan_dispatch": 1}
    (router,) = (module for module in model.modules() if isinstance(module, TopKRouter))
    assert router.tokens_since_update is not None
    assert int(router.tokens_since_update.sum()) == 4 * 16 * config.moe.top_k


def kept_per_token(kind: ActivationCheckpointing, num_layers: int, shared: int) -> float:
    """Elements that autograd keeps per token, parameters left out."""
    config = GPTMoEConfig(
        vocab_size=11,
        num_layers=num_layers,
        num_kv_heads=2,
        head_size=32,
        moe=MoEConfig(num_experts=4, expert_hidden_size=48, shared_expert_hidden_size=shared),
    )
    model = GPTMoEModel(config, activation_checkpointing=kind)
    tokens = torch.randint(11, (2, 128))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other tensor gets its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, tokens)
    return sum(storage.nbytes() for storage in kept.values()) / 4 / tokens.numel()


@pytest.mark.parametrize("shared", [0, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_activations_follow_the_formula(kind: ActivationCheckpointing, shared: int) -> None:
    """The difference of one more block is what the note at the head of block.py says, up to a few router scores."""
    width, heads, kv_heads, head, top_k, inner = 64, 4, 2, 32, 2, 48
    experts = top_k * (2 * width + 3 * inner) + 3 * shared
    formula = {
        "none": 6 * width + 3 * (heads + kv_heads) * head + experts,
        "selective": 2 * width + experts,
        "full": width,
    }[kind]
    measured = kept_per_token(kind, 3, shared) - kept_per_token(kind, 2, shared)
    assert 0 <= measured - formula <= 24


def test_unknown_kind() -> None:
    with pytest.raises(ConfigError, match="activation_checkpointing: 'block'"):
        GPTMoEModel(CONFIGS["tied"], activation_checkpointing="block")  # type: ignore[arg-type]
