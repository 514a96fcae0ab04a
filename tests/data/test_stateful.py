"""Loaders that users write, stopped within an epoch and continued in a process that was seeded in another way."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_moe import ConfigError
from lightning_moe.data.stateful import LookBackLoader, PositionedDataLoader, distributed_sampler, make_resumable
from lightning_moe.parallel.rng import capture_generators, restore_generators
from tests.data.test_loading import Numbers

# torchdata 0.11 makes a call that newer versions of torch ask their users not to make.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

LENGTH = 26


class Noisy(Dataset[Any]):
    """Its items depend on the default generators of the main process."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


class Counting(IterableDataset[int]):
    """A stream that knows where it is, and not how long it is."""

    def __init__(self, length: int = 10) -> None:
        self.length, self.at = length, 0

    def __iter__(self) -> Iterator[int]:
        while self.at < self.length:
            self.at += 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Chunks(BatchSampler):
    """A batch sampler of the user's."""


class Pairs:
    """A batch sampler that is nobody's subclass, and draws from Python's generator."""

    def __iter__(self) -> Iterator[list[int]]:
        yield from random.sample([[2 * i, 2 * i + 1] for i in range(len(self))], len(self))

    def __len__(self) -> int:
        return LENGTH // 2


def weighted() -> WeightedRandomSampler:
    return WeightedRandomSampler([1.0 + i for i in range(LENGTH)], LENGTH)


def own_generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


PLAIN: dict[str, Callable[[], DataLoader[Any]]] = {
    "in order": lambda: DataLoader(Noisy(), batch_size=4),
    "shuffled": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True),
    "last batch dropped": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True, drop_last=True),
    "a generator of the user's": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True, generator=own_generator()),
    "with replacement": lambda: DataLoader(
        Noisy(), batch_size=4, sampler=RandomSampler(Noisy(), True, 64, own_generator())
    ),
    "weighted": lambda: DataLoader(Noisy(), batch_size=4, sampler=weighted()),
    "a subset": lambda: DataLoader(Noisy(), batch_size=4, sampler=SubsetRandomSampler(range(3, 25))),
    "sharded by Lightning": lambda: DataLoader(
        Noisy(), batch_size=2, sampler=DistributedSamplerWrapper(weighted(), num_replicas=2, rank=1)
    ),
    "sharded": lambda: DataLoader(Noisy(), batch_size=2, sampler=DistributedSampler(Noisy(), 2, 1)),
    "a batch sampler": lambda: DataLoader(Noisy(), batch_sampler=Chunks(RandomSampler(Noisy()), 4, False)),
    "a foreign batch sampler": lambda: DataLoader(Noisy(), batch_sampler=Pairs()),  # type: ignore[arg-type]
    "no batches": lambda: DataLoader(Noisy(), batch_size=None, shuffle=True),
}


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def positioned(make: Callable[[], DataLoader[Any]]) -> PositionedDataLoader[Any]:
    loader = make_resumable(make())
    assert isinstance(loader, PositionedDataLoader)
    return loader


def epoch(loader: Any, number: int) -> Iterator[Any]:
    """Begin an epoch, as Lightning does."""
    _set_sampler_epoch(loader, number)
    return iter(loader)


def rest_of(batches: Iterator[Any]) -> list[Any]:
    """What is left of an epoch, as plain values."""
    return [[part.tolist() if isinstance(part, torch.Tensor) else part for part in batch] for batch in batches]


@pytest.mark.parametrize("served", [1, 3])
@pytest.mark.parametrize("kind", PLAIN)
def test_goes_on_in_mid_epoch(kind: str, served: int) -> None:
    """In the second epoch: the batches that are left, and the next epoch; with the noise that the data set draws."""
    seed(1)
    saved = positioned(PLAIN[kind])
    rest_of(epoch(saved, 0))
    batches = epoch(saved, 1)
    for _ in range(served):
        next(batches)
    state, now = plain(saved.state_dict()), capture_generators()
    expected = [rest_of(batches), rest_of(epoch(saved, 2))]
    assert len(expected[0]) == len(saved) - served

    seed(99)
    resumed = positioned(PLAIN[kind])
    resumed.load_state_dict(state)
    batches = epoch(resumed, 1)
    restore_generators(now)
    assert [rest_of(batches), rest_of(epoch(resumed, 2))] == expected


@pytest.mark.parametrize("kind", ["shuffled", "a generator of the user's"])
def test_goes_on_between_epochs(kind: str) -> None:
    """Lightning makes an iterator that it does not use: the second one begins the next epoch."""
    seed(1)
    saved = positioned(PLAIN[kind])
    rest_of(epoch(saved, 0))
    state, now = saved.state_dict(), capture_generators()
    expected = rest_of(epoch(saved, 1))
    seed(99)
    resumed = positioned(PLAIN[kind])
    resumed.load_state_dict(state)
    epoch(resumed, 0)
    restore_generators(now)
    assert rest_of(epoch(resumed, 1)) == expected


def test_a_run_that_has_resumed_can_be_resumed() -> None:
    seed(1)
    first = positioned(PLAIN["shuffled"])
    expected = [indices for indices, *_ in rest_of(epoch(first, 0))]
    seed(1)
    first = positioned(PLAIN["shuffled"])
    next(epoch(first, 0))
    state = first.state_dict()
    for step in range(1, 5):
        seed(100 + step)
        loader = positioned(PLAIN["shuffled"])
        loader.load_state_dict(state)
        batches = epoch(loader, 0)
        assert loader.state_dict()["served"] == step, "also before the first batch"
        assert next(batches)[0].tolist() == expected[step]
        state = loader.state_dict()


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_may_come_and_go(persistent: bool) -> None:
    """What workers have prepared is not what was served, and their number is not part of the position."""

    def make(num_workers: int) -> PositionedDataLoader[Any]:
        kept = persistent and num_workers > 0
        numbers = DataLoader(Numbers(LENGTH), 4, True, num_workers=num_workers, persistent_workers=kept)
        return positioned(lambda: numbers)

    seed(1)
    saved = make(1)
    batches = epoch(saved, 0)
    next(batches), next(batches)
    state = saved.state_dict()
    expected = [batch.tolist() for batch in batches]
    for num_workers in (0, 2):
        seed(99)
        resumed = make(num_workers)
        resumed.load_state_dict(state)
        assert [batch.tolist() for batch in epoch(resumed, 0)] == expected


def test_an_iterator_that_is_not_used_draws_nothing() -> None:
    seed(1)
    before = torch.get_rng_state()
    loader = positioned(PLAIN["shuffled"])
    unused = [iter(loader), iter(loader)]
    assert torch.equal(torch.get_rng_state(), before)
    next(unused[1])
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_position_is_that_of_the_global_batch() -> None:
    """Two ranks go on where one was, with the same global batch; another global batch repeats what it has to."""

    def make(num_replicas: int, rank: int, batch_size: int) -> PositionedDataLoader[Any]:
        sampler = DistributedSampler(Numbers(48), num_replicas, rank, seed=5)
        return positioned(lambda: DataLoader(Numbers(48), batch_size=batch_size, sampler=sampler))

    def steps(loaders: list[PositionedDataLoader[Any]]) -> list[set[int]]:
        return [set(torch.cat(parts).tolist()) for parts in zip(*loaders, strict=True)]

    whole = steps([make(1, 0, 8)])
    saved = make(1, 0, 8)
    served = iter(saved)
    for _ in range(3):
        next(served)
    pair = [make(2, rank, 4) for rank in (0, 1)]
    for loader in pair:
        loader.load_state_dict(saved.state_dict())
    assert steps(pair) == whole[3:]

    larger = [make(2, rank, 8) for rank in (0, 1)]
    for loader in larger:
        with pytest.warns(UserWarning, match="8 samples are seen twice"):
            loader.load_state_dict(saved.state_dict())
    assert steps(larger) == [whole[2] | whole[3], whole[4] | whole[5]]


def test_arguments_are_kept() -> None:
    def init(worker: int) -> None: ...

    loader = DataLoader(
        Numbers(LENGTH),
        batch_size=3,
        shuffle=True,
        num_workers=1,
        collate_fn=list,
        drop_last=True,
        timeout=7,
        worker_init_fn=init,
        multiprocessing_context="forkserver",
        generator=own_generator(),
        prefetch_factor=3,
        persistent_workers=True,
        in_order=False,
    )
    same = make_resumable(loader)
    assert type(same) is PositionedDataLoader
    for name in vars(loader).keys() - {"batch_sampler"}:
        assert getattr(same, name) == getattr(loader, name), name
    assert same.multiprocessing_context is loader.multiprocessing_context
    assert same.batch_sampler.__dict__ == loader.batch_sampler.__dict__
    assert len(same) == len(loader) == 8


def test_loaders_that_are_left_alone() -> None:
    class Mine(DataLoader[Any]):
        pass

    class Endless(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            yield 0

    stateful = StatefulDataLoader(Numbers(LENGTH))
    endless: Any = DataLoader(Endless())
    for loader in (Mine(Numbers(LENGTH)), stateful, endless, [1, 2, 3], positioned(PLAIN["shuffled"])):
        assert make_resumable(loader) is loader


def test_the_state_of_another_loader_is_refused() -> None:
    with pytest.raises(ConfigError, match="train_dataloader"):
        positioned(PLAIN["shuffled"]).load_state_dict(StatefulDataLoader(Numbers(LENGTH)).state_dict())


def test_the_sampler_that_cuts_shards_is_found() -> None:
    def found(kind: str) -> Any:
        return distributed_sampler(PLAIN[kind]())

    assert type(found("sharded")) is DistributedSampler
    assert type(found("sharded by Lightning")) is DistributedSamplerWrapper
    assert found("shuffled") is None
    inner = DistributedSampler(Noisy(), 2, 0)
    assert distributed_sampler(DataLoader(Noisy(), batch_sampler=Chunks(inner, 4, False))) is inner


# --- loaders that do not know their length


def test_streams_with_a_state_look_back() -> None:
    """Lightning holds a batch: the state is that before it was fetched, also in the last batch, with none held."""
    loader: Any = make_resumable(DataLoader(Counting(), batch_size=3))
    assert isinstance(loader, LookBackLoader)
    assert loader.previous_state_dict() == loader.state_dict()
    batches, before = iter(loader), [loader.state_dict()]
    for first in (0, 3, 6, 9):
        assert next(batches)[0] == first
        assert loader.previous_state_dict() == before[-1]
        before.append(loader.state_dict())
    assert next(batches, None) is None
    assert loader.previous_state_dict() == before[-1] != loader.state_dict()

    for step, state in enumerate(before[:-1]):
        resumed: Any = make_resumable(DataLoader(Counting(), batch_size=3))
        resumed.load_state_dict(state)
        assert [int(batch[0]) for batch in resumed] == [0, 3, 6, 9][step:]


def test_looking_back_is_not_at_what_a_stream_goes_on_working_with() -> None:
    class Live(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.state = {"seen": list[int]()}

        def __iter__(self) -> Iterator[int]:
            for number in super().__iter__():
                self.state["seen"].append(number)
                yield number

        def state_dict(self) -> dict[str, Any]:
            return self.state

    loader: Any = make_resumable(DataLoader(Live(), batch_size=5))
    batches = iter(loader)
    next(batches), next(batches)
    assert "[0, 1, 2, 3, 4]" in str(loader.previous_state_dict())


def test_a_stream_draws_for_the_held_batch_as_it_did() -> None:
    class Random(Counting):
        def __iter__(self) -> Iterator[int]:
            for _ in super().__iter__():
                yield random.randrange(1000)

    seed(1)
    loader: Any = make_resumable(DataLoader(Random(), batch_size=2))
    batches = iter(loader)
    next(batches)
    held = next(batches)
    state, states = loader.previous_state_dict(), loader.previous_generators()
    seed(99)
    resumed: Any = make_resumable(DataLoader(Random(), batch_size=2))
    resumed.load_state_dict(state)
    resumed.first_draws_from(states)
    assert torch.equal(next(iter(resumed)), held)


def test_looking_back_changes_nothing_else() -> None:
    stateful = StatefulDataLoader(Counting(), batch_size=2)
    loader: Any = make_resumable(stateful)
    assert (loader.dataset, loader.batch_size, loader.sampler) == (stateful.dataset, 2, stateful.sampler)
    with pytest.raises(TypeError):
        len(loader)
    loader.worker_init_fn = print
    assert stateful.worker_init_fn is print
    with pytest.raises(AttributeError):
        _ = loader.nothing
    assert copy(loader).batch_size == 2


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """The state from a file that may hold plain values only."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded
