"""Small modules and a reference way of training them, shared by the strategy tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_moe import MoEConfig, MoEStrategy, ParallelConfig, ParallelMesh, shard_specs
from lightning_moe.moe.layer import MoELayer
from lightning_moe.parallel.sharding import ShardSpecs

WIDTH = 16
TOKENS = 6


class Sequences(Dataset[dict[str, Tensor]]):
    """Fixed random sequences with a smooth target."""

    def __init__(self, length: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(5)
        self.inputs = torch.randn(length, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        self.targets = (torch.roll(self.inputs, 1, -1) * 0.5 + self.inputs.tanh()).to(dtype)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input": self.inputs[index], "target": self.targets[index], "index": torch.tensor(index)}


class TinyMoE(pl.LightningModule):
    """Linear, two MoE layers, linear; built in ``configure_model``."""

    def __init__(self, learning_rate: float = 1e-2, optimizer: str = "adamw", **moe: Any) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.optimizer = optimizer
        self.config = MoEConfig(
            **{"num_experts": 8, "top_k": 2, "expert_hidden_size": 12, "shared_expert_hidden_size": 8, **moe}
        )
        self.layers: nn.ModuleList | None = None

    def configure_model(self) -> None:
        if self.layers is not None:
            return
        mesh = getattr(self.trainer.strategy, "mesh", None) if self._trainer is not None else None
        torch.manual_seed(11)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(MoELayer(WIDTH, self.config, mesh or ParallelMesh.single()) for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.embed(hidden)
        auxiliary = hidden.new_zeros(())
        assert self.layers is not None
        for layer in self.layers:
            out, routing = layer(hidden)
            hidden = hidden + out
            auxiliary = auxiliary + routing.auxiliary_loss + routing.z_loss
        return self.head(hidden), auxiliary

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        predicted, auxiliary = self(batch["input"])
        return nn.functional.mse_loss(predicted, batch["target"]) + auxiliary

    def error(self, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch["input"])[0], batch["target"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.error(batch), sync_dist=True, batch_size=len(batch["input"]))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.error(batch), sync_dist=True, batch_size=len(batch["input"]))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        return {"index": batch["index"], "output": self(batch["input"])[0]}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=self.learning_rate)
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.1)


def loader(
    length: int, global_batch: int, world_size: int, rank: int, dtype: torch.dtype = torch.float32
) -> DataLoader[dict[str, Tensor]]:
    """Batches such that the ranks' batches of one step are the single process' batch of that step."""
    sampler: DistributedSampler[dict[str, Tensor]] = DistributedSampler(
        Sequences(length, dtype), world_size, rank, shuffle=False
    )
    return DataLoader(Sequences(length, dtype), batch_size=global_batch // world_size, sampler=sampler)


@dataclass
class Run:
    """What a training run left: global losses, whole gradients and whole weights."""

    losses: list[float]
    grads: list[dict[str, Tensor | None]]
    weights: dict[str, Tensor]
    metrics: dict[str, float] = field(default_factory=dict)

    def gradient_norms(self) -> list[float]:
        """Global norm of the gradients of every step, before clipping."""
        return [
            float(torch.stack([grad.norm() for grad in grads.values() if grad is not None]).norm())
            for grads in self.grads
        ]


class Recorder(pl.Callback):
    """Local loss of every micro-batch, and gradients before clipping and the whole weights at every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.grads: list[dict[str, Tensor | None]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_before_optimizer_step(self, trainer: Any, module: pl.LightningModule, optimizer: Any) -> None:
        self.grads.append(wholes(module, gradients(trainer, module)))

    def run(self, trainer: pl.Trainer, module: pl.LightningModule) -> Run:
        """The run as the single process would see it; call it on all ranks."""
        losses = self.losses
        if dist.is_initialized():  # tensor ranks report the same loss, so the mean over all ranks is that over data
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, losses)
            losses = [sum(values) / len(values) for values in zip(*gathered, strict=True)]
        weights = wholes(module, module.state_dict())
        return Run(
            losses,
            self.grads,
            {name: value for name, value in weights.items() if value is not None},
            {key: float(value) for key, value in trainer.callback_metrics.items()},
        )


def gradients(trainer: pl.Trainer, module: nn.Module) -> dict[str, Tensor | None]:
    """This rank's (whole) gradients, wherever the strategy keeps them."""
    strategy, named = trainer.strategy, dict(module.named_parameters())
    if not isinstance(strategy, MoEStrategy):
        return {name: parameter.grad for name, parameter in named.items()}
    return dict(zip(named, strategy.full_grads(named.values()), strict=True))


def wholes(module: nn.Module, local: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Assemble whole tensors from all ranks without the package's own gathering; checks that replicas are equal."""
    local = {name: None if part is None else part.detach().to("cpu", copy=True) for name, part in local.items()}
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    specs = {name: shard_specs(module).get(name, ()) for name in local}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, {name: ([spec.index for spec in specs[name]], local[name]) for name in local})
    assert all(parts.keys() == local.keys() for parts in ranks), "ranks have different tensors"
    return {name: _whole(name, specs[name], [parts[name] for parts in ranks]) for name in local}


def whole(module: nn.Module, name: str, local: Tensor | None) -> Tensor | None:
    """One of them."""
    return wholes(module, {name: local})[name]


def _whole(name: str, specs: ShardSpecs, parts: list[tuple[list[Any], Tensor | None]]) -> Tensor | None:
    for _, part in parts[1:]:
        assert (part is None) == (parts[0][1] is None), f"{name}: only some ranks have a gradient"
    if parts[0][1] is None:
        return None
    shape = list(parts[0][1].shape)
    for spec in specs:
        shape[spec.dim] = spec.size
    full = torch.full(shape, torch.nan, dtype=torch.float64).to(parts[0][1].dtype)
    seen = torch.zeros(shape, dtype=torch.bool)
    for indices, part in parts:
        place: list[Any] = [torch.arange(length) for length in part.shape]
        for spec, index in zip(specs, indices, strict=True):
            place[spec.dim] = torch.tensor(index)
        grid = torch.meshgrid(*place, indexing="ij") if place else ()
        before = full[grid][seen[grid]]
        assert torch.equal(before, part[seen[grid]]), f"{name}: replicas differ"
        full[grid], seen[grid] = part, True
    assert seen.all(), f"{name}: some positions are on no rank"
    return full


def trainer(world_size: int, expert: int, parallel: ParallelConfig | None = None, **settings: Any) -> pl.Trainer:
    """A quiet CPU trainer; a plain single-device one when ``expert`` is 0. ``parallel`` takes the place of it."""
    strategy = settings.pop("strategy", None) or (
        "auto"
        if expert == 0 and parallel is None
        else MoEStrategy(parallel or ParallelConfig(expert=expert), bucket_megabytes=0.008)
    )
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": world_size,
        "strategy": strategy,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return pl.Trainer(**{**defaults, **settings})


def train(
    world_size: int,
    expert: int,
    *,
    dtype: torch.dtype = torch.float32,
    steps: int = 10,
    accumulate: int = 1,
    global_batch: int = 8,
    model: dict[str, Any] | None = None,
    module: type[pl.LightningModule] = TinyMoE,
    **settings: Any,
) -> Run:
    """Train on this rank (inside a worker) and return the run as the single process would see it."""
    recorder = Recorder()
    settings.setdefault("precision", "64-true" if dtype == torch.float64 else "32-true")
    run = trainer(
        world_size,
        expert,
        callbacks=[recorder, *settings.pop("callbacks", [])],
        accumulate_grad_batches=accumulate,
        max_steps=steps,
        max_epochs=100,
        **settings,
    )
    lightning_module = module(**(model or {}))
    shard = run.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    # With accumulation each epoch ends in a short window, of one batch.
    batches = accumulate * 4 + (accumulate > 1)
    run.fit(lightning_module, loader(global_batch * batches, global_batch, shard["num_replicas"], shard["rank"], dtype))
    return recorder.run(run, lightning_module)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest difference relative to the largest magnitude of the reference."""
    scale = reference.abs().max().clamp(min=1e-30)
    return float((value - reference).abs().max() / scale)


def check_equal(
    run: Run,
    reference: Run,
    tolerance: float,
    *,
    grad_tolerance: float | None = None,
    weight_tolerance: float | None = None,
) -> None:
    """Compare two runs: every loss, every gradient of every step, and the final weights.

    Args:
        run: The run in question.
        reference: What it has to be equal to.
        tolerance: Largest relative error of anything without a tolerance of its own.
        grad_tolerance: Largest relative error of a gradient.
        weight_tolerance: Largest relative error of a weight.
    """
    grad_tolerance, weight_tolerance = grad_tolerance or tolerance, weight_tolerance or tolerance
    check_losses(run.losses, reference.losses, tolerance)
    assert len(run.grads) == len(reference.grads) > 0
    for step, (grads, expected) in enumerate(zip(run.grads, reference.grads, strict=True)):
        assert grads.keys() == expected.keys()
        for name, value in grads.items():
            assert (value is None) == (expected[name] is None), f"step {step}, {name}"
            if value is not None:
                error = relative_error(value, expected[name])  # type: ignore[arg-type]
                assert error <= grad_tolerance, f"step {step}, gradient of {name}: relative error {error:.1e}"
    assert run.weights.keys() == reference.weights.keys()
    for name, value in run.weights.items():
        if value.is_floating_point():
            error = relative_error(value, reference.weights[name])
            assert error <= weight_tolerance, f"{name}: relative error {error:.1e}"


def check_losses(losses: Sequence[float], reference: Sequence[float], tolerance: float) -> None:
    """Compare loss curves."""
    assert len(losses) == len(reference) > 0
    for step, (loss, expected) in enumerate(zip(losses, reference, strict=True)):
        assert abs(loss - expected) <= tolerance * abs(expected), f"step {step}: loss {loss} instead of {expected}"
