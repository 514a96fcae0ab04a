"""The callback that makes the report of a test, on whatever process the test runs: what all kinds have in common."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from typing_extensions import override

from lightning_moe.cli.report.summary import RunFacts, RunSummary, expert_shares
from lightning_moe.errors import ConfigError
from lightning_moe.metrics import ExpertLoad
from lightning_moe.models.ranks import mesh_of
from lightning_moe.parallel.sharding import sharded_parameters, whole_shape
from lightning_moe.parallel.stages import gather_stages

Model = TypeVar("Model", bound=pl.LightningModule)
Data = TypeVar("Data", bound=pl.LightningDataModule)
Gathered = TypeVar("Gathered")


class Report(Callback, ABC, Generic[Model, Data, Gathered]):
    """Writes ``summary.json`` into the run's folder when a test ends.

    It works inside the test because only there every rank is at hand: scores are reduced over ranks, and a forward
    pass needs the experts of all of them.

    Args:
        command: The command that is reported.
        checkpoint: The checkpoint that is tested; None for the weights as they are.
        seconds: Wall time of the training that led here; None reports the time of the test.
    """

    model_type: ClassVar[type[pl.LightningModule]]
    """The models that this kind of report is about."""
    data_type: ClassVar[type[pl.LightningDataModule]]
    """The data that it is about."""

    def __init__(self, command: str, checkpoint: str | None, seconds: float | None = None) -> None:
        self._command = command
        self._checkpoint = checkpoint
        self._seconds = seconds
        self._started = 0.0

    @abstractmethod
    def gather(self, trainer: pl.Trainer, model: Model, data: Data) -> Gathered:
        """Collect what takes calls that all ranks make together."""

    @abstractmethod
    def summarize(self, gathered: Gathered, model: Model, data: Data, folder: Path, facts: RunFacts) -> RunSummary:
        """Sum the run up, on rank 0 alone; further files go into the folder."""

    @staticmethod
    @abstractmethod
    def show(path: Path, console: Console) -> RunSummary:
        """Print a summary of this kind as tables and return it."""

    @classmethod
    def check(cls, model: object, data: object) -> None:
        """Refuse to report on a model or data that this report is not about.

        Raises:
            ConfigError: The model or the data are of another class.
        """
        for field, value, wanted in (("model", model, cls.model_type), ("data", data, cls.data_type)):
            if not isinstance(value, wanted):
                raise not_reportable(field, value, wanted)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.check(pl_module, trainer.datamodule)  # type: ignore[attr-defined]

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seconds = time.perf_counter() - self._started if self._seconds is None else self._seconds
        model: Any = pl_module  # setup() has checked both
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        load = getattr(pl_module, "expert_load", None)
        tokens = load.compute() if isinstance(load, ExpertLoad) else None
        gathered = self.gather(trainer, model, data)
        parameters = count_parameters(pl_module)
        folder = Path(trainer.log_dir or trainer.default_root_dir).resolve()
        if not trainer.is_global_zero:
            return
        facts = RunFacts(
            command=self._command,
            expert_load=None if tokens is None else expert_shares(tokens),
            parameters=parameters,
            world_size=trainer.world_size,
            seconds=seconds,
            checkpoint=None if self._checkpoint is None else str(Path(self._checkpoint).resolve()),
        )
        folder.mkdir(parents=True, exist_ok=True)
        self.summarize(gathered, model, data, folder, facts).write(folder)


def count_parameters(model: pl.LightningModule) -> int:
    """Number of parameters of the whole model, of which this rank may hold a part; a collective call."""
    own = {name: prod(whole_shape(parameter, specs)) for name, parameter, specs in sharded_parameters(model)}
    sizes: dict[str, int] = {}
    for stage in gather_stages(own, mesh_of(model)):
        sizes |= stage  # by name: tied weights count once
    return sum(sizes.values())


def not_reportable(field: str, value: object, *wanted: type) -> ConfigError:
    """Return the refusal of a model or of data."""
    names = " or ".join(f"lightning_moe.{cls.__name__}" for cls in wanted)
    return ConfigError(
        "report",
        True,
        f"false, or {names} as {field} (it is {type(value).__name__})",
        "the report scores forecasts of series and models of text",
    )
