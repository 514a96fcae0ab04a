"""How long saving a checkpoint holds up the training of a GPT-MoE, how long it takes, and how long loading takes.

    torchrun --nproc_per_node=4 -m lightning_moe.bench.checkpoint --expert 4 --async --folder /scratch --json

Sizes for a CPU: ``--accelerator cpu --precision 32-true --layers 2 --hidden 256 --batch 1 --sequence 64``.
"""

from __future__ import annotations

import argparse
import gc
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_moe.bench.gpt import RandomTokens, bench_config, figures, print_result, quiet_trainer
from lightning_moe.bench.timing import Times
from lightning_moe.config import GPTMoEConfig, OptimizerConfig, ParallelConfig
from lightning_moe.models.gpt_moe import GPTMoE
from lightning_moe.strategy import MoEStrategy


def sized_config(sequence_length: int, layers: int, hidden_size: int) -> GPTMoEConfig:
    """The configuration of :func:`lightning_moe.bench.gpt.bench_config`, with every width in proportion."""
    full = bench_config(sequence_length)
    assert full.moe is not None
    assert full.num_kv_heads is not None

    def scaled(width: int) -> int:
        return max(1, width * hidden_size // full.hidden_size)

    return replace(
        full,
        hidden_size=hidden_size,
        num_layers=layers,
        num_heads=scaled(full.num_heads),
        num_kv_heads=scaled(full.num_kv_heads),
        moe=replace(full.moe, expert_hidden_size=scaled(full.moe.expert_hidden_size)),
    )


class MeasureSaving(pl.Callback):
    """Saves every few steps and times it, then loads what it saved last.

    Each save begins when the one before is on disk, and that one has been removed.

    Args:
        folder: Where checkpoints are written, and removed again.
        warmup: Steps before the first save.
        saves: Number of saves.
        between: Steps after each.
        loads: Number of loads; the files are still in the host's page cache.

    Attributes:
        stalls: Seconds that each save took until this rank could train on, the device's own copies included.
        commits: Seconds until the checkpoint stood under its name; on rank 0.
        undisturbed: Seconds of the steps while nothing was written.
        disturbed: Seconds of the steps while a checkpoint was written, at least in part.
        loading: Seconds of reading this rank's part of the weights and the optimizer's state.
        size: Bytes of a checkpoint.
    """

    def __init__(self, folder: Path, warmup: int, saves: int, between: int, loads: int) -> None:
        self.folder, self.warmup, self.saves, self.between, self.loads = folder, warmup, saves, between, loads
        self.stalls: list[float] = []
        self.commits: list[float] = []
        self.undisturbed: list[float] = []
        self.disturbed: list[float] = []
        self.loading: list[float] = []
        self.size = 0
        self._watch: _Watch | None = None
        self._step_started: float | None = None

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        now = _now(pl_module.device)
        if self._step_started is not None and trainer.global_step > self.warmup:
            writing = self._watch is not None and not (self._watch.end and self._watch.end < self._step_started)
            (self.disturbed if writing else self.undisturbed).append(now - self._step_started)
        saved, rest = divmod(trainer.global_step - self.warmup, self.between)
        if saved >= 0 and rest == 0:
            if saved:
                self._finish(trainer, saved - 1)
            if saved < self.saves:
                self._save(trainer, pl_module, saved)
            else:
                self._load(trainer, pl_module, saved - 1)
                _strategy(trainer).remove_checkpoint(self._path(saved - 1))
                _strategy(trainer).wait_for_checkpoints()
        self._step_started = _now(pl_module.device)

    def _path(self, number: int) -> Path:
        return self.folder / f"bench_checkpoint_{number}.ckpt"

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, number: int) -> None:
        strategy, path = _strategy(trainer), self._path(number)
        strategy.remove_checkpoint(path)  # of a run that was killed
        if number:
            strategy.remove_checkpoint(self._path(number - 1))
        strategy.wait_for_checkpoints()
        strategy.barrier()
        started = _now(module.device)
        self._watch = _Watch(path)
        trainer.save_checkpoint(path)
        self.stalls.append(_now(module.device) - started)
        if path.exists():
            self._watch.seconds()  # it looks only now and then, and would count the next step as disturbed

    def _finish(self, trainer: pl.Trainer, number: int) -> None:
        _strategy(trainer).wait_for_checkpoints()
        assert self._watch is not None
        self.commits.append(self._watch.seconds())
        self.size = sum(file.stat().st_size for file in self._path(number).iterdir())
        _strategy(trainer).barrier()  # every rank has seen it before it is removed

    def _load(self, trainer: pl.Trainer, module: pl.LightningModule, number: int) -> None:
        strategy = _strategy(trainer)
        for _ in range(self.loads):
            strategy.barrier()
            started = _now(module.device)
            strategy.load_checkpoint(self._path(number))
            self.loading.append(_now(module.device) - started)
        strategy.barrier()  # every rank has read it before it is removed


class _Watch:
    """Notes when a path appears."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = time.perf_counter()
        self.end: float | None = None
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._path.exists():
            time.sleep(0.002)
        self.end = time.perf_counter()

    def seconds(self) -> float:
        """Seconds from the beginning until the path appeared; waits for it."""
        self._thread.join()
        assert self.end is not None
        return self.end - self._start


def _strategy(trainer: pl.Trainer) -> MoEStrategy:
    assert isinstance(trainer.strategy, MoEStrategy)
    return trainer.strategy


def _now(device: torch.device) -> float:
    """The time, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_saving(options: argparse.Namespace, *, asynchronous: bool) -> tuple[GPTMoEConfig, MeasureSaving]:
    """Train on random tokens and save in between; called on every rank."""
    gc.collect()  # a trainer before this one still holds its model: they refer to each other
    config = sized_config(options.sequence, options.layers, options.hidden)
    measure = MeasureSaving(options.folder, options.warmup, options.saves, options.between, options.loads)
    strategy = MoEStrategy(ParallelConfig(expert=options.expert), async_checkpoint=asynchronous)
    trainer = quiet_trainer(options, strategy, options.warmup + options.saves * options.between, measure)
    module = GPTMoE(config, OptimizerConfig(learning_rate=1e-4, warmup_steps=0), loss_chunk_tokens=options.loss_chunk)
    trainer.fit(module, DataLoader(RandomTokens(options.batch, options.sequence, config.vocab_size), batch_size=None))
    return config, measure


def summarize(measure: MeasureSaving) -> dict[str, Any]:
    """The figures of one kind of saving; a collective call. A rank that takes longer makes the others wait."""
    stalls = [max(values) for values in zip(*_gather(measure.stalls), strict=True)]
    loading = [max(values) for values in zip(*_gather(measure.loading), strict=True)]
    commits = _gather(measure.commits)[0]
    while_writing = Times.of(measure.disturbed).median if measure.disturbed else None
    return {
        "stall_seconds": _spread(stalls),
        "committed_seconds": _spread(commits),
        "written_gigabytes_per_second": measure.size / Times.of(commits).median / 1e9,
        "step_milliseconds_while_writing": None if while_writing is None else 1e3 * while_writing,
        "load_seconds": _spread(loading),
        "loaded_gigabytes_per_second": measure.size / Times.of(loading).median / 1e9,
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    times = Times.of(seconds)
    return {"median": times.median, "min": times.low, "max": times.high}


def _gather(values: list[float]) -> list[list[float]]:
    if not dist.is_initialized():
        return [values]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, values)
    return gathered


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, and print one JSON object as the last line of rank 0."""
    parser = argparse.ArgumentParser(prog="python -m lightning_moe.bench.checkpoint", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where to write; all ranks must see it")
    parser.add_argument("--async", dest="asynchronous", action="store_true", help="then measure async_checkpoint=True")
    parser.add_argument("--expert", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4, help="sequences per data rank")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens per sequence")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the first save")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--between", type=int, default=20, help="steps after each save")
    parser.add_argument("--loads", type=int, default=3)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--loss-chunk", type=int, default=4096, help="tokens whose logits exist at a time")
    parser.add_argument("--accelerator", default="gpu")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {}
    for asynchronous in (False, True)[: 1 + options.asynchronous]:
        config, measure = measure_saving(options, asynchronous=asynchronous)
        if not result:
            world_size = int(os.environ.get("WORLD_SIZE", "1"))
            name = f"GPTMoE, expert={options.expert}, {options.saves} checkpoints in {options.folder}"
            tokens = options.batch * options.sequence * world_size
            result = figures(name, config, options, tokens, world_size, Times.of(measure.undisturbed))
            result["checkpoint_bytes"] = measure.size
        result["asynchronous" if asynchronous else "synchronous"] = summarize(measure)
    print_result(result, on_one_line=options.json)


if __name__ == "__main__":
    main()
