"""Chronos-MoE built and run by parts equals the whole model to the last bit: weights, names, losses, gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from lightning_moe.config import MoEConfig
from lightning_moe.errors import ConfigError
from lightning_moe.models.chronos_moe import ChronosMoE, ChronosMoEModel
from lightning_moe.models.tasks import Scoring, Training
from lightning_moe.pipeline.parts import ModelPart
from lightning_moe.pipeline.spec import Microbatch
from tests.models.chronos_moe.configs import batch_of, small_config
from tests.models.pipelined import gradients, placements, run_by_hand

LAYERS = 4
PLACEMENTS = placements(LAYERS)
MOE = MoEConfig(num_experts=4, expert_hidden_size=16, shared_expert_hidden_size=16, load_balancing="sequence")


def build(moe: MoEConfig | None, parts: Sequence[ModelPart] | None = None) -> ChronosMoEModel:
    torch.manual_seed(7)
    return ChronosMoEModel(small_config(num_layers=LAYERS, moe=moe), parts=parts)


def batch(length: int = 24) -> dict[str, torch.Tensor]:
    """A context of which whole patches are missing."""
    values = batch_of(5, dtype=torch.float64)
    values["context"][1, :9] = torch.nan
    return {**values, "context": values["context"][:, -length:]}


@pytest.mark.parametrize("moe", [MOE, None], ids=["moe", "dense"])
def test_names_and_initial_weights(moe: MoEConfig | None) -> None:
    whole = build(moe)
    expected, generator = whole.state_dict(), torch.get_rng_state()
    for placement, ranks in PLACEMENTS.items():
        held: list[str] = []
        for parts in ranks:
            state = build(moe, parts).state_dict()
            assert torch.equal(torch.get_rng_state(), generator), placement
            assert all(torch.equal(value, expected[key]) for key, value in state.items())
            held += state
        assert sorted(held) == sorted(expected), placement


@pytest.mark.parametrize("moe", [MOE, None], ids=["moe", "dense"])
def test_loss_and_gradients(moe: MoEConfig | None) -> None:
    whole = build(moe).double()
    microbatch = Microbatch(batch(), context=Training(torch.tensor(41.0)))
    out = whole.run_whole(microbatch)
    assert out.loss is not None
    out.loss.backward()
    expected = gradients([whole])
    for placement, ranks in PLACEMENTS.items():
        modules = [build(moe, parts).double() for parts in ranks]
        loss, metrics = run_by_hand(modules, microbatch)
        assert metrics.keys() == out.metrics.keys()
        assert torch.equal(metrics["loss_sum"], out.metrics["loss_sum"]), placement
        torch.testing.assert_close(loss, out.loss.detach(), rtol=1e-14, atol=0.0, check_dtype=False)
        found = gradients(modules)
        assert found.keys() == expected.keys()
        for key, grad in found.items():
            assert torch.equal(grad, expected[key]), f"{placement}: {key}"


@pytest.mark.parametrize("length", [24, 10])
def test_predictions_are_those_of_the_whole_model(length: int) -> None:
    """Also of contexts that are shorter than the model's."""
    data = batch(length)
    whole = build(MOE).double().eval()
    stages = [build(MOE, parts).double().eval() for parts in PLACEMENTS["ends alone"]]
    with torch.no_grad():
        expected = whole.denormalize(whole(data["context"]))
        output, carry = None, ()
        for stage in stages:
            output = stage.run_part(0, carry, Microbatch(data, context=Scoring()))
            carry = output.carry
    assert output is not None
    assert torch.equal(output.output, expected)


def test_a_part_is_no_model() -> None:
    with pytest.raises(ConfigError, match="1 of 4 blocks"):
        build(MOE, PLACEMENTS["two"][0])(batch()["context"])


def test_costs_of_the_pieces() -> None:
    spec = ChronosMoE(small_config(num_layers=LAYERS, moe=MOE)).pipeline_spec()
    assert (spec.num_blocks, spec.block_costs) == (LAYERS, (1.0,) * LAYERS)
    assert spec.embed_cost > 0.0
    assert spec.head_cost > 0.0
