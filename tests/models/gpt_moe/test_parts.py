"""GPT-MoE built and run by parts equals the whole model to the last bit: weights, names, losses and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from lightning_moe import GPTMoE, GPTMoEConfig
from lightning_moe.config.gpt import ActivationCheckpointing
from lightning_moe.errors import ConfigError
from lightning_moe.models.gpt_moe import GPTMoEModel
from lightning_moe.models.tasks import Predicting, Training
from lightning_moe.parallel.main_params import gathered_in_forward
from lightning_moe.parallel.sharding import tied_parameters
from lightning_moe.pipeline.parts import ModelPart
from lightning_moe.pipeline.spec import Microbatch
from tests.models.gpt_moe.training import CONFIGS, PackedText
from tests.models.pipelined import gradients, placements, run_by_hand

LAYERS = 4
PLACEMENTS = placements(LAYERS)


def deep(name: str) -> GPTMoEConfig:
    """Four blocks, with a router bias."""
    config = CONFIGS[name]
    assert config.moe is not None
    return replace(config, num_layers=LAYERS, moe=replace(config.moe, expert_bias=True))


def build(
    name: str, parts: Sequence[ModelPart] | None = None, checkpointing: ActivationCheckpointing = "none"
) -> GPTMoEModel:
    torch.manual_seed(7)
    return GPTMoEModel(deep(name), parts=parts, activation_checkpointing=checkpointing, loss_chunk_tokens=5)


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    """What weights are made in, as the Trainer's precision sets it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_initial_weights(name: str) -> None:
    whole = build(name)
    expected, generator = whole.state_dict(), torch.get_rng_state()
    assert [key for key in expected if key.startswith("blocks.3.")], "blocks are named by their numbers"
    for placement, ranks in PLACEMENTS.items():
        held: list[str] = []
        for parts in ranks:
            state = build(name, parts).state_dict()
            assert torch.equal(torch.get_rng_state(), generator), placement
            assert all(not value.is_meta and torch.equal(value, expected[key]) for key, value in state.items())
            held += state
        ends_together = any(parts[0].first and parts[-1].last for parts in ranks)
        twice = ["embedding.weight"] if name == "tied" and not ends_together else []
        assert sorted(held) == sorted([*expected, *twice]), placement


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients(name: str, checkpointing: ActivationCheckpointing) -> None:
    whole = build(name, checkpointing=checkpointing).double()
    microbatch = Microbatch(PackedText(4, documents=True).values, context=Training(torch.tensor(41.0)))
    out = whole.run_whole(microbatch)
    assert out.loss is not None
    out.loss.backward()
    expected = gradients([whole])
    for placement, ranks in PLACEMENTS.items():
        modules = [build(name, parts, checkpointing).double() for parts in ranks]
        loss, metrics = run_by_hand(modules, microbatch)
        assert torch.equal(metrics["loss_sum"], out.metrics["loss_sum"]), placement
        assert torch.equal(metrics["tokens_per_expert"], out.metrics["tokens_per_expert"]), placement
        # Layers' losses are added up in another order.
        torch.testing.assert_close(metrics["auxiliary"], out.metrics["auxiliary"], rtol=1e-14, atol=0.0)
        torch.testing.assert_close(loss, out.loss.detach(), rtol=1e-14, atol=0.0, check_dtype=False)
        found = gradients(modules)
        assert found.keys() == expected.keys()
        for key, grad in found.items():
            assert torch.equal(grad, expected[key]), f"{placement}: {key}"


def test_whole_passes_agree() -> None:
    """``forward`` gives what ``run_whole`` does, and a model in two parts on one rank is whole as well."""
    batch = PackedText(4, documents=True).values
    model = build("untied", PLACEMENTS["loop"][0] + PLACEMENTS["loop"][1])
    output = model(batch["tokens"], batch["labels"], batch["positions"], batch["documents"])
    ours = model.run_whole(Microbatch(batch, context=Training(torch.tensor(3.0))))
    assert torch.equal(ours.metrics["loss_sum"], output.loss_sum.detach().double())
    assert int(output.num_labels) == int((batch["labels"] != -100).sum())
    newest = model.run_whole(Microbatch({"tokens": batch["tokens"][:, :7]}, context=Predicting())).output
    torch.testing.assert_close(newest, model.logits(batch["tokens"][:, :7])[:, -1], rtol=1e-5, atol=1e-6)


def test_tied_embeddings_are_marked_where_the_ends_are_apart() -> None:
    for ranks in PLACEMENTS.values():
        for parts in ranks:
            model = build("tied", parts)
            first, last = any(part.first for part in parts), any(part.last for part in parts)
            expected = {model.output_weight} if last else set(model.embedding.parameters()) if first else set()
            assert tied_parameters(model) == (expected if first != last else set())
            assert not tied_parameters(build("untied", parts))


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_read_by_the_modules_that_wait_for_them(name: str) -> None:
    """Promises are made for all but the final norm of a tied whole model, whose output projection comes first."""
    for ranks in PLACEMENTS.values():
        for parts in ranks:
            model = build(name, parts)
            promised = gathered_in_forward(model)
            late = {key for key, parameter in model.named_parameters() if parameter not in promised}
            assert late <= {"final_norm.weight"}
    model = build("tied", PLACEMENTS["two"][1])
    order: list[str] = []
    assert model.final_norm is not None
    assert model.embedding is not None
    model.embedding.register_forward_pre_hook(lambda *_: order.append("embedding"))
    model.final_norm.register_forward_pre_hook(lambda *_: order.append("norm"))
    carry = (torch.zeros(16, 24),)
    model.run_part(0, carry, Microbatch(PackedText(1, documents=False).values, context=Training(torch.tensor(1.0))))
    assert order == ["norm"], "the embedding is not called there, so the norm must wait for its weight"
    assert model.embedding.weight in gathered_in_forward(model.final_norm)


def test_a_part_is_no_model() -> None:
    model = build("untied", PLACEMENTS["two"][0])
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    for run in (lambda: model(tokens, tokens), lambda: model.logits(tokens), lambda: model.run_whole(Microbatch({}))):
        with pytest.raises(ConfigError, match="1 of 4 blocks"):
            run()


def test_costs_of_the_pieces() -> None:
    spec = GPTMoE(deep("untied")).pipeline_spec()
    assert spec.num_blocks == LAYERS
    assert spec.block_costs is not None
    assert sum(spec.block_costs) == pytest.approx(LAYERS)
    assert spec.block_costs[0] < spec.block_costs[1] == spec.block_costs[3], "the first block is dense and smaller"
    assert spec.embed_cost == 0.0
    assert 0.0 < spec.head_cost < min(spec.block_costs)
