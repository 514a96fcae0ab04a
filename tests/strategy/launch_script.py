"""A user's training script, run by the launcher tests: ``python -m tests.strategy.launch_script STRATEGY FOLDER``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import lightning_moe.strategy  # noqa: F401  (registers "moe")
from lightning_moe import MoEStrategy, ParallelConfig
from tests.strategy.tiny import Recorder, TinyMoE, loader, trainer

SETTINGS: dict[str, Any] = {
    "precision": "64-true",
    "max_steps": 10,
    "max_epochs": 10,
    "gradient_clip_val": 0.05,
    "accumulate_grad_batches": 3,
}
"""An epoch has four batches: a window of three, and a short one of one."""


class Data(pl.LightningDataModule):
    """Asks for the rank only once it is known."""

    def train_dataloader(self) -> Any:
        """The ranks' shares of four global batches of 8."""
        assert self.trainer is not None
        return loader(32, 8, self.trainer.world_size, self.trainer.global_rank, torch.float64)

    val_dataloader = train_dataloader


class Writer(Recorder):
    """Writes the run from inside the ranks that trained it: spawned and forked ones are gone after ``fit``."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Collect from all ranks, write on rank 0."""
        run = self.run(trainer, module)
        if trainer.is_global_zero:
            torch.save(vars(run), self.file)


def main() -> None:
    """Fit, then validate with the weights that the main process holds."""
    warnings.filterwarnings("ignore")
    name, folder = sys.argv[1], Path(sys.argv[2])
    strategy: Any = name
    if not name.startswith("moe"):
        strategy = MoEStrategy(ParallelConfig(expert=2), start_method=name)  # type: ignore[arg-type]
    run = trainer(2, 2, strategy=strategy, callbacks=[Writer(folder / "run.pt")], **SETTINGS)
    module = TinyMoE()
    run.fit(module, Data())
    (metrics,) = run.validate(module, Data(), verbose=False)
    if run.global_rank == 0:
        torch.save({"validate": metrics, "weights": module.state_dict()}, folder / "after.pt")


if __name__ == "__main__":
    main()
