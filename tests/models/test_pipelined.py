"""Steps of our modules through a pipeline give the numbers of the same steps in one piece."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_moe import GPTMoE, ParallelConfig, ParallelMesh
from lightning_moe.config import MoEConfig
from lightning_moe.errors import ConfigError
from lightning_moe.models.chronos_moe import ChronosMoE
from lightning_moe.models.ranks import on_first_stage
from tests.models.chronos_moe.configs import batch_of, contexts, small_config
from tests.models.gpt_moe.training import CONFIGS, PackedText
from tests.models.pipelined import SequentialRunner, StepTrainer, gradients

LAYERS = 4

# The losses of single sequences are the only ones that microbatches of a batch add up to.
CHRONOS = small_config(
    num_layers=LAYERS,
    moe=MoEConfig(
        num_experts=4,
        expert_hidden_size=16,
        load_balancing="sequence",
        auxiliary_loss_coefficient=0.1,
        expert_bias=True,
    ),
)


def gpt(name: str) -> GPTMoE:
    config = CONFIGS[name]
    assert config.moe is not None
    moe = replace(config.moe, load_balancing="sequence", z_loss_coefficient=0.0)
    return GPTMoE(replace(config, num_layers=LAYERS, moe=moe))


MODULES: dict[str, Callable[[], GPTMoE | ChronosMoE]] = {
    "untied": lambda: gpt("untied"),
    "tied": lambda: gpt("tied"),
    "chronos": lambda: ChronosMoE(CHRONOS),
    "dense chronos": lambda: ChronosMoE(replace(CHRONOS, moe=None)),
}


def batch_for(module: GPTMoE | ChronosMoE) -> dict[str, Tensor]:
    """Five samples with different numbers of labels, which two and three microbatches divide unevenly."""
    return PackedText(5, documents=True).values if isinstance(module, GPTMoE) else batch_of(5, dtype=torch.float64)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Weights in float64, as the Trainer makes them for ``64-true``."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


RUNNERS: dict[str, Callable[[], SequentialRunner | None]] = {
    "one piece": lambda: None,
    "two stages": lambda: SequentialRunner((1, 3), ranks=2, microbatches=2),
    "last rank": lambda: SequentialRunner((1, 3), ranks=2, microbatches=3, rank=1),
    "loop": lambda: SequentialRunner((1, 1, 1, 1), ranks=2, microbatches=3),
    "one rank": lambda: SequentialRunner((4,), ranks=1, microbatches=3),
}


def set_up(name: str, runner: SequentialRunner | None) -> tuple[Any, dict[str, Any]]:
    """A module as a Trainer with this strategy would set it up, and what it logs from now on."""
    module: Any = MODULES[name]()
    module._trainer = StepTrainer(runner)
    logged: dict[str, Any] = {}
    module.log = lambda key, value, **_: logged.update({key: value})
    module.log_dict = lambda values, **_: logged.update(values)
    torch.manual_seed(3)
    module.configure_model()
    return module, logged


def close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal up to the rounding of sums in float64; what is logged in float32 is compared as such."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        one, other = torch.as_tensor(found[key]), torch.as_tensor(value)
        tolerance = 1e-12 if other.dtype == torch.float64 else 1e-6
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True), key


def train(name: str, runner: SequentialRunner | None) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    module, logged = set_up(name, runner)
    loss = module.training_step(batch_for(module), 0)
    loss.backward()
    grads = gradients([module.network()] if runner is None else runner.modules)
    return {"loss": loss.detach()}, grads, logged


@pytest.mark.parametrize("name", MODULES)
def test_training(name: str) -> None:
    expected = train(name, None)
    assert {"train_loss", "auxiliary_loss", "expert_load_imbalance"} >= expected[2].keys()
    for kind, make in RUNNERS.items():
        if kind != "one piece":
            for found, reference in zip(train(name, make()), expected, strict=True):
                close(found, reference)


def evaluate(name: str, runner: SequentialRunner | None) -> dict[str, Any]:
    """Scores of two batches, their states included, and predictions."""
    module, logged = set_up(name, runner)
    module.eval()
    with torch.no_grad():
        module.on_validation_epoch_start()
        for _ in range(2):
            module.validation_step(batch_for(module), 0)
        module.on_validation_epoch_end()
        if module.expert_load is not None:
            logged["expert load"] = module.expert_load.compute()
        if isinstance(module, ChronosMoE):
            batch = batch_for(module)
            logged["predictions"] = module.predict_step(batch, 0)
            logged["long forecast"] = module.predict(contexts(5, dtype=torch.float64), batch_size=2)
            assert module.scores is not None
            logged["total"] = module.scores.loss.total
        else:
            logged["total"], logged["nats"] = module.mean_loss.total, module.bits_per_byte.nats
            prompt = batch_for(module)["tokens"][:3, :4]
            logged["greedy"] = module.generate(prompt, 6, temperature=0.0)
            logged["drawn"] = module.generate(prompt, 6, seed=4)
    return logged


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:prediction_length")
def test_evaluation(name: str) -> None:
    expected = evaluate(name, None)
    for kind, make in RUNNERS.items():
        if kind != "one piece":
            close(evaluate(name, make()), expected)


@pytest.mark.parametrize("name", ["tied", "chronos"])
def test_of_a_model_that_was_loaded_whole_a_part_is_taken(name: str) -> None:
    """Its weights and which of them are frozen; built once, also for a copy of the module."""
    module = MODULES[name]()
    torch.manual_seed(5)
    state = {key: value.clone() for key, value in module.network().state_dict().items()}
    for parameter in module.network().blocks.get_submodule("2").parameters():
        parameter.requires_grad_(False)
    runner = SequentialRunner((1, 3), ranks=2, microbatches=2, rank=1)
    module._trainer = StepTrainer(runner)  # type: ignore[assignment]
    module.configure_model()
    part = module.network()
    assert part is runner.modules[1]
    assert 0 < len(part.state_dict()) < len(state)
    for key, value in part.state_dict().items():
        assert torch.equal(value, state[key]), key
    for key, parameter in part.named_parameters():
        assert parameter.requires_grad == (not key.startswith("blocks.2.")), key
    module.configure_model()
    assert module.network() is part
    copied = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert copied.network().state_dict().keys() == part.state_dict().keys()


def test_counts_that_all_stages_know_are_added_once() -> None:
    counts = torch.tensor([[3, 4]])
    total = torch.zeros_like(counts)
    for rank in range(4):
        module = MODULES["untied"]()
        mesh = ParallelMesh(ParallelConfig(pipeline=2, data=2), rank)
        module._trainer = StepTrainer(SimpleNamespace(mesh=mesh))  # type: ignore[assignment]
        total += on_first_stage(module, counts)
    assert torch.equal(total, 2 * counts), "each of the two data ranks has counts of its own"


def test_a_part_does_not_train_without_its_pipeline() -> None:
    module, _ = set_up("untied", SequentialRunner((1, 3), ranks=2, microbatches=2))
    module._trainer = StepTrainer()
    with pytest.raises(ConfigError, match="the pipeline that this part was built for"):
        module.training_step(batch_for(module), 0)
