"""Runs go on with the very next sample, whatever the loader is and whenever the checkpoint was written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_moe import ParallelConfig
from lightning_moe.data.loading import ResumableDataLoader, ShuffledSampler
from tests.distributed import RankPool
from tests.strategy.resuming import Dropping, Noisy, Planning, Step, every_step, fit, follow, shuffled
from tests.strategy.tiny import Sequences, TinyMoE, trainer

FORKED: dict[str, Any] = {"multiprocessing_context": "fork"}
"""The pool's processes come from a fork server, and would start a worker's whole Python anew."""


class Chunks(BatchSampler):
    """A batch sampler of the user's."""


class Stream(IterableDataset[dict[str, torch.Tensor]]):
    """A stream with noise; the last of its six batches is a short one."""

    def __init__(self) -> None:
        self.items, self.at = Noisy(23), 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while self.at < len(self.items):
            self.at += 1
            yield self.items[self.at - 1]
        self.at = 0


class StatefulStream(Stream):
    """The same, with a state."""

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def in_chunks() -> DataLoader[Any]:
    return DataLoader(Noisy(24), batch_sampler=Chunks(RandomSampler(Noisy(24)), 4, False))


def weighted() -> DataLoader[Any]:
    return DataLoader(Noisy(24), batch_size=4, sampler=WeightedRandomSampler(torch.arange(1.0, 25.0), 24))


def with_generator() -> DataLoader[Any]:
    return shuffled(generator=torch.Generator().manual_seed(3))


def pair(mode: str) -> CombinedLoader:
    return CombinedLoader({"first": shuffled(), "second": shuffled(12)}, mode)  # type: ignore[arg-type]


def numbered() -> DataLoader[Any]:
    return ResumableDataLoader(Noisy(24), sampler=ShuffledSampler(Noisy(24), 1, 0, 24, seed=3), batch_size=4)


def stateful(num_workers: int) -> DataLoader[Any]:
    data = Noisy(24) if num_workers == 0 else Sequences(24)
    context = FORKED["multiprocessing_context"] if num_workers else None
    return StatefulDataLoader(
        data, 4, sampler=DistributedSampler(data, 1, 0), num_workers=num_workers, multiprocessing_context=context
    )


def stream(data: type[Stream]) -> DataLoader[Any]:
    return DataLoader(data(), batch_size=4)


def beside_a_stream() -> dict[str, DataLoader[Any]]:
    return {"first": shuffled(dataset=Sequences), "second": stream(StatefulStream)}


def validation() -> DataLoader[Any]:
    return shuffled(8, shuffle=False)


OWN_SAMPLER: dict[str, Any] = {"use_distributed_sampler": False}
EARLY: dict[str, Any] = {"module": Planning, "max_epochs": 9}
LOADERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "workers": (partial(shuffled, dataset=Sequences, num_workers=2, **FORKED), {}),
    "workers that live on": (
        partial(shuffled, dataset=Sequences, num_workers=1, persistent_workers=True, **FORKED),
        {},
    ),
    "last batch dropped": (partial(shuffled, 27, drop_last=True), {}),
    "a batch sampler": (in_chunks, {}),
    "a batch sampler that nobody cuts": (in_chunks, OWN_SAMPLER),
    "a sampler": (weighted, {}),
    "the default generator": (shuffled, OWN_SAMPLER),
    "the default generator, workers": (partial(shuffled, dataset=Sequences, num_workers=2, **FORKED), OWN_SAMPLER),
    "a generator": (with_generator, OWN_SAMPLER),
    "the shorter one begins again": (partial(pair, "max_size_cycle"), {}),
    "the shorter one ends": (partial(pair, "max_size"), {}),
    "accumulation": (partial(shuffled, 48), {"accumulate_grad_batches": 2}),
    "validation in mid-epoch": (shuffled, {"val": validation, "val_check_interval": 2}),
    "validation after an epoch": (shuffled, {"val": validation}),
    "the data set up early": (shuffled, EARLY),
    "some batches of an epoch": (shuffled, {"limit_train_batches": 4}),
    "overfitting": (shuffled, {"overfit_batches": 5}),
    "another loader each epoch": (shuffled, {"reload_dataloaders_every_n_epochs": 1, "same_seed": True}),
    "numbered samples": (numbered, EARLY),
    "the user's stateful loader": (partial(stateful, 0), EARLY),
    # Asked for its state after training, as Lightning does, it starts workers that take ten seconds to end.
    "the user's stateful loader, workers": (partial(stateful, 2), {"later": False}),
    "the user's stateful loader, some batches": (partial(stateful, 0), {"limit_train_batches": 4}),
    "beside a stream": (beside_a_stream, {}),
    "a stream": (partial(stream, StatefulStream), {}),
}


def test_a_shuffled_loader_in_mid_epoch(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(1, follow, shuffled, str(tmp_path), (2,), 3, init_process_group=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADERS)
def test_loaders(ranks: RankPool, tmp_path: Path, name: str) -> None:
    """After two steps, and after six: between two epochs, or in the second one where epochs are short."""
    loaders, settings = LOADERS[name]
    (steps,) = ranks.run(1, follow, loaders, str(tmp_path), (2, 6), 8, init_process_group=False, **settings)
    assert len({drawn for _, _, drawn, _ in steps}) == len(steps)


def between_epochs(folder: str, max_steps: int) -> None:
    saver = ModelCheckpoint(folder, "{epoch}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True)
    whole = fit(shuffled, 1, callbacks=[saver], max_steps=max_steps, max_epochs=3)
    for epoch in (0, 1):
        path = Path(folder, f"epoch={epoch}.ckpt")
        resumed = fit(shuffled, 99, resume=path, max_steps=max_steps, max_epochs=3)
        assert resumed == whole[6 * (epoch + 1) :]


@pytest.mark.slow
@pytest.mark.parametrize("max_steps", [-1, 16])
def test_saved_by_a_hook_at_the_end_of_an_epoch(ranks: RankPool, tmp_path: Path, max_steps: int) -> None:
    ranks.run(1, between_epochs, str(tmp_path), max_steps, init_process_group=False)


class Failing(Dropping):
    """Has a step that goes wrong."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 2:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


class SaveOnException(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


def fail_and_go_on(folder: str, length: int) -> None:
    path = Path(folder, "failed.ckpt")
    loaders = partial(shuffled, length, dataset=Sequences)
    whole = fit(loaders, 1, max_steps=5)
    with pytest.raises(ZeroDivisionError):
        fit(loaders, 1, callbacks=[SaveOnException(path)], module=Failing, max_steps=5)
    resumed = fit(loaders, 99, resume=path, max_steps=5)
    assert [numbers for _, numbers, *_ in resumed] == [numbers for _, numbers, *_ in whole[2:]]


@pytest.mark.slow
@pytest.mark.parametrize("length", [24, 12])
def test_the_batch_of_a_step_that_failed_comes_again(ranks: RankPool, tmp_path: Path, length: int) -> None:
    """In the middle of an epoch, and in the last batch of one."""
    ranks.run(1, fail_and_go_on, str(tmp_path), length, init_process_group=False)


# --- other ranks, other loaders, other runs


def train_and_trace(world_size: int, batch_size: int, folder: str, resume: str | None) -> list[Step]:
    loaders = partial(shuffled, 48, dataset=Sequences, batch_size=batch_size)
    path = None if resume is None else Path(resume)
    return fit(
        loaders,
        1 if resume is None else 99,
        world_size=world_size,
        parallel=ParallelConfig(),
        callbacks=[every_step(folder)],
        resume=path,
        max_steps=9,
    )


def global_batches(runs: list[list[Step]]) -> list[list[int]]:
    """The numbers of the samples of each step, on all ranks."""
    return [sorted(number for _, numbers, *_ in steps for number in numbers[0]) for steps in zip(*runs, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("saved_on", "resumed_on"), [(1, 2), (2, 1)])
def test_another_number_of_data_ranks(ranks: RankPool, tmp_path: Path, saved_on: int, resumed_on: int) -> None:
    """The same global batches; the random states of ranks begin anew."""
    first, second = str(tmp_path / "a"), str(tmp_path / "b")
    whole = ranks.run(saved_on, train_and_trace, saved_on, 8 // saved_on, first, None, init_process_group=False)
    path = f"{first}/step=2.ckpt"
    rest = ranks.run(resumed_on, train_and_trace, resumed_on, 8 // resumed_on, second, path, init_process_group=False)
    assert global_batches(rest) == global_batches(whole)[2:]
    assert rest[0][0][2] != whole[0][2][2]


def fit_streams(folder: str) -> tuple[list[Step], list[str]]:
    loaders = partial(stream, Stream)
    fit(loaders, 1, callbacks=[every_step(folder)], max_steps=2)
    run = trainer(1, 0, ParallelConfig(), max_steps=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Dropping(), loaders(), ckpt_path=f"{folder}/step=2.ckpt")
    return run.global_step, [str(warning.message) for warning in caught]


@pytest.mark.slow
def test_a_stream_without_a_state_begins_anew_and_says_so(ranks: RankPool, tmp_path: Path) -> None:
    ((steps, messages),) = ranks.run(1, fit_streams, str(tmp_path), init_process_group=False)
    assert steps == 3
    assert any("DataLoader has no state_dict" in message and "begins anew" in message for message in messages)


class Indices(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch["index"].tolist())


def go_on_from_plain_lightning(folder: str) -> tuple[list[list[int]], list[list[int]]]:
    """The samples of a run of plain Lightning, and those of a run with the strategy from its second step on."""
    seen = []
    for parallel, path in ((None, None), (ParallelConfig(), f"{folder}/step=2.ckpt")):
        indices = Indices()
        callbacks = [indices, every_step(folder)]
        run = trainer(1, 0, parallel, callbacks=callbacks, enable_checkpointing=True, max_steps=5, max_epochs=9)
        run.fit(Planned(), stateful(0), ckpt_path=path)
        seen.append(indices.seen)
    return seen[0], seen[1]


class Planned(TinyMoE):
    """Has the data set up before the checkpoint is loaded."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 5
        return super().configure_optimizers()


@pytest.mark.slow
def test_positions_that_plain_lightning_kept_are_restored(ranks: RankPool, tmp_path: Path) -> None:
    """Lightning itself would not, as the data was set up early."""
    ((plain, resumed),) = ranks.run(1, go_on_from_plain_lightning, str(tmp_path), init_process_group=False)
    assert resumed == plain[2:]


def lightnings_states(folder: str) -> list[Any]:
    """What plain Lightning would find of three kinds of loaders."""
    found = []
    for name, loaders in (("own", shuffled), ("torchdata", partial(stateful, 0)), ("stream", LOADERS["a stream"][0])):
        fit(loaders, 1, callbacks=[every_step(f"{folder}/{name}")], max_steps=2)
        meta = torch.load(f"{folder}/{name}/step=2.ckpt/meta.pt", weights_only=True)
        found.append(meta["loops"]["fit_loop"]["state_dict"].get("combined_loader"))
    return found


@pytest.mark.slow
def test_a_checkpoint_holds_what_plain_lightning_would_have_written(ranks: RankPool, tmp_path: Path) -> None:
    """It refuses states that it has no loader for."""
    ((own, torchdata, held),) = ranks.run(1, lightnings_states, str(tmp_path), init_process_group=False)
    assert own is None
    assert [state["_num_yielded"] for state in torchdata] == [2]
    assert [state["_num_yielded"] for state in held] == [2], "without the batch that Lightning holds"
