"""Generation with a cache equals full passes without one, on any topology, and leaves no trace in training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_moe import GPTMoE, GPTMoEConfig, ParallelConfig, ParallelMesh
from lightning_moe.errors import ConfigError
from lightning_moe.models.gpt_moe import GPTMoEModel
from lightning_moe.parallel.sharding import sharded_init_, sharded_parameters
from tests.distributed import RankPool
from tests.models.gpt_moe.training import CONFIGS, SEQUENCE, VOCABULARY, SeededGPTMoE, loader, topology_name
from tests.strategy.tiny import trainer

PROMPT, NEW = 7, 20
CONFIG = {name: replace(config, max_sequence_length=64) for name, config in CONFIGS.items()}


def prompts() -> Tensor:
    return torch.randint(VOCABULARY, (3, PROMPT), generator=torch.Generator().manual_seed(1))


def build(name: str, mesh: ParallelMesh | None = None, *, tensor_type: torch.dtype = torch.float64) -> GPTMoE:
    """A module whose network does not depend on the mesh, without a trainer."""
    torch.manual_seed(11)
    module = GPTMoE(CONFIG[name])
    module.model = GPTMoEModel(CONFIG[name], mesh).to(tensor_type)
    for parameter_name, parameter, specs in sharded_parameters(module.model):
        if "norm" in parameter_name:
            sharded_init_(parameter, specs, lambda values, draw: values.uniform_(0.5, 1.5, generator=draw))
    return module


@pytest.mark.parametrize("name", CONFIG)
def test_greedy_equals_full_passes_without_a_cache(name: str) -> None:
    module = build(name)
    network, tokens = module.network().eval(), prompts()
    expected = tokens
    with torch.no_grad():
        for _ in range(NEW):
            expected = torch.cat((expected, network.logits(expected)[:, -1:].argmax(-1)), dim=1)
    found = module.generate(tokens, NEW, temperature=0.0)
    assert torch.equal(found, expected)
    assert len(set(found[:, PROMPT:].flatten().tolist())) > 3, "a constant continuation would hide mistakes"


@pytest.mark.parametrize("name", CONFIG)
def test_logits_with_a_cache(name: str) -> None:
    """Prompt in one piece, then one token at a time, then several: float64 to 1e-12."""
    network, tokens = build(name).network().eval(), prompts().repeat(1, 4)
    with torch.no_grad():
        expected = network.logits(tokens)
        caches = network.new_caches(3, tokens.shape[1], torch.float64)
        pieces = [network.logits(piece, caches=caches) for piece in tokens.split([PROMPT, 1, 1, 5, 14], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-12, atol=1e-12)


def test_draws_depend_on_the_seed_alone() -> None:
    module = build("untied")
    state = torch.get_rng_state()
    first = module.generate(prompts(), NEW, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(module.generate(prompts(), NEW, seed=3), first)
    assert not torch.equal(module.generate(prompts(), NEW, seed=4), first)
    assert torch.equal(first[:, :PROMPT], prompts())
    assert torch.equal(module.generate(prompts(), NEW, top_k=1), module.generate(prompts(), NEW, temperature=0.0))


def test_modes_and_gradients_are_as_before() -> None:
    module = build("untied")
    network = module.network().train()
    network.blocks[1].eval()  # a frozen part
    modes = [part.training for part in network.modules()]
    assert not module.generate(prompts(), 2).requires_grad
    assert torch.is_grad_enabled()
    assert [part.training for part in network.modules()] == modes


def test_nothing_to_generate() -> None:
    assert torch.equal(build("tied").generate(prompts(), 0), prompts())


@pytest.mark.parametrize(
    ("shape", "new", "field"),
    [
        ((1, 4), 61, "max_new_tokens"),
        ((1, 4), -1, "max_new_tokens"),
        ((1, 0), 1, "tokens"),
        ((1, 65), 1, "tokens"),
        ((4,), 1, "tokens"),
    ],
)
def test_refuses(shape: Sequence[int], new: int, field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        build("tied").generate(torch.zeros(*shape, dtype=torch.int64), new)
    assert raised.value.field == field


def test_longest_sequence() -> None:
    assert build("tied").generate(prompts(), 64 - PROMPT, temperature=0.0).shape == (3, 64)


TOPOLOGIES = [
    (2, ParallelConfig(tensor=2)),
    (2, ParallelConfig(context=2)),
    (4, ParallelConfig(tensor=2, expert=2, expert_tensor=2)),
    (4, ParallelConfig(context=2, tensor=2, expert=4)),
]


def generate_on(parallel: ParallelConfig) -> list[Tensor]:
    mesh = ParallelMesh.build(parallel)
    found = []
    for name in CONFIG:
        module = build(name, mesh)
        found += [
            module.network().logits(prompts()).detach(),
            module.generate(prompts(), NEW, temperature=0.0),
            module.generate(prompts(), NEW, seed=5),
        ]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "parallel"), TOPOLOGIES, ids=topology_name)
def test_any_topology(ranks: RankPool, world_size: int, parallel: ParallelConfig) -> None:
    """Odd numbers of tokens, which no axis divides; every rank has the tokens of a single process."""
    expected = []
    for name in CONFIG:
        module = build(name)
        expected += [
            module.network().logits(prompts()).detach(),
            module.generate(prompts(), NEW, temperature=0.0),
            module.generate(prompts(), NEW, seed=5),
        ]
    for found in ranks.run(world_size, generate_on, parallel):
        for ours, reference in zip(found, expected, strict=True):
            if reference.is_floating_point():
                torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-11)
            else:
                assert torch.equal(ours, reference)


class Sampler(pl.Callback):
    """Generates after every step."""

    def __init__(self) -> None:
        self.samples: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.samples.append(module.generate(prompts()[:, :5], SEQUENCE - 5))


def train_and_sample(parallel: ParallelConfig, *, sample: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    config = CONFIGS["untied"]
    assert config.moe is not None
    config: GPTMoEConfig = replace(config, moe=replace(config.moe, expert_bias=True))
    sampler = Sampler()
    run = trainer(
        2, 0, parallel, max_steps=3, max_epochs=9, callbacks=[sampler] if sample else [], precision="bf16-mixed"
    )
    module = SeededGPTMoE(config, activation_checkpointing="full")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, loader(run.distributed_sampler_kwargs, documents=True))
    return sampler.samples, {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.mark.slow
def test_in_the_middle_of_training(ranks: RankPool) -> None:
    """Ranks agree on the samples, which training never notices."""
    parallel = ParallelConfig(tensor=2, expert=2)
    sampled = ranks.run(2, train_and_sample, parallel, sample=True, init_process_group=False)
    plain = ranks.run(2, train_and_sample, parallel, sample=False, init_process_group=False)
    assert len(sampled[0][0]) == 3
    for ours, other in zip(sampled[0][0], sampled[1][0], strict=True):
        assert ours.shape == (3, SEQUENCE)
        assert torch.equal(ours, other)
    for (_, with_samples), (_, without) in zip(sampled, plain, strict=True):
        for name, value in with_samples.items():
            assert torch.equal(value, without[name]), name
