"""A run that is interrupted and goes on, against one that is not: batches, random draws and losses, bit by bit."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_moe import MoEStrategy, ParallelConfig
from lightning_moe.layers import ColumnParallelLinear, RowParallelLinear
from lightning_moe.layers.token_layout import TokenLayout
from tests.strategy.tiny import WIDTH, Sequences, TinyMoE, trainer

Step = tuple[float, tuple[Any, ...], tuple[float, ...], int]
"""Loss, numbers of the samples, numbers drawn from the default generators, and the epoch."""


class Noisy(Sequences):
    """Augments what it serves with noise from the default generators."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = super().__getitem__(index)
        return {**item, "input": item["input"] + 0.1 * sum(draws())}


def draws() -> tuple[float, ...]:
    """A number from each default generator."""
    return random.gauss(0.0, 1.0), float(np.random.randn()), float(torch.randn(()))


def shuffled(length: int = 24, dataset: type[Sequences] = Noisy, **arguments: Any) -> DataLoader[Any]:
    """A loader as a user writes it; six batches on one data rank."""
    return DataLoader(dataset(length), **{"batch_size": 4, "shuffle": True, **arguments})


class Dropping(TinyMoE):
    """Dropout before split layers and around the MoE layers; steps with a schedule."""

    def configure_model(self) -> None:
        if self.layers is not None:
            return
        super().configure_model()
        mesh = self.trainer.strategy.mesh
        self.up = ColumnParallelLinear(WIDTH, 2 * WIDTH, mesh)
        self.down = RowParallelLinear(2 * WIDTH, WIDTH, mesh)
        self.dropout = nn.Dropout(0.3)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        layout = TokenLayout(hidden.shape[0], hidden.shape[1])
        tokens = self.dropout(hidden).flatten(0, 1)
        hidden = hidden + self.down(torch.tanh(self.up(tokens, layout)), layout).view_as(hidden)
        hidden, auxiliary = super().forward(self.dropout(hidden))
        return self.dropout(hidden), auxiliary

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch.get("first", batch))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        draws()
        self.log("val_loss", self.error(batch), sync_dist=True, batch_size=len(batch["input"]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Planning(Dropping):
    """Asks how long it will train before the checkpoint is loaded, for which Lightning sets up the data."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.fit_loop._combined_loader is None
        assert self.trainer.estimated_stepping_batches > 0
        assert self.trainer.fit_loop._combined_loader is not None
        return super().configure_optimizers()


class Trace(pl.Callback):
    """What every batch was and what came of it; draws, as a user's hook may."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._drawn: tuple[float, ...] = ()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self._drawn = draws()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        parts = [batch] if "index" in batch else list(batch.values())
        numbers = tuple(None if part is None else tuple(part["index"].tolist()) for part in parts)
        self.steps.append((float(outputs["loss"]), numbers, self._drawn, trainer.current_epoch))


def fit(
    loaders: Callable[[], Any],
    seed: int,
    *,
    world_size: int = 1,
    parallel: ParallelConfig | None = None,
    resume: Path | None = None,
    callbacks: Sequence[pl.Callback] = (),
    save_after: Path | None = None,
    module: type[Dropping] = Dropping,
    val: Callable[[], Any] | None = None,
    background: bool = False,
    **settings: Any,
) -> list[Step]:
    """Train on this rank from a process state that follows from ``seed``; returns what was done step by step."""
    pl.seed_everything(seed, verbose=False)
    trace = Trace()
    run = trainer(
        world_size,
        0,
        strategy=MoEStrategy(parallel or ParallelConfig(), bucket_megabytes=0.002, async_checkpoint=background),
        callbacks=[trace, *callbacks],
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        **{"max_epochs": None, **settings},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module(), loaders(), None if val is None else val(), ckpt_path=resume)
        if save_after is not None:
            pl.seed_everything(seed + 1, verbose=False)  # what happens after training is no part of it
            run.save_checkpoint(save_after)
    return trace.steps


def every_step(folder: str) -> ModelCheckpoint:
    """Keeps a checkpoint of every optimizer step."""
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)


def follow(
    loaders: Callable[[], Any],
    folder: str,
    at: Sequence[int],
    steps: int,
    *,
    later: bool = True,
    same_seed: bool = False,
    **settings: Any,
) -> list[Step]:
    """Train ``steps`` optimizer steps; go on after those in ``at``, saved during the run and after one that ended.

    Args:
        loaders: Makes the training loaders.
        folder: Where checkpoints go.
        at: Optimizer steps at which runs are interrupted.
        steps: Optimizer steps of the whole run.
        later: Whether checkpoints that were saved after training are tried too.
        same_seed: Whether the processes that resume are seeded as the first one was.
        **settings: As for :func:`fit`.

    Returns:
        The steps of the run that was not interrupted.
    """
    accumulated = settings.get("accumulate_grad_batches", 1)
    whole = fit(loaders, 1, callbacks=[every_step(folder)], max_steps=steps, **settings)
    assert len({loss for loss, *_ in whole}) == len(whole) == steps * accumulated
    for step in at:
        expected = whole[step * accumulated :]
        seed = 1 if same_seed else 100 + step
        during = fit(loaders, seed, resume=Path(folder, f"step={step}.ckpt"), max_steps=steps, **settings)
        assert during == expected, f"saved at step {step}"
        if not later:
            continue
        after = Path(folder, f"after={step}.ckpt")
        fit(loaders, 1, save_after=after, max_steps=step, **settings)
        rest = fit(loaders, seed, resume=after, max_steps=steps, **settings)
        assert rest == expected, f"saved after a run of {step} steps"
    return whole
