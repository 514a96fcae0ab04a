"""GPT-MoEs that hide nothing, on packed documents, trained under the strategy and in a single process."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_moe import GPTMoE, GPTMoEConfig, MoEConfig, ParallelConfig, RopeScaling
from lightning_moe.config.gpt import ActivationCheckpointing
from lightning_moe.config.optimizer import OptimizerConfig
from lightning_moe.models.gpt_moe.block import GPTMoEBlock
from lightning_moe.parallel.sharding import ShardSpecs, shard_specs, sharded_init_, sharded_parameters, whole_shape
from tests.strategy.tiny import Run, gradients, trainer

SEQUENCE = 16
GLOBAL_BATCH = 4
VOCABULARY = 37  # no multiple of anything

CONFIGS = {
    # A dense block and one with a gated shared expert; fewer key-value heads than context and tensor ranks together.
    "untied": GPTMoEConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_size=8,
        ffn_hidden_size=20,
        dense_layers=(0,),
        moe=MoEConfig(
            num_experts=4,
            top_k=2,
            expert_hidden_size=12,
            shared_expert_hidden_size=10,
            shared_expert_gate=True,
            auxiliary_loss_coefficient=0.1,
            z_loss_coefficient=0.01,
        ),
        max_sequence_length=SEQUENCE,
        qk_norm="head",
        init_std=0.2,
    ),
    # Experts in every block, losses per sequence, norms over the projection.
    "tied": GPTMoEConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_layers=2,
        num_heads=4,
        moe=MoEConfig(
            num_experts=4, top_k=2, expert_hidden_size=12, load_balancing="sequence", auxiliary_loss_coefficient=0.1
        ),
        max_sequence_length=SEQUENCE,
        rope_scaling=RopeScaling(type="linear", factor=2.0),
        qk_norm="projection",
        tie_embeddings=True,
        sliding_window=5,
        init_std=0.2,
    ),
}


class PackedText(Dataset[dict[str, Tensor]]):
    """Random tokens in documents of random lengths; the number of labels differs widely from row to row."""

    def __init__(self, length: int, *, documents: bool) -> None:
        generator = torch.Generator().manual_seed(5)
        tokens = torch.randint(VOCABULARY, (length, SEQUENCE + 1), generator=generator)
        starts = torch.rand(length, SEQUENCE, generator=generator, dtype=torch.float32) < 0.2
        starts[:, 0] = True
        place = torch.arange(SEQUENCE).expand(length, -1)
        first = torch.where(starts, place, 0).cummax(dim=1).values
        labels = tokens[:, 1:].clone()
        ends = torch.cat((starts[:, 1:], torch.zeros(length, 1, dtype=torch.bool)), dim=1)
        if documents:
            labels[ends] = -100
        # Nothing to predict in the second half of every third row, so ranks have different numbers of labels.
        labels[::3, SEQUENCE // 2 :] = -100
        self.values = {"tokens": tokens[:, :-1], "labels": labels, "label_bytes": (labels >= 0).long()}
        if documents:
            self.values |= {"positions": place - first, "documents": starts.cumsum(dim=1) - 1}

    def __len__(self) -> int:
        return len(self.values["tokens"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self.values.items()}


@dataclass(frozen=True)
class Case:
    """One training run; ``parallel`` None is the single process under Lightning's own strategy."""

    config: str = "untied"
    parallel: ParallelConfig | None = None
    activation_checkpointing: Sequence[ActivationCheckpointing] = ("none", "selective", "full")
    """What each step uses, in turn."""
    dtype: torch.dtype = torch.float64
    steps: int = 20
    learning_rate: float = 1e-2
    loss_chunk_tokens: int | None = 5
    precision: str | None = None
    """The Trainer's; that of ``dtype`` when None."""
    accelerator: str = "cpu"


class InTurn(pl.Callback):
    """Changes the kind of activation checkpointing before every step."""

    def __init__(self, kinds: Sequence[ActivationCheckpointing]) -> None:
        self.kinds = kinds

    def on_train_batch_start(self, trainer: Any, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        for block in module.modules():
            if isinstance(block, GPTMoEBlock):
                block.activation_checkpointing = self.kinds[trainer.global_step % len(self.kinds)]


class SeededGPTMoE(GPTMoE):
    """Starts from the same weights on any topology, with norms far from 1."""

    def configure_model(self) -> None:
        if self.model is None:
            torch.manual_seed(11)
            super().configure_model()
            for name, parameter, specs in sharded_parameters(self.network()):
                if "norm" in name:
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(zlib.crc32(name.encode()))  # a stage of a pipeline has some of the norms only
                        sharded_init_(parameter, specs, lambda values, draw: values.uniform_(0.5, 1.5, generator=draw))


@dataclass
class LocalRun:
    """What one rank saw of a run: its losses, its parts of all gradients and final weights (on the CPU), and which."""

    losses: list[float]
    grads: list[dict[str, Tensor | None]]
    weights: dict[str, Tensor]
    specs: dict[str, ShardSpecs]


class LocalRecorder(pl.Callback):
    """Loss and gradients of every step, before clipping."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.grads: list[dict[str, Tensor | None]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_before_optimizer_step(self, trainer: Any, module: pl.LightningModule, optimizer: Any) -> None:
        self.grads.append({name: _copy(grad) for name, grad in gradients(trainer, module).items()})


def local_run(recorder: LocalRecorder, module: pl.LightningModule) -> LocalRun:
    """What a recorder saw on this rank, and what the module has become."""
    weights = {name: parameter.detach().cpu() for name, parameter in module.named_parameters()}
    return LocalRun(recorder.losses, recorder.grads, weights, shard_specs(module))


def train(world_size: int, case: Case) -> LocalRun:
    """Train on this rank (inside a worker)."""
    recorder = LocalRecorder()
    run = trainer(
        world_size,
        0,
        case.parallel,
        callbacks=[InTurn(case.activation_checkpointing), recorder],
        max_steps=case.steps,
        max_epochs=100,
        precision=case.precision or ("64-true" if case.dtype == torch.float64 else "32-true"),
        accelerator=case.accelerator,
    )
    module = SeededGPTMoE(
        CONFIGS[case.config],
        OptimizerConfig(learning_rate=case.learning_rate, warmup_steps=3),
        loss_chunk_tokens=case.loss_chunk_tokens,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, loader(run.distributed_sampler_kwargs, documents=case.config == "untied"))
    return local_run(recorder, module)


def _copy(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.detach().to("cpu", copy=True)


def train_all(world_size: int, cases: Sequence[Case]) -> list[LocalRun]:
    """Train one after the other in the same processes."""
    return [train(world_size, case) for case in cases]


def assemble(ranks: Sequence[LocalRun]) -> Run:
    """The run as a single process would have seen it; replicas must be equal to the last bit.

    Ranks of the axes tensor report the same loss, so the mean over all ranks is that over data and context.
    """
    losses = [sum(values) / len(ranks) for values in zip(*(rank.losses for rank in ranks), strict=True)]
    grads = []
    for step in zip(*(rank.grads for rank in ranks), strict=True):
        parts = {name: [grads[name] for grads in step] for name in step[0]}
        grads.append({name: _whole(name, ranks, values) for name, values in parts.items()})
    weights = {name: _whole(name, ranks, [rank.weights[name] for rank in ranks]) for name in ranks[0].weights}
    return Run(losses, grads, {name: value for name, value in weights.items() if value is not None})


def _whole(name: str, ranks: Sequence[LocalRun], parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    assert len(present) in (0, len(parts)), f"{name}: only some ranks have a gradient"
    if not present:
        return None
    shape = whole_shape(present[0], ranks[0].specs.get(name, ()))
    full, seen = torch.zeros(shape, dtype=present[0].dtype), torch.zeros(shape, dtype=torch.bool)
    for rank, part in zip(ranks, present, strict=True):
        place = [torch.arange(length) for length in part.shape]
        for spec in rank.specs.get(name, ()):
            place[spec.dim] = torch.tensor(spec.index)
        grid = torch.meshgrid(*place, indexing="ij")
        known = seen[grid]
        assert torch.equal(full[grid][known], part[known]), f"{name}: replicas differ"
        full[grid], seen[grid] = part, True
    assert seen.all(), f"{name}: some positions are on no rank"
    return full


def loader(shard: Any, *, documents: bool) -> DataLoader[dict[str, Tensor]]:
    """Batches such that the data ranks' batches of one step are the single process' batch of that step."""
    replicas, rank = (shard["num_replicas"], shard["rank"]) if shard else (1, 0)
    dataset = PackedText(5 * GLOBAL_BATCH, documents=documents)
    sampler: DistributedSampler[dict[str, Tensor]] = DistributedSampler(dataset, replicas, rank, shuffle=False)
    return DataLoader(dataset, batch_size=GLOBAL_BATCH // replicas, sampler=sampler)


def topology_name(value: object) -> str:
    """Name of a parametrised test: the axes of a ParallelConfig that have ranks; anything else as it is."""
    if not isinstance(value, ParallelConfig):
        return str(value)
    sizes = {name: getattr(value, name) for name in ("data", "context", "tensor", "expert", "expert_tensor")}
    parts = [name for name, size in sizes.items() if size is not None and size > 1]
    return "-".join(parts + ["no_sp"] * (not value.sequence_parallel)) or "one"
