"""A user's training script, run by the launcher tests: ``python -m tests.strategy.launch_script STRATEGY OUTPUT``."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import lightning.pytorch as pl
import torch

import lightning_moe.strategy  # noqa: F401  (registers "moe")
from lightning_moe import MoEStrategy, ParallelConfig
from tests.strategy.tiny import TinyMoE, loader, trainer


class Data(pl.LightningDataModule):
    """Asks for the rank only once it is known."""

    def train_dataloader(self) -> Any:
        """The ranks' shares of one global batch of 8."""
        assert self.trainer is not None
        return loader(16, 8, self.trainer.world_size, self.trainer.global_rank, torch.float64)

    val_dataloader = train_dataloader


def main() -> None:
    """Fit, then validate with the weights that the main process holds."""
    warnings.filterwarnings("ignore")
    name, output = sys.argv[1:3]
    strategy: Any = name
    if not name.startswith("moe"):
        strategy = MoEStrategy(ParallelConfig(expert=2), start_method=name)  # type: ignore[arg-type]
    run = trainer(2, 2, strategy=strategy, precision="64-true", max_steps=3, max_epochs=10)
    module = TinyMoE()
    run.fit(module, Data())
    (metrics,) = run.validate(module, Data(), verbose=False)
    if run.global_rank == 0:
        torch.save({"validate": metrics, "weights": module.state_dict()}, output)


if __name__ == "__main__":
    main()
