"""Compiled blocks give what eager ones give."""

from __future__ import annotations

import copy
import shutil
import warnings

import pytest
import torch
from torch import Tensor

from lightning_moe import ParallelConfig, ParallelMesh
from lightning_moe.models.gpt_moe import GPTMoEModel
from lightning_moe.models.gpt_moe.block import GPTMoEBlock
from lightning_moe.models.routing import auxiliary_loss
from tests.distributed import RankPool
from tests.models.gpt_moe.training import CONFIGS, PackedText


def loss_and_gradients(model: GPTMoEModel) -> tuple[Tensor, dict[str, Tensor]]:
    rows = PackedText(4, documents=True).values
    output = model(rows["tokens"], rows["labels"], rows["positions"], rows["documents"])
    loss = output.loss_sum + auxiliary_loss(output.routing)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), {name: grad for name, grad in grads.items() if grad is not None}


def compare(mesh: ParallelMesh | None, backend: str, kinds: tuple[str, ...], num_blocks: int = 2) -> None:
    for kind in kinds:
        torch.compiler.reset()
        torch.manual_seed(3)
        eager = GPTMoEModel(CONFIGS["untied"], mesh, activation_checkpointing=kind).double()  # type: ignore[arg-type]
        compiled = copy.deepcopy(eager)
        for block in compiled.blocks[:num_blocks]:
            assert isinstance(block, GPTMoEBlock)
            block.compile_dense_parts(backend)
        expected, expected_grads = loss_and_gradients(eager)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss, grads = loss_and_gradients(compiled)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)
        assert grads.keys() == expected_grads.keys()
        for name, grad in grads.items():
            scale = float(expected_grads[name].abs().max())
            torch.testing.assert_close(grad, expected_grads[name], rtol=0.0, atol=1e-12 * scale)


@pytest.mark.slow
def test_single_process() -> None:
    compare(None, "aot_eager", ("none", "selective", "full"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    """One dense block, since each graph goes through the C++ compiler."""
    compare(None, "inductor", ("none",), num_blocks=1)


def compare_on_two_tensor_ranks() -> None:
    compare(ParallelMesh.build(ParallelConfig(tensor=2)), "aot_eager", ("none",))


@pytest.mark.slow
def test_tensor_ranks(ranks: RankPool) -> None:
    """Collectives inside compiled parts."""
    ranks.run(2, compare_on_two_tensor_ranks)


def test_a_module_compiles_what_it_is_told_to() -> None:
    config = CONFIGS["untied"]
    block, other = (GPTMoEModel(config, compile_blocks=True).blocks[layer] for layer in (0, 1))
    compiled = [name for name, part in block.named_children() if part._compiled_call_impl is not None]
    assert compiled == ["attention_norm", "attention", "ffn_norm", "ffn"]
    assert other.ffn._compiled_call_impl is None, "experts stay eager"
    plain = GPTMoEModel(config).blocks[0]
    assert all(part._compiled_call_impl is None for part in plain.children())
