from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, SequentialSampler

from lightning_moe.data.loading import EpochSampler, ResumableDataLoader, ShardedSampler, ShuffledSampler

Loader = ResumableDataLoader[torch.Tensor]


class Numbers(Dataset[Any]):
    """Serves every index as itself."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("length", [0, 1, 6, 7])
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 8])
def test_every_index_is_on_one_rank(length: int, num_replicas: int) -> None:
    shards = [ShardedSampler(Numbers(length), num_replicas, rank) for rank in range(num_replicas)]
    assert sorted(index for shard in shards for index in shard) == list(range(length))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("epoch", [0, 3])
def test_global_batches_are_the_same_for_any_number_of_ranks(epoch: int) -> None:
    def global_batches(num_replicas: int) -> list[set[int]]:
        loaders: list[Loader] = []
        for rank in range(num_replicas):
            sampler = EpochSampler(Numbers(36), num_replicas, rank)
            sampler.set_epoch(epoch)
            loaders.append(ResumableDataLoader(sampler.dataset, sampler=sampler, batch_size=12 // num_replicas))
        return [set(torch.cat(batches).tolist()) for batches in zip(*loaders, strict=True)]

    expected = [set(range(36 * epoch + first, 36 * epoch + first + 12)) for first in (0, 12, 24)]
    assert [global_batches(num_replicas) for num_replicas in (1, 2, 3, 4)] == [expected] * 4


def loader(num_replicas: int = 1, rank: int = 0, batch_size: int = 4, num_workers: int = 0) -> Loader:
    dataset = Numbers(24)
    sampler = EpochSampler(dataset, num_replicas, rank)
    return ResumableDataLoader(dataset, sampler=sampler, batch_size=batch_size, num_workers=num_workers)


def first_of(batches: list[torch.Tensor]) -> list[int]:
    return [int(batch.min()) for batch in batches]


def test_state_before_the_first_batch() -> None:
    """A checkpoint may be written before any batch is drawn, e.g. by the learning-rate finder."""
    assert loader().state_dict() == {"epoch": 0, "samples": 0, "start": 0}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_resumes_at_the_next_sample_on_another_number_of_ranks(num_replicas: int, num_workers: int) -> None:
    saved = loader()
    saved.sampler.set_epoch(2)  # type: ignore[attr-defined]
    batches = iter(saved)
    for _ in range(2):
        next(batches)
    state = saved.state_dict()
    rest = set(torch.cat(list(batches)).tolist())

    seen: set[int] = set()
    for rank in range(num_replicas):
        resumed = loader(num_replicas, rank, 4 // num_replicas, num_workers)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state  # a checkpoint before the first batch
        resumed.sampler.set_epoch(2)  # type: ignore[attr-defined]  # as Lightning does
        own = list(resumed)
        assert len(own) == 4
        assert seen.isdisjoint(torch.cat(own).tolist())
        seen.update(torch.cat(own).tolist())
        assert len(resumed) == 6  # the length is that of a whole epoch, as Lightning expects
        assert first_of(list(resumed)) == [48 + num_replicas * 0 + rank + 4 * step for step in range(6)]
    assert seen == rest


def test_position_counts_what_was_handed_out_not_what_workers_prepared() -> None:
    ahead = loader(num_workers=1)
    batches = iter(ahead)
    next(batches)
    assert ahead.state_dict() == {"epoch": 0, "samples": 4, "start": 0}


def test_a_finished_epoch_resumes_at_the_next_one() -> None:
    finished = loader()
    list(finished)
    assert finished.state_dict() == {"epoch": 0, "samples": 24, "start": 0}
    resumed = loader()
    resumed.load_state_dict(finished.state_dict())
    assert first_of(list(resumed))[0] == 24


def test_positions_add_up_over_two_resumes() -> None:
    one = loader()
    next(iter(one))
    two = loader()
    two.load_state_dict(one.state_dict())
    next(iter(two))
    assert two.state_dict() == {"epoch": 0, "samples": 8, "start": 0}


def test_a_replaced_sampler_is_served_as_it_is() -> None:
    dataset = Numbers(24)
    plain: Loader = ResumableDataLoader(dataset, sampler=SequentialSampler(dataset), batch_size=4)
    assert first_of(list(plain)) == [0, 4, 8, 12, 16, 20]
    plain.load_state_dict(plain.state_dict())
    assert len(list(plain)) == 6


def test_the_state_of_a_replaced_sampler_is_that_of_the_base_class() -> None:
    dataset = Numbers(24)
    saved: Loader = ResumableDataLoader(dataset, sampler=SequentialSampler(dataset), batch_size=4)
    batches = iter(saved)
    next(batches)
    resumed: Loader = ResumableDataLoader(dataset, sampler=SequentialSampler(dataset), batch_size=4)
    resumed.load_state_dict(saved.state_dict())
    assert first_of(list(resumed)) == [4, 8, 12, 16, 20]


# --- epochs of another length after a resume


def epoch_of(num_replicas: int, samples_per_epoch: int) -> list[Loader]:
    """One loader for each rank, four samples a batch."""
    loaders: list[Loader] = []
    for rank in range(num_replicas):
        sampler = EpochSampler(Numbers(10), num_replicas, rank, samples_per_epoch)
        loaders.append(ResumableDataLoader(sampler.dataset, sampler=sampler, batch_size=4))
    return loaders


@pytest.mark.parametrize(("saved_on", "resumed_on"), [(1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("batches", [1, 2, 3])
def test_numbers_go_on_when_the_global_batch_changes(saved_on: int, resumed_on: int, batches: int) -> None:
    """Epochs have three batches on each rank, so their length changes with the number of ranks."""
    (saved, *_) = epoch_of(saved_on, 12 * saved_on)
    saved.sampler.set_epoch(1)  # type: ignore[attr-defined]
    served = iter(saved)
    for _ in range(batches):
        next(served)
    first = 12 * saved_on + 4 * saved_on * batches

    seen: list[int] = []
    for loader in epoch_of(resumed_on, 12 * resumed_on):
        loader.load_state_dict(saved.state_dict())
        for epoch in (1, 2, 3):
            if epoch == 1 and batches == 3:
                continue  # Lightning has finished it
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            seen += torch.cat(list(loader)).tolist()
    assert sorted(seen) == list(range(first, first + len(seen)))
    assert len(seen) >= 24 * resumed_on


def test_numbers_go_on_when_lightning_counts_the_epoch_as_complete() -> None:
    """Two of three batches on one rank are more than the single batch that an epoch has on three ranks."""
    (saved,) = epoch_of(1, 12)
    served = iter(saved)
    next(served), next(served)
    seen: list[int] = []
    for loader in epoch_of(3, 12):
        loader.load_state_dict(saved.state_dict())
        loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
        seen += torch.cat(list(loader)).tolist()
    assert sorted(seen) == list(range(8, 20))


# --- random orders of a finite dataset


def orders(num_replicas: int, *, items: int = 10, epochs: int = 5, seed: int = 0) -> list[Counter[int]]:
    """The global batches of twelve samples, epochs of 24."""
    samplers = [ShuffledSampler(Numbers(items), num_replicas, rank, 24, seed=seed) for rank in range(num_replicas)]
    batches: list[list[int]] = []
    for epoch in range(epochs):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shards = [list(sampler) for sampler in samplers]
        per_rank = 12 // num_replicas
        batches += [
            [item for shard in shards for item in shard[step * per_rank : (step + 1) * per_rank]] for step in range(2)
        ]
    return [Counter(batch) for batch in batches]


def test_shuffled_global_batches_are_the_same_for_any_number_of_ranks() -> None:
    assert orders(1) == orders(2) == orders(3) == orders(4)
    assert orders(1) != orders(1, seed=1)


def test_passes_over_the_items_follow_one_another() -> None:
    """Ten items do not fill batches of twelve: passes straddle batches and epochs, and each has every item once."""
    sampler = ShuffledSampler(Numbers(10), 1, 0, 24, seed=3)
    served: list[int] = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        served += sampler
    passes = [served[first : first + 10] for first in range(0, 120, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 12, "every pass has its own order"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shuffled_items_resume_in_mid_epoch(num_workers: int) -> None:
    def shuffled(num_replicas: int, rank: int, workers: int) -> Loader:
        sampler = ShuffledSampler(Numbers(10), num_replicas, rank, 24, seed=0)
        return ResumableDataLoader(sampler.dataset, sampler=sampler, batch_size=4 // num_replicas, num_workers=workers)

    saved = shuffled(1, 0, num_workers)
    saved.sampler.set_epoch(1)  # type: ignore[attr-defined]
    batches = iter(saved)
    next(batches), next(batches)
    state = saved.state_dict()
    rest = [Counter(batch.tolist()) for batch in batches]
    for num_replicas, workers in [(1, 0), (2, 0), (1, 2)]:
        loaders = [shuffled(num_replicas, rank, workers) for rank in range(num_replicas)]
        for loader in loaders:
            loader.load_state_dict(state)
        resumed = [Counter(torch.cat(parts).tolist()) for parts in zip(*loaders, strict=True)]
        assert resumed == rest


# --- what checkpoints hold


def test_states_of_the_first_release_had_no_start() -> None:
    resumed = loader()
    resumed.load_state_dict({"epoch": 2, "samples": 8})
    resumed.sampler.set_epoch(2)  # type: ignore[attr-defined]
    assert first_of(list(resumed)) == [56, 60, 64, 68]
    assert resumed.state_dict() == {"epoch": 2, "samples": 24, "start": 48}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_position_before_the_last_batch(num_workers: int) -> None:
    """Lightning holds a batch that it has not trained on, beside one of a loader without a length."""
    saved = loader()
    batches = iter(saved)
    assert saved.previous_state_dict() == {"epoch": 0, "samples": 0, "start": 0}
    for step in range(3):
        next(batches)
        assert saved.previous_state_dict() == {"epoch": 0, "samples": 4 * step, "start": 0}
    resumed = loader(num_workers=num_workers)
    resumed.load_state_dict(saved.previous_state_dict())
    batches = iter(resumed)
    next(batches)
    assert resumed.previous_state_dict() == saved.previous_state_dict()
    assert first_of(list(batches)) == [12, 16, 20]
    resumed.sampler.set_epoch(1)  # type: ignore[attr-defined]
    next(iter(resumed))
    again = loader()
    again.load_state_dict(resumed.previous_state_dict())
    again.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert first_of(list(again))[0] == 24


@pytest.mark.parametrize("num_workers", [0, 1])
def test_iterating_leaves_the_default_generator_alone(num_workers: int) -> None:
    """A run that resumes begins more iterations than one that was not interrupted."""
    before = torch.get_rng_state()
    list(loader(num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before)
