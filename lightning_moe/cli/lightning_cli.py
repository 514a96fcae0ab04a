"""``lightning-moe fit|validate|test|predict``: LightningCLI with our strategy, our errors and a report."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from typing_extensions import override

import lightning_moe.strategy  # noqa: F401 (registers the strategy names "moe", "moe_spawn" and "moe_fork")
from lightning_moe.checkpoint import store
from lightning_moe.cli.report import SUMMARY_NAME, Report, report_on
from lightning_moe.errors import CheckpointError, ConfigError

_PATIENCE = 10.0
"""Seconds in which rank 0 tells of a problem and leaves, if it has found it as well; a busy machine is slow."""


class TrainerCLI(LightningCLI):
    """LightningCLI with one more key in a recipe, ``report``; parsing, building and running happen in ``__init__``.

    Attributes:
        outcome: Figures of the command for ``--json``, complete on rank 0 of commands without a report.
        report: The kind of report that the recipe asks for; None without one.
        summary_path: The summary that the report has written; None without a report.
    """

    outcome: dict[str, Any]
    report: type[Report[Any, Any, Any]] | None = None
    summary_path: Path | None = None

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--report",
            type=bool,
            default=False,
            help="Whether fit and test print scores on held-out data beside known ones, and write summary.json.",
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # LightningCLI warns when it is given arguments while the process has some as well. Here they are the same.
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    @override
    def after_instantiate_classes(self) -> None:
        if self.subcommand in ("fit", "test") and self._get(self.config, "report"):
            self.report = report_on(self.model, self.datamodule)  # refused before the training, not after it

    def fit(self, **kwargs: Any) -> None:
        """Train; then test the best checkpoint and report on it, if the recipe asks for a report."""
        folder = self._run_folder()
        started = time.perf_counter()
        self.trainer.fit(**kwargs)
        seconds = time.perf_counter() - started
        self._note("fit", seconds)
        if self.report is not None:
            saved = self.trainer.checkpoint_callback
            best = saved.best_model_path if isinstance(saved, ModelCheckpoint) else ""
            self._test_and_report("fit", folder, best or None, seconds, model=self.model, datamodule=self.datamodule)

    def validate(self, **kwargs: Any) -> None:
        """Run the validation set."""
        started = time.perf_counter()
        self.trainer.validate(**kwargs)
        self._note("validate", time.perf_counter() - started)

    def test(self, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Run the test set, and report on it if the recipe asks for a report."""
        if self.report is not None:
            self._test_and_report("test", self._run_folder(), ckpt_path, None, **kwargs)
            return
        started = time.perf_counter()
        self.trainer.test(ckpt_path=ckpt_path, **kwargs)
        self._note("test", time.perf_counter() - started)

    def predict(self, **kwargs: Any) -> None:
        """Run the prediction set; a callback such as ``BasePredictionWriter`` keeps what comes out."""
        started = time.perf_counter()
        self.trainer.predict(**kwargs)
        self._note("predict", time.perf_counter() - started)

    def _run_folder(self) -> Path:
        """The folder of this run; asked for before ranks start, so that all of them use the same version number."""
        return Path(self.trainer.log_dir or self.trainer.default_root_dir).resolve()

    def _test_and_report(
        self, command: str, folder: Path, checkpoint: str | None, seconds: float | None, **kwargs: Any
    ) -> None:
        assert self.report is not None
        self.trainer.callbacks.append(self.report(command, checkpoint, seconds))  # type: ignore[attr-defined]
        self.trainer.test(**kwargs | {"ckpt_path": checkpoint, "verbose": False})
        self.summary_path = folder / SUMMARY_NAME

    def _note(self, command: str, seconds: float) -> None:
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        self.outcome = {
            "command": command,
            "seconds": seconds,
            "world_size": self.trainer.world_size,
            "metrics": {name: value if math.isfinite(value) else None for name, value in sorted(metrics.items())},
        }


def run(argv: Sequence[str]) -> int:
    """Run a command of the Trainer and print what came of it on rank 0.

    Args:
        argv: The command and its options; ``--json`` prints one JSON object as the last line.

    Returns:
        The exit code: 0, 2 when a setting was refused, or 1 when a checkpoint could not be read or written.
    """
    _quieten()
    as_json = "--json" in argv
    try:
        cli = TrainerCLI(
            args=[argument for argument in argv if argument != "--json"],
            # A second run in the same folder overwrites the recipe of the first, as it does its logs.
            save_config_kwargs={"overwrite": True},
        )
    except (ConfigError, CheckpointError) as problem:
        return _refuse(problem)
    except IsADirectoryError as error:
        # Of checkpoints, Lightning's own strategies for whole models open files only.
        if error.filename is None or not _holds_checkpoints(Path(error.filename)):
            raise
        return _refuse(_sharded(error.filename))
    if cli.trainer.is_global_zero:
        _print_outcome(cli, as_json)
    return 0


def _print_outcome(cli: TrainerCLI, as_json: bool) -> None:
    if cli.report is None or cli.summary_path is None:
        if as_json:
            print(json.dumps(cli.outcome), flush=True)
        return
    # In a file or a pipe there is no width to fit into, and rich would assume 80 columns.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    console.print()
    summary = cli.report.show(cli.summary_path, console)
    print(summary.as_json() if as_json else f"summary: {cli.summary_path}", flush=True)


def _holds_checkpoints(path: Path) -> bool:
    return store.is_checkpoint(path) or any(store.is_checkpoint(entry) for entry in path.iterdir())


def _sharded(path: str) -> ConfigError:
    return ConfigError(
        "ckpt_path",
        path,
        "a file, as this strategy reads no sharded checkpoints",
        "use trainer.strategy lightning_moe.MoEStrategy, on any number of devices; or make one file, of the checkpoint "
        "by `python -m lightning.pytorch.utilities.consolidate_checkpoint`, of its weights by `lightning-moe convert`",
    )


def _refuse(problem: ConfigError | CheckpointError) -> int:
    """Tell the user once, whichever ranks have refused."""
    code = 2 if isinstance(problem, ConfigError) else 1
    rank = rank_zero_only.rank  # type: ignore[attr-defined]
    if rank:
        # Most problems are found by all ranks, and rank 0 tells them. It also has to leave first: once a rank that it
        # started has failed, Lightning kills rank 0 at the next look, before it could tell.
        parent, deadline = os.getppid(), time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            if os.getppid() != parent:
                return code
            time.sleep(0.05)
    print(f"rank {rank}: {problem}" if rank else str(problem), file=sys.stderr, flush=True)
    return code


def _quieten() -> None:
    """Leave out what tells the user nothing that they could act on."""
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*treespec, LeafSpec",  # Lightning calls torch's deprecated API itself
        r".*does not have many workers",  # a batch of windows takes a millisecond
    ):
        warnings.filterwarnings("ignore", message=message)
